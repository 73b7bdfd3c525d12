// The forward for up to 16 rows of x on Hopper, near the rate at which memory delivers the weight.
//
// The arithmetic is linear_few_rows's: W is the left operand of mma.m16n8k16, one packed byte is one register of it,
// and a table in shared memory, copied for every bank, turns one into the other. What differs is how the bytes travel
// and who waits for whom:
//
//   - One persistent block to an SM makes the table once. Its entries lie 256 bytes apart at a multiple of 64 KB, so
//     that an entry's address is one byte permutation: the packed byte put into bits 8 to 15 of a lane's base address.
//   - A warp keeps its part of x, 256 k of up to 16 rows or 512 of up to 8, in registers for good, and walks down the
//     rows of W in tiles of 16, each in one part or two along k. Its tiles arrive in a ring of its own, which it
//     refills itself through the tensor memory accelerator: no warp waits for another's copies.
//   - The warps' sums of a tile are added while the next tile is multiplied.
//   - Where K is more than a block's warps cover, the blocks of a cluster share it out and add their sums through
//     distributed shared memory, in a fixed order.
//   - Launched programmatically, it requests its first tiles of W before the previous kernel has ended. Everything that
//     is not the weight waits for that end. So no kernel that writes weights may let its successor start early.
#include <algorithm>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/linear_kernels.h"
#include "kernels/cuda/tensor_map.h"
#include "ptx/cluster.h"
#include "ptx/mma.h"
#include "ptx/tma.h"

