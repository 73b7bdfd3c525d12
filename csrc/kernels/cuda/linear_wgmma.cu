// The 4-bit linear on Hopper's tensor cores (sm_90a): wgmma with W as the left operand, decoded into registers.
//
// A block computes tiles of 128 rows of W (forward; columns of W in dX) by kTokens tokens. Two warps bring activations
// and packed weights to shared memory through the tensor memory accelerator, each in a ring of its own, two decode
// absmax there, and two warpgroups of consumers have 64 rows each: while the tensor cores multiply one step of 64 along
// the reduction, the same threads decode the next one's weights straight into the registers of the left operand.
// Decoded weights are never stored. Blocks are persistent; pairs of them (clusters) share the activations they copy.
// Tiles that do not fill the GPU, be it all of them or those of a last wave, are shared by the blocks of a cluster,
// which add their parts of the reduction through distributed shared memory. Few tokens leave registers for two teams of
// consumers, which take every other step each, with all 128 rows: the time is then that of their instructions, not of
// the products. Very many tokens (LinearKernel::kDense) find the weights dequantized in memory, by a kernel before,
// once instead of once for every 256 tokens, and have them copied to shared memory as they are.
//
// Weights and their statistics are read before the previous kernel has ended; everything else waits for that, but
// beside the kernel of an adapter (Parameters::beside).
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
constexpr int kTileW = 128;  // rows of the left operand a block
constexpr int kTeam = 256;   // threads of a team of consumers: two warpgroups. See Teams
[[maybe_unused]] constexpr int kScaleWarps = 2;
constexpr int kPackedBytes = kTileW * kStep / 2;  // of W, a step
constexpr int kScaleBytes = 1024;                 // decoded absmax, a step
constexpr int kGroup = 8;                         // tiles of tokens that run side by side

// Shared memory by address. Decoded pairs: entry b of the table, 128 bytes, holds the weights of byte b once for every
// lane, so that no look-up has a bank conflict. Two rings: the activations of a step, and its weights with their
// absmax, which are decoded well before they are multiplied.
constexpr int kBase = 1024;  // the driver keeps the first KB
constexpr int kScales = kBase;
constexpr int kTable = 0x8000;
constexpr int kSlots = 0x10000;
constexpr int kGather = 0x30000;  // rows of the output: of each warpgroup two buffers
constexpr int kNested = 0x38000;
constexpr int kBarriers = kNested + 1024;
constexpr int kWorks = kBarriers + 512;  // of the last kWorksKept turns
constexpr int kWorksKept = 16;           // more than the producer of activations runs ahead
constexpr int kSharedBytes = kWorks + kWorksKept * 16 - kBase;
constexpr int kPartBytes = kTeam * 16;  // of a tile's sums: eight tokens of one block

template <int kTokens, bool kDense = false>
struct Layout {
  static constexpr int kStages = kTokens == 256 ? 4 : kTokens == 128 ? 6 : 10;  // of activations
  static constexpr int kSlotBytes = kTokens * kStep * 2;
  static constexpr int kRing = kDense ? 4 : kTokens == 256 ? 6 : 8;  // of weights
  // Dense ones: three slots where packed ones have their table, the last behind smaller buffers of the output.
  static constexpr int kDenseBytes = kTileW * kStep * 2;
  __device__ static uint32_t dense_at(int stage) { return stage < 3 ? (stage + 1) * kDenseBytes : 0x34000; }
  static constexpr int kGatherTokens = kDense ? 32 : 64;
  static constexpr int kGatherBytes = kGatherTokens * 128;
  static_assert(kGather + 4 * kGatherBytes <= (kDense ? 0x34000 : kNested));
  static constexpr int kPacked = kTokens == 256 ? kScales + kRing * kScaleBytes : kSlots + kStages * kSlotBytes;
  static_assert(kPacked % 512 == 0 && kScales + kRing * kScaleBytes <= kTable);
  static_assert(kPacked + kRing * kPackedBytes <= (kTokens == 256 ? kTable : kGather));
  // Barriers: of the two rings, full and empty, and of the exchange. Behind the empty slots of either is one for
  // "no slot".
  static constexpr int kFull = kBarriers, kEmpty = kFull + 8 * kStages, kFullW = kEmpty + 8 * (kStages + 1),
                       kEmptyW = kFullW + 8 * kRing, kReceived = kEmptyW + 8 * (kRing + 1);
  static_assert(kReceived + 8 <= kBarriers + 512);
  // Where the parts of a split reduction are exchanged, by when nobody decodes any more: of every eight tokens, 4 KB
  // from each block of the cluster.
  static constexpr int kExchange = kTable;
  static constexpr int exchange_bytes(int split) { return split * ((kTokens / 8 + split - 1) / split) * kPartBytes; }
  static constexpr bool has_room(int split) {
    return split > 8 || (kExchange + exchange_bytes(split) <= kGather && has_room(split + 1));
  }
  static_assert(has_room(2));
};

struct Parameters {
  CUtensorMap input, packed, left, output_map;  // packed: or dense
  Weight weight;
  float table_scale;  // the codebook's, before it is rounded to 16 bits
  const void* factor;
  bool float_factor;  // float32 instead of T
  const void* bias;
  Dropout dropout;
  void* output;
  bool vector_output;
  int m, columns, steps;
  int rank, lora_steps;
  int tiles_m, tiles_w;  // tiles_w counts pairs where blocks share activations
  // The first `whole` units are done by single blocks (pairs, where they share activations), in `rounds` turns;
  // clusters of `split` blocks do one more each, where there is one. In the first turn the last `skipped` blocks
  // (pairs) have no unit: `beside`.
  int whole, rounds, split, skipped;
  int first_step[9];  // of the parts of a shared tile
  bool share;
  // The previous kernel, still running, writes `left` and nothing else that this one touches. That it has ended is
  // waited for before `left` is read and the output written. Activations, factor and bias may come from kernels before
  // it: they are read once it says that those have ended (`begun`; null: it let this kernel start only then), and from
  // L2, where what they wrote is.
  bool beside;
  const uint32_t* begun;
  bool quick;  // blocks of 64, double quantization, codes in whole words
};

