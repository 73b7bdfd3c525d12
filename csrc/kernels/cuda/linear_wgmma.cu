// The 4-bit linear on Hopper's tensor cores (sm_90a): wgmma with W as the left operand, decoded into registers.
//
// A block computes tiles of 128 rows of W (forward; columns of W in dX) by kTokens tokens. A producer warp brings
// activations and packed weights to shared memory through the tensor memory accelerator, two warps decode absmax there,
// and two warpgroups of consumers have 64 rows each: while the tensor cores multiply one step of 64 along the
// reduction, the same threads decode the next one's weights straight into the registers of the left operand. Decoded
// weights are never stored. Blocks are persistent; pairs of them (clusters) share the activations they copy, and where
// the tiles do not fill the GPU a cluster shares a tile and adds its parts through distributed shared memory.
#include <cudaTypedefs.h>

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "kernels/cuda/dropout.h"
#include "kernels/cuda/element.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/linear_kernels.h"
#include "kernels/cuda/tensor_map.h"
#include "ptx/cluster.h"
#include "ptx/tma.h"
#include "ptx/wgmma.h"

namespace pyquant::cuda {
namespace {

constexpr int kStep = 64;
constexpr int kTileW = 128;       // rows of the left operand a block
constexpr int kConsumers = 256;   // threads: two warpgroups
constexpr int kThreads = kConsumers + 128;
constexpr int kScaleWarps = 2;
constexpr int kPackedBytes = kTileW * kStep / 2;  // of W, a step
constexpr int kScaleBytes = 2048;                 // decoded absmax, a step
constexpr int kPartBytes = 64 * kStep * 2;        // of a low-rank factor, a warpgroup
constexpr int kGroup = 8;                         // tiles of tokens that run side by side

// Shared memory by address. The table of decoded pairs begins at a multiple of 64 KB: there, byte 1 of an address is
// the packed byte and byte 0 the lane's bank, so that one byte permutation makes the address of a look-up. Entries are
// 128 bytes (a copy for every lane) at a distance of 256; the gaps serve the epilogue.
constexpr int kBase = 1024;  // the driver keeps the first KB
constexpr int kTable = 0x10000;
constexpr int kHigh = 0x20000;
constexpr int kBarriers = kHigh + 96 * 1024;
constexpr int kSharedBytes = kBarriers + 512 - kBase;

template <int kTokens>
struct Layout {
  static constexpr int kSlot = kTokens * kStep * 2 < kPartBytes ? kPartBytes : kTokens * kStep * 2;
  static constexpr int kSlotsHigh = 96 * 1024 / kSlot;
  static constexpr int kStages = kTokens == 256 ? 4 : kTokens == 128 ? 6 : 10;
  static constexpr int kSlotsLow = kStages > kSlotsHigh ? kStages - kSlotsHigh : 0;
  static constexpr int kPacked = kBase + kSlotsLow * kSlot;
  static constexpr int kScales = kPacked + kStages * kPackedBytes;
  static constexpr int kNested = kScales + kStages * kScaleBytes;
  static_assert(kNested + 1024 <= kTable);
  static constexpr int kFull = kBarriers, kEmpty = kBarriers + 8 * kStages;
  static_assert(2 * 8 * kStages <= 512);
  // Where the parts of a split reduction are exchanged, and then the output's rows gathered.
  static constexpr int kExchange = kBase;
  static constexpr int kGather = kBase + 137 * 1024;
  static_assert(kExchange + kTokens * 512 <= kGather && kGather + 2 * 128 * 128 <= kBarriers);

  __device__ static uint32_t slot(int stage) {
    return stage < kSlotsHigh ? kHigh + stage * kSlot : kBase + (stage - kSlotsHigh) * kSlot;
  }
};

struct Parameters {
  CUtensorMap input, packed, left, factor;
  Weight weight;
  float table_scale;  // the codebook's, before it is rounded to 16 bits
  const void* bias;
  Dropout dropout;
  void* output;
  bool vector_output;
  int m, columns, steps;
  int rank, lora_steps;
  int tiles_m, tiles_w;  // tiles_w counts pairs where blocks share activations
  int split;
  bool share;
  bool vector_codes;
};

struct Ring {
  int stage = 0;
  uint32_t phase = 0;
  template <int kStages>
  __device__ void advance() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
};

__device__ inline void wait_phase(uint32_t barrier, uint32_t parity) {
#ifdef PYQUANT_BOUNDED_WAITS
  for (int i = 0; i < 100000; ++i) {
    uint32_t done;
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
    if (done) return;
  }
  __trap();
#else
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "WAIT_%=:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra WAIT_%=;\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
#endif
}

__device__ inline void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ inline void expect_bytes(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ inline uint4 load_16(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
  return v;
}
__device__ inline uint2 load_8(uint32_t address) {
  uint2 v;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address));
  return v;
}
__device__ inline uint32_t load_4(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(address));
  return v;
}
__device__ inline void store_16(uint32_t address, uint4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}
__device__ inline void store_8(uint32_t address, uint32_t a, uint32_t b) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(address), "r"(a), "r"(b) : "memory");
}
__device__ inline void store_4(uint32_t address, uint32_t v) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}
__device__ inline void store_2(uint32_t address, uint16_t v) {
  asm volatile("st.shared.b16 [%0], %1;" ::"r"(address), "h"(v) : "memory");
}

