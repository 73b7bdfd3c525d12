// The 4-bit linear on Hopper's tensor cores (sm_90a): wgmma with W as the left operand, decoded into registers.
//
// A block computes tiles of 128 rows of W (forward; columns of W in dX) by kTokens tokens. A producer warp brings
// activations and packed weights to shared memory through the tensor memory accelerator, two warps decode absmax there,
// and two warpgroups of consumers have 64 rows each: while the tensor cores multiply one step of 64 along the
// reduction, the same threads decode the next one's weights straight into the registers of the left operand. Decoded
// weights are never stored. Blocks are persistent; pairs of them (clusters) share the activations they copy, and where
// the tiles do not fill the GPU a cluster shares a tile and adds its parts through distributed shared memory.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "kernels/cuda/dropout.h"
#include "kernels/cuda/element.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/linear_kernels.h"
#include "kernels/cuda/tensor_map.h"
#include "ptx/cluster.h"
#include "ptx/shared_memory.h"
#include "ptx/tma.h"
#include "ptx/wgmma.h"

namespace pyquant::cuda {
namespace {

constexpr int kStep = 64;
constexpr int kTileW = 128;      // rows of the left operand a block
constexpr int kConsumers = 256;  // threads: two warpgroups
constexpr int kThreads = kConsumers + 128;
[[maybe_unused]] constexpr int kScaleWarps = 2;
constexpr int kPackedBytes = kTileW * kStep / 2;  // of W, a step
constexpr int kScaleBytes = 2048;                 // decoded absmax, a step
constexpr int kGroup = 8;                         // tiles of tokens that run side by side

// Shared memory by address. Decoded pairs: entry b of the table, 128 bytes, holds the weights of byte b once for every
// lane, so that no look-up has a bank conflict. Activations, and packed weights behind them, lie in kSlots.
constexpr int kBase = 1024;  // the driver keeps the first KB
constexpr int kBarriers = kBase;
constexpr int kNested = kBarriers + 512;
constexpr int kScales = kNested + 1024;
constexpr int kTable = 0x8000;
constexpr int kSlots = 0x10000;
constexpr int kGather = 0x30000;  // rows of the output: of each warpgroup two buffers
constexpr int kGatherTokens = 64;
constexpr int kGatherBytes = kGatherTokens * 128;
constexpr int kSharedBytes = kGather + 4 * kGatherBytes - kBase;

template <int kTokens>
struct Layout {
  static constexpr int kStages = kTokens == 256 ? 4 : kTokens == 128 ? 6 : 10;
  static constexpr int kSlot = kTokens * kStep * 2;
  static constexpr int kPacked = kTokens == 256 ? kScales + kStages * kScaleBytes : kSlots + kStages * kSlot;
  static constexpr int kFull = kBarriers, kEmpty = kBarriers + 8 * kStages;
  static_assert(kPacked % 512 == 0 && kScales + kStages * kScaleBytes <= kTable);
  static_assert(kPacked + kStages * kPackedBytes <= (kTokens == 256 ? kTable : kGather));
  // Where the parts of a split reduction are exchanged.
  static constexpr int kExchange = kSlots;
  static_assert(kExchange + kTokens * 512 <= kGather);
};

struct Parameters {
  CUtensorMap input, packed, left, output_map;
  Weight weight;
  float table_scale;  // the codebook's, before it is rounded to 16 bits
  const void* factor;
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
  bool quick_scales;  // blocks of 64, double quantization, codes in whole words
};

struct Ring {
  int stage = 0;
  uint32_t phase = 0;
  template <int kStages>
  __device__ void advance() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
};

template <int kBarrier>
__device__ inline void sync_threads(int threads) {
  asm volatile("bar.sync %0, %1;" ::"n"(kBarrier), "r"(threads) : "memory");
}

// A value that the compiler keeps in a register and does not compute again.
[[maybe_unused]] __device__ inline uint32_t kept(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
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
[[maybe_unused]] __device__ inline Tile tile_of(const Parameters& p, int unit, int rank, int tokens) {
  const int group_units = kGroup * p.tiles_w;
  const int group = unit / group_units, in_group = unit % group_units;
  const int group_rows = min(kGroup, p.tiles_m - group * kGroup);
  const int tile_m = group * kGroup + in_group % group_rows;
  const int tile_w = in_group / group_rows;
  return {tile_m * tokens, (p.share ? 2 * tile_w + rank : tile_w) * kTileW};
}

// The words of absmax (or of its codes) of one row, one after the other, the next two always on their way.
struct AbsmaxStream {
  uint32_t word[3];
  float nested[3];
  uint32_t index;
};

struct AbsmaxReader {
  const Weight& weight;
  float offset, factor;
  bool nested;
  int codes_log2;  // codes a word
  uint32_t last;   // block

  [[maybe_unused]] __device__ void fetch(uint32_t index, uint32_t& word, float& nested_absmax) const {
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

  [[maybe_unused]] __device__ float finish(uint32_t word, float nested_absmax, uint32_t block,
                                           uint32_t nested_code) const {
    if (!nested) return __uint_as_float(word) * factor;
    const uint32_t code = codes_log2 > 0 ? word >> 8 * (block & 3) & 255u : word;
    return combine(code, nested_absmax, nested_code);
  }

  // Absmax times `factor`, which the table of nested codes and the offset carry.
  [[maybe_unused]] __device__ float combine(uint32_t code, float nested_absmax, uint32_t nested_code) const {
    return __fmaf_rn(__uint_as_float(ptx::load_4(nested_code + 4 * code)), nested_absmax, offset);
  }
};

// The two numbers whose sum `scaled` takes, each twice in a register.
template <typename T>
__device__ inline void split_scale(float scale, uint32_t& high, uint32_t& low) {
  high = pack_pair<T>(scale, scale);
  const float rest = scale - unpack_pair<T>(high).x;
  low = pack_pair<T>(rest, rest);
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
  // The order of the slots of a tile. One low-rank step comes second, so that the first step of W can be decoded behind
  // the tile before; but more of them between two steps of W would fill the ring.
  const bool lora_first = lora_steps > 1;
  const int units = p.tiles_m * p.tiles_w;
  const int unit0 = blockIdx.x / cluster, unit_stride = gridDim.x / cluster;
  const auto full = [window](int stage) { return window + L::kFull + 8 * stage; };
  const auto empty = [window](int stage) { return window + L::kEmpty + 8 * stage; };
  const auto slot_at = [window](int stage) { return window + kSlots + stage * L::kSlot; };

  if (threadIdx.x == kConsumers) {
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::init_barrier(full(stage), 1 + kScaleWarps);
      ptx::init_barrier(empty(stage), p.share ? 16 : 8);
    }
    ptx::init_barrier(empty(kStages), 1);
    ptx::fence_barrier_init();
    ptx::prefetch_tensor_map(&p.input);
    ptx::prefetch_tensor_map(&p.packed);
  }
  __syncthreads();
  if (p.share) ptx::arrive_cluster(), ptx::wait_cluster();
  ptx::wait_for_previous_kernel();
  ptx::let_next_kernel_start();

  if (warp >= kConsumers / 32) {
    ptx::give_registers<72>();
    Ring ring;
    if (warp == kConsumers / 32) {
      if (lane == 0) {
        const uint32_t slot_bytes = kTokens * kStep * 2;
        for (int unit = unit0; unit < units; unit += unit_stride) {
          const Tile tile = tile_of(p, unit, rank, kTokens);
          const auto copy_lora = [&] {
#pragma unroll 1
            for (int i = 0; i < lora_steps; ++i) {
              ptx::wait_barrier(empty(ring.stage), ring.phase ^ 1);
              ptx::expect_bytes(full(ring.stage), slot_bytes);
              ptx::copy_tile(slot_at(ring.stage), &p.left, i * kStep, tile.token0, full(ring.stage));
              ring.advance<kStages>();
            }
          };
          if (lora_first) copy_lora();
          for (int step = first_step; step < first_step + steps; ++step) {
            ptx::wait_barrier(empty(ring.stage), ring.phase ^ 1);
            const uint32_t slot = slot_at(ring.stage), barrier = full(ring.stage);
            const uint32_t packed = window + L::kPacked + ring.stage * kPackedBytes;
            ptx::expect_bytes(barrier, slot_bytes + kPackedBytes);
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
            if (step == first_step && !lora_first) copy_lora();
          }
        }
      }
      __syncwarp();
    } else if (warp <= kConsumers / 32 + kScaleWarps) {
      const int id = threadIdx.x - kConsumers - 32;
      const QuantizedMatrix& matrix = p.weight.matrix;
      const float factor = 1.0f / p.table_scale;
      if (matrix.double_quantized()) {
        for (int i = id; i < 256; i += 32 * kScaleWarps) {
          ptx::store_4(window + kNested + 4 * i, __float_as_uint(__ldg(matrix.nested_code + i) * factor));
        }
        sync_threads<4>(32 * kScaleWarps);
      }
      const int shift = p.weight.blocksize_log2 - 5;
      const uint32_t units_32 = static_cast<uint32_t>(matrix.k / 32);  // a row
      const AbsmaxReader reader{p.weight,
                                load_offset(p.weight) * factor,
                                factor,
                                matrix.double_quantized(),
                                p.vector_codes ? 2 : 0,
                                static_cast<uint32_t>(matrix.blocks() - 1)};
      const auto take_slot = [&] { ptx::wait_barrier(empty(ring.stage), ring.phase ^ 1); };
      const auto finish_slot = [&] {
        __syncwarp();
        if (lane == 0) ptx::arrive(full(ring.stage));
        ring.advance<kStages>();
      };
      const auto pass_lora_slots = [&] {
#pragma unroll 1
        for (int i = 0; i < lora_steps; ++i) {
          take_slot();
          finish_slot();
        }
      };
      for (int unit = unit0; unit < units; unit += unit_stride) {
        const Tile tile = tile_of(p, unit, rank, kTokens);
        if (lora_first) pass_lora_slots();
        if (p.quick_scales && kForward) {
          // Lane: rows id and id + 64 of the tile; a word holds the codes of four steps.
          const uint32_t* codes = reinterpret_cast<const uint32_t*>(matrix.absmax_codes);
          const uint32_t last = reader.last >> 2;
          uint32_t index[2], word[2];
          float nested[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int row = tile.row0 + id + 64 * i;
            index[i] = (row < matrix.n ? row : 0) * (units_32 / 8) + first_step / 4;
            word[i] = __ldg(codes + index[i]) >> first_step % 4 * 8;
            nested[i] = __ldg(matrix.nested_absmax + (index[i] >> 6));
          }
          int group_end = 4 - first_step % 4;
          for (int step = 0; step < steps;) {
            // The next four steps' words are on their way during these.
            uint32_t next_word[2];
            float next_nested[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              index[i] = min(index[i] + 1, last);
              next_word[i] = __ldg(codes + index[i]);
              next_nested[i] = __ldg(matrix.nested_absmax + (index[i] >> 6));
            }
#pragma unroll 1
            for (; step < min(group_end, steps); ++step) {
              uint32_t high[2], low[2];
#pragma unroll
              for (int i = 0; i < 2; ++i) {
                split_scale<T>(reader.combine(word[i] & 255u, nested[i], window + kNested), high[i], low[i]);
                word[i] >>= 8;
              }
              take_slot();
              const uint32_t scales = window + kScales + ring.stage * kScaleBytes + id * 8;
#pragma unroll
              for (int i = 0; i < 2; ++i) ptx::store_8(scales + i * 512, high[i], low[i]);
              finish_slot();
              if (step == 0 && !lora_first) pass_lora_slots();
            }
            group_end += 4;
#pragma unroll
            for (int i = 0; i < 2; ++i) word[i] = next_word[i], nested[i] = next_nested[i];
          }
        } else if (p.quick_scales) {
          // Lane: row id of the step; the codes of its two blocks are neighbours. Four steps are on their way.
          const int offset = id / 16 * 64 + id % 8 / 2 * 16 + id / 8 % 2 * 8 + id % 2 * 2;
          constexpr int kAhead = 4;
          uint32_t code[kAhead];
          float nested[kAhead];
          const auto load = [&](int step, uint32_t& to, float& to_nested) {
            const int row = min(step * kStep + id, static_cast<int>(matrix.n) - 1);
            const uint32_t block = row * (units_32 / 2) + tile.row0 / 64;
            to = __ldg(reinterpret_cast<const uint16_t*>(matrix.absmax_codes + block));
            to_nested = __ldg(matrix.nested_absmax + (block >> 8));
          };
#pragma unroll
          for (int i = 0; i < kAhead; ++i) load(first_step + i, code[i], nested[i]);
          const int end = first_step + steps;
          for (int step0 = first_step; step0 < end; step0 += kAhead) {
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
              const int step = step0 + i;
              if (step >= end) break;
              const bool inside = step * kStep + id < matrix.n;
              uint32_t high[2], low[2];
#pragma unroll
              for (int set = 0; set < 2; ++set) {
                const float scale = reader.combine(code[i] >> 8 * set & 255u, nested[i], window + kNested);
                split_scale<T>(inside ? scale : 0.0f, high[set], low[set]);
              }
              load(step + kAhead, code[i], nested[i]);
              take_slot();
              const uint32_t scales = window + kScales + ring.stage * kScaleBytes + offset;
#pragma unroll
              for (int set = 0; set < 2; ++set) {
                ptx::store_2(scales + set * 256, static_cast<uint16_t>(high[set]));
                ptx::store_2(scales + set * 256 + 4, static_cast<uint16_t>(low[set]));
              }
              finish_slot();
              if (step == first_step && !lora_first) pass_lora_slots();
            }
          }
        } else if constexpr (kForward) {
          // Lane: rows id and id + 64 of the tile.
          AbsmaxStream stream[2];
          uint32_t position[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int row = tile.row0 + id + 64 * i;
            position[i] = row < matrix.n ? row * units_32 + 2 * first_step : 0;
            AbsmaxStream& s = stream[i];
            s.index = position[i] >> shift >> reader.codes_log2;
#pragma unroll
            for (int ahead = 0; ahead < 3; ++ahead) reader.fetch(s.index + ahead, s.word[ahead], s.nested[ahead]);
          }
          const auto scale = [&](int i, int half, uint32_t& high_pair, uint32_t& low_pair) {
            AbsmaxStream& s = stream[i];
            const uint32_t block = (position[i] + half) >> shift;
            const uint32_t index = block >> reader.codes_log2;
            if (index != s.index) {
              s.index = index;
              s.word[0] = s.word[1], s.nested[0] = s.nested[1];
              s.word[1] = s.word[2], s.nested[1] = s.nested[2];
              reader.fetch(index + 2, s.word[2], s.nested[2]);
            }
            split_scale<T>(reader.finish(s.word[0], s.nested[0], block, window + kNested), high_pair, low_pair);
          };
          for (int step = 0; step < steps; ++step) {
            uint32_t high[2], low[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) scale(i, 0, high[i], low[i]);
            take_slot();
            const uint32_t scales = window + kScales + ring.stage * kScaleBytes + id * 8;
#pragma unroll
            for (int i = 0; i < 2; ++i) ptx::store_8(scales + i * 512, high[i], low[i]);
            if (shift == 0) {
#pragma unroll
              for (int i = 0; i < 2; ++i) {
                scale(i, 1, high[i], low[i]);
                ptx::store_8(scales + 1024 + i * 512, high[i], low[i]);
              }
            }
            position[0] += 2, position[1] += 2;
            finish_slot();
            if (step == 0 && !lora_first) pass_lora_slots();
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
            uint32_t high[4], low[4];
#pragma unroll
            for (int set = 0; set < 4; ++set) {
              if (set >= sets) break;
              const float scale = reader.finish(word[set], nested[set], block[set], window + kNested);
              split_scale<T>(inside ? scale : 0.0f, high[set], low[set]);
            }
            if (step + 1 < first_step + steps) load(step + 1);
            take_slot();
            const uint32_t scales = window + kScales + ring.stage * kScaleBytes + offset;
#pragma unroll
            for (int set = 0; set < 4; ++set) {
              if (set >= sets) break;
              ptx::store_2(scales + set * 256, static_cast<uint16_t>(high[set]));
              ptx::store_2(scales + set * 256 + 4, static_cast<uint16_t>(low[set]));
            }
            finish_slot();
            if (step == first_step && !lora_first) pass_lora_slots();
          }
        }
      }
    }
    if (p.split > 1) ptx::arrive_cluster(), ptx::wait_cluster();
    if (cluster > 1) ptx::arrive_cluster(), ptx::wait_cluster();
    return;
  }

  ptx::take_registers<216>();
  // The first nibble of a byte is the even weight. Eight threads write an entry, 16 bytes each.
  for (int i = threadIdx.x; i < 256 * 8; i += kConsumers) {
    const int byte = i / 8;
    const uint32_t pair =
        pack_pair<T>(p.weight.codebook[byte >> 4] * p.table_scale, p.weight.codebook[byte & 15] * p.table_scale);
    ptx::store_16(window + kTable + i * 16, make_uint4(pair, pair, pair, pair));
  }
  sync_threads<3>(kConsumers);

  const int group = warp / 4, w = warp % 4;
  const int g = lane / 4, t = lane % 4;
  float sum[kTokens / 2];

  // What the lane's two rows of the left operand are. Forward: rows 2 g and 2 g + 1 of the warp's 16 of W, in an order
  // that spreads the reads over the banks. dX: two neighbouring columns, as a packed byte has them; two warps share 32.
  const int flip = kForward ? g >> 2 : 0;
  const int column = kForward ? 64 * group + 16 * w + 2 * g : 64 * group + 32 * (w / 2) + 2 * (w & 1) + 4 * g;

  // Halves of steps, 32 along the reduction, go through a pipeline: packed words, looked-up pairs, pairs times absmax
  // in the registers of the operand, products. While two products of one half run, the next half is decoded.
  uint32_t operand[16], pairs[8], words[kForward ? 16 : 8], scales[kForward ? 4 : 8];
  const bool blocksize_32 = p.weight.blocksize_log2 == 5;
  // Twice the address of a look-up, but for the byte, which goes to bits 8 to 15.
  const uint32_t lane_table = kept(2 * (window | kTable | lane * 4));
  const uint32_t selector = kept(0x7604u | (kForward ? t : w & 1) << 4);
  const auto look_up = [&](uint32_t word, uint32_t byte_selector) {
    return ptx::load_4(__byte_perm(word, lane_table, byte_selector) >> 1);
  };

  const uint32_t row_low = column + flip;   // forward
  const uint32_t slab = 2 * group + w / 2;  // dX: of 32 columns
  const uint32_t words_at =
      kept(window + L::kPacked +
           (kForward ? row_low * 32 + (row_low >> 2 & 1) * 16 : lane * 64 + (slab ^ (lane >> 1 & 3)) * 16));
  const uint32_t scales_at =
      kept(window + kScales + (kForward ? row_low * 8 : (blocksize_32 ? slab : group) * 256 + t * 16));
  const uint32_t to_high = kept(flip != 0 ? -1 : 1);             // from row_low to the lane's other row
  const uint32_t second_scales = kept(blocksize_32 ? 1024 : 0);  // forward: from a step's first half to its second

  const auto load_words = [&](uint32_t at, int half) {
    if constexpr (kForward) {
      const uint4 low = ptx::load_16(at ^ 16 * half);
      const uint4 high = ptx::load_16((at ^ 16 * half) + to_high * 32);
      uint32_t* to = words + 8 * half;
      to[0] = low.x, to[1] = high.x, to[2] = low.y, to[3] = high.y;
      to[4] = low.z, to[5] = high.z, to[6] = low.w, to[7] = high.w;
    } else {
      uint32_t* to = words + 4 * half;
      ptx::load_matrices_transposed(to, at + half * 2048);
    }
  };
  const auto look_up_half = [&](int half) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      pairs[i] =
          kForward ? look_up(words[8 * half + i], selector) : look_up(words[4 * half + i / 2], selector + i % 2 * 0x20);
    }
  };
  const auto load_scales = [&](uint32_t at, int half) {
    if constexpr (kForward) {
      if (half == 1) at += second_scales;
      const uint2 low = ptx::load_8(at), high = ptx::load_8(at + to_high * 8);
      scales[0] = low.x, scales[1] = low.y, scales[2] = high.x, scales[3] = high.y;
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint4 scale = ptx::load_16(at + (2 * half + i) * 64);
        scales[4 * i] = scale.x, scales[4 * i + 1] = scale.y, scales[4 * i + 2] = scale.z, scales[4 * i + 3] = scale.w;
      }
    }
  };
  const auto finish_half = [&](int half) {
    uint32_t* a = operand + 8 * half;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if constexpr (kForward) {
        a[i] = scaled<T>(pairs[i], scales[i % 2 * 2], scales[i % 2 * 2 + 1]);
      } else {
        a[i] = scaled<T>(__byte_perm(pairs[i / 2 * 2], pairs[i / 2 * 2 + 1], i % 2 == 0 ? 0x5410 : 0x7632),
                         scales[i / 2 * 2], scales[i / 2 * 2 + 1]);
      }
    }
  };

  // The left operand of a low-rank step, straight from the dense factor.
  uint32_t factor[16];
  const auto load_factor = [&](int row0, int lora_step) {
    const auto word = [&](int row, int at, bool inside) {
      const T* pointer = static_cast<const T*>(p.factor) + int64_t{row} * (kForward ? p.rank : p.columns) + at;
      return inside ? __ldg(reinterpret_cast<const uint32_t*>(pointer)) : 0u;
    };
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int k = lora_step * kStep + i * 8 + 2 * t, outer = row0 + column;
      if constexpr (kForward) {
        factor[2 * i] = word(outer + flip, k, outer + flip < p.columns && k < p.rank);
        factor[2 * i + 1] = word(outer + 1 - flip, k, outer + 1 - flip < p.columns && k < p.rank);
      } else {
        const bool inside = outer < p.columns && k < p.rank;
        const uint32_t first = word(k, outer, inside), second = word(k + 1, outer, inside);
        factor[2 * i] = __byte_perm(first, second, 0x5410);
        factor[2 * i + 1] = __byte_perm(first, second, 0x7632);
      }
    }
  };

  // One lane of a warp arrives for its own block, another for the block that shares activations.
  const uint32_t releases = kept(lane < (p.share ? 2 : 1));
  const uint32_t release_at = kept(ptx::address_in_rank(window + L::kEmpty, lane == 1 && p.share ? rank ^ 1 : rank));
  const auto release = [&](int stage) {
    if (releases != 0) ptx::arrive_in_rank(release_at + 8 * stage);
  };

  Ring ring;                            // the next slot
  int current = 0, previous = kStages;  // kStages: no slot, a barrier that nobody waits for
  bool ready = false;                   // the next slot is known to be full
  // One step, and the decoding of what follows it, of this tile or the next. Behind the very last step nothing follows,
  // and what is decoded is never used: between products, registers may be written in straight lines of code only, or
  // the compiler lets every product wait for the one before.
  const auto step = [&](bool more) {
    const uint32_t b = ptx::operand_128(slot_at(current));
    const int upcoming = ring.stage;
    const uint32_t next_words = words_at + upcoming * kPackedBytes, next_scales = scales_at + upcoming * kScaleBytes;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      ptx::fence_products();
#pragma unroll
      for (int chunk = 2 * half; chunk < 2 * half + 2; ++chunk) {
        ptx::Wgmma<T, kTokens>::add(sum, operand + 4 * chunk, b + 2 * chunk);
      }
      ptx::commit_products();
      look_up_half(half ^ 1);
      if (half == 0 && more && !ready) ptx::wait_barrier(full(upcoming), ring.phase);
      load_words(next_words, half);
      ptx::wait_products<1>();
      if (half == 0) release(previous);
      finish_half(half ^ 1);
      load_scales(next_scales, half);
    }
    previous = current;
    if (more) {
      current = upcoming;
      ring.advance<kStages>();
      ready = ptx::test_barrier(full(ring.stage), ring.phase);
    }
  };
  // Fills the pipeline.
  const auto start = [&] {
    ptx::wait_barrier(full(ring.stage), ring.phase);
    current = ring.stage;
    ring.advance<kStages>();
    const uint32_t first_words = words_at + current * kPackedBytes, first_scales = scales_at + current * kScaleBytes;
    load_words(first_words, 0);
    load_scales(first_scales, 0);
    load_words(first_words, 1);
    look_up_half(0);
    finish_half(0);
    load_scales(first_scales, 1);
  };

  if (!lora_first) start();
  if (lora_steps > 0) load_factor(tile_of(p, unit0, rank, kTokens).row0, 0);
  for (int unit = unit0; unit < units; unit += unit_stride) {
    const Tile tile = tile_of(p, unit, rank, kTokens);
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) sum[i] = 0.0f;

    for (int i = 0; i < lora_steps; ++i) {
      if (i > 0) load_factor(tile.row0, i);
      ptx::wait_barrier(full(ring.stage), ring.phase);
      const uint32_t b = ptx::operand_128(slot_at(ring.stage));
      const auto multiply = [&](auto chunks) {
        ptx::fence_products();
#pragma unroll
        for (int chunk = 0; chunk < decltype(chunks)::value; ++chunk) {
          ptx::Wgmma<T, kTokens>::add(sum, factor + 4 * chunk, b + 2 * chunk);
        }
        ptx::commit_products();
        ptx::wait_products<0>();
        ptx::hold_sums(sum);
      };
      if (p.rank - i * kStep <= 16) {
        multiply(std::integral_constant<int, 1>{});
      } else {
        multiply(std::integral_constant<int, 4>{});
      }
      release(ring.stage);
      ring.advance<kStages>();
    }
    // Nothing is in flight here, but the compiler needs to be told outside of the loop.
    ptx::wait_products<0>();
    ptx::hold_sums(sum);
    if (!kForward && p.dropout.active() && lora_steps > 0) {
      const uint64_t seed = static_cast<uint64_t>(*p.dropout.seed);
      const int64_t first = (int64_t{tile.token0} + 2 * t) * p.columns + tile.row0 + column;
      constexpr int kPairs = kTokens / 4;  // (token, two columns)
      constexpr int kWords = (kPairs + 15) / 16;
      uint32_t masks[kWords];
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
        masks[word] = bits;
      }
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& value = sum[pair / 2 * 4 + pair % 2 + 2 * i];
          value = (masks[pair / 16] >> (2 * (pair % 16) + i) & 1) != 0 ? value * p.dropout.scale : 0.0f;
        }
      }
    }

    if (lora_first) start();
    if (lora_steps > 0) ready = false;  // that was another slot
    const bool last = lora_first || unit + unit_stride >= units;
    int left = steps;
    do {
      step(left > 1 || !last);
    } while (--left > 0);
    ptx::wait_products<0>();
    ptx::hold_sums(sum);
    release(previous);
    previous = kStages;
    if (lora_steps > 0 && unit + unit_stride < units) {
      load_factor(tile_of(p, unit + unit_stride, rank, kTokens).row0, 0);
    }

    // The output goes through shared memory, rows of 64 columns with 128-byte swizzle, kGatherTokens at a time.
    const T* bias = static_cast<const T*>(p.bias);
    float bias_low = 0.0f, bias_high = 0.0f;
    if (bias != nullptr) {
      const int low = tile.row0 + column + flip, high = tile.row0 + column + 1 - flip;
      if (low < p.columns) bias_low = to_float(bias[low]);
      if (high < p.columns) bias_high = to_float(bias[high]);
    }
    const int column0 = tile.row0 + 64 * group;
    const uint32_t gather = window + kGather + group * 2 * kGatherBytes;
    const auto put = [&](uint32_t buffer, int token, float low, float high) {
      const uint32_t pair =
          flip != 0 ? pack_pair<T>(high + bias_high, low + bias_low) : pack_pair<T>(low + bias_low, high + bias_high);
      ptx::store_4(buffer + token * 128 + ((column - 64 * group) * 2 ^ (token & 7) << 4), pair);
    };
    const auto sync_group = [&] { group == 0 ? sync_threads<1>(128) : sync_threads<2>(128); };
    constexpr int kPass = kTokens < kGatherTokens ? kTokens : kGatherTokens;

    if (p.split == 1 && p.vector_output) {
#pragma unroll
      for (int pass = 0; pass < kTokens / kPass; ++pass) {
        const uint32_t buffer = gather + pass % 2 * kGatherBytes;
        if (w == 0 && lane == 0) ptx::wait_stores_read<1>();  // the copy out of this buffer
        sync_group();
#pragma unroll
        for (int j = 0; j < kPass / 8; ++j) {
          const float* v = sum + pass * (kPass / 2) + 4 * j;
          put(buffer, 8 * j + 2 * t, v[0], v[2]);
          put(buffer, 8 * j + 2 * t + 1, v[1], v[3]);
        }
        ptx::fence_async_proxy();
        sync_group();
        if (w == 0 && lane == 0) ptx::store_tile(&p.output_map, column0, tile.token0 + pass * kPass, buffer);
      }
      continue;
    }

    const auto write_rows = [&](int token0, int tokens) {
      sync_group();
      const int piece = threadIdx.x % 8;
      for (int token = threadIdx.x % 128 / 8; token < tokens; token += 16) {
        const uint4 v = ptx::load_16(gather + token * 128 + (piece ^ (token & 7)) * 16);
        const int row = token0 + token, at = column0 + piece * 8;
        if (row >= p.m || at >= p.columns) continue;
        T* to = static_cast<T*>(p.output) + int64_t{row} * p.columns + at;
        if (p.vector_output) {
          *reinterpret_cast<uint4*>(to) = v;
        } else {
          const uint32_t piece_words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            const uint16_t element = static_cast<uint16_t>(piece_words[i / 2] >> 16 * (i % 2));
            if (at + i < p.columns) reinterpret_cast<uint16_t*>(to)[i] = element;
          }
        }
      }
      sync_group();
    };

    if (p.split == 1) {
#pragma unroll
      for (int pass = 0; pass < kTokens / kPass; ++pass) {
#pragma unroll
        for (int j = 0; j < kPass / 8; ++j) {
          const float* v = sum + pass * (kPass / 2) + 4 * j;
          put(gather, 8 * j + 2 * t, v[0], v[2]);
          put(gather, 8 * j + 2 * t + 1, v[1], v[3]);
        }
        write_rows(tile.token0 + pass * kPass, kPass);
      }
    } else {
      // Both warpgroups are done with the slots, so the parts may go there.
      sync_threads<3>(kConsumers);
      const uint32_t mine = window + L::kExchange + threadIdx.x * 16;
#pragma unroll
      for (int j = 0; j < kTokens / 8; ++j) {
        ptx::store_16(mine + j * (kConsumers * 16),
                      make_uint4(__float_as_uint(sum[4 * j]), __float_as_uint(sum[4 * j + 1]),
                                 __float_as_uint(sum[4 * j + 2]), __float_as_uint(sum[4 * j + 3])));
      }
      ptx::arrive_cluster(), ptx::wait_cluster();
      // Of the tile's tokens this block adds up its share, the parts in their order.
      const int j0 = kTokens / 8 * part / p.split, count = kTokens / 8 * (part + 1) / p.split - j0;
      for (int done = 0; done < count; done += kPass / 8) {
        const int pass = min(kPass / 8, count - done);
        for (int j = 0; j < pass; ++j) {
          const uint32_t at = mine + (j0 + done + j) * (kConsumers * 16);
          float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
          for (int from = 0; from < p.split; ++from) {
            const float4 v = ptx::load_from_rank(ptx::address_in_rank(at, from));
            total.x += v.x, total.y += v.y, total.z += v.z, total.w += v.w;
          }
          put(gather, 8 * j + 2 * t, total.x, total.z);
          put(gather, 8 * j + 2 * t + 1, total.y, total.w);
        }
        write_rows(tile.token0 + 8 * (j0 + done), 8 * pass);
      }
    }
  }
  if (w == 0 && lane == 0) ptx::wait_stores();
  // No block of a cluster ends while another may still reach into its shared memory.
  if (cluster > 1) __syncwarp(), ptx::arrive_cluster(), ptx::wait_cluster();