template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t phase = 0;
  template <int kBy = 1>
  __device__ void advance() {
    stage += kBy;
    if (stage >= kStages) stage -= kStages, phase ^= 1;
  }
  __device__ void retreat() {
    if (--stage < 0) stage = kStages - 1, phase ^= 1;
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

// Whether the low-rank steps of a tile in turn i come last, when the kernel beside has computed their left factor.
[[maybe_unused]] __device__ inline bool late_low_rank(const Parameters& p, int i) { return p.beside && i == 0; }

// What a block does in turn i of its loop: a tile, or its part of the reduction of one.
struct Work {
  int token0, row0;
  int first_step, steps, lora_steps;
  bool split;
};
[[maybe_unused]] __device__ inline int unit_at(const Parameters& p, int i) {
  const int unit = p.share ? ptx::cluster_id() + i * ptx::clusters() : static_cast<int>(blockIdx.x + i * gridDim.x);
  return i == 0 ? unit : unit - p.skipped;
}
[[maybe_unused]] __device__ inline int shared_unit(const Parameters& p) { return p.whole + ptx::cluster_id(); }
// The first turn of this block: 1 if it has none in turn 0.
[[maybe_unused]] __device__ inline int first_turn(const Parameters& p) {
  return unit_at(p, 0) >= static_cast<int>(p.share ? ptx::clusters() : gridDim.x) - p.skipped ? 1 : 0;
}
// Whether there is a turn i, which is not before the first.
[[maybe_unused]] __device__ inline bool has_work(const Parameters& p, int i) {
  return unit_at(p, i) < p.whole || (p.split > 1 && i == p.rounds && shared_unit(p) < p.tiles_m * p.tiles_w);
}
// n / d for n below 2^24, which takes the general division several times as long.
[[maybe_unused]] __device__ inline int divide(int n, int d) {
  int quotient = static_cast<int>(__fdividef(static_cast<float>(n), static_cast<float>(d)));
  const int rest = n - quotient * d;
  quotient += rest >= d ? 1 : rest < 0 ? -1 : 0;
  return quotient;
}
// Tiles go tokens fastest within groups of kGroup tiles of tokens.
[[maybe_unused]] __device__ inline Work work_at(const Parameters& p, int i, int tokens) {
  const int rank = static_cast<int>(ptx::cluster_rank());
  Work work;
  int unit = unit_at(p, i);
  work.split = unit >= p.whole;
  if (work.split) unit = shared_unit(p);
  const int group = divide(unit, kGroup * p.tiles_w), in_group = unit - group * kGroup * p.tiles_w;
  const int group_rows = min(kGroup, p.tiles_m - group * kGroup);
  const int tile_w = divide(in_group, group_rows), tile_m = group * kGroup + in_group - tile_w * group_rows;
  work.token0 = tile_m * tokens, work.row0 = (p.share ? 2 * tile_w + rank : tile_w) * kTileW;
  const int part = work.split ? rank : 0;
  work.first_step = work.split ? p.first_step[part] : 0;
  work.steps = work.split ? p.first_step[part + 1] - work.first_step : p.steps;
  work.lora_steps = part == 0 ? p.lora_steps : 0;
  return work;
}
// The producer of activations tells consumers, whose registers are dear, through shared memory; the barrier of a tile's
// first slot makes it visible.
[[maybe_unused]] __device__ inline void put_work(uint32_t window, int turn, const Work& work) {
  ptx::store_16(window + kWorks + turn % kWorksKept * 16,
                make_uint4(work.token0, work.row0, work.steps, work.lora_steps << 1 | (work.split ? 1 : 0)));
}
[[maybe_unused]] __device__ inline Work get_work(uint32_t window, int turn) {
  const uint4 v = ptx::load_16(window + kWorks + turn % kWorksKept * 16);
  return {static_cast<int>(v.x), static_cast<int>(v.y),      0,
          static_cast<int>(v.z), static_cast<int>(v.w >> 1), (v.w & 1) != 0};
}

// One absmax between its loads and its arithmetic: the 8-bit code and the absmax of its block of blocks, or without
// double quantization the absmax itself.
struct Absmax {
  uint32_t raw;
  float nested;
};

// The two numbers whose sum `scaled` takes, the higher one in the lower half.
template <typename T>
__device__ inline uint32_t split_scale(float scale) {
  const T high = from_float<T>(scale);
  return pack_pair<T>(to_float(high), scale - to_float(high));
}

// The part of the two warps that decode absmax, from `work`, that of `turn`, on; `id`: of the thread among theirs. A
// thread has two values a step. Forward: of rows id and id + 64 of the tile; dX: of row id of the step, for the two
// halves of the tile's columns.
template <typename T, LinearDirection kDirection, int kTokens>
__device__ inline void decode_absmax(const Parameters& p, uint32_t window, int id, int turn, Work& work) {
  using L = Layout<kTokens>;
  constexpr bool kForward = kDirection == LinearDirection::kForward;
  const QuantizedMatrix& matrix = p.weight.matrix;
  const bool nested = matrix.double_quantized();
  const int shift = p.weight.blocksize_log2 - 5;
  const uint32_t units_32 = static_cast<uint32_t>(matrix.k / 32);  // a row
  const uint32_t last_block = static_cast<uint32_t>(matrix.blocks() - 1);

  // Loads run ahead of their use. Where p.quick allows it, one brings what would take several: forward the codes of
  // four steps, dX those of both halves.
  constexpr int kAhead = 4;
  Absmax ahead[kAhead][2];
  uint32_t position[2];  // in units of 32 weights, of the next to load
  // Beyond the end of the weight the last block is loaded: what it is multiplied with is zero or leaves the output.
  const auto fetch = [&](uint32_t at) {
    const uint32_t block = min(at >> shift, last_block);
    if (!nested) return Absmax{__float_as_uint(__ldg(matrix.absmax + block)), 0.0f};
    return Absmax{__ldg(matrix.absmax_codes + block), __ldg(matrix.nested_absmax + (block >> 8))};
  };
  const uint32_t stride = kForward ? (p.quick ? 8 : 2) : kStep * units_32;
  const auto fetch_step = [&](Absmax(&to)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!p.quick) {
        to[i] = fetch(position[i]);
      } else if (kForward || i == 0) {
        const uint32_t block = min(position[i] >> 1, last_block & ~(kForward ? 3u : 1u));
        const unsigned char* codes = matrix.absmax_codes + block;
        to[i].raw = kForward ? __ldg(reinterpret_cast<const uint32_t*>(codes))
                             : __ldg(reinterpret_cast<const uint16_t*>(codes));
        to[i].nested = __ldg(matrix.nested_absmax + (block >> 8));
      }
      position[i] += stride;
    }
  };
  const auto fetch_first = [&] {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      position[i] = kForward ? (work.row0 + id + 64 * i) * units_32 + 2 * work.first_step
                             : (work.first_step * kStep + id) * units_32 + work.row0 / 32 + 2 * i;
      if (kForward && p.quick) position[i] &= ~7u;
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (kForward && p.quick && i >= 2) break;
      fetch_step(ahead[i]);
    }
  };
  fetch_first();

  // The table of nested codes and the offset carry the factor by which absmax is divided.
  const float factor = 1.0f / p.table_scale;
  float offset = 0.0f;
  if (nested) {
    constexpr int kCodes = 256 / (32 * kScaleWarps);
    float code[kCodes];
#pragma unroll
    for (int i = 0; i < kCodes; ++i) code[i] = __ldg(matrix.nested_code + id + i * 32 * kScaleWarps);
    offset = __ldg(matrix.offset) * factor;
#pragma unroll
    for (int i = 0; i < kCodes; ++i) {
      ptx::store_4(window + kNested + 4 * (id + i * 32 * kScaleWarps), __float_as_uint(code[i] * factor));
    }
  }
  sync_threads<4>(32 * kScaleWarps);
  const auto decode = [&](Absmax absmax) {
    const float value =
        nested ? __fmaf_rn(__uint_as_float(ptx::load_4(window + kNested + 4 * absmax.raw)), absmax.nested, offset)
               : __uint_as_float(absmax.raw) * factor;
    return split_scale<T>(value);
  };

  // Where a lane of the consumers finds the values. Forward: by row, of the first 32 of a step and of the second. dX:
  // its operand's pairs of neighbouring rows, the high halves and behind them the low ones, for 64 or 32 columns.
  Ring<L::kRing> ring;
  const int place = kForward ? id * 8 : id / 16 * 64 + id % 8 / 2 * 16 + id / 8 % 2 * 8 + id % 2 * 2;
  const auto give_step = [&](const uint32_t (&first)[2]) {
    uint32_t second[2] = {first[0], first[1]};
    if (shift == 0) {
      // Blocks of 32: of 64 weights, the second block's value is decoded as it is loaded.
#pragma unroll
      for (int i = 0; i < 2; ++i) second[i] = decode(fetch(position[i] - (kAhead + 1) * stride + 1));
    }
    ptx::wait_barrier(window + L::kEmptyW + 8 * ring.stage, ring.phase ^ 1);
    const uint32_t to = window + kScales + ring.stage * kScaleBytes + place;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if constexpr (kForward) {
        ptx::store_8(to + i * 512, first[i], second[i]);
      } else {
        const uint32_t set = to + (shift == 0 ? 2 * i : i) * 256;
        ptx::store_2(set, static_cast<uint16_t>(first[i]));
        ptx::store_2(set + 4, static_cast<uint16_t>(first[i] >> 16));
        if (shift == 0) {
          ptx::store_2(set + 256, static_cast<uint16_t>(second[i]));
          ptx::store_2(set + 256 + 4, static_cast<uint16_t>(second[i] >> 16));
        }
      }
    }
    ptx::arrive_for_warp(window + L::kFullW + 8 * ring.stage);
    ring.advance();
  };
  for (;;) {
    uint32_t value[2];
    if (p.quick && kForward) {
      int in_group = work.first_step % 4;
#pragma unroll
      for (int i = 0; i < 2; ++i) ahead[0][i].raw >>= 8 * in_group;
      for (int step = 0; step < work.steps; in_group = 0) {
        const int end = min(work.steps, step + 4 - in_group);
#pragma unroll 1
        for (; step < end; ++step) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            value[i] = decode(Absmax{ahead[0][i].raw & 255u, ahead[0][i].nested});
            ahead[0][i].raw >>= 8;
          }
          give_step(value);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) ahead[0][i] = ahead[1][i];
        fetch_step(ahead[1]);
      }
    } else {
      for (int step0 = 0; step0 < work.steps; step0 += kAhead) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          if (step0 + i >= work.steps) break;
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            value[j] = decode(p.quick ? Absmax{ahead[i][0].raw >> 8 * j & 255u, ahead[i][0].nested} : ahead[i][j]);
          }
          fetch_step(ahead[i]);
          give_step(value);
        }
      }
    }
    if (!has_work(p, ++turn)) break;
    work = work_at(p, turn, kTokens);
    fetch_first();
  }
}