namespace pyquant::cuda {
namespace {

constexpr int kWarps = 16;
constexpr int kThreads = 32 * kWarps;
constexpr int kRows = 16;   // of W in a tile
constexpr int kChunk = 64;  // k that share one absmax
constexpr int kChunks = 4;  // of a part of a tile
constexpr int kTileRowBytes = kChunks * kChunk / 2;
constexpr int kTileBytes = kRows * kTileRowBytes;  // of one warp, a part
// More would not be read faster: 64 KB on their way to an SM already cover the latency of memory, and what is small but
// urgent, x and absmax, waits behind them.
constexpr int kStages = 2;
constexpr int kAhead = 3;  // tiles whose statistics are on their way to the L2 cache
constexpr int kMaxCluster = 8;
constexpr int kSlots = 4;   // tiles that blocks of a cluster may be apart
constexpr int kPiece = 32;  // floats, one a lane

// Shared memory: what fits below the table, the table, and the rest of the ring.
constexpr int kEntryPitch = 256;  // bytes; 32 copies of a byte's pair in the first half, a piece in the second
constexpr int kTableBytes = 256 * kEntryPitch;
constexpr int kStageBytes = kWarps * kTileBytes;

struct Low {
  unsigned char stage0[kStageBytes];
  float nested_code[256];
  float offset;
  float4 scale[2][kWarps][kRows];                // absmax of a warp's tile and of the next
  float inbox[kSlots][2 * kMaxCluster][kPiece];  // sums from the blocks of the cluster, of some tiles
  uint64_t full[kWarps][kStages];                // a warp's tile has arrived
  uint64_t summed[4];                            // every thread has written its sums of a tile
  uint64_t received[kSlots];                     // the inbox is full
  uint64_t free[kSlots];  // the inboxes of the cluster have been read; the last of twelve in a row
};
constexpr int kLowBytes = (sizeof(Low) + 1023) / 1024 * 1024;
// With 16 rows and the low-rank term, or two parts, the registers do not suffice: x of the last rows in that many of
// the last chunks lies in shared memory.
template <int kTokenTiles, int kParts, bool kLora>
constexpr int kParked = kParts == 2 ? 2 + kLora : (kLora && kTokenTiles == 2 ? 1 : 0);
// No more than an instantiation uses: the rest is its L1 cache.
template <int kTokenTiles, int kParts, bool kLora>
constexpr int kSharedBytes = 2 * kTableBytes + (kStages - 1) * kStageBytes +
                             kParked<kTokenTiles, kParts, kLora> * 2 * kThreads * static_cast<int>(sizeof(uint4));
static_assert(kLowBytes + 1024 <= kTableBytes, "below the first multiple of 64 KB but for the runtime's own 1 KB");

// The row, of the upper 8 of a tile, that lanes 4g … 4g + 3 hold: such that the 8-byte reads of half a warp from rows
// of 128 swizzled bytes meet every bank.
[[maybe_unused]] __device__ inline int tile_row(int g) { return (g & 3) << 1 | g >> 2; }
// Where the 8 bytes of chunk 0 for lane t of that row lie; those of chunk c are at this ^ 32 c.
[[maybe_unused]] __device__ inline int tile_offset(int row, int t) {
  return row * kTileRowBytes + (((t >> 1) ^ (row & 7)) << 4) + (t & 1) * 8;
}

// The pair of byte kByte of `word`. `lane_base`: the address of the lane's copy of entry 0, bits 8 to 15 of it 0.
template <int kByte>
__device__ inline uint32_t look_up(uint32_t word, uint32_t lane_base) {
  uint32_t pair;
  asm("ld.shared.u32 %0, [%1];" : "=r"(pair) : "r"(__byte_perm(word, lane_base, 0x7604 | kByte << 4)));
  return pair;
}

template <typename T>
struct Parameters {
  Weight weight;
  int m, tiles, chunks;               // tiles of rows, chunks of W along k
  int clusters, cluster_size, warps;  // that work in a block
  const T* x;
  const T* bias;
  LowRank lora;
  T* y;
};

// kTokenTiles: rows of x, in eights. kParts: of a warp's tile along k.
template <typename T, int kTokenTiles, int kParts, bool kLora>
__global__ void __launch_bounds__(kThreads, 1)
    linear_stream_kernel(const __grid_constant__ CUtensorMap packed_map, const __grid_constant__ Parameters<T> p) {
#if __CUDA_ARCH__ >= 900
  constexpr int kValues = 4 * kTokenTiles;                                 // sums of a lane
  constexpr int kBuffers = 256 / (kWarps * kValues), kLag = kBuffers / 2;  // tiles whose sums the table's holes keep
  extern __shared__ __align__(1024) unsigned char shared[];
  // Everything lies at a fixed distance from the table: one register addresses all of it.
  const uint32_t window = ptx::shared_address(shared);
  unsigned char* table = shared + (((window + kLowBytes + kTableBytes - 1) & ~(kTableBytes - 1u)) - window);
  Low& low = *reinterpret_cast<Low*>(table - kLowBytes);
  const auto piece = [&](int index) { return reinterpret_cast<float*>(table + index * kEntryPitch + kEntryPitch / 2); };

  // The warp's number from lane 0: so the compiler knows that it is uniform.
  const int warp = __shfl_sync(0xFFFFFFFFu, static_cast<int>(threadIdx.x) / 32, 0), lane = threadIdx.x % 32;
  const int g = lane / 4, t = lane % 4, row = tile_row(g);
  const int cluster_size = p.cluster_size;
  const int rank = static_cast<int>(blockIdx.x) % cluster_size, cluster = static_cast<int>(blockIdx.x) / cluster_size;
  const int tiles = (p.tiles - cluster + p.clusters - 1) / p.clusters;  // cluster, cluster + clusters …
  const int first_chunk = (rank * p.warps + warp) * kChunks * kParts;
  const bool working = warp < p.warps && first_chunk < p.chunks;
  const Weight& weight = p.weight;
  const int n = static_cast<int>(weight.matrix.n);
  const bool nested = weight.matrix.double_quantized();

  const auto stage_at = [&](int stage) {
    return (stage == 0 ? low.stage0 : table + kTableBytes + (stage - 1) * kStageBytes) + warp * kTileBytes;
  };
  // Part j of all: part j % kParts of tile j / kParts.
  const auto request = [&](int j) {
    if (j >= tiles * kParts) return;
    uint64_t* full = &low.full[warp][j % kStages];
    ptx::expect_bytes(full, kTileBytes);
    ptx::copy_tile_once(stage_at(j % kStages), &packed_map, (first_chunk + j % kParts * kChunks) * (kChunk / 2),
                        (cluster + j / kParts * p.clusters) * kRows, full);
  };

  if (lane == 0) {
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) ptx::init_barrier(&low.full[warp][stage], 1);
    ptx::fence_barrier_init();
    if (working) {
#pragma unroll
      for (int i = 0; i < kStages; ++i) request(i);
    }
  }
  __syncwarp();