#else
  __trap();  // the plan takes this kernel only where there is code for sm_90a
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
  }
  p.weight = arguments.weight;
  p.table_scale = table_scale<T>(arguments.weight);
  p.factor = arguments.lora.factor;
  p.bias = arguments.bias;
  p.dropout = arguments.dropout;
  p.output = arguments.output;
  p.vector_output = aligned_16(p.output) && p.columns % 8 == 0;
  if (p.vector_output) {
    p.output_map = make_tensor_map(p.output, kElement, arguments.m, p.columns, int64_t{p.columns} * 2,
                                   std::min(kTokens, kGatherTokens), 64, CU_TENSOR_MAP_SWIZZLE_128B);
  }
  p.steps = static_cast<int>(ceil_div(reduction, kStep));
  p.rank = static_cast<int>(rank);
  p.lora_steps = static_cast<int>(ceil_div(rank, kStep));
  p.vector_codes = matrix.double_quantized() && matrix.blocks() % 4 == 0 &&
                   reinterpret_cast<uintptr_t>(matrix.absmax_codes) % 4 == 0;
  p.quick_scales = p.vector_codes && matrix.blocksize == 64 && matrix.k % (kForward ? 256 : 128) == 0;

  const auto kernel = linear_wgmma_kernel<T, kDirection, kTokens>;
  allow_shared_memory(reinterpret_cast<const void*>(kernel), "linear_wgmma", kSharedBytes);
  const unsigned cluster = p.share ? 2 : p.split;
  const int64_t units = int64_t{p.tiles_m} * p.tiles_w;
  const int64_t resident = p.split > 1 ? units : std::max<int64_t>(1, current_device().sm_count / cluster);
  const std::string problem = "of " + std::to_string(p.m) + " rows and a [" + std::to_string(matrix.n) + ", " +
                              std::to_string(matrix.k) + "] weight";
  const unsigned grid = grid_size(std::min(units, resident) * cluster, "linear_wgmma");
  launch_kernel("linear_wgmma", problem, Launch{grid, kThreads, kSharedBytes, stream, cluster, true}, kernel, p);
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
    direction == LinearDirection::kForward ? launch_tokens<T, LinearDirection::kForward>(arguments, plan, stream)
                                           : launch_tokens<T, LinearDirection::kDx>(arguments, plan, stream);
  });
}

}  // namespace pyquant::cuda