// Which part of a tile a thread of the consumers has. Asked for anew wherever it is needed, so that it takes no
// registers while products run.
struct Consumer {
  int group, w, lane, g, t;  // warpgroup, warp of it, lane, and its quad and place there
  // The lane's two rows of the left operand. Forward: rows 2 g and 2 g + 1 of the warp's 16 of W, in an order that
  // spreads the reads over the banks. dX: two neighbouring columns, as a packed byte has them; two warps share 32.
  // Dense: as the products have them, 8 apart.
  int flip, column, apart;
};
template <bool kForward, bool kDense>
__device__ inline Consumer this_consumer() {
  uint32_t thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  thread %= kTeam;
  Consumer c;
  c.group = thread / 128, c.w = thread / 32 % 4, c.lane = thread % 32;
  c.g = c.lane / 4, c.t = c.lane % 4;
  c.flip = kForward && !kDense ? c.g >> 2 : 0;
  c.column = 64 * c.group + (kDense     ? 16 * c.w + c.g
                             : kForward ? 16 * c.w + 2 * c.g
                                        : 32 * (c.w / 2) + 2 * (c.w & 1) + 4 * c.g);
  c.apart = kDense ? 8 : 1;
  return c;
}

// Teams of consumers are two warpgroups with 64 rows of W each; for 128 tokens two teams are one each, with 128 rows.
template <int kTokens, int kTeams>
struct Teams {
  static constexpr int kBlocks = kTokens == 128 && kTeams == 2 ? 2 : 1;  // of 64 rows that a warpgroup has
  static constexpr int kThreads = kTeam / kBlocks, kConsumers = kTeams * kThreads;
};

