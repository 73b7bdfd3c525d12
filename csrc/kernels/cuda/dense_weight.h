// A weight that is dequantized to memory while a kernel already multiplies by it (LinearKernel::kDense): by warps which
// that kernel has to spare, piece by piece, in the order in which its blocks want them.
#pragma once

#include "kernels/cuda/element.h"
#include "kernels/cuda/weight.h"
#include "ptx/barrier.h"
#include "ptx/shared_memory.h"
#include "ptx/tma.h"

namespace pyquant::cuda {

// Two weights times absmax, given as the sum of two 16-bit numbers: rounded once, but for an error far below.
template <typename T>
__device__ inline uint32_t scaled(uint32_t pair, uint32_t high, uint32_t low) {
  uint32_t result;
  if constexpr (std::is_same_v<T, __half>) {
    asm("{\n.reg .b32 t;\nmul.rn.f16x2 t, %1, %3;\nfma.rn.f16x2 %0, %1, %2, t;\n}"
        : "=r"(result)
        : "r"(pair), "r"(high), "r"(low));
  } else {
    asm("{\n.reg .b32 t;\nmul.rn.bf16x2 t, %1, %3;\nfma.rn.bf16x2 %0, %1, %2, t;\n}"
        : "=r"(result)
        : "r"(pair), "r"(high), "r"(low));
  }
  return result;
}

// The two numbers whose sum `scaled` takes, the higher one in the lower half.
template <typename T>
__device__ inline uint32_t split_scale(float scale) {
  const T high = from_float<T>(scale);
  return pack_pair<T>(to_float(high), scale - to_float(high));
}

// Cut up into tasks, of a slab of 256 across the reduction and a chunk of 256 along it, and those into pieces, of 16
// rows of the weight and 256 columns, for a warp.
constexpr int kDenseSlab = 256, kDenseChunk = 256, kDensePieces = 16, kDenseRows = 16;

struct DenseWeight {
  void* values;  // [n, k], 16-bit
  // How many pieces are taken; of each slab, and behind those of each task, how many are done.
  uint32_t* counters;
  bool forward;  // the reduction runs along k
  int slabs, chunks;
  int turn_slabs;    // that the blocks want in a turn: tasks go by those, and within them chunk by chunk
  int begun_chunks;  // of the first turn's slabs, that a kernel before has done

  __device__ uint32_t* done_of(int slab) const { return counters + 1 + slab; }
  __device__ uint32_t* done_of(int slab, int chunk) const { return counters + 1 + slabs + slab * chunks + chunk; }
  __device__ int begun_of(int slab) const { return slab < turn_slabs ? begun_chunks : 0; }
  __device__ int begun_tasks() const { return turn_slabs * begun_chunks; }
  __device__ int counter_count() const { return 1 + slabs * (1 + chunks); }
};

// What a thread decodes with: the codebook's 16-bit values by lower and upper bytes, and of absmax the factor that they
// were multiplied with (its inverse), the offset, and the table of nested codes in shared memory.
struct DenseDecoder {
  uint32_t lower[4], upper[4];
  float factor, offset;
  uint32_t nested;
};

template <typename T>
__device__ inline DenseDecoder dense_decoder(const Weight& weight, float table_scale, uint32_t nested) {
  DenseDecoder decoder;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t first = pack_pair<T>(weight.codebook[4 * i] * table_scale, weight.codebook[4 * i + 1] * table_scale),
                   second =
                       pack_pair<T>(weight.codebook[4 * i + 2] * table_scale, weight.codebook[4 * i + 3] * table_scale);
    decoder.lower[i] = __byte_perm(first, second, 0x6420);
    decoder.upper[i] = __byte_perm(first, second, 0x7531);
  }
  decoder.factor = 1.0f / table_scale;
  decoder.offset = load_offset(weight) * decoder.factor;
  decoder.nested = nested;
  return decoder;
}

// Fills the table of nested codes; the threads that use it synchronise behind.
__device__ inline void load_nested_codes(const Weight& weight, float table_scale, uint32_t nested, int thread,
                                         int threads) {
  if (!weight.matrix.double_quantized()) return;
  const float factor = 1.0f / table_scale;
  for (int i = thread; i < 256; i += threads) {
    ptx::store_4(nested + 4 * i, __float_as_uint(__ldg(weight.matrix.nested_code + i) * factor));
  }
}

