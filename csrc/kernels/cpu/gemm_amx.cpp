// The engine for bfloat16 operands on tile registers: 32 × 32 outputs in four tiles, 32 elements of the reduction an
// instruction.
//
// A panel of A is, for every 32 depths, two tiles of 16 rows of 32 elements. A panel of B is, for every 32 depths, two
// tiles of 16 columns: tile row p holds depths 2p and 2p + 1 of every column side by side, as the instruction wants.
#include "kernels/cpu/panels.h"
#include "kernels/cpu/strip.h"

namespace pyquant::cpu {
namespace {

constexpr int64_t kTile = 32;  // rows or columns of a panel
constexpr int64_t kPanelRows = 4 * kTile;
constexpr int64_t kDepth = 512;                       // what the reduction is cut into
constexpr int64_t kPanel = kTile * kDepth;            // elements from one panel to the next
constexpr int64_t kTileElements = 16 * 32;            // of one tile
constexpr int64_t kStepElements = 2 * kTileElements;  // of 32 depths of a panel

void pack_a(const Dense& a, int64_t row, int64_t rows, int64_t start, int64_t depth, void* to) {
  BFloat16* out = static_cast<BFloat16*>(to);
  alignas(64) BFloat16 buffer[kRowChunk];
  const int64_t padded = round_up(depth, 32);
  if (a.transposed) {
    std::memset(out, 0, round_up(rows, kTile) * kDepth * sizeof(BFloat16));
    for (int64_t d = 0; d < depth; ++d) {
      for (int64_t done = 0; done < rows; done += kRowChunk) {
        const int64_t n = smaller(kRowChunk, rows - done);
        load_dense(a, start + d, row + done, n, buffer);
        BFloat16* at = out + d / 32 * kStepElements + d % 32;
        for (int64_t i = done; i < done + n; ++i) at[i / kTile * kPanel + i % kTile * 32] = buffer[i - done];
      }
    }
    return;
  }
  for (int64_t i = 0; i < round_up(rows, kTile); ++i) {
    if (i < rows) load_dense(a, row + i, start, depth, buffer);
    const int64_t filled = i < rows ? depth : 0;
    if (filled < padded) std::memset(buffer + filled, 0, (padded - filled) * sizeof(BFloat16));
    BFloat16* at = out + i / kTile * kPanel + i % kTile * 32;
    for (int64_t d = 0; d < padded; d += 32) {
      _mm512_storeu_si512(at + d / 32 * kStepElements, _mm512_load_si512(buffer + d));
    }
  }
}

// Where column j of a panel's tiles begins; depth d is at d / 32 · kStepElements + d % 32 / 2 · 32 + d % 2 from there.
inline int64_t column_offset(int64_t j) { return j / kTile * kPanel + j % kTile / 16 * kTileElements + j % 16 * 2; }

// Columns [done, columns) of panels whose columns are rows in memory: read(column, to) gives `depth` elements of one.
template <typename Read>
void pack_transposed(int64_t done, int64_t columns, int64_t depth, const Read& read, BFloat16* out) {
  alignas(64) BFloat16 buffer[kDepth];
  const int64_t padded = round_up(depth, 32);
  for (int64_t j = done; j < round_up(columns, kTile); ++j) {
    if (j < columns) read(j, buffer);
    const int64_t filled = j < columns ? depth : 0;
    if (filled < padded) std::memset(buffer + filled, 0, (padded - filled) * sizeof(BFloat16));
    BFloat16* at = out + column_offset(j);
    for (int64_t d = 0; d < padded; d += 2) {
      std::memcpy(at + d / 32 * kStepElements + d % 32 / 2 * 32, buffer + d, 2 * sizeof(BFloat16));
    }
  }
}

// Two rows of 32 columns, side by side in memory, into a row of both tiles of a panel.
inline void interleave(const BFloat16* even, const BFloat16* odd, BFloat16* to) {
  const __m512i first = _mm512_loadu_si512(even), second = _mm512_loadu_si512(odd);
  // Unpacking works within 128 bits: quarters 0 and 1 of both results make up the first 16 columns.
  const __m512i low = _mm512_unpacklo_epi16(first, second), high = _mm512_unpackhi_epi16(first, second);
  const __m512i left = _mm512_permutex2var_epi64(low, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), high);
  const __m512i right = _mm512_permutex2var_epi64(low, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), high);
  _mm512_storeu_si512(to, left);
  _mm512_storeu_si512(to + kTileElements, right);
}