// kTeams: of consumers. With two, a block has one turn, of two steps or more. kDense: with one, nothing is split.
template <typename T, LinearDirection kDirection, int kTokens, int kTeams, bool kDense>
__global__ void __launch_bounds__(Teams<kTokens, kTeams>::kConsumers + 128, 1)
    linear_wgmma_kernel(const __grid_constant__ Parameters p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using L = Layout<kTokens, kDense>;
  constexpr int kBlocks = Teams<kTokens, kTeams>::kBlocks, kTeamWarps = Teams<kTokens, kTeams>::kThreads / 32;
  constexpr int kConsumers = Teams<kTokens, kTeams>::kConsumers, kThreads = kConsumers + 128;
  constexpr bool kForward = kDirection == LinearDirection::kForward;
  extern __shared__ __align__(1024) unsigned char dynamic_shared[];
  // In a cluster, addresses carry the block's rank above their lower 24 bits.
  const uint32_t window = ptx::shared_address(dynamic_shared) - kBase;
  if ((window & 0xFFFFFFu) != 0) __trap();

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // Parameters come through a cold cache, line by line, and an instruction that needs one waits: all lines at once.
  asm volatile(
      "" ::"r"(reinterpret_cast<const int*>(&p)[min(warp * 16, static_cast<int>(sizeof(Parameters) / 4) - 1)]));

  const int rank = static_cast<int>(ptx::cluster_rank());
  const auto full = [window](int stage) { return window + L::kFull + 8 * stage; };
  const auto empty = [window](int stage) { return window + L::kEmpty + 8 * stage; };
  const auto full_w = [window](int stage) { return window + L::kFullW + 8 * stage; };
  const auto empty_w = [window](int stage) { return window + L::kEmptyW + 8 * stage; };
  const auto slot_at = [window](int stage) { return window + kSlots + stage * L::kSlotBytes; };
  if (threadIdx.x == kConsumers) {
    for (int stage = 0; stage < L::kStages; ++stage) {
      ptx::init_barrier(full(stage), 1);
      ptx::init_barrier(empty(stage), kTeamWarps * (p.share ? 2 : 1));
    }
    ptx::init_barrier(empty(L::kStages), 1);
    for (int stage = 0; stage < L::kRing; ++stage) {
      ptx::init_barrier(full_w(stage), 1 + (kDense ? 0 : kScaleWarps * ptx::kWarpArrivals));
      ptx::init_barrier(empty_w(stage), kTeamWarps * ptx::kWarpArrivals);
    }
    ptx::init_barrier(empty_w(L::kRing), 1);
    ptx::init_barrier(window + L::kReceived, 1);
    ptx::fence_barrier_init();
  } else if (threadIdx.x == kThreads - 32) {
    ptx::prefetch_tensor_map(&p.packed);
    ptx::prefetch_tensor_map(&p.input);
  }
  __syncthreads();
  if (p.share) ptx::arrive_cluster_relaxed(), ptx::wait_cluster();

  if (first_turn(p) > 0 && !has_work(p, 1)) return;  // so does the block that shares activations with this one

  if (warp >= kConsumers / 32) {
    ptx::give_registers<56>();
    int turn = first_turn(p);
    Work work = work_at(p, turn, kTokens);
    if (warp == kConsumers / 32) {
      // Activations, perhaps the previous kernel's, but for `beside`. The low-rank steps of a tile come first, but for
      // late_low_rank.
      bool waited = !p.beside;
      if (waited) ptx::wait_for_previous_kernel(), ptx::let_next_kernel_start();
      if (lane == 0) {
        if (p.begun != nullptr) {
          while (ptx::load_acquire(p.begun) == 0) continue;
          ptx::fence_async_proxy_global();
        }
        Ring<L::kStages> ring;
        for (;;) {
          put_work(window, turn, work);
          const int all = work.steps + work.lora_steps, begin = late_low_rank(p, turn) ? 0 : -work.lora_steps;
          for (int i = begin; i < begin + all; ++i) {
            const uint32_t slot = slot_at(ring.stage), barrier = full(ring.stage);
            ptx::wait_barrier(empty(ring.stage), ring.phase ^ 1);
            ptx::expect_bytes(barrier, L::kSlotBytes);
            const int step = work.first_step + i;
            if (i < 0 || i >= work.steps) {
              if (!waited) ptx::wait_for_previous_kernel(), ptx::let_next_kernel_start();
              waited = true;
              const int lora_step = i < 0 ? i + work.lora_steps : i - work.steps;
              ptx::copy_tile(slot, &p.left, lora_step * kStep, work.token0, barrier);
            } else if (p.share) {
              ptx::copy_tile_to_ranks(slot + rank * (L::kSlotBytes / 2), &p.input, step * kStep,
                                      work.token0 + rank * (kTokens / 2), barrier, 3);
            } else {
              ptx::copy_tile(slot, &p.input, step * kStep, work.token0, barrier);
            }
            ring.advance();
          }
          if (!has_work(p, ++turn)) break;
          work = work_at(p, turn, kTokens);
        }
        if (!waited) ptx::wait_for_previous_kernel(), ptx::let_next_kernel_start();
      }
      __syncwarp();
    } else if (warp == kConsumers / 32 + 3) {
      // Packed weights, which no kernel writes that lets its successors start before it has ended. Dense ones come from
      // a kernel before, as activations may.
      if (kDense && !p.beside) ptx::wait_for_previous_kernel();
      if (lane == 0) {
        if (kDense && p.begun != nullptr) {
          while (ptx::load_acquire(p.begun) == 0) continue;
          ptx::fence_async_proxy_global();
        }
        Ring<L::kRing> ring;
        for (;;) {
          for (int step = work.first_step; step < work.first_step + work.steps; ++step) {
            const uint32_t packed = window + L::kPacked + ring.stage * kPackedBytes;
            ptx::wait_barrier(empty_w(ring.stage), ring.phase ^ 1);
            ptx::expect_bytes(full_w(ring.stage), kDense ? L::kDenseBytes : kPackedBytes);
            if constexpr (kDense) {
              const uint32_t dense = window + L::dense_at(ring.stage), barrier = full_w(ring.stage);
              if (kForward) {
                ptx::copy_tile(dense, &p.packed, step * kStep, work.row0, barrier);
              } else {
                ptx::copy_tile(dense, &p.packed, work.row0, step * kStep, barrier);
                ptx::copy_tile(dense + L::kDenseBytes / 2, &p.packed, work.row0 + 64, step * kStep, barrier);
              }
            } else if (kForward) {
              ptx::copy_tile(packed, &p.packed, step * (kStep / 2), work.row0, full_w(ring.stage));
            } else {
              ptx::copy_tile(packed, &p.packed, work.row0 / 2, step * kStep, full_w(ring.stage));
            }
            ring.advance();
          }
          if (!has_work(p, ++turn)) break;
          work = work_at(p, turn, kTokens);
        }
      }
      __syncwarp();
    } else if (!kDense) {
      decode_absmax<T, kDirection, kTokens>(p, window, threadIdx.x - kConsumers - 32, turn, work);
    }
    if (p.share) ptx::arrive_cluster_relaxed(), ptx::wait_cluster();
    return;
  }

  constexpr int kRegisters = kConsumers == 256 ? 224 : 104;
  // More than the block was launched with would be waited for forever.
  static_assert(kConsumers * kRegisters + 128 * 56 <= kThreads * (65536 / kThreads / 8 * 8));
  ptx::take_registers<kRegisters>();
  // The first nibble of a byte is the even weight. Eight threads write an entry, 16 bytes each. A lane has one code:
  // read by the nibble itself, the constants would come one after the other.
  if constexpr (!kDense) {
    float code = 0.0f;
#pragma unroll
    for (int i = 0; i < 16; ++i) code = lane % 16 == i ? p.weight.codebook[i] : code;
    code *= p.table_scale;
#pragma unroll
    for (int i = 0; i < 2048 / kConsumers; ++i) {
      const int byte = (warp * 2048 / kConsumers + i) * 4 + lane / 8;
      const float first = __shfl_sync(0xFFFFFFFFu, code, byte >> 4), second = __shfl_sync(0xFFFFFFFFu, code, byte & 15);
      const uint32_t pair = pack_pair<T>(first, second);
      ptx::store_16(window + kTable + byte * 128 + lane % 8 * 16, make_uint4(pair, pair, pair, pair));
    }
  }
  if (!p.beside) ptx::wait_for_previous_kernel(), ptx::let_next_kernel_start();
  sync_threads<3>(kConsumers);

  float sums[kBlocks][kTokens / 2];
  float (&sum)[kTokens / 2] = sums[0];

  // Halves of steps, 32 along the reduction, go through a pipeline: packed words, looked-up pairs, pairs times absmax
  // in the registers of the operand, products. While the two products of half h run, half h + 1 is multiplied by its
  // absmax and half h + 2 loaded and looked up, so that hardly anybody waits for shared memory.
  uint32_t operand[kBlocks][16], pairs[kBlocks][8], words[kBlocks][kForward ? 8 : 4], scales[kBlocks][kForward ? 4 : 8];
  const Consumer self = this_consumer<kForward, kDense>();
  const bool blocksize_32 = p.weight.blocksize_log2 == 5;
  // The address of a look-up is the lane's copy of entry 0 and 128 times a byte of the word: one dot product.
  const uint32_t lane_table = kept(window | kTable | self.lane * 4);
  const uint32_t selector = kept(128u << 8 * (kForward ? self.t : self.w & 1));
  const auto look_up = [&](uint32_t word, uint32_t byte_selector) {
    return ptx::load_4(__dp4a(word, byte_selector, lane_table));
  };

  const uint32_t group = kBlocks == 1 ? self.group : 0;                          // whose rows come first
  const uint32_t row_low = self.column - 64 * (self.group - group) + self.flip;  // forward
  const uint32_t slab = 2 * group + self.w / 2;                                  // dX: of 32 columns
  const uint32_t words_at =
      kept(window + L::kPacked +
           (kForward ? row_low * 32 + (row_low >> 2 & 1) * 16 : lane * 64 + (slab ^ (lane >> 1 & 3)) * 16));
  const uint32_t scales_at =
      kept(window + kScales + (kForward ? row_low * 8 : (blocksize_32 ? slab : group) * 256 + self.t * 16));
  const uint32_t to_block = kept(blocksize_32 ? 512 : 256);  // dX: from scales_at to those of the next 64 columns
  const uint32_t to_high = kept(self.flip != 0 ? -1 : 1);    // from row_low to the lane's other row

  const auto load_words = [&](int stage, int half) {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      uint32_t* to = words[block];
      const uint32_t at =
          (words_at + stage * kPackedBytes + (kForward ? 2048 * block : 0)) ^ (kForward ? 0 : 32 * block);
      if constexpr (kForward) {
        const uint4 low = ptx::load_16(at ^ 16 * half);
        const uint4 high = ptx::load_16((at ^ 16 * half) + to_high * 32);
        to[0] = low.x, to[1] = high.x, to[2] = low.y, to[3] = high.y;
        to[4] = low.z, to[5] = high.z, to[6] = low.w, to[7] = high.w;
      } else {
        ptx::load_matrices_transposed(to, at + half * 2048);
      }
    }
  };
  const auto look_up_half = [&] {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        pairs[block][i] = kForward ? look_up(words[block][i], selector)
                                   : look_up(words[block][i / 2], i % 2 == 0 ? selector : selector << 16);
      }
    }
  };
  // Forward: of the lane's two rows, for both halves of a step at once. dX: of the half's rows.
  const auto load_scales = [&](int stage, int half) {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      uint32_t* to = scales[block];
      uint32_t at = scales_at + stage * kScaleBytes;
      if constexpr (kForward) {
        at += 512 * block;
        if (half == 1) return;
        const uint2 low = ptx::load_8(at), high = ptx::load_8(at + to_high * 8);
        to[0] = low.x, to[1] = high.x, to[2] = low.y, to[3] = high.y;
      } else {
        if (block > 0) at += to_block;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint4 scale = ptx::load_16(at + (2 * half + i) * 64);
          to[4 * i] = scale.x, to[4 * i + 1] = scale.y, to[4 * i + 2] = scale.z, to[4 * i + 3] = scale.w;
        }
      }
    }
  };
  const auto finish_half = [&](int half) {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      uint32_t* a = operand[block] + 8 * half;
      const uint32_t *pair = pairs[block], *scale = scales[block];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if constexpr (kForward) {
          const uint32_t both = scale[2 * half + i % 2];
          a[i] = scaled<T>(pair[i], __byte_perm(both, both, 0x1010), __byte_perm(both, both, 0x3232));
        } else {
          a[i] = scaled<T>(__byte_perm(pair[i / 2 * 2], pair[i / 2 * 2 + 1], i % 2 == 0 ? 0x5410 : 0x7632),
                           scale[i / 2 * 2], scale[i / 2 * 2 + 1]);
        }
      }
    }
  };

  // The left operand of a low-rank step, straight from the dense factor.
  uint32_t factor[16];
  const auto load_factor = [&](int row0, int lora_step) {
    const Consumer c = this_consumer<kForward, kDense>();
    const int flip = c.flip, t = c.t;
    const auto word = [&](int row, int at, bool inside) {
      const int64_t index = int64_t{row} * (kForward ? p.rank : p.columns) + at;
      // From L2: this SM may have read it before an earlier kernel wrote it, since when nothing has been waited for.
      if (!inside) return 0u;
      if (!p.float_factor) return __ldcg(reinterpret_cast<const uint32_t*>(static_cast<const T*>(p.factor) + index));
      const float2 pair = __ldcg(reinterpret_cast<const float2*>(static_cast<const float*>(p.factor) + index));
      return pack_pair<T>(pair.x, pair.y);
    };
    [[maybe_unused]] const auto element = [&](int row, int at) {
      const int64_t index = int64_t{row} * p.columns + at;
      return p.float_factor ? __ldcg(static_cast<const float*>(p.factor) + index)
                            : to_float(__ldcg(static_cast<const T*>(p.factor) + index));
    };
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int k = lora_step * kStep + i * 8 + 2 * t, outer = row0 + c.column;
      if constexpr (kForward) {
        const int other = outer + c.apart - flip;
        factor[2 * i] = word(outer + flip, k, outer + flip < p.columns && k < p.rank);
        factor[2 * i + 1] = word(other, k, other < p.columns && k < p.rank);
      } else if constexpr (kDense) {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          const int at = outer + 8 * row;
          const bool inside = at < p.columns && k < p.rank;
          factor[2 * i + row] = inside ? pack_pair<T>(element(k, at), element(k + 1, at)) : 0u;
        }
      } else {
        const bool inside = outer < p.columns && k < p.rank;
        const uint32_t first = word(k, outer, inside), second = word(k + 1, outer, inside);
        factor[2 * i] = __byte_perm(first, second, 0x5410);
        factor[2 * i + 1] = __byte_perm(first, second, 0x7632);
      }
    }
  };

  // One lane of a warp arrives for its own block, another for the block that shares activations, and the others have 0
  // here.
  const uint32_t release_at =
      kept(lane < (p.share ? 2 : 1) ? ptx::address_in_rank(window + L::kEmpty, lane == 1 ? rank ^ 1 : rank) : 0);
  const auto release = [&](int stage) {
    if (release_at != 0) ptx::arrive_in_rank(release_at + 8 * stage);
  };

  const int team = kTeams == 1 ? 0 : warp / kTeamWarps;
  Ring<L::kStages> ring;      // of activations: the slot of this step
  Ring<L::kRing> ring_w;      // of weights: the team's next slot, that it has not looked at
  int current_w = 0;          // of weights: the slot of this step
  int previous = L::kStages;  // of activations: the slot that products may still read, or "no slot"
  // One step, and the decoding of the one that follows, of this tile or the next; what is decoded behind the very last
  // step is never used. Between products, registers may be written in straight lines of code only, or the compiler lets
  // every product wait for the one before. It also moves arithmetic up across products, where it would wait for its
  // operands, but not across the loops that wait for slots; so those stand behind the products, and where no slot
  // follows wait for one that has come.
  const auto step = [&](bool more_activations, bool more_weights) {
    const uint32_t b = ptx::operand_128(slot_at(ring.stage));
    const int next_w = more_weights ? ring_w.stage : current_w;
    Ring<L::kStages> next = ring;
    next.template advance<kTeams>();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // The weights of the next step, then its activations. A barrier's answer takes 60 to 90 cycles: asked here, it
      // comes while the products wait for the ones before.
      uint32_t barrier, phase;
      if (half == 0) {
        barrier = full_w(next_w);
        phase = more_weights ? ring_w.phase : ring_w.phase ^ (ring_w.stage < kTeams ? 1 : 0);
      } else {
        barrier = full(more_activations ? next.stage : ring.stage);
        phase = more_activations ? next.phase : ring.phase;
      }
      const bool ready = ptx::test_barrier(barrier, phase);
      ptx::fence_products();
#pragma unroll
      for (int chunk = 2 * half; chunk < 2 * half + 2; ++chunk) {
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
          ptx::Wgmma<T, kTokens>::add(sums[block], operand[block] + 4 * chunk, b + 2 * chunk);
        }
      }
      ptx::commit_products();
      if (!ready) ptx::wait_barrier(barrier, phase);
      if (kBlocks == 1) load_words(next_w, half);
      ptx::wait_products<1>();
      finish_half(half ^ 1);
      if (kBlocks == 2) load_words(next_w, half);
      if (half == 0) {
        release(previous);
        ptx::arrive_for_warp(empty_w(current_w));
      }
      look_up_half();
      load_scales(next_w, half);
    }
    previous = ring.stage;
    ring = next;
    current_w = next_w;
    if (more_weights) ring_w.template advance<kTeams>();
  };
  // The same of dense weights; its slots have come.
  const auto dense_step = [&](bool more) {
    const uint32_t a = ptx::operand_128(window + L::dense_at(ring_w.stage) + self.group * (L::kDenseBytes / 2)),
                   b = ptx::operand_128(slot_at(ring.stage));
    const int this_slot = ring.stage, this_slot_w = ring_w.stage;
    ring.advance(), ring_w.advance();
    ptx::fence_products();
#pragma unroll
    for (int chunk = 0; chunk < 4; ++chunk) {
      // 16 along the reduction are 32 bytes of a row, or 16 rows of 128.
      if constexpr (kDense) {
        ptx::multiply<T, kTokens, !kForward, false>(sum, a + chunk * (kForward ? 2 : 128), b + 2 * chunk);
      }
    }
    ptx::commit_products();
    if (more) ptx::wait_barrier(full_w(ring_w.stage), ring_w.phase), ptx::wait_barrier(full(ring.stage), ring.phase);
    ptx::wait_products<1>();
    release(previous);
    ptx::arrive_for_warp(empty_w(current_w));
    previous = this_slot, current_w = this_slot_w;
  };
  // Fills the pipeline with the team's first step.
  const auto start = [&] {
    current_w = team;
    ptx::wait_barrier(full_w(team), 0);
    ring_w.template advance<kTeams>();
    load_words(team, 0);
    load_scales(team, 0);
    look_up_half();
    finish_half(0);
    load_words(team, 1);
    look_up_half();
    load_scales(team, 1);
  };

  // The low-rank steps, whose first factor is loaded.
  const auto multiply_low_rank = [&](const Work& work) {
    for (int i = 0; i < work.lora_steps; ++i) {
      if (i > 0) load_factor(work.row0, i);
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
      ring.advance();
    }
    // Nothing is in flight here, but the compiler needs to be told outside of the loop.
    ptx::wait_products<0>();
    ptx::hold_sums(sum);
  };

  int turn = kTeams == 2 ? 0 : first_turn(p);
  Work work = work_at(p, turn, kTokens);
  if (kTeams == 2 && team == 1) {
    ring_w.advance();
    // Low-rank steps that come first are the other team's. Slots come around: that theirs have been filled is seen
    // here, or a later turn of the ring could pass for this one.
    for (int i = 0; i < (kBlocks == 1 ? work.lora_steps : 0); ++i) {
      ptx::wait_barrier(full(ring.stage), ring.phase);
      ring.advance();
    }
    ring.advance();
    work.lora_steps = 0;
  }
  if constexpr (kDense) {
    current_w = L::kRing;
  } else {
    start();
  }
  // Where registers allow it, a late step's factor waits in them.
  constexpr bool kFactorWaits = kForward || kTokens < 256;
  if (p.begun != nullptr) ptx::wait_barrier(full(ring.stage), ring.phase);  // activations have come, so it has begun
  if (kBlocks == 1 && work.lora_steps > 0 && (kFactorWaits || !late_low_rank(p, turn))) load_factor(work.row0, 0);
  for (;;) {
    const bool more_work = kTeams == 1 && kept(has_work(p, turn + 1)) != 0;
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) {
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) sums[block][i] = 0.0f;
    }
    if (kBlocks == 1 && !late_low_rank(p, turn)) multiply_low_rank(work);
    if (!kForward && !kDense && kBlocks == 1 && p.dropout.active() && work.lora_steps > 0) {
      const Consumer c = this_consumer<kForward, kDense>();
      const uint64_t seed = static_cast<uint64_t>(*p.dropout.seed);
      const int64_t first = (int64_t{work.token0} + 2 * c.t) * p.columns + work.row0 + c.column;
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
          const uint32_t draw0 = (c.w & 1) != 0 ? draws.lane[2] : draws.lane[0];
          const uint32_t draw1 = (c.w & 1) != 0 ? draws.lane[3] : draws.lane[1];
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

    ptx::wait_barrier(full(ring.stage), ring.phase);
    int left = kTeams == 1 ? work.steps : (work.steps + 1 - team) / 2;
    if constexpr (kDense) {
      ptx::wait_barrier(full_w(ring_w.stage), ring_w.phase);
#pragma unroll 1  // unrolled, every product would wait for the one before
      do {
        dense_step(left > 1);
      } while (--left > 0);
    } else {
      do {
        step(left > 1, left > 1 || more_work);
      } while (--left > 0);
    }
    work = get_work(window, turn);
    if ((!kFactorWaits || kBlocks == 2) && late_low_rank(p, turn) && work.lora_steps > 0) load_factor(work.row0, 0);
    ptx::wait_products<0>();
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) ptx::hold_sums(sums[block]);
    release(previous);
    previous = L::kStages;
    if constexpr (kDense) ptx::arrive_for_warp(empty_w(current_w)), current_w = L::kRing;
    if constexpr (kBlocks == 2) {
      // Each team gets the other's sums of its 64 rows, where the table and the packed weights were.
      constexpr int kSumsBytes = 128 * kTokens / 2 * 4;
      static_assert(kTable + kSumsBytes <= kSlots && L::kPacked + kSumsBytes <= kGather);
      const uint32_t thread = threadIdx.x % 128 * 16;
      const uint32_t mine = window + (team == 0 ? kTable : L::kPacked) + thread,
                     theirs = window + (team == 0 ? L::kPacked : kTable) + thread;
      sync_threads<5>(kConsumers);  // nobody decodes any more
#pragma unroll
      for (int j = 0; j < kTokens / 8; ++j) {
        const float* v = sums[1] + 4 * j;
        const float* w = sums[0] + 4 * j;
        ptx::store_16(theirs + j * 2048,
                      make_uint4(__float_as_uint(team == 0 ? v[0] : w[0]), __float_as_uint(team == 0 ? v[1] : w[1]),
                                 __float_as_uint(team == 0 ? v[2] : w[2]), __float_as_uint(team == 0 ? v[3] : w[3])));
      }
      sync_threads<6>(kConsumers);
#pragma unroll
      for (int j = 0; j < kTokens / 8; ++j) {
        const uint4 v = ptx::load_16(mine + j * 2048);
        const uint32_t parts[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float own = team == 0 ? sums[0][4 * j + i] : sums[1][4 * j + i], other = __uint_as_float(parts[i]);
          sum[4 * j + i] = own + other;
        }
      }
      sync_threads<5>(kConsumers);  // what was read there may be overwritten by another block
      // Behind the last step, whichever team's it was.
      if ((work.steps & 1) != team) ring.retreat();
    } else if constexpr (kTeams == 2) {
      // The second team's sums go to the first, through the buffers of the output, and it is done.
      const uint32_t place = window + kGather + threadIdx.x % kTeam * 16;
      if (team == 1) {
#pragma unroll
        for (int j = 0; j < kTokens / 8; ++j) {
          ptx::store_16(place + j * kPartBytes,
                        make_uint4(__float_as_uint(sum[4 * j]), __float_as_uint(sum[4 * j + 1]),
                                   __float_as_uint(sum[4 * j + 2]), __float_as_uint(sum[4 * j + 3])));
        }
        sync_threads<5>(kConsumers);
        return;
      }
      sync_threads<5>(kConsumers);
#pragma unroll
      for (int j = 0; j < kTokens / 8; ++j) {
        const uint4 v = ptx::load_16(place + j * kPartBytes);
        sum[4 * j] += __uint_as_float(v.x), sum[4 * j + 1] += __uint_as_float(v.y);
        sum[4 * j + 2] += __uint_as_float(v.z), sum[4 * j + 3] += __uint_as_float(v.w);
      }
      sync_threads<6>(kTeam);  // all have read before the output takes the buffers
    }
    if ((kTeams == 1 || kBlocks == 2) && late_low_rank(p, turn)) multiply_low_rank(work);
    ++turn;
    Work upcoming{};
    if (more_work) {
      ptx::wait_barrier(full(ring.stage), ring.phase);
      upcoming = get_work(window, turn);
      if (upcoming.lora_steps > 0) load_factor(upcoming.row0, 0);
    }

    // The output goes through shared memory, rows of 64 columns with 128-byte swizzle, kGatherTokens at a time.
    const Consumer c = this_consumer<kForward, kDense>();
    const int group = c.group, column = c.column, flip = c.flip, t = c.t;
    const bool leader = c.w == 0 && c.lane == 0;
    const T* bias = static_cast<const T*>(p.bias);
    float bias_low = 0.0f, bias_high = 0.0f;
    if (bias != nullptr) {
      const int low = work.row0 + column + flip, high = work.row0 + column + c.apart - flip;
      if (low < p.columns) bias_low = to_float(__ldcg(bias + low));
      if (high < p.columns) bias_high = to_float(__ldcg(bias + high));
    }
    const int column0 = work.row0 + 64 * group;
    constexpr int kGatherTokens = L::kGatherTokens, kGatherBytes = L::kGatherBytes;
    const uint32_t gather = window + kGather + group * 2 * kGatherBytes;
    const auto put = [&](uint32_t buffer, int token, float low, float high) {
      const uint32_t pair =
          flip != 0 ? pack_pair<T>(high + bias_high, low + bias_low) : pack_pair<T>(low + bias_low, high + bias_high);
      ptx::store_4(buffer + token * 128 + ((column - 64 * group) * 2 ^ (token & 7) << 4), pair);
    };
    constexpr int kPass = kTokens < kGatherTokens ? kTokens : kGatherTokens;
    // kPass tokens, whose sums begin at v.
    const auto put_pass = [&](uint32_t buffer, const float* v) {
      if constexpr (kDense) {
        // Matrix i of four: of the eight tokens behind token 8 * (i / 2), and the warp's first or second eight columns.
        const int i = c.lane / 8, token = i / 2 * 8 + c.lane % 8, piece = 2 * c.w + (i & 1);
        const uint32_t at = buffer + token * 128 + (piece ^ (token & 7)) * 16;
#pragma unroll
        for (int j = 0; j < kPass / 16; ++j, v += 8) {
          const uint32_t matrices[4] = {
              pack_pair<T>(v[0] + bias_low, v[1] + bias_low), pack_pair<T>(v[2] + bias_high, v[3] + bias_high),
              pack_pair<T>(v[4] + bias_low, v[5] + bias_low), pack_pair<T>(v[6] + bias_high, v[7] + bias_high)};
          ptx::store_matrices_transposed(at + j * 16 * 128, matrices);
        }
      } else {
#pragma unroll
        for (int j = 0; j < kPass / 8; ++j, v += 4) {
          put(buffer, 8 * j + 2 * t, v[0], v[2]);
          put(buffer, 8 * j + 2 * t + 1, v[1], v[3]);
        }
      }
    };
    const auto sync_group = [&] { group == 0 ? sync_threads<1>(128) : sync_threads<2>(128); };

    if (!work.split && p.vector_output) {
#pragma unroll
      for (int pass = 0; pass < kTokens / kPass; ++pass) {
        const uint32_t buffer = gather + pass % 2 * kGatherBytes;
        if (leader) ptx::wait_stores_read<1>();  // the copy out of this buffer
        sync_group();
        put_pass(buffer, sum + pass * (kPass / 2));
        ptx::fence_async_proxy();
        sync_group();
        if (leader) ptx::store_tile(&p.output_map, column0, work.token0 + pass * kPass, buffer);
      }
      if (!more_work) break;
      work = upcoming;
      continue;
    }

    // A copy of the tile before may still be reading the buffers.
    if (leader) ptx::wait_stores_read<0>();
    const auto write_rows = [&](int token0, int tokens) {
      sync_group();
      const int thread = 32 * c.w + c.lane, piece = thread % 8;
#pragma unroll 4
      for (int token = thread / 8; token < tokens; token += 16) {
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
    };

    // Of halves, only what the other block adds up goes through shared memory.
    constexpr bool kHalves = kTokens >= 2 * kGatherTokens && !kDense;
    if (kHalves && work.split && p.split == 2 && p.vector_output) {
      constexpr int kOwn = kTokens / 16;  // eights
      const uint32_t received = window + L::kReceived,
                     place = window + L::kExchange + (128 * group + 32 * c.w + c.lane) * 16;
      if (leader && group == 0) ptx::expect_bytes(received, kOwn * kPartBytes);
      ptx::arrive_cluster_relaxed(), ptx::wait_cluster();  // all are done with their slots, where the parts go
      const uint32_t to = ptx::address_in_rank(place, rank ^ 1), barrier = ptx::address_in_rank(received, rank ^ 1);
      const auto half_of = [&](int owner, int i) { return owner == 0 ? sum[i] : sum[kTokens / 4 + i]; };
#pragma unroll
      for (int j = 0; j < kOwn; ++j) {
        ptx::send(to + j * kPartBytes, barrier,
                  make_float4(half_of(rank ^ 1, 4 * j), half_of(rank ^ 1, 4 * j + 1), half_of(rank ^ 1, 4 * j + 2),
                              half_of(rank ^ 1, 4 * j + 3)));
      }
      ptx::wait_barrier(received, 0);
#pragma unroll
      for (int pass = 0; pass < kTokens / 2 / kGatherTokens; ++pass) {
        const uint32_t buffer = gather + pass * kGatherBytes;
#pragma unroll
        for (int j = pass * 8; j < pass * 8 + 8; ++j) {
          const uint4 v = ptx::load_16(place + j * kPartBytes);
          const int token = 8 * (j - pass * 8) + 2 * t;
          put(buffer, token, half_of(rank, 4 * j) + __uint_as_float(v.x),
              half_of(rank, 4 * j + 2) + __uint_as_float(v.z));
          put(buffer, token + 1, half_of(rank, 4 * j + 1) + __uint_as_float(v.y),
              half_of(rank, 4 * j + 3) + __uint_as_float(v.w));
        }
        ptx::fence_async_proxy();
        sync_group();
        if (leader) {
          ptx::store_tile(&p.output_map, column0, work.token0 + rank * (kTokens / 2) + pass * kGatherTokens, buffer);
        }
      }
      break;  // a shared tile is the last
    }

    if (kDense || !work.split) {
#pragma unroll
      for (int pass = 0; pass < kTokens / kPass; ++pass) {
        sync_group();
        put_pass(gather, sum + pass * (kPass / 2));
        write_rows(work.token0 + pass * kPass, kPass);
      }
    } else {
      // Every block adds up its share of the tile's tokens, to which all send their parts. First all must be done with
      // their slots, for that is where the parts go.
      constexpr int kEights = kTokens / 8;
      const int j0 = kEights * rank / p.split, count = kEights * (rank + 1) / p.split - j0;
      const uint32_t received = window + L::kReceived;
      if (leader && group == 0) ptx::expect_bytes(received, count * (p.split - 1) * kPartBytes);
      ptx::arrive_cluster_relaxed(), ptx::wait_cluster();
      // Of its eights, a thread finds the parts of all blocks one behind the other. Block b owns eights from
      // kEights · b / split on.
      const uint32_t mine = window + L::kExchange + (128 * group + 32 * c.w + c.lane) * 16;
      const uint32_t stride = p.split * kPartBytes;
      int owner = -1;
      uint32_t to = 0, barrier = 0;
#pragma unroll
      for (int j = 0; j < kEights; ++j) {
        const int owner_now = ((j + 1) * p.split - 1) / kEights;
        if (owner_now != owner) {
          owner = owner_now;
          to = ptx::address_in_rank(mine + rank * kPartBytes, owner);
          barrier = ptx::address_in_rank(received, owner);
        }
        if (owner == rank) {
          ptx::store_16(to, make_uint4(__float_as_uint(sum[4 * j]), __float_as_uint(sum[4 * j + 1]),
                                       __float_as_uint(sum[4 * j + 2]), __float_as_uint(sum[4 * j + 3])));
        } else {
          ptx::send(to, barrier, make_float4(sum[4 * j], sum[4 * j + 1], sum[4 * j + 2], sum[4 * j + 3]));
        }
        to += stride;
      }
      ptx::wait_barrier(received, 0);
      const auto add_parts = [&](int at, auto parts) {
        float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int from = 0; from < decltype(parts)::value; ++from) {
          if (from >= p.split) break;
          const uint4 v = ptx::load_16(mine + at * stride + from * kPartBytes);
          total.x += __uint_as_float(v.x), total.y += __uint_as_float(v.y);
          total.z += __uint_as_float(v.z), total.w += __uint_as_float(v.w);
        }
        return total;
      };
      for (int done = 0; done < count; done += kPass / 8) {
        const int pass = min(kPass / 8, count - done);
        sync_group();
#pragma unroll 4
        for (int j = 0; j < pass; ++j) {
          const float4 total = p.split <= 2 ? add_parts(done + j, std::integral_constant<int, 2>{})
                                            : add_parts(done + j, std::integral_constant<int, 8>{});
          put(gather, 8 * j + 2 * t, total.x, total.z);
          put(gather, 8 * j + 2 * t + 1, total.y, total.w);
        }
        write_rows(work.token0 + 8 * (j0 + done), 8 * pass);
      }
    }
    if (!more_work) break;
    work = upcoming;
  }
  if (threadIdx.x % 128 == 0) ptx::wait_stores();
  // No block of a pair ends while the other may still copy activations to it.
  if (p.share) __syncwarp(), ptx::arrive_cluster_relaxed(), ptx::wait_cluster();
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

