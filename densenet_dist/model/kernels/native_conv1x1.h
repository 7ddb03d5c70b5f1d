// BN-ReLU and a 1x1 convolution, forward and backward, a chunk of rows at a time: what is between them never leaves the
// caches. Separate passes write the rectified maps to memory and read them again, and backward their gradient too.
//
// For float and double alone: in bfloat16 the library's convolutions are faster, where the processor multiplies it.

#pragma once

#include "native_common.h"
#include "native_gemm.h"

namespace {

constexpr int64_t kMostGradients = 64;  // of a weight, each summed by one thread

// A matrix in the accumulation type, with whole vectors of columns, zero beyond its own.
template <typename A>
struct Matrix {
  int64_t ld;
  std::vector<A> values;
  Matrix(int64_t rows, int64_t columns) : ld(padded<A>(columns)), values(rows * ld) {}
  A *row(int64_t number) { return values.data() + number * ld; }
  const A *row(int64_t number) const { return values.data() + number * ld; }
};

// slot = drop(conv(relu(norm(x)))) and the slot's statistics. `weight`: (makes, channels).
template <typename A>
void conv1x1(int64_t rows, int64_t channels, int64_t makes, const A *x, int64_t ldx, const void *gamma,
             const void *beta, const void *mean, const void *var, double eps, const A *weight, const uint8_t *mask,
             double keep, A *slot, int64_t lds, void *slot_mean, void *slot_var, int threads) {
  const Affine<A> norm(channels, static_cast<const A *>(gamma), static_cast<const A *>(beta),
                       static_cast<const A *>(mean), static_cast<const A *>(var), eps);
  const A factor = keep > 0 ? static_cast<A>(1 / keep) : A(0);
  Matrix<A> transposed(channels, makes);
  for (int64_t k = 0; k < makes; ++k)
    for (int64_t c = 0; c < channels; ++c) transposed.row(c)[k] = weight[k * channels + c];
  Moments<A> moments(rows, makes, slot_mean != nullptr);
  const int64_t groups = moments.groups(rows);
#pragma omp parallel num_threads(threads)
  {
    Matrix<A> rectified(kChunk, channels), made(kChunk, makes);
    std::vector<A> scratch(3 * makes);
#pragma omp for schedule(static)
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t begin = group * kGroup, end = std::min(rows, begin + kGroup);
      for (int64_t first = begin; first < end; first += kChunk) {
        const int64_t last = std::min(end, first + kChunk);
        for (int64_t row = first; row < last; ++row) rectify(channels, x + row * ldx, norm, rectified.row(row - first));
        multiply(round_up(last - first, kTall), made.ld, channels, rectified.row(0), rectified.ld, 1, transposed.row(0),
                 transposed.ld, made.row(0), made.ld);
        for (int64_t row = first; row < last; ++row)
          drop(makes, made.row(row - first), mask == nullptr ? nullptr : mask + row * makes, factor, slot + row * lds);
        moments.add(begin, first, last, slot, lds, scratch.data());
      }
    }
  }
  moments.finish(slot_mean, slot_var);
}

// One row: out = carry + scale g, where g is what came back if x was above 0 after BN; and the sums of g and g (x - mean).
template <typename A>
inline void add_row(int64_t channels, const A *__restrict x, const A *__restrict rectified, const A *__restrict came,
                    const A *__restrict scale, const A *__restrict mean, const A *carry, A *out, A *__restrict sum,
                    A *__restrict moment) {
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) {
    const A g = rectified[c] <= 0 ? A(0) : came[c];
    const A base = carry == nullptr ? A(0) : carry[c];
    out[c] = base + scale[c] * g;
    sum[c] += g;
    moment[c] += g * (x[c] - mean[c]);
  }
}

// Rows that one thread sums a weight's gradient of: a multiple of kGroup, by the shape alone.
inline int64_t rows_a_gradient(int64_t rows) {
  return round_up(std::max(kGroup, (rows + kMostGradients - 1) / kMostGradients), kGroup);
}

// From d_made, the gradient of what the convolution made: out = carry + scale g; sums of g and g (x - mean), (2,
// channels); and where `d_weight` is given, the weight's gradient, (makes, channels), in the accumulation type.
template <typename A>
void conv1x1_backward(int64_t rows, int64_t channels, int64_t makes, const A *x, int64_t ldx, const void *gamma,
                      const void *beta, const void *mean_, const void *var, double eps, const A *weight, const A *d_made,
                      int64_t ldd, const A *carry, int64_t ldc, A *out, int64_t ldo, void *sums_, void *d_weight_,
                      int threads) {
  const A *mean = static_cast<const A *>(mean_);
  const Affine<A> norm(channels, static_cast<const A *>(gamma), static_cast<const A *>(beta), mean,
                       static_cast<const A *>(var), eps);
  Matrix<A> weights(makes, channels);
  for (int64_t k = 0; k < makes; ++k)
    for (int64_t c = 0; c < channels; ++c) weights.row(k)[c] = weight[k * channels + c];
  const int64_t per_group = rows_a_gradient(rows), groups = (rows + per_group - 1) / per_group, width = 2 * channels;
  std::vector<double> partial(groups * width);
  std::vector<Matrix<A>> gradients(d_weight_ == nullptr ? 0 : groups, Matrix<A>(padded<A>(channels), makes));
#pragma omp parallel num_threads(threads)
  {
    Matrix<A> rectified(kChunk, channels), came(kChunk, channels), made(kChunk, makes);
    std::vector<A> sums(width);
#pragma omp for schedule(static)
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t begin = group * per_group, end = std::min(rows, begin + per_group);
      for (int64_t first = begin; first < end; first += kChunk) {
        const int64_t last = std::min(end, first + kChunk), few = last - first;
        for (int64_t row = first; row < last; ++row) {
          rectify(channels, x + row * ldx, norm, rectified.row(row - first));
          std::copy_n(d_made + row * ldd, makes, made.row(row - first));
        }
        if (d_weight_ != nullptr)
          multiply(rectified.ld, made.ld, few, rectified.row(0), 1, rectified.ld, made.row(0), made.ld,
                   gradients[group].row(0), made.ld, true);
        multiply(round_up(few, kTall), came.ld, makes, made.row(0), made.ld, 1, weights.row(0), weights.ld, came.row(0),
                 came.ld);
        std::fill(sums.begin(), sums.end(), A(0));
        for (int64_t row = first; row < last; ++row)
          add_row(channels, x + row * ldx, rectified.row(row - first), came.row(row - first), norm.scale.data(), mean,
                  carry == nullptr ? nullptr : carry + row * ldc, out + row * ldo, sums.data(), sums.data() + channels);
        for (int64_t c = 0; c < width; ++c) partial[group * width + c] += sums[c];
      }
    }
  }
  A *to = static_cast<A *>(sums_), *d_weight = static_cast<A *>(d_weight_);
  for (int64_t c = 0; c < width; ++c) {
    double total = 0;
    for (int64_t group = 0; group < groups; ++group) total += partial[group * width + c];
    to[c] = static_cast<A>(total);
  }
  if (d_weight == nullptr) return;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t k = 0; k < makes; ++k) {
      double total = 0;
      for (int64_t group = 0; group < groups; ++group) total += gradients[group].row(c)[k];
      d_weight[k * channels + c] = static_cast<A>(total);
    }
}

}  // namespace