  // absmax of a part: lane l loads those of chunks 2 (l % 2) and the next in row l / 2, and decodes them a part later.
  // Beyond the ends of W the last ones are read: no product with them reaches y.
  const auto chunk_pair = [&](int j) { return first_chunk + j % kParts * kChunks + lane % 2 * 2; };
  const bool first_inside = chunk_pair(0) < p.chunks;  // kept where there are registers for it
  const auto inside = [&](int j) { return kParts == 1 ? first_inside : chunk_pair(j) < p.chunks; };
  const int block_shift = weight.blocksize_log2 - 6;
  struct {
    uint32_t raw[2];
    float nested;
  } absmax;
  const auto load_scales = [&](int j) {
    const int at = inside(j) ? chunk_pair(j) : 0;
    const int block = ((cluster + j / kParts * p.clusters) * kRows + lane / 2) * p.chunks + at;
    const int first = block >> block_shift, second = (block + 1) >> block_shift;
    if (nested) {
      absmax.raw[0] = __ldg(weight.matrix.absmax_codes + first);
      absmax.raw[1] = __ldg(weight.matrix.absmax_codes + second);
      absmax.nested = __ldg(weight.matrix.nested_absmax + (first >> 8));
    } else {
      absmax.raw[0] = __float_as_uint(__ldg(weight.matrix.absmax + first));
      absmax.raw[1] = __float_as_uint(__ldg(weight.matrix.absmax + second));
    }
  };
  if (working) load_scales(0);
  // Statistics of later tiles come to the L2 cache ahead of their loads, a warp for all: lane l those of half a block's
  // chunks in row l / 2.
  const auto prefetch_scales = [&](int i) {
    const int chunk = min((rank * p.warps + lane % 2 * (p.warps / 2)) * kChunks * kParts, p.chunks - 1);
    const int index = ((cluster + i * p.clusters) * kRows + lane / 2) * p.chunks + chunk >> block_shift;
    if (nested) {
      ptx::prefetch_to_l2(weight.matrix.absmax_codes + index);
      ptx::prefetch_to_l2(weight.matrix.nested_absmax + (index >> 8));
    } else {
      ptx::prefetch_to_l2(weight.matrix.absmax + index);
    }
  };
  if (warp < kAhead && warp + 1 < tiles) prefetch_scales(warp + 1);

  float nested_code = 0.0f;
  const float offset = load_offset(weight);
  if (nested && threadIdx.x < 256) nested_code = __ldg(weight.matrix.nested_code + threadIdx.x);

  if (threadIdx.x < 4 + 2 * kSlots) {
    const int arrivals = threadIdx.x < 4 ? kThreads : threadIdx.x < 4 + kSlots ? 1 : kValues;
    ptx::init_barrier(low.summed + threadIdx.x, arrivals);
    ptx::fence_barrier_init();
  }
  __syncwarp();
  if (cluster_size > 1) ptx::arrive_cluster_relaxed();

  // The table: a thread stores 16 copies of one byte's pair.
  {
    const float code = weight.codebook[lane % 16];
    const float first = __shfl_sync(0xFFFFFFFFu, code, warp), second = __shfl_sync(0xFFFFFFFFu, code, lane / 2);
    const uint32_t pair = pack_pair<T>(first, second);
    uint4* copies = reinterpret_cast<uint4*>(table + (warp * 16 + lane / 2) * kEntryPitch) + lane % 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) copies[2 * i] = make_uint4(pair, pair, pair, pair);
  }

  ptx::wait_for_previous_kernel();
  ptx::let_next_kernel_start();

  constexpr int kFirstParked = kParts * kChunks - kParked<kTokenTiles, kParts, kLora>;
  uint4* parked = reinterpret_cast<uint4*>(table + kTableBytes + (kStages - 1) * kStageBytes) + threadIdx.x;
  static_assert(kParts * kTokenTiles <= 2);
  uint32_t x[kParts * kChunks][kTokenTiles][8];
#pragma unroll
  for (int u = 0; u < kTokenTiles; ++u) {
    const T* from = p.x + min(8 * u + g, p.m - 1) * weight.matrix.k + first_chunk * kChunk + 16 * t;
#pragma unroll
    for (int c = 0; c < kParts * kChunks; ++c) {
      uint4 first{}, second{};
      if (working && first_chunk + c < p.chunks) {
        first = *reinterpret_cast<const uint4*>(from + c * kChunk);
        second = *(reinterpret_cast<const uint4*>(from + c * kChunk) + 1);
      }
      if (c >= kFirstParked && u == kTokenTiles - 1) {
        parked[2 * (c - kFirstParked) * kThreads] = first, parked[(2 * (c - kFirstParked) + 1) * kThreads] = second;
        continue;
      }
      x[c][u][0] = first.x, x[c][u][1] = first.y, x[c][u][2] = first.z, x[c][u][3] = first.w;
      x[c][u][4] = second.x, x[c][u][5] = second.y, x[c][u][6] = second.z, x[c][u][7] = second.w;
    }
  }
  if (threadIdx.x < 256) low.nested_code[threadIdx.x] = nested_code;
  if (threadIdx.x == 0) low.offset = offset;
  __syncthreads();                            // the table and the barriers
  if (cluster_size > 1) ptx::wait_cluster();  // the barriers of the other blocks