__device__ inline void sync_threads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

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

// Which tile a block works on: tokens fastest within groups of kGroup tiles of tokens.
struct Tile {
  int token0, row0;
};
__device__ inline Tile tile_of(const Parameters& p, int unit, int rank, int tokens) {
  const int group_units = kGroup * p.tiles_w;
  const int group = unit / group_units, in_group = unit % group_units;
  const int group_rows = min(kGroup, p.tiles_m - group * kGroup);
  const int tile_m = group * kGroup + in_group % group_rows;
  const int tile_w = in_group / group_rows;
  return {tile_m * tokens, (p.share ? 2 * tile_w + rank : tile_w) * kTileW};
}

// The words of absmax (or of its codes) of one row, one after the other, the next one always on its way.
struct AbsmaxStream {
  uint32_t word, next_word;
  float nested, next_nested;
  uint32_t index;
};

struct AbsmaxReader {
  const Weight& weight;
  float offset, factor;
  bool nested;
  int codes_log2;  // codes a word
  uint32_t last;   // block

  __device__ void fetch(uint32_t index, uint32_t& word, float& nested_absmax) const {
    const QuantizedMatrix& matrix = weight.matrix;
    index = min(index, last >> codes_log2);
    if (!nested) {
      word = __float_as_uint(__ldg(matrix.absmax + index));
      return;
    }
    word = codes_log2 > 0 ? __ldg(reinterpret_cast<const uint32_t*>(matrix.absmax_codes) + index)
                          : __ldg(matrix.absmax_codes + index);
    nested_absmax = __ldg(matrix.nested_absmax + (index << codes_log2 >> 8));
  }

  __device__ float finish(uint32_t word, float nested_absmax, uint32_t block, uint32_t nested_code) const {
    if (!nested) return __uint_as_float(word) * factor;
    const uint32_t code = codes_log2 > 0 ? word >> 8 * (block & 3) & 255u : word;
    const float value = __uint_as_float(load_4(nested_code + 4 * code));
    return __fadd_rn(__fmul_rn(value, nested_absmax), offset) * factor;
  }
};

template <typename T>
__device__ inline void split_scale(float scale, T& high, T& low) {
  high = from_float<T>(scale);
  low = from_float<T>(scale - to_float(high));
}