// The codes of a word through the codebook, in pairs. No memory is read: a byte permutation looks up four nibbles of
// three bits at a time, of the lower and of the upper half of the table, and another one spreads the fourth bits to
// masks that choose between the two.
__device__ inline void look_up_word(const DenseDecoder& decoder, uint32_t word, uint32_t (&pairs)[4]) {
  const auto permute = [](uint32_t a, uint32_t b, uint32_t selector) {
    uint32_t result;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(selector));
    return result;
  };
  const uint32_t shifted = word << 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t selector = (half == 0 ? word : word >> 16) & 0x7777u;
    const uint32_t mask = permute(word, shifted, half == 0 ? 0x9D8C : 0xBFAE);  // the sign bits of four bytes
    const auto look_up = [&](const uint32_t (&table)[4]) {
      return (permute(table[0], table[1], selector) & ~mask) | (permute(table[2], table[3], selector) & mask);
    };
    const uint32_t lower = look_up(decoder.lower), upper = look_up(decoder.upper);
    // The first of two weights is the upper nibble of their byte.
    pairs[2 * half] = permute(lower, upper, 0x4051);
    pairs[2 * half + 1] = permute(lower, upper, 0x6273);
  }
}

// A piece between its loads and its arithmetic, of a lane: a word of 8 weights in each row, and for the whole warp the
// absmax of 64 columns of two rows (in blocks of 32, of both halves of them).
struct DensePiece {
  int slab, chunk, rows;
  int64_t first;  // element of the first row
  uint32_t words[kDenseRows];
  uint32_t absmax[2][2];
  float nested[2];

  // The row's width is a multiple of 64, so that no 64 columns share a block with others in part.
  __device__ void load(const DenseWeight& dense, const Weight& weight, int task_slab, int task_chunk, int piece,
                       int lane) {
    const QuantizedMatrix& matrix = weight.matrix;
    const int k = static_cast<int>(matrix.k), shift = weight.blocksize_log2;
    slab = task_slab, chunk = task_chunk;
    const int row0 = (dense.forward ? slab * kDenseSlab : chunk * kDenseChunk) + piece * kDenseRows;
    const int column0 = (dense.forward ? chunk * kDenseChunk : slab * kDenseSlab);
    rows = max(0, min(kDenseRows, static_cast<int>(matrix.n) - row0));
    if (rows == 0) return;
    const int64_t origin = int64_t{row0} * k;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = min(8 * i + lane / 4, rows - 1), column = min(column0 + 64 * (lane % 4), k - 64);
      const int64_t block = origin + int64_t{row} * k + column >> shift;
      if (matrix.double_quantized()) {
        absmax[i][0] = __ldg(matrix.absmax_codes + block);
        if (shift == 5) absmax[i][1] = __ldg(matrix.absmax_codes + block + 1);
        nested[i] = __ldg(matrix.nested_absmax + (block >> 8));
      } else {
        absmax[i][0] = __float_as_uint(__ldg(matrix.absmax + block));
        if (shift == 5) absmax[i][1] = __float_as_uint(__ldg(matrix.absmax + block + 1));
      }
    }
    const int column = column0 + 8 * lane;
    if (column >= k) rows = -rows;  // of this lane there are none
    first = origin + min(column, k - 8);
    const unsigned char* const packed = matrix.packed + first / 2;
#pragma unroll
    for (int i = 0; i < kDenseRows; ++i) {
      words[i] = __ldg(reinterpret_cast<const uint32_t*>(packed + int64_t{min(i, abs(rows) - 1)} * (k / 2)));
    }
  }

  template <typename T>
  __device__ void store(const DenseWeight& dense, const Weight& weight, const DenseDecoder& decoder, int lane) const {
    // Straight lines of code where all lanes do the same, so that a warp's rows overlap.
    const bool whole = __all_sync(0xFFFFFFFFu, rows == kDenseRows);
    if (whole && weight.blocksize_log2 > 5) {
      store_rows<T, true>(dense, weight, decoder, lane);
    } else if (rows != 0) {
      store_rows<T, false>(dense, weight, decoder, lane);
    }
  }

 private:
  template <typename T, bool kWhole>
  __device__ void store_rows(const DenseWeight& dense, const Weight& weight, const DenseDecoder& decoder,
                             int lane) const {
    const bool halves = !kWhole && weight.blocksize_log2 == 5;
    uint32_t scale[2][2] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (half == 1 && !halves) continue;
        const float value = weight.matrix.double_quantized()
                                ? __fmaf_rn(__uint_as_float(ptx::load_4(decoder.nested + 4 * absmax[i][half])),
                                            nested[i], decoder.offset)
                                : __uint_as_float(absmax[i][half]) * decoder.factor;
        scale[i][half] = split_scale<T>(value);
      }
    }
    const auto scale_of = [&](int i) {
      const int source = i % 8 * 4 + lane / 8;
      uint32_t both = __shfl_sync(0xFFFFFFFFu, scale[i / 8][0], source);
      if (halves) {
        const uint32_t second = __shfl_sync(0xFFFFFFFFu, scale[i / 8][1], source);
        if (lane % 8 >= 4) both = second;
      }
      return both;
    };
    // What goes through shared memory, which the products keep busy, is asked for at once, and stored by fours.
    uint32_t scales[kDenseRows];