  // Sum v of a lane belongs to token 8 (v / 4) + 2t + v % 2 and to its row of W, 8 further down for v % 4 >= 2.
  const auto store = [&](int i, int v, float total) {
    const int token = 8 * (v / 4) + 2 * t + v % 2;
    const int64_t at = int64_t{cluster + i * p.clusters} * kRows + row + (v & 2) * 4;
    if (token >= p.m) return;
    if (p.bias != nullptr) total += to_float(p.bias[at]);
    p.y[token * int64_t{n} + at] = from_float<T>(total);
  };
  // Sum v of the cluster is finished by block v % size, there by warp v / size.
  const int owned = warp * cluster_size + rank;
  const int owners_values = (kValues - rank + cluster_size - 1) / cluster_size;
  const auto finish_received = [&](int i) {
    if (owned >= kValues) return;
    ptx::wait_barrier(&low.received[i % kSlots], i / kSlots & 1);
    float total = 0.0f;
    for (int from = 0; from < cluster_size; ++from) total += low.inbox[i % kSlots][warp * cluster_size + from][lane];
    __syncwarp();
    if (lane < cluster_size) ptx::arrive_at_rank(&low.free[i % kSlots], lane, total);
    store(i, owned, total);
  };
  // Adds the warps' sums of tile i in their order, a warp for each value, other warps for the next tile.
  const auto add_warps = [&](int i) {
    ptx::wait_barrier(&low.summed[i % kBuffers], i / kBuffers & 1);
    const int v = (warp + i * kValues) % kWarps;
    if (v < kValues) {
      float total = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) total += piece((i % kBuffers * kWarps + w) * kValues + v)[lane];
      if (cluster_size == 1) {
        store(i, v, total);
      } else {
        if (i >= kSlots) ptx::wait_barrier(&low.free[i % kSlots], (i / kSlots & 1) ^ 1);
        ptx::send_to_rank(&low.inbox[i % kSlots][v / cluster_size * cluster_size + rank][lane],
                          &low.received[i % kSlots], v % cluster_size, total);
      }
    }
    if (cluster_size > 1) {
      if (threadIdx.x == 0 && owners_values > 0) {
        ptx::expect_bytes(&low.received[i % kSlots], owners_values * cluster_size * kPiece * sizeof(float));
      }
      if (i >= 2) finish_received(i - 2);
    }
  };

  const auto decode_scales = [&](int j) {
    float2 decoded = make_float2(__uint_as_float(absmax.raw[0]), __uint_as_float(absmax.raw[1]));
    if (nested) {
      decoded.x = __fadd_rn(__fmul_rn(low.nested_code[absmax.raw[0]], absmax.nested), low.offset);
      decoded.y = __fadd_rn(__fmul_rn(low.nested_code[absmax.raw[1]], absmax.nested), low.offset);
    }
    if (!inside(j)) decoded = make_float2(0.0f, 0.0f);
    reinterpret_cast<float2*>(low.scale[j & 1][warp])[lane] = decoded;
    if (j + 1 < tiles * kParts) load_scales(j + 1);
  };
  if (working) {
    decode_scales(0);
    __syncwarp();
  }

  const uint32_t lane_base = ptx::shared_address(table) + 4 * lane;
  const int offset_in_tile = tile_offset(row, t);
