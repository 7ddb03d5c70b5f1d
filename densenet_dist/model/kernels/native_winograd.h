// The transforms of Winograd convolutions F(4x4, 3x3): 16 outputs of a 3x3 convolution for 36 products instead of 144.
//
// A convolution in one dimension is a product of polynomials. Evaluated at the points 0, p, -p, q, -q and infinity, it
// is one product per point, and four outputs of three taps w follow from six inputs d (Lavin and Gray 2015,
// arXiv:1509.09308):
//
//   y = Output(Filter(w) * Input(d))          in two dimensions for rows, then for columns
//
// Each transform is a small constant matrix. Gradients need the same matrices transposed, `Adjoint` below:
//
//   dm = Adjoint<Output>(dy)    dd = Adjoint<Input>(Filter(w) dm)    dw = Adjoint<Filter>(Input(d) dm)

#pragma once

#include "native_gemm.h"

namespace {

constexpr int kTile = 4, kInput = 6, kSide = 3;  // sides of the outputs, the inputs and the filter
constexpr int kPoints = kInput * kInput;
constexpr double kP = 0.75, kQ = 1.5;  // half the rounding errors of 1 and 2
constexpr double kP2 = kP * kP, kQ2 = kQ * kQ;
// Lagrange's denominators of the points 0, +-p and +-q.
constexpr double kAt0 = 1 / (kP2 * kQ2), kAtP = 1 / (2 * kP2 * (kP2 - kQ2)), kAtQ = 1 / (2 * kQ2 * (kQ2 - kP2));

// Values at the points: 0, p, -p, q, -q, infinity.
struct InputTransform {
  static constexpr int kFrom = kInput, kTo = kInput;
  template <typename A, typename V>
  static void apply(const V *d, V *v) {
    v[0] = A(kP2 * kQ2) * d[0] - A(kP2 + kQ2) * d[2] + d[4];
    v[5] = A(kP2 * kQ2) * d[1] - A(kP2 + kQ2) * d[3] + d[5];
    const V even_p = d[4] - A(kQ2) * d[2], odd_p = A(kP) * (d[3] - A(kQ2) * d[1]);
    const V even_q = d[4] - A(kP2) * d[2], odd_q = A(kQ) * (d[3] - A(kP2) * d[1]);
    v[1] = even_p + odd_p;
    v[2] = even_p - odd_p;
    v[3] = even_q + odd_q;
    v[4] = even_q - odd_q;
  }
};

struct InputAdjoint {
  static constexpr int kFrom = kInput, kTo = kInput;
  template <typename A, typename V>
  static void apply(const V *v, V *d) {
    const V sum_p = v[1] + v[2], sum_q = v[3] + v[4], odd_p = A(kP) * (v[1] - v[2]), odd_q = A(kQ) * (v[3] - v[4]);
    d[0] = A(kP2 * kQ2) * v[0];
    d[1] = A(kP2 * kQ2) * v[5] - A(kQ2) * odd_p - A(kP2) * odd_q;
    d[2] = -A(kP2 + kQ2) * v[0] - A(kQ2) * sum_p - A(kP2) * sum_q;
    d[3] = -A(kP2 + kQ2) * v[5] + odd_p + odd_q;
    d[4] = v[0] + sum_p + sum_q;
    d[5] = v[5];
  }
};

struct FilterTransform {
  static constexpr int kFrom = kSide, kTo = kInput;
  template <typename A, typename V>
  static void apply(const V *w, V *u) {
    const V even_p = A(kAtP) * (w[0] + A(kP2) * w[2]), odd_p = A(kAtP * kP) * w[1];
    const V even_q = A(kAtQ) * (w[0] + A(kQ2) * w[2]), odd_q = A(kAtQ * kQ) * w[1];
    u[0] = A(kAt0) * w[0];
    u[1] = even_p + odd_p;
    u[2] = even_p - odd_p;
    u[3] = even_q + odd_q;
    u[4] = even_q - odd_q;
    u[5] = w[2];
  }
};

struct FilterAdjoint {
  static constexpr int kFrom = kInput, kTo = kSide;
  template <typename A, typename V>
  static void apply(const V *u, V *w) {
    const V sum_p = A(kAtP) * (u[1] + u[2]), sum_q = A(kAtQ) * (u[3] + u[4]);
    w[0] = A(kAt0) * u[0] + sum_p + sum_q;
    w[1] = A(kAtP * kP) * (u[1] - u[2]) + A(kAtQ * kQ) * (u[3] - u[4]);
    w[2] = A(kP2) * sum_p + A(kQ2) * sum_q + u[5];
  }
};

struct OutputTransform {
  static constexpr int kFrom = kInput, kTo = kTile;
  template <typename A, typename V>
  static void apply(const V *m, V *y) {
    const V sum_p = m[1] + m[2], sum_q = m[3] + m[4], odd_p = A(kP) * (m[1] - m[2]), odd_q = A(kQ) * (m[3] - m[4]);
    y[0] = m[0] + sum_p + sum_q;
    y[1] = odd_p + odd_q;
    y[2] = A(kP2) * sum_p + A(kQ2) * sum_q;
    y[3] = A(kP2) * odd_p + A(kQ2) * odd_q + m[5];
  }
};

struct OutputAdjoint {
  static constexpr int kFrom = kTile, kTo = kInput;
  template <typename A, typename V>
  static void apply(const V *y, V *m) {
    const V even_p = y[0] + A(kP2) * y[2], odd_p = A(kP) * (y[1] + A(kP2) * y[3]);
    const V even_q = y[0] + A(kQ2) * y[2], odd_q = A(kQ) * (y[1] + A(kQ2) * y[3]);
    m[0] = y[0];
    m[1] = even_p + odd_p;
    m[2] = even_p - odd_p;
    m[3] = even_q + odd_q;
    m[4] = even_q - odd_q;
    m[5] = y[3];
  }
};

// Where the elements of a square are: rows, and elements of a row, this far apart.
struct Steps {
  int64_t row, column;
};

// Transform `count` squares in both dimensions, whole vectors of them; their elements follow each other.
template <typename Transform, bool kAdd = false, typename A>
inline void transform(int64_t count, const A *from, Steps steps, A *to, Steps to_steps) {
  using Vector = typename Simd<A>::type;
  constexpr int kFrom = Transform::kFrom, kTo = Transform::kTo;
  for (int64_t at = 0; at < count; at += Simd<A>::lanes, from += Simd<A>::lanes, to += Simd<A>::lanes) {
    Vector column[kFrom], rows[kTo][kFrom], made[kTo];
#pragma GCC unroll 8
    for (int j = 0; j < kFrom; ++j) {
#pragma GCC unroll 8
      for (int i = 0; i < kFrom; ++i) std::memcpy(&column[i], from + i * steps.row + j * steps.column, kVectorBytes);
      Transform::template apply<A>(column, made);
#pragma GCC unroll 8
      for (int i = 0; i < kTo; ++i) rows[i][j] = made[i];
    }
#pragma GCC unroll 8
    for (int i = 0; i < kTo; ++i) {
      Transform::template apply<A>(rows[i], made);
#pragma GCC unroll 8
      for (int j = 0; j < kTo; ++j) {
        A *element = to + i * to_steps.row + j * to_steps.column;
        if (kAdd) {
          Vector before;
          std::memcpy(&before, element, kVectorBytes);
          made[j] += before;
        }
        std::memcpy(element, &made[j], kVectorBytes);
      }
    }
  }
}

}  // namespace