#pragma unroll
    for (int i = 0; i < (kWhole ? kDenseRows : 0); ++i) scales[i] = scale_of(i);
    T* to = static_cast<T*>(dense.values) + first;
    constexpr int kGroup = kWhole ? 4 : 1;
#pragma unroll
    for (int group = 0; group < kDenseRows; group += kGroup) {
      uint4 values[kGroup];
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const uint32_t both = kWhole ? scales[group + i] : scale_of(group + i);
        const uint32_t high = __byte_perm(both, both, 0x1010), low = __byte_perm(both, both, 0x3232);
        uint32_t pairs[4];
        look_up_word(decoder, words[group + i], pairs);
        values[i] = make_uint4(scaled<T>(pairs[0], high, low), scaled<T>(pairs[1], high, low),
                               scaled<T>(pairs[2], high, low), scaled<T>(pairs[3], high, low));
      }
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        if (kWhole || group + i < rows) *reinterpret_cast<uint4*>(to) = values[i];
        to += weight.matrix.k;
      }
    }
  }
};

// The part of a warp of the multiplying kernel: pieces until none is left. It waits for no other warp, and takes
// pieces only when it runs, so that blocks that do not run yet keep nobody waiting. While one piece is decoded, the
// next one's loads are on their way, and what the last one stored is; only then is that said to be done.
template <typename T>
__device__ inline void dequantize_pieces(const DenseWeight& dense, const Weight& weight, const DenseDecoder& decoder,
                                         int lane) {
  const int begun = dense.begun_tasks(), tasks = dense.slabs * dense.chunks, in_turn = dense.turn_slabs * dense.chunks;
  const auto take = [&] { return lane == 0 ? static_cast<int>(ptx::fetch_increment(dense.counters)) : 0; };
  int taken = take();
  const auto load_next = [&](DensePiece& piece) {
    const int index = __shfl_sync(0xFFFFFFFFu, taken, 0), task = begun + index / kDensePieces;
    if (task >= tasks) return false;
    taken = take();  // the answer comes while this piece is on its way
    const int turn = task / in_turn, in_this = task - turn * in_turn, first_slab = turn * dense.turn_slabs;
    const int slabs = min(dense.turn_slabs, dense.slabs - first_slab);
    const int chunk = in_this / slabs, slab = first_slab + in_this - chunk * slabs;
    piece.load(dense, weight, slab, chunk, index % kDensePieces, lane);
    return true;
  };
  int done_slab = -1, done_chunk = 0;
  const auto publish = [&] {
    if (done_slab < 0) return;
    ptx::fence_async_proxy_global();
    __syncwarp();
    if (lane == 0) {
      // One fence for both: each waits for all that is under way.
      ptx::fence_release();
      ptx::add(dense.done_of(done_slab, done_chunk), 1), ptx::add(dense.done_of(done_slab), 1);
    }
  };
  const auto store = [&](const DensePiece& piece) {
    piece.store<T>(dense, weight, decoder, lane);
    done_slab = piece.slab, done_chunk = piece.chunk;
  };
  DensePiece even, odd;
  bool more = load_next(even);
  while (more) {
    publish();
    more = load_next(odd);
    store(even);
    if (!more) break;
    publish();
    more = load_next(even);
    store(odd);
  }
  publish();
}

// What the thread knows of a slab that has the accelerator copy the weight's tiles: which of its chunks are done. To
// ask takes as long as a step, so it asks ahead.
class DenseSlab {
 public:
  __device__ DenseSlab(const DenseWeight& dense, int slab) : dense_(dense), slab_(slab), ready_(dense.begun_of(slab)) {
    const int pieces = (dense.chunks - ready_) * kDensePieces;
    if (static_cast<int>(ptx::load_acquire(dense.done_of(slab))) == pieces) ready_ = dense.chunks;
  }
  __device__ void ask(int chunk) {
    if (chunk < ready_ || chunk >= dense_.chunks) return;
    if (ptx::load_acquire(dense_.done_of(slab_, chunk)) == kDensePieces) ready_ = chunk + 1;
  }
  __device__ void wait(int chunk) {
    while (chunk >= ready_) ask(chunk);
  }

 private:
  const DenseWeight& dense_;
  int slab_, ready_;
};

}  // namespace pyquant::cuda
