#include "dispatch/linear_plan.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <vector>

namespace pyquant {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

const char* name_of(LinearKernel kernel) {
  switch (kernel) {
    case LinearKernel::kStream:
      return "stream";
    case LinearKernel::kFewRows:
      return "few_rows";
    case LinearKernel::kSmallM:
      return "small_m";
    case LinearKernel::kWgmma:
      return "wgmma";
    case LinearKernel::kDense:
      return "dense";
    case LinearKernel::kMma:
      return "mma";
    default:
      return "simt";
  }
}

// What the cost model knows about a GPU. The clock, and the bandwidths of memory, are round figures of the data-centre
// GPUs; only ratios between candidates matter.
constexpr double kClock = 1.6e3;                // cycles a microsecond
constexpr double kBytesPerMicrosecond = 2.5e6;  // of memory
constexpr double kLaunch = 2.0;                 // microseconds for one launch more

// Bytes of the packed weight and its statistics.
double weight_bytes(const LinearProblem& p) { return p.n * p.k * (0.5 + 1.0 / p.blocksize); }

bool small_m_legal(const LinearProblem& p) {
  return p.direction == LinearDirection::kForward && p.dtype != DType::kFloat32 && p.m <= 8 && p.k % 32 == 0 &&
         p.aligned;
}

LinearPlan small_m_plan(const LinearProblem& p, int split) {
  const int rows = p.m > 2 ? 2 : 4;  // of W, a warp
  LinearPlan plan{LinearKernel::kSmallM, static_cast<int>(p.m), rows * 8 / split, 1024 * split, split, 0.0};
  // Decoding costs about 9 instructions a weight, every row of x about two more (measured on an H100).
  const double blocks = static_cast<double>(ceil_div(p.n, plan.tile_n));
  const double waves = std::max(1.0, blocks / (2.0 * p.sm_count));
  const double steps = static_cast<double>(ceil_div(p.k, plan.tile_k));
  const double issue = waves * steps * plan.tile_n * plan.tile_k * (9.5 + 2.0 * p.m) / 64.0 / kClock;
  // A warp waits for memory about once a step; other blocks hide it, as far as there are any.
  const double latency = steps * 0.8 * std::min(1.0, waves);
  plan.microseconds = kLaunch + latency + std::max(issue, weight_bytes(p) / kBytesPerMicrosecond);
  return plan;
}

bool stream_legal(const LinearProblem& p) {
  return p.direction == LinearDirection::kForward && p.dtype != DType::kFloat32 && p.m <= 16 && p.n % 16 == 0 &&
         p.k % 128 == 0 && p.k <= 8 * 4096 && p.n * p.k < (int64_t{1} << 36) && p.blocksize >= 64 && p.rank % 2 == 0 &&
         p.aligned && p.arch == 90 && p.sm_90a;
}

// Blocks that run at a time in clusters of `split`, as a part of all multiprocessors: clusters stay within a GPC.
// Measured on an H200.
constexpr double kClusterShare[9] = {0.0,         1.0,         1.0,         117 / 132.0, 120 / 132.0,
                                     110 / 132.0, 102 / 132.0, 105 / 132.0, 120 / 132.0};

LinearPlan stream_plan(const LinearProblem& p, int parts) {
  // A block's 16 warps keep 256 values of each row of x, or in two parts 512; the blocks of a cluster share out the
  // rest.
  const int64_t most = int64_t{4096} * parts;
  const int split = static_cast<int>(ceil_div(p.k, most));
  LinearPlan plan{LinearKernel::kStream, p.m <= 8 ? 8 : 16, 16, static_cast<int>(most), split, 0.0};
  // Measured on an H200: microseconds that a block needs for 16 rows of W and 4096 k, and a kernel to begin and end.
  const double clusters = std::max(1.0, std::floor(p.sm_count * kClusterShare[split] / split));
  const double rounds = std::max(1.0, static_cast<double>(ceil_div(p.n, 16)) / clusters);
  plan.microseconds = 1.2 + rounds * (p.m <= 8 ? 1.6 : 1.9) * (static_cast<double>(p.k) / split / 4096.0);
  return plan;
}

bool few_rows_legal(const LinearProblem& p) {
  return p.direction == LinearDirection::kForward && p.dtype != DType::kFloat32 && p.m <= 16 && p.k % 64 == 0 &&
         p.k < (1 << 24) && p.blocksize >= 64 && p.aligned && p.arch >= 80;
}

// The kernel is bound by the shared-memory and L1 pipeline: accesses, in cycles of an SM, of one warp's step of 64
// along k, for each tile of 16 rows of W (the look-ups, the packed bytes, absmax) and for the values of x that they
// share.
constexpr double kFewRowsTile = 68.0;
constexpr double kFewRowsValues8 = 8.0;
constexpr double kFewRowsValues16 = 32.0;

LinearPlan few_rows_plan(const LinearProblem& p, int tile) {
  LinearPlan plan{LinearKernel::kFewRows, p.m <= 8 ? 8 : 16, tile, 64, 1, 0.0};
  const double resident = static_cast<double>(ceil_div(p.n, tile)) / p.sm_count;
  const double step = tile / 16 * kFewRowsTile + (p.m <= 8 ? kFewRowsValues8 : kFewRowsValues16);
  // With fewer than two blocks on an SM, latency shows.
  const double exposed = 1.0 + 0.25 * std::max(0.0, 2.0 - resident);
  const double cycles = std::max(resident, 1.0) * static_cast<double>(ceil_div(p.k, 64)) * step * exposed;
  plan.microseconds = kLaunch + std::max(cycles / kClock, weight_bytes(p) / kBytesPerMicrosecond);
  return plan;
}

LinearPlan mma_plan(const LinearProblem& p, int tile, int split) {
  LinearPlan plan{LinearKernel::kMma, tile, tile, 64, split, 0.0};
  const double tiles = static_cast<double>(ceil_div(p.m, tile)) * ceil_div(p.columns(), tile) * split;
  const int resident = tile == 128 ? 2 : 4;  // blocks on one SM
  const double steps = static_cast<double>(ceil_div(ceil_div(p.reduction(), 64), split) + ceil_div(p.rank, 64));
  // Cycles of an SM for one step of one tile: the products at the rate mma.sync reaches, the weights at about 5
  // instructions each on 128 lanes, and as much again where odd shapes forbid vector loads.
  const bool vector = p.aligned && p.k % 32 == 0;
  const double step = tile * tile * 64.0 / 1100.0 + tile * 64.0 * (vector ? 5.0 : 60.0) / 128.0;
  // An SM works on its resident tiles together: the last wave is only as long as its fullest SM. One step of a lone
  // tile waits for memory and for the other warps.
  const double full = std::max(tiles / p.sm_count, 1.0);
  const double cycles =
      std::max(full * step, std::max(1.0, tiles / (p.sm_count * resident)) * std::max(step, 900.0)) * steps;
  plan.microseconds = kLaunch + std::max(cycles / kClock, weight_bytes(p) / kBytesPerMicrosecond);
  if (split > 1) plan.microseconds += kLaunch + 8.0 * split * p.m * p.columns() / kBytesPerMicrosecond;
  return plan;
}

// The tensor memory accelerator wants rows of multiples of 16 bytes.
bool hopper_legal(const LinearProblem& p) {
  return p.dtype != DType::kFloat32 && p.arch == 90 && p.sm_90a && p.aligned && p.k % 8 == 0 && p.rank % 8 == 0 &&
         (p.direction == LinearDirection::kForward || p.n % 8 == 0) && p.n * p.k < (int64_t{1} << 36) &&
         std::max({p.m, p.n, p.k}) < (int64_t{1} << 30) && ceil_div(p.m, 32) * ceil_div(p.columns(), 128) < (1 << 24);
}

bool wgmma_legal(const LinearProblem& p) { return hopper_legal(p) && p.k % 64 == 0; }
bool dense_legal(const LinearProblem& p) {
  const bool dropout_of_dx = p.direction == LinearDirection::kDx && p.rank > 0 && !p.left_beside;
  return hopper_legal(p) && !dropout_of_dx;
}

// Microseconds for the left factor of a low-rank term, computed before the linear, or beside it by blocks of that many
// rows. From a dozen times on an H100.
double low_rank_before(const LinearProblem& p) {
  return p.rank == 0 ? 0.0 : 6.0 + 2.0 * p.m * p.reduction() / kBytesPerMicrosecond;
}
double low_rank_beside(const LinearProblem& p, int rows) {
  const double step = rows == 256 ? 0.43 : rows == 128 ? 0.26 : 0.18;
  return 1.0 + static_cast<double>(ceil_div(p.reduction(), 64)) * step;
}

LinearPlan wgmma_plan(const LinearProblem& p, int tokens, int split, int beside) {
  LinearPlan plan{LinearKernel::kWgmma, tokens, 128, 64, split, 0.0};
  const int64_t tiles = ceil_div(p.m, tokens) * ceil_div(p.columns(), 128);
  // Sharing halves what blocks read and couples their pace: of use where all run together from beginning to end.
  plan.share = split == 1 && tokens == 256 && p.columns() > 128 && tiles <= p.sm_count;
  plan.beside = beside;
  const int64_t blocks = plan.blocks_beside(p.m, p.rank);
  const int64_t clusters = std::max<int64_t>(1, static_cast<int64_t>(p.sm_count * kClusterShare[split]) / split);
  // Turns of whole tiles, and turns of shared ones: one behind those, or else nothing but shared ones. In the first,
  // the blocks beside take the place of tiles.
  int64_t rounds = (tiles + blocks) / (clusters * split), shared_rounds = 0;
  if (split == 1) {
    rounds = ceil_div(tiles + blocks, clusters);
  } else {
    int64_t rest = tiles + blocks - rounds * clusters * split;
    if (rest > clusters) rounds = 0, rest = tiles + blocks / split;
    shared_rounds = ceil_div(rest, clusters);
  }
  const double steps = static_cast<double>(ceil_div(p.reduction(), 64)),
               lora = static_cast<double>(ceil_div(p.rank, 64));
  // Microseconds: a step (forward, dX) and the part of it that it takes with two teams of consumers, a tile's beginning
  // and end, the exchange of a shared tile's halves, and a launch that keeps all multiprocessors busy. Fitted to 336
  // plans of 56 problems timed on an H100; for all but two they choose one within 2 % of the fastest.
  // benchmarks/plan_costs.py does it anew.
  struct Cost {
    double forward, dx, teams, tile, exchange;
  };
  const Cost cost = tokens == 256   ? Cost{0.680, 0.741, 1.0, 0.20, 4.85}
                    : tokens == 128 ? Cost{0.457, 0.536, 0.92, 1.37, 2.13}
                    : tokens == 64  ? Cost{0.357, 0.400, 0.98, 0.94, 1.52}
                                    : Cost{0.363, 0.414, 0.86, 0.56, 1.35};
  constexpr double kBusy = 2.0;
  const bool one_turn = rounds == (split == 1 ? 1 : 0) && steps >= 2 * split;
  // As linear_wgmma.cu's launch decides, by the slots of its ring: 6 of 128 tokens, 10 of fewer.
  const bool teams = one_turn && (tokens == 128 ? p.rank == 0 || (beside > 0 && lora <= 6) : beside == 0 && lora <= 8);
  const double step = (p.direction == LinearDirection::kForward ? cost.forward : cost.dx) * (teams ? cost.teams : 1.0);
  const double shared = std::ceil(steps / split) * step + cost.tile;  // and the exchange
  const double exchange = cost.exchange * 2.0 * (split - 1) / split;  // of what a block does not add up itself
  const double work = rounds * ((steps + lora) * step + cost.tile) + shared_rounds * (shared + lora * step + exchange);
  const double busy = split > 1 && rounds > 0 ? p.sm_count : static_cast<double>(std::min(tiles, clusters) * split);
  plan.microseconds = kBusy * busy / p.sm_count + std::max(work, weight_bytes(p) / kBytesPerMicrosecond);
  if (beside > 0) {
    // One more launch, and what the first turn has to wait for.
    const double first_turn = rounds > 0 ? steps * step + cost.tile : shared;
    plan.microseconds += 1.2 + std::max(0.0, low_rank_beside(p, beside) - first_turn);
  }
  return plan;
}

// Below so many rows the weight is not dequantized, whatever the estimates: memory matters more.
constexpr int64_t kDenseRows = 1024;

LinearPlan dense_plan(const LinearProblem& p, int beside) {
  LinearPlan plan{LinearKernel::kDense, 256, 128, 64, 1, 0.0};
  plan.share = p.columns() > 128;
  plan.beside = beside;
  const int64_t tiles = ceil_div(p.m, 256) * ceil_div(p.columns(), 256) * 2;
  const double steps = static_cast<double>(ceil_div(p.reduction(), 64) + ceil_div(p.rank, 64));
  const int64_t rounds = ceil_div(tiles + plan.blocks_beside(p.m, p.rank), std::max(2, p.sm_count / 2 * 2));
  // Microseconds of a step (forward, dX) and of a tile's beginning and end, from two dozen times on an H100 under load,
  // relative to wgmma's; bytes of the weight read and written.
  const double step = p.direction == LinearDirection::kForward ? 0.66 : 0.62;
  constexpr double kTile = 0.5;
  plan.microseconds =
      2.0 * kLaunch + rounds * (steps * step + kTile) + (weight_bytes(p) + 2.0 * p.n * p.k) / kBytesPerMicrosecond;
  return plan;
}

LinearPlan simt_plan(const LinearProblem& p) {
  LinearPlan plan{LinearKernel::kSimt, 64, 64, 16, 1, 0.0};
  const double tiles = static_cast<double>(ceil_div(p.m, 64)) * ceil_div(p.columns(), 64);
  const double waves = std::max(1.0, tiles / p.sm_count);
  plan.microseconds = kLaunch + waves * static_cast<double>(p.reduction() + p.rank) * 64.0 * 64.0 / 48.0 / kClock;
  return plan;
}

std::vector<LinearPlan> candidates(const LinearProblem& p, const char* forced) {
  std::vector<LinearPlan> plans{simt_plan(p)};
  if (small_m_legal(p)) {
    for (int split : {1, 2, 4}) {
      // Rows of x of a whole step of `split` warps lie in shared memory: half as many for 5 to 8 rows.
      if (split == 4 && p.m > 4) continue;
      plans.push_back(small_m_plan(p, split));
    }
  }
  if (stream_legal(p)) {
    plans.push_back(stream_plan(p, 1));
    if (p.m <= 8 && p.k > 4096) plans.push_back(stream_plan(p, 2));
  }
  if (few_rows_legal(p)) {
    for (int tile : {16, 32}) plans.push_back(few_rows_plan(p, tile));
  }
  if (wgmma_legal(p)) {
    for (int tokens : {32, 64, 128, 256}) {
      // Every part of a split tile has at least one step, and eight tokens to add up.
      const int64_t parts = std::min<int64_t>(tokens / 8, ceil_div(p.reduction(), 64));
      for (int split = 1; split <= std::min<int64_t>(parts, 8); ++split) {
        for (int beside : {0, 64, 128, 256}) {
          if (beside > 0 && (p.rank == 0 || !p.left_beside)) break;
          const LinearPlan plan = wgmma_plan(p, tokens, split, beside);
          if (plan.blocks_beside(p.m, p.rank) <= p.sm_count / 4) plans.push_back(plan);
        }
      }
    }
  }
  static const char* const dense = std::getenv("PYQUANT_DENSE");
  const bool dense_wanted = forced != nullptr ? std::strncmp(forced, "dense", 5) == 0
                                              : p.m >= kDenseRows && (dense == nullptr || std::strcmp(dense, "0") != 0);
  if (dense_wanted && dense_legal(p)) {
    for (int beside : {0, 64, 128, 256}) {
      if (beside > 0 && (p.rank == 0 || !p.left_beside)) break;
      const LinearPlan plan = dense_plan(p, beside);
      if (plan.blocks_beside(p.m, p.rank) <= p.sm_count / 4) plans.push_back(plan);
    }
  }
  if (p.dtype != DType::kFloat32 && p.arch >= 80) {
    for (int tile : {128, 64}) {
      const int64_t steps = ceil_div(p.reduction(), 64);
      for (int split : {1, 2, 4, 8}) {
        if (split == 1 || steps >= 4 * split) plans.push_back(mma_plan(p, tile, split));
      }
    }
  }
  for (LinearPlan& plan : plans) {
    if (plan.beside == 0) plan.microseconds += low_rank_before(p);
  }
  return plans;
}

// A plan as PYQUANT_KERNEL asks for it: a kernel's name, and behind colons tile_m, split and beside where they are to
// be forced.
bool asked_for(const LinearPlan& plan, const char* forced) {
  std::string name = name_of(plan.kernel);
  for (const int choice : {plan.tile_m, plan.split, plan.beside}) {
    if (forced == name) return true;
    name += ':' + std::to_string(choice);
  }
  return forced == name;
}

LinearPlan best_plan(const LinearProblem& problem, const char* forced) {
  const std::vector<LinearPlan> plans = candidates(problem, forced);
  const LinearPlan* best = nullptr;
  for (const bool respect : {true, false}) {
    for (const LinearPlan& plan : plans) {
      if (respect && forced != nullptr && !asked_for(plan, forced)) continue;
      if (best == nullptr || plan.microseconds < best->microseconds) best = &plan;
    }
    if (best != nullptr) break;
  }
  return *best;
}

}  // namespace