// Panels whose columns lie beside each other in memory: read(d, to) gives `columns` elements of depth d.
template <typename Read>
void pack_by_rows(int64_t columns, int64_t depth, const Read& read, BFloat16* out) {
  alignas(64) BFloat16 rows[2][kRowChunk];
  const int64_t padded = round_up(columns, kTile);
  std::memset(rows, 0, sizeof rows);
  for (int64_t d = 0; d < round_up(depth, 32); d += 2) {
    for (int64_t i = 0; i < 2; ++i) {
      if (d + i < depth) {
        read(d + i, rows[i]);
      } else {
        std::memset(rows[i], 0, columns * sizeof(BFloat16));
      }
    }
    BFloat16* at = out + d / 32 * kStepElements + d % 32 / 2 * 32;
    for (int64_t j = 0; j < padded; j += kTile) interleave(rows[0] + j, rows[1] + j, at + j / kTile * kPanel);
  }
}

void pack_b(const Dense& b, int64_t column, int64_t columns, int64_t start, int64_t depth, void* to) {
  BFloat16* out = static_cast<BFloat16*>(to);
  if (b.transposed) {
    pack_transposed(
        0, columns, depth, [&](int64_t j, BFloat16* row) { load_dense(b, column + j, start, depth, row); }, out);
  } else {
    pack_by_rows(
        columns, depth, [&](int64_t d, BFloat16* row) { load_dense(b, start + d, column, columns, row); }, out);
  }
}

// 16 rows of the weight become 16 columns; see strip.h.
void pack_strip(const QuantizedMatrix& weight, int64_t row, int64_t start, int64_t depth, BFloat16* out) {
  const __m512 values = _mm512_loadu_ps(values_of(weight.type));
  const int64_t run = constant_run(weight);
  __m512 absmax = _mm512_setzero_ps();
  // After the conversion the even depths are the low 16 words, the odd ones the high 16.
  alignas(64) uint16_t order[32];
  for (int i = 0; i < 16; ++i) {
    order[2 * i] = static_cast<uint16_t>(i);
    order[2 * i + 1] = static_cast<uint16_t>(16 + i);
  }
  const __m512i pairs = _mm512_load_si512(order);
  for (int64_t d = 0; d < depth; d += 32, out += kStepElements) {
    if (d % run == 0) absmax = strip_absmax(weight, row, start + d);
    const Strip strip(weight.packed + (row * weight.k + start + d) / 2, weight.k / 2);
    for (int w = 0; w < 4; ++w) {
      const auto store = [&](int pair, __m512i even, __m512i odd) {
        const __m512 low = _mm512_mul_ps(_mm512_permutexvar_ps(even, values), absmax);
        const __m512 high = _mm512_mul_ps(_mm512_permutexvar_ps(odd, values), absmax);
        const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(high, low);
        _mm512_storeu_si512(out + (4 * w + pair) * 32, _mm512_permutexvar_epi16(pairs, rounded));
      };
      const __m512i word = strip.words[w];
      store(0, _mm512_srli_epi32(word, 4), word);
      store(1, _mm512_srli_epi32(word, 12), _mm512_srli_epi32(word, 8));
      store(2, _mm512_srli_epi32(word, 20), _mm512_srli_epi32(word, 16));
      store(3, _mm512_srli_epi32(word, 28), _mm512_srli_epi32(word, 24));
    }
  }
}

void pack_weight(const QuantizedMatrix& weight, int64_t row, int64_t rows, int64_t start, int64_t depth, void* to) {
  BFloat16* out = static_cast<BFloat16*>(to);
  int64_t done = 0;
  if (aligned(weight)) {
    for (; done + 16 <= rows; done += 16) pack_strip(weight, row + done, start, depth, out + column_offset(done));
  }
  pack_transposed(
      done, rows, depth, [&](int64_t j, BFloat16* to) { decode(weight, (row + j) * weight.k + start, depth, to); },
      out);
}