template <typename T, LinearDirection kDirection, int kTokens, bool kDense>
void launch(const LinearArguments& arguments, const LinearPlan& plan, cudaStream_t stream) {
  using L = Layout<kTokens, kDense>;
  constexpr int kMostTeams = kTokens <= 128 ? 2 : 1;
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
  p.beside = plan.beside > 0;
  p.begun = p.beside ? arguments.lora.begun : nullptr;
  p.skipped = static_cast<int>(plan.blocks_beside(arguments.m, rank));  // where there is no room for them
  p.input = make_tensor_map(arguments.input, kElement, arguments.m, reduction, reduction * 2,
                            p.share ? kTokens / 2 : kTokens, kStep, CU_TENSOR_MAP_SWIZZLE_128B);
  if (kDense) {
    p.packed = make_tensor_map(arguments.workspace, kElement, matrix.n, matrix.k, matrix.k * 2,
                               kForward ? kTileW : kStep, kStep, CU_TENSOR_MAP_SWIZZLE_128B);
  } else {
    p.packed = make_tensor_map(matrix.packed, CU_TENSOR_MAP_DATA_TYPE_UINT8, matrix.n, matrix.k / 2, matrix.k / 2,
                               kForward ? kTileW : kStep, (kForward ? kStep : kTileW) / 2,
                               kForward ? CU_TENSOR_MAP_SWIZZLE_32B : CU_TENSOR_MAP_SWIZZLE_64B);
  }
  if (rank > 0) {
    p.left = make_tensor_map(arguments.lora.left, kElement, arguments.m, rank, rank * 2, kTokens, kStep,
                             CU_TENSOR_MAP_SWIZZLE_128B);
  }
  p.weight = arguments.weight;
  p.table_scale = table_scale<T>(arguments.weight);
  p.factor = arguments.lora.factor;
  p.float_factor = arguments.lora.float_factor;
  p.bias = arguments.bias;
  p.dropout = arguments.dropout;
  p.output = arguments.output;
  p.vector_output = aligned_16(p.output) && p.columns % 8 == 0;
  if (p.vector_output) {
    p.output_map = make_tensor_map(p.output, kElement, arguments.m, p.columns, int64_t{p.columns} * 2,
                                   std::min(kTokens, L::kGatherTokens), 64, CU_TENSOR_MAP_SWIZZLE_128B);
  }
  p.steps = static_cast<int>(ceil_div(reduction, kStep));
  for (int part = 0; part <= p.split; ++part) p.first_step[part] = p.steps * part / p.split;
  p.rank = static_cast<int>(rank);
  p.lora_steps = static_cast<int>(ceil_div(rank, kStep));
  p.quick = matrix.double_quantized() && matrix.blocksize == 64 && matrix.k % (kForward ? 256 : 128) == 0 &&
            reinterpret_cast<uintptr_t>(matrix.absmax_codes) % 4 == 0;

  const int cluster = p.share ? 2 : p.split, units = p.tiles_m * p.tiles_w;
  const auto shape_of = [&](const void* kernel, int teams) {
    allow_shared_memory(kernel, "linear_wgmma", kSharedBytes);
    const unsigned consumers = teams == 1 ? kTeam : Teams<kTokens, kMostTeams>::kConsumers;
    return Launch{1, consumers + 128, kSharedBytes, stream, static_cast<unsigned>(cluster), true};
  };
  const auto one_team = linear_wgmma_kernel<T, kDirection, kTokens, 1, kDense>;
  int clusters;
  if (p.split == 1) {
    const int room = std::max(1, current_device().sm_count / cluster);
    p.skipped /= cluster;
    if (units + p.skipped <= room) p.skipped = 0;
    p.whole = units;
    clusters = std::min(units, room);
  } else {
    // As many turns of whole tiles as fill all clusters, and one in which a cluster shares a tile. Where the rest is
    // too much for that one, all tiles are shared, with as many clusters as there are tiles.
    const void* kernel = reinterpret_cast<const void*>(one_team);
    clusters = resident_clusters(kernel, shape_of(kernel, 1));
    if (p.skipped >= clusters * cluster) p.skipped = 0;
    p.rounds = (units + p.skipped) / (clusters * cluster);
    if (units + p.skipped - p.rounds * clusters * cluster > clusters) p.rounds = 0;
    p.whole = p.rounds * clusters * cluster - p.skipped;
    if (p.rounds == 0) clusters = units, p.whole = p.skipped = 0;
  }
  // Two teams, where they pay: of few tokens with nothing beside, or of 128 with low-rank steps only at the end. Each
  // of those steps has a slot of its own, and one team's first step another.
  const bool one_turn = clusters == units && p.rounds == 0 && p.skipped == 0;
  const bool pays = kTokens == 128 ? rank == 0 || (p.beside && p.lora_steps <= L::kStages)
                                   : !p.beside && p.lora_steps + 1 < L::kStages;
  const int teams = one_turn && pays && p.steps / p.split >= 2 ? kMostTeams : 1;
  const auto kernel = teams == 1 ? one_team : linear_wgmma_kernel<T, kDirection, kTokens, kMostTeams, kDense>;
  Launch shape = shape_of(reinterpret_cast<const void*>(kernel), teams);
  shape.grid = grid_size(int64_t{clusters} * cluster, "linear_wgmma");
  const std::string problem = "of " + std::to_string(p.m) + " rows and a [" + std::to_string(matrix.n) + ", " +
                              std::to_string(matrix.k) + "] weight";
  launch_kernel("linear_wgmma", problem, shape, kernel, p);
}

template <typename T, LinearDirection kDirection>
void launch_tokens(const LinearArguments& arguments, const LinearPlan& plan, cudaStream_t stream) {
  switch (plan.tile_m) {
    case 32:
      return launch<T, kDirection, 32, false>(arguments, plan, stream);
    case 64:
      return launch<T, kDirection, 64, false>(arguments, plan, stream);
    case 128:
      return launch<T, kDirection, 128, false>(arguments, plan, stream);
    default:
      return plan.kernel == LinearKernel::kDense ? launch<T, kDirection, 256, true>(arguments, plan, stream)
                                                 : launch<T, kDirection, 256, false>(arguments, plan, stream);
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