int64_t LinearPlan::blocks_beside(int64_t m, int64_t rank) const {
  if (beside == 0) return 0;
  return ceil_div(ceil_div(m, beside) * ceil_div(rank, 64), cluster()) * cluster();
}

int64_t LinearPlan::workspace(const LinearProblem& problem) const {
  if (kernel == LinearKernel::kDense) return problem.n * problem.k * 2;
  if (kernel != LinearKernel::kMma || split == 1) return 0;
  // Rows of an even length, so that pairs of columns stay aligned.
  return int64_t{split} * problem.m * ((problem.columns() + 1) / 2 * 2) * 4;
}

LinearPlan plan_linear(const LinearProblem& problem) {
  const char* forced = std::getenv("PYQUANT_KERNEL");
  if (forced != nullptr) return best_plan(problem, forced);
  // A model asks for the same few problems again and again, each several times a layer; to choose takes one or two
  // microseconds.
  constexpr size_t kKept = 64;
  struct Kept {
    LinearProblem problem;
    LinearPlan plan;
  };
  thread_local std::optional<Kept> kept[kKept];
  uint64_t hash = static_cast<uint64_t>(problem.m * 31 + problem.n * 7 + problem.k * 3 + problem.rank);
  hash = hash * 8 + static_cast<uint64_t>(problem.direction) * 4 + problem.left_beside * 2 + problem.aligned;
  std::optional<Kept>& entry = kept[hash * 0x9E3779B97F4A7C15u >> 58];
  if (!entry || !(entry->problem == problem)) entry = Kept{problem, best_plan(problem, nullptr)};
  return entry->plan;
}