void pack_weight_by_rows(const QuantizedMatrix& weight, int64_t column, int64_t columns, int64_t start, int64_t depth,
                         void* to) {
  pack_by_rows(
      columns, depth, [&](int64_t d, BFloat16* row) { decode(weight, (start + d) * weight.k + column, columns, row); },
      static_cast<BFloat16*>(to));
}

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Where tile (half, step) of a panel of A is: in bytes from the panel's begin, and from one of its rows to the next.
struct Strides {
  int64_t row, half, step;
};
constexpr Strides kPacked = {64, 2 * kTileElements, 2 * kStepElements};

// One 32 × 32 output, or with kHalves = 1 its upper 16 rows. Tiles 0 to 3 accumulate, 4 and 5 hold A, 6 and 7 B.
template <int kHalves>
void multiply_tile(const void* a, Strides strides, const BFloat16* b, int64_t steps, float* c, int64_t c_stride,
                   bool accumulate) {
  const int64_t stride = c_stride * static_cast<int64_t>(sizeof(float));
  if (accumulate) {
    _tile_loadd(0, c, stride);
    _tile_loadd(1, c + 16, stride);
    if constexpr (kHalves == 2) {
      _tile_loadd(2, c + 16 * c_stride, stride);
      _tile_loadd(3, c + 16 * c_stride + 16, stride);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const char* upper = static_cast<const char*>(a);
  for (int64_t step = 0; step < steps; ++step, upper += strides.step, b += kStepElements) {
    _tile_loadd(4, upper, strides.row);
    _tile_loadd(6, b, 64);
    _tile_loadd(7, b + kTileElements, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kHalves == 2) {
      _tile_loadd(5, upper + strides.half, strides.row);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, stride);
  _tile_stored(1, c + 16, stride);
  if constexpr (kHalves == 2) {
    _tile_stored(2, c + 16 * c_stride, stride);
    _tile_stored(3, c + 16 * c_stride + 16, stride);
  }
}

// `panel`: bytes from one panel of A to the next.
void multiply_tiles(const void* a, Strides strides, int64_t panel, const void* b, int64_t rows, int64_t columns,
                    int64_t depth, float* c, int64_t c_stride, bool accumulate) {
  const int64_t steps = divide_up(depth, 32);
  for (int64_t column = 0; column < columns; column += kTile) {
    const BFloat16* b_panel = static_cast<const BFloat16*>(b) + column * kDepth;
    for (int64_t row = 0; row < rows; row += kTile) {
      const void* a_panel = static_cast<const char*>(a) + row / kTile * panel;
      float* to = c + row * c_stride + column;
      if (rows - row > 16) {
        multiply_tile<2>(a_panel, strides, b_panel, steps, to, c_stride, accumulate);
      } else {
        multiply_tile<1>(a_panel, strides, b_panel, steps, to, c_stride, accumulate);
      }
    }
  }
}

void multiply_panels(const void* a, const void* b, int64_t rows, int64_t columns, int64_t depth, float* c,
                     int64_t c_stride, bool accumulate) {
  const TileConfig config;
  _tile_loadconfig(&config);
  multiply_tiles(a, kPacked, kPanel * 2, b, rows, columns, depth, c, c_stride, accumulate);
  _tile_release();
}

// Rows of x are tile rows as they are, 32 elements at a time. What is left over is padded, hence packed.
int64_t multiply_stored(const Dense& a, int64_t row, int64_t rows, int64_t start, const void* b, int64_t columns,
                        int64_t depth, float* c, int64_t c_stride, bool accumulate) {
  if (a.transposed || a.dropout != nullptr || depth % 32 != 0) return 0;
  const int64_t whole = rows / 16 * 16;
  const int64_t stride = a.stride * static_cast<int64_t>(sizeof(BFloat16));
  const TileConfig config;
  _tile_loadconfig(&config);
  for (int64_t done = 0; done < whole; done += kPanelRows) {
    const char* from = static_cast<const char*>(a.data) + (row + done) * stride + start * 2;
    multiply_tiles(from, {stride, 16 * stride, 64}, kTile * stride, b, smaller(kPanelRows, whole - done), columns,
                   depth, c + done * c_stride, c_stride, accumulate);
  }
  _tile_release();
  return whole;
}

}  // namespace

const Engine kEngineAmx = {kTile,           kTile,  kDepth,      sizeof(BFloat16),    kPanelRows,
                           pack_a,          pack_b, pack_weight, pack_weight_by_rows, multiply_panels,
                           multiply_stored, drop,   finish};

}  // namespace pyquant::cpu
