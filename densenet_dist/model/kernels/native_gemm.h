// Products of small matrices that are in the caches, by one thread.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

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
constexpr int kBroad = 3;  // kTall * kBroad sums and kBroad + 1 factors fill the vector registers

template <typename A>
struct Simd {
  typedef A type __attribute__((vector_size(kVectorBytes)));
  static constexpr int64_t lanes = kVectorBytes / sizeof(A);
};

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Round up columns, so that rows are whole vectors and can be the rows of a transposed left factor.
template <typename A>
constexpr int64_t padded(int64_t columns) {
  return round_up(columns, std::max<int64_t>(Simd<A>::lanes, kTall));
}

// The left factor of a product. Element (i, p) is at i * ld + p, of a transposed factor at i + p * ld.
template <typename A>
struct Left {
  const A *values;
  int64_t ld, inner;
};

// Compute a tile of kTall rows by kWide vectors. Its sums stay in registers only if the loops over it are unrolled,
// which gcc does not do by itself for 16 registers: on AVX2 the pragmas make it five times as fast (141 instead of 28
// GFLOP/s per core).
template <bool kTransposed, int kWide, typename A>
inline void multiply_tile(const Left<A> left, const A *a, const A *b, int64_t ldb, A *out, int64_t ldo, bool add) {
  using Vector = typename Simd<A>::type;
  Vector sums[kTall][kWide] = {};
  for (int64_t p = 0; p < left.inner; ++p, b += ldb) {
    Vector factors[kWide];
#pragma GCC unroll 8
    for (int v = 0; v < kWide; ++v) std::memcpy(&factors[v], b + v * Simd<A>::lanes, kVectorBytes);
#pragma GCC unroll 16
    for (int row = 0; row < kTall; ++row) {
      const A factor = kTransposed ? a[row + p * left.ld] : a[row * left.ld + p];
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

// out (+)= left right: (rows, inner) x (inner, columns). kTall must divide `rows`, the lanes `columns`; the memory of
// `left` and `out` must have as many rows.
template <bool kTransposed = false, typename A>
void multiply(int64_t rows, int64_t columns, const Left<A> &left, const A *right, int64_t ldb, A *out, int64_t ldo,
              bool add = false) {
  constexpr int64_t lanes = Simd<A>::lanes;
  for (int64_t column = 0; column < columns; column += kBroad * lanes) {
    const int64_t vectors = (columns - column) / lanes;
    for (int64_t row = 0; row < rows; row += kTall) {
      const A *a = left.values + row * (kTransposed ? 1 : left.ld), *b = right + column;
      A *to = out + row * ldo + column;
      if (vectors >= 3)
        multiply_tile<kTransposed, 3>(left, a, b, ldb, to, ldo, add);
      else if (vectors == 2)
        multiply_tile<kTransposed, 2>(left, a, b, ldb, to, ldo, add);
      else
        multiply_tile<kTransposed, 1>(left, a, b, ldb, to, ldo, add);
    }
  }
}

// Memory that begins at a cache line, so that no aligned vector crosses two.
template <typename A>
struct Aligned {
  using value_type = A;
  static constexpr std::align_val_t kLine{64};
  A *allocate(size_t count) { return static_cast<A *>(::operator new(count * sizeof(A), kLine)); }
  void deallocate(A *values, size_t) { ::operator delete(values, kLine); }
  bool operator==(const Aligned &) const { return true; }
  bool operator!=(const Aligned &) const { return false; }
};

// A matrix whose rows are padded to whole vectors; padding is initially 0.
template <typename A>
struct Matrix {
  int64_t ld;
  std::vector<A, Aligned<A>> values;
  Matrix(int64_t rows, int64_t columns) : ld(padded<A>(columns)), values(rows * ld) {}
  A *row(int64_t number) { return values.data() + number * ld; }
  const A *row(int64_t number) const { return values.data() + number * ld; }
};

}  // namespace