#pragma unroll 1
  for (int i = 0; i < tiles; ++i) {
    ptx::FragC sum[kTokenTiles] = {};
    if (working) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const int j = i * kParts + part;
        const int stage = kParts == kStages ? part : j % kStages, turn = kParts == kStages ? i : j / kStages;
        ptx::wait_barrier(&low.full[warp][stage], turn & 1);
        const float4 upper_scales = low.scale[kParts == 2 ? part : j & 1][warp][row],
                     lower_scales = low.scale[kParts == 2 ? part : j & 1][warp][row + 8];
        const float upper_scale[kChunks] = {upper_scales.x, upper_scales.y, upper_scales.z, upper_scales.w};
        const float lower_scale[kChunks] = {lower_scales.x, lower_scales.y, lower_scales.z, lower_scales.w};
        const unsigned char* tile = stage_at(stage);
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          const uint2 upper = *reinterpret_cast<const uint2*>(tile + (offset_in_tile ^ c << 5));
          const uint2 lower = *reinterpret_cast<const uint2*>(tile + (offset_in_tile ^ c << 5) + kTileBytes / 2);
          if (c == kChunks - 1) decode_scales(j + 1);
          const int parked_chunk = part * kChunks + c - kFirstParked;
          if (parked_chunk >= 0) {
            const uint4 first = parked[2 * parked_chunk * kThreads], second = parked[(2 * parked_chunk + 1) * kThreads];
            uint32_t (&last)[8] = x[part * kChunks + c][kTokenTiles - 1];
            last[0] = first.x, last[1] = first.y, last[2] = first.z, last[3] = first.w;
            last[4] = second.x, last[5] = second.y, last[6] = second.z, last[7] = second.w;
          }
          const uint32_t (&x_of_chunk)[kTokenTiles][8] = x[part * kChunks + c];
          ptx::FragC product[kTokenTiles] = {};
#pragma unroll
          for (int quarter = 0; quarter < 4; ++quarter) {
            const uint32_t from_upper = quarter < 2 ? upper.x : upper.y, from_lower = quarter < 2 ? lower.x : lower.y;
            ptx::FragA a;
            if (quarter % 2 == 0) {
              a.reg[0] = look_up<0>(from_upper, lane_base), a.reg[1] = look_up<0>(from_lower, lane_base);
              a.reg[2] = look_up<1>(from_upper, lane_base), a.reg[3] = look_up<1>(from_lower, lane_base);
            } else {
              a.reg[0] = look_up<2>(from_upper, lane_base), a.reg[1] = look_up<2>(from_lower, lane_base);
              a.reg[2] = look_up<3>(from_upper, lane_base), a.reg[3] = look_up<3>(from_lower, lane_base);
            }
#pragma unroll
            for (int u = 0; u < kTokenTiles; ++u) {
              ptx::mma<T>(product[u], a, {{x_of_chunk[u][2 * quarter], x_of_chunk[u][2 * quarter + 1]}});
            }
          }
#pragma unroll
          for (int u = 0; u < kTokenTiles; ++u) {
            float (&total)[4] = sum[u].value;
            const float (&products)[4] = product[u].value;
            total[0] = fmaf(upper_scale[c], products[0], total[0]);
            total[1] = fmaf(upper_scale[c], products[1], total[1]);
            total[2] = fmaf(lower_scale[c], products[2], total[2]);
            total[3] = fmaf(lower_scale[c], products[3], total[3]);
          }
        }
        __syncwarp();  // every lane has read its bytes
        // Whether kParts is 1 is known before the loop is unrolled, which `part` is not.
        const bool first_part = kParts == 1 || part == 0;
        if (first_part && warp == i % kWarps && i + 1 + kAhead < tiles) prefetch_scales(i + 1 + kAhead);
        if (lane == 0) request(j + kStages);
      }
    }

    if constexpr (kLora) {
      // The low-rank term is sixteen k more for some of the warps. The rank is even: a pair is one word, or of float32
      // two. Those are rounded once all are here, lest a load wait for the one before.
      const int lora_rank = static_cast<int>(p.lora.rank);
      const bool float_factor = p.lora.float_factor;
      const auto load = [&](const void* matrix, bool is_float, int at_row, int r) {
        const int64_t at = (int64_t{at_row} * lora_rank + r) * (is_float ? 4 : 2);
        const auto* words = reinterpret_cast<const uint32_t*>(static_cast<const unsigned char*>(matrix) + at);
        return uint2{r < lora_rank ? words[0] : 0, r < lora_rank && is_float ? words[1] : 0};
      };
#pragma unroll 1
      for (int r = (rank * kWarps + warp) * 16 + 2 * t; r - 2 * t < lora_rank; r += cluster_size * kWarps * 16) {
        const int upper = (cluster + i * p.clusters) * kRows + row;
        uint2 factor[4];
#pragma unroll
        for (int v = 0; v < 4; ++v) factor[v] = load(p.lora.factor, float_factor, upper + v % 2 * 8, r + v / 2 * 8);
        ptx::FragB left[kTokenTiles];
#pragma unroll
        for (int u = 0; u < kTokenTiles; ++u) {
          const int token = min(8 * u + g, p.m - 1);
          left[u] = {{load(p.lora.left, false, token, r).x, load(p.lora.left, false, token, r + 8).x}};
        }
        ptx::FragA a;
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          a.reg[v] = factor[v].x;
          if (float_factor) a.reg[v] = pack_pair<T>(__uint_as_float(factor[v].x), __uint_as_float(factor[v].y));
        }
#pragma unroll
        for (int u = 0; u < kTokenTiles; ++u) ptx::mma<T>(sum[u], a, left[u]);
      }
    }

    // First the sums of kLag tiles ago. That all warps have written those means that all have read those of another
    // kLag tiles before, whose place this tile's take.
    if (i >= kLag) add_warps(i - kLag);
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
      piece((i % kBuffers * kWarps + warp) * kValues + v)[lane] = sum[v / 4].value[v % 4];
    }
    ptx::arrive(&low.summed[i % kBuffers]);
  }
  for (int i = max(tiles - kLag, 0); i < tiles; ++i) add_warps(i);
  if (cluster_size > 1) {
    for (int i = max(tiles - 2, 0); i < tiles; ++i) finish_received(i);
    // No block ends while others may still write to it.
    ptx::arrive_cluster();
    ptx::wait_cluster();
  }