template <typename T, LinearDirection kDirection, int kTokens>
__global__ void __launch_bounds__(kThreads, 1) linear_wgmma_kernel(const __grid_constant__ Parameters p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using L = Layout<kTokens>;
  constexpr bool kForward = kDirection == LinearDirection::kForward;
  constexpr int kStages = L::kStages;
  extern __shared__ __align__(1024) unsigned char dynamic_shared[];
  // In a cluster, addresses carry the block's rank above their lower 24 bits.
  const uint32_t window = ptx::shared_address(dynamic_shared) - kBase;
  if ((window & 0xFFFFFFu) != 0) __trap();

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int rank = static_cast<int>(ptx::cluster_rank());
  const int cluster = p.share ? 2 : p.split;
  const int part = p.split > 1 ? rank : 0;
  const int first_step = static_cast<int>(int64_t{p.steps} * part / p.split);
  const int steps = static_cast<int>(int64_t{p.steps} * (part + 1) / p.split) - first_step;
  const int lora_steps = part == 0 ? p.lora_steps : 0;
  const int units = p.tiles_m * p.tiles_w;
  const int unit0 = blockIdx.x / cluster, unit_stride = gridDim.x / cluster;
  const auto full = [window](int stage) { return window + L::kFull + 8 * stage; };
  const auto empty = [window](int stage) { return window + L::kEmpty + 8 * stage; };
  const auto slot_at = [window](int stage) { return window + L::slot(stage); };

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(full(stage)), "r"(1 + kScaleWarps) : "memory");
      asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(empty(stage)), "r"(p.share ? 16 : 8) : "memory");
    }
    ptx::fence_barrier_init();
    ptx::prefetch_tensor_map(&p.input);
    ptx::prefetch_tensor_map(&p.packed);
  }
  if (cluster > 1) ptx::arrive_cluster();
  // Entry b: the weights of byte b, its high nibble first. Eight threads write an entry, 16 bytes each.
  for (int i = threadIdx.x; i < 256 * 8; i += kThreads) {
    const int byte = i / 8;
    const uint32_t pair = pack_pair<T>(p.weight.codebook[byte >> 4] * p.table_scale,
                                       p.weight.codebook[byte & 15] * p.table_scale);
    store_16(window + kTable + byte * 256 + i % 8 * 16, make_uint4(pair, pair, pair, pair));
  }
  if (p.weight.matrix.double_quantized()) {
    for (int i = threadIdx.x; i < 256; i += kThreads) {
      store_4(window + L::kNested + 4 * i, __float_as_uint(p.weight.matrix.nested_code[i]));
    }
  }
  __syncthreads();
  if (cluster > 1) ptx::wait_cluster();

  if (warp >= kConsumers / 32) {
    ptx::give_registers<56>();
    Ring ring;
    if (warp == kConsumers / 32) {
      if (lane == 0) {
        const uint32_t slot_bytes = kTokens * kStep * 2;
        for (int unit = unit0; unit < units; unit += unit_stride) {
          const Tile tile = tile_of(p, unit, rank, kTokens);
          for (int i = 0; i < lora_steps; ++i) {
            // Three slots: the tokens' side, then the factor of either warpgroup.
            for (int piece = 0; piece < 3; ++piece) {
              wait_phase(empty(ring.stage), ring.phase ^ 1);
              const uint32_t slot = slot_at(ring.stage), barrier = full(ring.stage);
              expect_bytes(barrier, piece == 0 ? slot_bytes : kPartBytes);
              if (piece == 0) {
                ptx::copy_tile(slot, &p.left, i * kStep, tile.token0, barrier);
              } else {
                const int row = tile.row0 + 64 * (piece - 1);
                ptx::copy_tile(slot, &p.factor, kForward ? i * kStep : row, kForward ? row : i * kStep, barrier);
              }
              ring.advance<kStages>();
            }
          }
          for (int step = first_step; step < first_step + steps; ++step) {
            wait_phase(empty(ring.stage), ring.phase ^ 1);
            const uint32_t slot = slot_at(ring.stage), barrier = full(ring.stage);
            const uint32_t packed = window + L::kPacked + ring.stage * kPackedBytes;
            expect_bytes(barrier, slot_bytes + kPackedBytes);
            if (p.share) {
              ptx::copy_tile_to_ranks(slot + rank * (slot_bytes / 2), &p.input, step * kStep,
                                      tile.token0 + rank * (kTokens / 2), barrier, 3);
            } else {
              ptx::copy_tile(slot, &p.input, step * kStep, tile.token0, barrier);
            }
            if (kForward) {
              ptx::copy_tile(packed, &p.packed, step * (kStep / 2), tile.row0, barrier);
            } else {
              ptx::copy_tile(packed, &p.packed, tile.row0 / 2, step * kStep, barrier);
            }
            ring.advance<kStages>();
          }
        }
      }
      __syncwarp();
    } else if (warp <= kConsumers / 32 + kScaleWarps) {
      const int id = threadIdx.x - kConsumers - 32;
      const QuantizedMatrix& matrix = p.weight.matrix;
      const int shift = p.weight.blocksize_log2 - 5;
      const uint32_t units_32 = static_cast<uint32_t>(matrix.k / 32);  // a row
      const AbsmaxReader reader{p.weight,
                                load_offset(p.weight),
                                1.0f / p.table_scale,
                                matrix.double_quantized(),
                                p.vector_codes ? 2 : 0,
                                static_cast<uint32_t>(matrix.blocks() - 1)};
      const auto finish_slot = [&] {
        __syncwarp();
        if (lane == 0) arrive(full(ring.stage));
        ring.advance<kStages>();
      };
      for (int unit = unit0; unit < units; unit += unit_stride) {
        const Tile tile = tile_of(p, unit, rank, kTokens);
        for (int i = 0; i < 3 * lora_steps; ++i) {
          wait_phase(empty(ring.stage), ring.phase ^ 1);
          finish_slot();
        }
        if constexpr (kForward) {
          // Lane: rows id and id + 64 of the tile.
          AbsmaxStream stream[2];
          uint32_t position[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int row = tile.row0 + id + 64 * i;
            position[i] = row < matrix.n ? row * units_32 + 2 * first_step : 0;
            AbsmaxStream& s = stream[i];
            s.index = position[i] >> shift >> reader.codes_log2;
            reader.fetch(s.index, s.word, s.nested);
            reader.fetch(s.index + 1, s.next_word, s.next_nested);
          }
          const int halves = shift == 0 ? 2 : 1;
          for (int step = 0; step < steps; ++step) {
            wait_phase(empty(ring.stage), ring.phase ^ 1);
            const uint32_t scales = window + L::kScales + ring.stage * kScaleBytes;
            for (int half = 0; half < halves; ++half) {
#pragma unroll
              for (int i = 0; i < 2; ++i) {
                AbsmaxStream& s = stream[i];
                const uint32_t block = (position[i] + half) >> shift;
                const uint32_t index = block >> reader.codes_log2;
                if (index != s.index) {
                  s.index = index, s.word = s.next_word, s.nested = s.next_nested;
                  reader.fetch(index + 1, s.next_word, s.next_nested);
                }
                T high, low;
                split_scale<T>(reader.finish(s.word, s.nested, block, window + L::kNested), high, low);
                const uint32_t h = pack_pair<T>(to_float(high), to_float(high));
                const uint32_t l = pack_pair<T>(to_float(low), to_float(low));
                store_8(scales + half * 1024 + (id + 64 * i) * 8, h, l);
              }
            }
            position[0] += 2, position[1] += 2;
            finish_slot();
          }
        } else {
          // Lane: row id of the step; its blocks for the sets of columns that share absmax.
          const int sets = shift == 0 ? 4 : 2;
          const int offset = id / 16 * 64 + id % 8 / 2 * 16 + id / 8 % 2 * 8 + id % 2 * 2;
          uint32_t word[4];
          float nested[4];
          uint32_t block[4];
          bool inside;
          const auto load = [&](int step) {
            const int row = step * kStep + id;
            inside = row < matrix.n;
            const uint32_t position = (inside ? row : 0) * units_32 + tile.row0 / 32;
#pragma unroll
            for (int set = 0; set < 4; ++set) {
              if (set >= sets) break;
              block[set] = min((position + (shift == 0 ? set : 2 * set)) >> shift, reader.last);
              reader.fetch(block[set] >> reader.codes_log2, word[set], nested[set]);
            }
          };
          load(first_step);
          for (int step = first_step; step < first_step + steps; ++step) {
            T high[4], low[4];
#pragma unroll
            for (int set = 0; set < 4; ++set) {
              if (set >= sets) break;
              const float scale = reader.finish(word[set], nested[set], block[set], window + L::kNested);
              split_scale<T>(inside ? scale : 0.0f, high[set], low[set]);
            }
            if (step + 1 < first_step + steps) load(step + 1);
            wait_phase(empty(ring.stage), ring.phase ^ 1);
            const uint32_t scales = window + L::kScales + ring.stage * kScaleBytes + offset;
#pragma unroll
            for (int set = 0; set < 4; ++set) {
              if (set >= sets) break;
              store_2(scales + set * 256, *reinterpret_cast<const uint16_t*>(&high[set]));
              store_2(scales + set * 256 + 4, *reinterpret_cast<const uint16_t*>(&low[set]));
            }
            finish_slot();
          }
        }
      }
    }
    if (p.split > 1) ptx::arrive_cluster(), ptx::wait_cluster();
    if (cluster > 1) ptx::arrive_cluster(), ptx::wait_cluster();
    return;
  }

  ptx::take_registers<224>();
  const int group = warp / 4, w = warp % 4;
  const int g = lane / 4, t = lane % 4;
  float sum[kTokens / 2];
  uint32_t even[16], odd[16];  // left operands of even and odd steps

  // What the lane's two rows of the left operand are. Forward: rows 2 g and 2 g + 1 of the warp's 16 of W, in an order
  // that spreads the reads over the banks. dX: two neighbouring columns, as a packed byte has them; two warps share 32.
  const int flip = kForward ? g >> 2 : 0;
  const int column = kForward ? 64 * group + 16 * w + 2 * g : 64 * group + 32 * (w / 2) + 2 * (w & 1) + 4 * g;

  const uint32_t lane_table = window | kTable | lane * 4;
  const uint32_t shift_32 = p.weight.blocksize_log2 == 5 ? 1 : 0;
  const auto look_up = [&](uint32_t word, uint32_t selector) { return load_4(__byte_perm(word, lane_table, selector)); };

  const auto decode = [&](uint32_t (&a)[16], int stage) {
    const uint32_t packed = window + L::kPacked + stage * kPackedBytes;
    const uint32_t scales = window + L::kScales + stage * kScaleBytes;
    if constexpr (kForward) {
      const uint32_t selector = 0x7604u | t << 4;
      const uint32_t row_low = column + flip, row_high = column + 1 - flip;
      const uint32_t swizzle = (row_low >> 2 & 1) * 16;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4 low = load_16(packed + row_low * 32 + (16 * half ^ swizzle));
        const uint4 high = load_16(packed + row_high * 32 + (16 * half ^ swizzle));
        const uint32_t at = scales + half * shift_32 * 1024;
        const uint2 scale_low = load_8(at + row_low * 8), scale_high = load_8(at + row_high * 8);
        const uint32_t words_low[4] = {low.x, low.y, low.z, low.w}, words_high[4] = {high.x, high.y, high.z, high.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          a[half * 8 + 2 * i] = scaled<T>(look_up(words_low[i], selector), scale_low.x, scale_low.y);
          a[half * 8 + 2 * i + 1] = scaled<T>(look_up(words_high[i], selector), scale_high.x, scale_high.y);
        }
      }
    } else {
      const uint32_t selector0 = 0x7604u | (w & 1) << 4, selector1 = selector0 + 0x20;
      const uint32_t slab = 2 * group + w / 2;
      const uint32_t at = packed + lane * 64 + ((slab ^ (lane >> 1 & 3)) * 16);
      const uint32_t set = scales + (shift_32 != 0 ? slab : group) * 256 + t * 16;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t words[4];
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                     : "r"(at + half * 2048));
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const uint4 scale = load_16(set + (half * 2 + k) * 64);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const uint32_t word = words[2 * k + i];
            const uint32_t first = look_up(word, selector0), second = look_up(word, selector1);
            const uint32_t high = i == 0 ? scale.x : scale.z, low = i == 0 ? scale.y : scale.w;
            a[half * 8 + 4 * k + 2 * i] = scaled<T>(__byte_perm(first, second, 0x5410), high, low);
            a[half * 8 + 4 * k + 2 * i + 1] = scaled<T>(__byte_perm(first, second, 0x7632), high, low);
          }
        }
      }
    }
  };

  // The left operand out of a dense factor's tile of 64 rows of 128 bytes, swizzled.
  const auto load_factor = [&](uint32_t (&a)[16], uint32_t tile) {
    const auto word = [&](int row, int byte) { return load_4(tile + row * 128 + (byte ^ (row & 7) << 4)); };
    const int local = column - 64 * group;
#pragma unroll
    for (int kk = 0; kk < 4; ++kk) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if constexpr (kForward) {
          a[4 * kk + 2 * i] = word(local + flip, kk * 32 + i * 16 + t * 4);
          a[4 * kk + 2 * i + 1] = word(local + 1 - flip, kk * 32 + i * 16 + t * 4);
        } else {
          const int row = kk * 16 + i * 8 + 2 * t;
          const uint32_t first = word(row, local * 2), second = word(row + 1, local * 2);
          a[4 * kk + 2 * i] = __byte_perm(first, second, 0x5410);
          a[4 * kk + 2 * i + 1] = __byte_perm(first, second, 0x7632);
        }
      }
    }
  };

  const uint32_t peer_empty = p.share ? ptx::address_in_rank(window + L::kEmpty, rank ^ 1) : 0;
  const auto release = [&](int stage) {
    if (lane == 0) arrive(empty(stage));
    if (p.share && lane == 1) ptx::arrive_in_rank(peer_empty + 8 * stage);
  };

  Ring ring;  // the next slot to decode
  int current = 0, previous = -1;
  const auto decode_next = [&](uint32_t (&a)[16]) {
    decode(a, ring.stage);
    current = ring.stage;
    ring.advance<kStages>();
  };
  const auto multiply = [&](const uint32_t (&a)[16], uint32_t slot, int count) {
    const uint64_t b = ptx::operand_128(slot);
    ptx::fence_products();
#pragma unroll
    for (int kk = 0; kk < 4; ++kk) {
      if (kk < count) ptx::Wgmma<T, kTokens>::add(sum, a + 4 * kk, b + 2 * kk);
    }
    ptx::commit_products();
  };
  const auto step = [&](uint32_t (&now)[16], uint32_t (&later)[16], bool more) {
    multiply(now, slot_at(current), 4);
    if (more) wait_phase(full(ring.stage), ring.phase);
    ptx::wait_products<1>();  // the step before
    if (previous >= 0) release(previous);
    previous = current;
    if (more) decode_next(later);
  };

  bool decoded = false;
  for (int unit = unit0; unit < units; unit += unit_stride) {
    const Tile tile = tile_of(p, unit, rank, kTokens);
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) sum[i] = 0.0f;

    for (int i = 0; i < lora_steps; ++i) {
      int slots[3];
#pragma unroll
      for (int piece = 0; piece < 3; ++piece) {
        wait_phase(full(ring.stage), ring.phase);
        slots[piece] = ring.stage;
        ring.advance<kStages>();
      }
      load_factor(odd, slot_at(group == 0 ? slots[1] : slots[2]));
      multiply(odd, slot_at(slots[0]), min(4, (p.rank - i * kStep + 15) / 16));
      ptx::wait_products<0>();
#pragma unroll
      for (int piece = 0; piece < 3; ++piece) release(slots[piece]);
    }
    if (!kForward && p.dropout.active() && lora_steps > 0) {
      const uint64_t seed = static_cast<uint64_t>(*p.dropout.seed);
      const int64_t first = (int64_t{tile.token0} + 2 * t) * p.columns + tile.row0 + column;
      constexpr int kPairs = kTokens / 4;  // (token, two columns)
      constexpr int kWords = (kPairs + 15) / 16;
      uint32_t kept[kWords];
#pragma unroll
      for (int word = 0; word < kWords; ++word) {
        uint32_t bits = 0;
#pragma unroll 1
        for (int i = 0; i < 16; ++i) {
          const int pair = 16 * word + i;
          const int64_t index = first + int64_t{pair / 2 * 8 + pair % 2} * p.columns;
          const Philox4 draws = philox(seed, static_cast<uint64_t>(index) / 4);
          const uint32_t draw0 = (w & 1) != 0 ? draws.lane[2] : draws.lane[0];
          const uint32_t draw1 = (w & 1) != 0 ? draws.lane[3] : draws.lane[1];
          bits |= (draw0 >= p.dropout.threshold ? 1u : 0u) << 2 * i | (draw1 >= p.dropout.threshold ? 2u : 0u) << 2 * i;
        }
        kept[word] = bits;
      }
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& value = sum[pair / 2 * 4 + pair % 2 + 2 * i];
          value = (kept[pair / 16] >> (2 * (pair % 16) + i) & 1) != 0 ? value * p.dropout.scale : 0.0f;
        }
      }
    }

    if (!decoded) {
      wait_phase(full(ring.stage), ring.phase);
      decode_next(even);
    }
    // The next tile's first step is decoded behind this tile's last one.
    decoded = lora_steps == 0 && unit + unit_stride < units;
    for (int left = steps;;) {
      step(even, odd, left > 1 || decoded);
      if (--left == 0) {
#pragma unroll
        for (int i = 0; i < 16; ++i) even[i] = odd[i];
        break;
      }
      step(odd, even, left > 1 || decoded);
      if (--left == 0) break;
    }
    ptx::wait_products<0>();
    release(previous);
    previous = -1;

    // The output through shared memory, so that its rows are written in pieces of 16 bytes.
    T* output = static_cast<T*>(p.output);
    const T* bias = static_cast<const T*>(p.bias);
    const int column0 = tile.row0 + 64 * group;
    float bias_low = 0.0f, bias_high = 0.0f;
    if (bias != nullptr) {
      const int low = tile.row0 + column + flip, high = tile.row0 + column + 1 - flip;
      if (low < p.columns) bias_low = to_float(bias[low]);
      if (high < p.columns) bias_high = to_float(bias[high]);
    }
    const uint32_t gather = window + (p.split > 1 ? L::kGather + group * 128 * 128 : kTable + 128 + group * 128 * 256);
    const uint32_t pitch = p.split > 1 ? 128 : 256;
    const auto put = [&](int token, float low, float high) {
      const uint32_t pair = flip != 0 ? pack_pair<T>(high + bias_high, low + bias_low)
                                      : pack_pair<T>(low + bias_low, high + bias_high);
      const uint32_t at = (column - 64 * group) * 2;
      const uint32_t swizzle = kForward ? (token & 7) << 4 : (token >> 1 & 1) << 6 | (token >> 2 & 1) << 2;
      store_4(gather + token * pitch + (at ^ swizzle), pair);
    };
    const auto write_rows = [&](int token0, int tokens) {
      sync_threads(1 + group, 128);
      const int piece = threadIdx.x % 8;
      for (int token = threadIdx.x % 128 / 8; token < tokens; token += 16) {
        const uint32_t swizzle = kForward ? token & 7 : (token >> 1 & 1) << 2;
        uint4 v = load_16(gather + token * pitch + (piece ^ swizzle) * 16);
        if (!kForward && (token >> 2 & 1) != 0) v = make_uint4(v.y, v.x, v.w, v.z);
        const int row = token0 + token, at = column0 + piece * 8;
        if (row >= p.m || at >= p.columns) continue;
        T* to = output + int64_t{row} * p.columns + at;
        if (p.vector_output) {
          *reinterpret_cast<uint4*>(to) = v;
        } else {
          const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            const uint16_t element = static_cast<uint16_t>(words[i / 2] >> 16 * (i % 2));
            if (at + i < p.columns) reinterpret_cast<uint16_t*>(to)[i] = element;
          }
        }
      }
      sync_threads(1 + group, 128);
    };

    if (p.split == 1) {
      constexpr int kPass = kTokens < 128 ? kTokens : 128;
#pragma unroll
      for (int pass = 0; pass < kTokens / kPass; ++pass) {
#pragma unroll
        for (int j = 0; j < kPass / 8; ++j) {
          const float* v = sum + pass * (kPass / 2) + 4 * j;
          put(8 * j + 2 * t, v[0], v[2]);
          put(8 * j + 2 * t + 1, v[1], v[3]);
        }
        write_rows(tile.token0 + pass * kPass, kPass);
      }
    } else {
      // Both warpgroups are done with the ring, so the parts may go there.
      sync_threads(3, kConsumers);
      const uint32_t mine = window + L::kExchange + threadIdx.x * 16;
#pragma unroll
      for (int j = 0; j < kTokens / 8; ++j) {
        store_16(mine + j * (kConsumers * 16),
                 make_uint4(__float_as_uint(sum[4 * j]), __float_as_uint(sum[4 * j + 1]),
                            __float_as_uint(sum[4 * j + 2]), __float_as_uint(sum[4 * j + 3])));
      }
      ptx::arrive_cluster(), ptx::wait_cluster();
      const int count = kTokens / 8 / p.split, j0 = part * count;
      for (int j = 0; j < count; ++j) {
        float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
        for (int from = 0; from < p.split; ++from) {
          const float4 v = ptx::load_from_rank(ptx::address_in_rank(mine + (j0 + j) * (kConsumers * 16), from));
          total.x += v.x, total.y += v.y, total.z += v.z, total.w += v.w;
        }
        put(8 * j + 2 * t, total.x, total.z);
        put(8 * j + 2 * t + 1, total.y, total.w);
      }
      write_rows(tile.token0 + 8 * j0, 8 * count);
    }
  }
  // No block of a cluster ends while another may still reach into its shared memory.
  if (cluster > 1) ptx::arrive_cluster(), ptx::wait_cluster();
