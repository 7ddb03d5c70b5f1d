// Small matrix products on data that lies in the caches, by one thread.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kTall = 8;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32, kTall = 4;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kTall = 8;
#else
constexpr int kVectorBytes = 16, kTall = 4;
#endif
constexpr int kBroad = 3;  // kTall * kBroad sums, kBroad + 1 factors: as many vectors as the processor has registers

template <typename A>
struct Simd {
  typedef A type __attribute__((vector_size(kVectorBytes)));
  static constexpr int64_t lanes = kVectorBytes / sizeof(A);
};

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Columns, so that a matrix' rows are whole vectors. `kTall` divides them too.
template <typename A>
inline int64_t padded(int64_t columns) {
  return round_up(columns, std::max<int64_t>(Simd<A>::lanes, kTall));
}

// A tile of sums stays in registers only if the loops over it are unrolled, and with 16 registers gcc does not do that by
// itself: on AVX2 the product is five times as fast with the pragmas (141 instead of 28 GFLOP/s on one core).
template <typename A, int kWide>
inline void multiply_tile(int64_t inner, const A *a, int64_t a_row, int64_t a_inner, const A *b, int64_t ldb, A *out,
                          int64_t ldo, bool add) {
  using Vector = typename Simd<A>::type;
  Vector sums[kTall][kWide] = {};
  for (int64_t p = 0; p < inner; ++p) {
    Vector factors[kWide];
#pragma GCC unroll 8
    for (int v = 0; v < kWide; ++v) std::memcpy(&factors[v], b + p * ldb + v * Simd<A>::lanes, kVectorBytes);
#pragma GCC unroll 16
    for (int row = 0; row < kTall; ++row) {
      const A factor = a[row * a_row + p * a_inner];
#pragma GCC unroll 8
      for (int v = 0; v < kWide; ++v) sums[row][v] += factor * factors[v];
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < kTall; ++row)
#pragma GCC unroll 8
    for (int v = 0; v < kWide; ++v) {
      A *to = out + row * ldo + v * Simd<A>::lanes;
      if (add) {
        Vector before;
        std::memcpy(&before, to, kVectorBytes);
        sums[row][v] += before;
      }
      std::memcpy(to, &sums[row][v], kVectorBytes);
    }
}

// out (+)= a b: (rows, inner) times (inner, columns). `rows` is a multiple of kTall, `columns` of the vectors' lanes;
// element (i, p) of `a` lies at i * a_row + p * a_inner.
template <typename A>
void multiply(int64_t rows, int64_t columns, int64_t inner, const A *a, int64_t a_row, int64_t a_inner, const A *b,
              int64_t ldb, A *out, int64_t ldo, bool add = false) {
  constexpr int64_t lanes = Simd<A>::lanes;
  for (int64_t column = 0; column < columns; column += kBroad * lanes) {
    const int64_t vectors = (columns - column) / lanes;
    for (int64_t row = 0; row < rows; row += kTall) {
      const A *left = a + row * a_row, *right = b + column;
      A *to = out + row * ldo + column;
      if (vectors >= 3)
        multiply_tile<A, 3>(inner, left, a_row, a_inner, right, ldb, to, ldo, add);
      else if (vectors == 2)
        multiply_tile<A, 2>(inner, left, a_row, a_inner, right, ldb, to, ldo, add);
      else
        multiply_tile<A, 1>(inner, left, a_row, a_inner, right, ldb, to, ldo, add);
    }
  }
}

}  // namespace
