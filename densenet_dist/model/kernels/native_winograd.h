// The transforms of Winograd convolutions F(4x4, 3x3): 16 outputs of a 3x3 convolution for 36 products instead of 144.
//
// Multiplying polynomials with 4 and 3 coefficients takes 6 products: evaluate both at 6 points, multiply, interpolate.
// The transposed algorithm computes 4 outputs y of a filter w of 3 taps from 6 inputs d (Lavin and Gray 2015,
// arXiv:1509.09308). In two dimensions the columns are transformed first, then the rows.
//
//   m = Filter(w) * Input(d),  y = Output(m)          `*` is elementwise; m is summed over the input channels
//
// Each transform is a small constant matrix. Gradients need the same matrices transposed, the "adjoints":
//
//   dm = OutputAdjoint(dy)
//   dd = InputAdjoint(Filter(w) * dm)                 summed over the output channels
//   dw = FilterAdjoint(Input(d) * dm)                 summed over the tiles

#pragma once

#include "native_gemm.h"

namespace {

constexpr int kOutputSide = 4, kInputSide = 6, kFilterSide = 3;
constexpr int kPoints = kInputSide * kInputSide;
// The points are 0, p, -p, q, -q and infinity. Measured in float: half the rounding errors of the usual 1 and 2.
constexpr double kP = 0.75, kQ = 1.5;
constexpr double kP2 = kP * kP, kQ2 = kQ * kQ;
// 1 / product of (point - other finite point) for 0, p and q: the scale of interpolation, applied to the filter.
constexpr double kScale0 = 1 / (kP2 * kQ2);
constexpr double kScaleP = 1 / (2 * kP2 * (kP2 - kQ2)), kScaleQ = 1 / (2 * kQ2 * (kQ2 - kP2));

// In all transforms six elements belong to the points, in the order 0, p, -p, q, -q, infinity.
struct InputTransform {
  static constexpr int kFrom = kInputSide, kTo = kInputSide;
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
  static constexpr int kFrom = kInputSide, kTo = kInputSide;
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
  static constexpr int kFrom = kFilterSide, kTo = kInputSide;
  template <typename A, typename V>
  static void apply(const V *w, V *u) {
    const V even_p = A(kScaleP) * (w[0] + A(kP2) * w[2]), odd_p = A(kScaleP * kP) * w[1];
    const V even_q = A(kScaleQ) * (w[0] + A(kQ2) * w[2]), odd_q = A(kScaleQ * kQ) * w[1];
    u[0] = A(kScale0) * w[0];
    u[1] = even_p + odd_p;
    u[2] = even_p - odd_p;
    u[3] = even_q + odd_q;
    u[4] = even_q - odd_q;
    u[5] = w[2];
  }
};

struct FilterAdjoint {
  static constexpr int kFrom = kInputSide, kTo = kFilterSide;
  template <typename A, typename V>
  static void apply(const V *u, V *w) {
    const V sum_p = A(kScaleP) * (u[1] + u[2]), sum_q = A(kScaleQ) * (u[3] + u[4]);
    w[0] = A(kScale0) * u[0] + sum_p + sum_q;
    w[1] = A(kScaleP * kP) * (u[1] - u[2]) + A(kScaleQ * kQ) * (u[3] - u[4]);
    w[2] = A(kP2) * sum_p + A(kQ2) * sum_q + u[5];
  }
};

struct OutputTransform {
  static constexpr int kFrom = kInputSide, kTo = kOutputSide;
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
  static constexpr int kFrom = kOutputSide, kTo = kInputSide;
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

// Distances in elements between vertical and horizontal neighbors of a square.
struct Steps {
  int64_t row, column;
};

// Transform `count` squares, one per channel, a vector of channels at a time; the lanes divide `count`. Channels are
// contiguous. With kAdd, add the results to `to`.
template <typename Transform, bool kAdd = false, typename A>
inline void transform(int64_t count, const A *from, Steps steps, A *to, Steps to_steps) {
  using Vector = typename Simd<A>::type;
  constexpr int kFrom = Transform::kFrom, kTo = Transform::kTo;
  for (int64_t at = 0; at < count; at += Simd<A>::lanes, from += Simd<A>::lanes, to += Simd<A>::lanes) {
    Vector column[kFrom], rows[kTo][kFrom], result[kTo];
#pragma GCC unroll 8
    for (int j = 0; j < kFrom; ++j) {
#pragma GCC unroll 8
      for (int i = 0; i < kFrom; ++i) std::memcpy(&column[i], from + i * steps.row + j * steps.column, kVectorBytes);
      Transform::template apply<A>(column, result);
#pragma GCC unroll 8
      for (int i = 0; i < kTo; ++i) rows[i][j] = result[i];
    }
#pragma GCC unroll 8
    for (int i = 0; i < kTo; ++i) {
      Transform::template apply<A>(rows[i], result);
#pragma GCC unroll 8
      for (int j = 0; j < kTo; ++j) {
        A *element = to + i * to_steps.row + j * to_steps.column;
        if (kAdd) {
          Vector before;
          std::memcpy(&before, element, kVectorBytes);
          result[j] += before;
        }
        std::memcpy(element, &result[j], kVectorBytes);
      }
    }
  }
}

}  // namespace