#endif
}

// The factor in [1, 2) by which the codebook loses least when it is rounded to 16 bits; absmax is divided by it.
template <typename T>
float best_table_scale(const float (&codebook)[16]) {
  const auto rounded = [](double value) {
    constexpr int kBits = std::is_same_v<T, __half> ? 11 : 8;
    int exponent;
    const double fraction = std::frexp(value, &exponent);
    return std::ldexp(std::nearbyint(std::ldexp(fraction, kBits)), exponent - kBits);
  };
  double best_error = 1e30;
  float best = 1.0f;
  for (int i = 0; i < 1024; ++i) {
    const double scale = 1.0 + i / 1024.0;
    double error = 0.0;
    for (const float code : codebook) {
      const double difference = rounded(code * scale) / scale - code;
      error += difference * difference;
    }
    if (error < best_error) best_error = error, best = static_cast<float>(scale);
  }
  return best;
}

template <typename T>
float table_scale(const Weight& weight) {
  static const float scales[2] = {best_table_scale<T>(kFP4Values), best_table_scale<T>(kNF4Values)};
  return scales[weight.matrix.type == QuantType::kNF4 ? 1 : 0];
}

template <typename T, LinearDirection kDirection, int kTokens>
void launch(const LinearArguments& arguments, const LinearPlan& plan, cudaStream_t stream) {
  constexpr bool kForward = kDirection == LinearDirection::kForward;
  constexpr CUtensorMapDataType kElement =
      std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const QuantizedMatrix& matrix = arguments.weight.matrix;
  const int64_t reduction = kForward ? matrix.k : matrix.n, rank = arguments.lora.rank;
  Parameters p{};
  p.columns = static_cast<int>(kForward ? matrix.n : matrix.k);
  p.m = static_cast<int>(arguments.m);
  p.tiles_m = static_cast<int>(ceil_div(arguments.m, kTokens));
  p.tiles_w = static_cast<int>(ceil_div(p.columns, kTileW));
  p.split = plan.split;
  p.share = plan.split == 1 && plan.share;
  if (p.share) p.tiles_w = (p.tiles_w + 1) / 2;
  p.input = make_tensor_map(arguments.input, kElement, arguments.m, reduction, reduction * 2,
                            p.share ? kTokens / 2 : kTokens, kStep, CU_TENSOR_MAP_SWIZZLE_128B);
  p.packed = make_tensor_map(matrix.packed, CU_TENSOR_MAP_DATA_TYPE_UINT8, matrix.n, matrix.k / 2, matrix.k / 2,
                             kForward ? kTileW : kStep, (kForward ? kStep : kTileW) / 2,
                             kForward ? CU_TENSOR_MAP_SWIZZLE_32B : CU_TENSOR_MAP_SWIZZLE_64B);
  if (rank > 0) {
    p.left = make_tensor_map(arguments.lora.left, kElement, arguments.m, rank, rank * 2, kTokens, kStep,
                             CU_TENSOR_MAP_SWIZZLE_128B);
    const int64_t rows = kForward ? matrix.n : rank, columns = kForward ? rank : matrix.k;
    p.factor = make_tensor_map(arguments.lora.factor, kElement, rows, columns, columns * 2, 64, 64,
                               CU_TENSOR_MAP_SWIZZLE_128B);
  }
  p.weight = arguments.weight;
  p.table_scale = table_scale<T>(arguments.weight);
  p.bias = arguments.bias;
  p.dropout = arguments.dropout;
  p.output = arguments.output;
  p.vector_output = aligned_16(p.output) && p.columns % 8 == 0;
  p.steps = static_cast<int>(ceil_div(reduction, kStep));
  p.rank = static_cast<int>(rank);
  p.lora_steps = static_cast<int>(ceil_div(rank, kStep));
  p.vector_codes = matrix.double_quantized() && matrix.blocks() % 4 == 0 &&
                   reinterpret_cast<uintptr_t>(matrix.absmax_codes) % 4 == 0;

  const auto kernel = linear_wgmma_kernel<T, kDirection, kTokens>;
  allow_shared_memory(reinterpret_cast<const void*>(kernel), "linear_wgmma", kSharedBytes);
  const unsigned cluster = p.share ? 2 : p.split;
  const int64_t units = int64_t{p.tiles_m} * p.tiles_w;
  const int64_t resident = p.split > 1 ? units : std::max<int64_t>(1, current_device().sm_count / cluster);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid_size(std::min(units, resident) * cluster, "linear_wgmma");
  config.blockDim = kThreads;
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, p);
  check_launch("linear_wgmma", "of " + std::to_string(p.m) + " rows and a [" + std::to_string(matrix.n) + ", " +
                                   std::to_string(matrix.k) + "] weight");
}

template <typename T, LinearDirection kDirection>
void launch_tokens(const LinearArguments& arguments, const LinearPlan& plan, cudaStream_t stream) {
  switch (plan.tile_m) {
    case 32:
      return launch<T, kDirection, 32>(arguments, plan, stream);
    case 64:
      return launch<T, kDirection, 64>(arguments, plan, stream);
    case 128:
      return launch<T, kDirection, 128>(arguments, plan, stream);
    default:
      return launch<T, kDirection, 256>(arguments, plan, stream);
  }
}

}  // namespace

void linear_wgmma(const LinearArguments& arguments, LinearDirection direction, const LinearPlan& plan,
                  cudaStream_t stream) {
  with_half_type(arguments.dtype, [&](auto element) {
    using T = decltype(element);
    direction == LinearDirection::kForward
        ? launch_tokens<T, LinearDirection::kForward>(arguments, plan, stream)
        : launch_tokens<T, LinearDirection::kDx>(arguments, plan, stream);
  });
}

}  // namespace pyquant::cuda