void log_plan(const LinearProblem& problem, const LinearPlan& plan) {
  const char* log = std::getenv("PYQUANT_LOG");
  if (log == nullptr || std::strcmp(log, "plan") != 0) return;
  static std::mutex mutex;
  static std::set<std::string> printed;
  const std::string line = describe(problem, plan);
  const std::lock_guard<std::mutex> lock(mutex);
  if (printed.insert(line).second) std::fprintf(stderr, "pyquant: %s\n", line.c_str());
}

std::string describe(const LinearProblem& problem, const LinearPlan& plan) {
  const char* dtype = problem.dtype == DType::kFloat32   ? "float32"
                      : problem.dtype == DType::kFloat16 ? "float16"
                                                         : "bfloat16";
  const std::string beside =
      plan.beside == 0
          ? ""
          : " beside " + std::to_string(plan.blocks_beside(problem.m, problem.rank)) + " blocks of the adapter's";
  char line[320];
  std::snprintf(
      line, sizeof(line),
      "%s m=%lld n=%lld k=%lld rank=%lld%s blocksize=%lld %s sm_%d%s: %s tile %dx%dx%d split %d%s, about %.1f us",
      problem.direction == LinearDirection::kForward ? "linear_4bit" : "linear_4bit_dx",
      static_cast<long long>(problem.m), static_cast<long long>(problem.n), static_cast<long long>(problem.k),
      static_cast<long long>(problem.rank), problem.rank > 0 && !problem.left_beside ? " dropout" : "",
      static_cast<long long>(problem.blocksize), dtype, problem.arch, problem.aligned ? "" : " unaligned",
      name_of(plan.kernel), plan.tile_m, plan.tile_n, plan.tile_k, plan.split, beside.c_str(), plan.microseconds);
  return line;
}

}  // namespace pyquant