#else
  __trap();  // the plan takes this kernel only where there is code for sm_90a
#endif
}

template <typename T, int kTokenTiles, int kParts, bool kLora>
void launch_stream(const std::string& problem, const CUtensorMap& map, Parameters<T> p, cudaStream_t stream) {
  const auto kernel = linear_stream_kernel<T, kTokenTiles, kParts, kLora>;
  const void* function = reinterpret_cast<const void*>(kernel);
  constexpr int kBytes = kSharedBytes<kTokenTiles, kParts, kLora>;
  allow_shared_memory(function, "linear_stream", kBytes);
  Launch launch{1, kThreads, kBytes, stream, static_cast<unsigned>(p.cluster_size), true};
  p.clusters = std::min(p.tiles, resident_clusters(function, launch));
  launch.grid = static_cast<unsigned>(p.clusters * p.cluster_size);
  launch_kernel("linear_stream", problem, launch, kernel, map, p);
}

}  // namespace

void linear_stream(const LinearArguments& arguments, const LinearPlan& plan, cudaStream_t stream) {
  const QuantizedMatrix& matrix = arguments.weight.matrix;
  const std::string problem = "of " + std::to_string(arguments.m) + " rows and a [" + std::to_string(matrix.n) + ", " +
                              std::to_string(matrix.k) + "] weight";
  with_half_type(arguments.dtype, [&](auto element) {
    using T = decltype(element);
    Parameters<T> p{};
    p.weight = arguments.weight;
    p.m = static_cast<int>(arguments.m);
    p.tiles = static_cast<int>(ceil_div(matrix.n, kRows));
    p.chunks = static_cast<int>(matrix.k / kChunk);
    p.cluster_size = plan.split;
    const int parts = plan.tile_k / (kWarps * kChunks * kChunk);
    p.warps = static_cast<int>(ceil_div(ceil_div(p.chunks, kChunks * parts), plan.split));
    p.x = static_cast<const T*>(arguments.input);
    p.bias = static_cast<const T*>(arguments.bias);
    p.lora = arguments.lora;
    p.y = static_cast<T*>(arguments.output);
    const CUtensorMap map = make_tensor_map(matrix.packed, CU_TENSOR_MAP_DATA_TYPE_UINT8, matrix.n, matrix.k / 2,
                                            matrix.k / 2, kRows, kTileRowBytes, CU_TENSOR_MAP_SWIZZLE_128B);
    const bool lora = arguments.lora.rank > 0;
    const auto launch = arguments.m > 8 ? (lora ? launch_stream<T, 2, 1, true> : launch_stream<T, 2, 1, false>)
                        : parts == 1    ? (lora ? launch_stream<T, 1, 1, true> : launch_stream<T, 1, 1, false>)
                                        : (lora ? launch_stream<T, 1, 2, true> : launch_stream<T, 1, 2, false>);
    launch(problem, map, p, stream);
  });
}

}  // namespace pyquant::cuda
