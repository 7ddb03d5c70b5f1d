// Shared by the convolutions: their arguments, and the last step of their backward pass.

#pragma once

#include "native_common.h"
#include "native_gemm.h"

namespace {

constexpr int64_t kMaxGradients = 64;  // most partial gradients of a weight, each summed by one thread

// conv(relu(norm(x))) with stride 1 and "same" padding with zeros. native.py declares the same three structures.
template <typename A>
struct Convolution {
  int64_t images, height, width, channels, out_channels;
  const A *x;
  int64_t ldx;
  const A *gamma, *beta, *mean, *var;
  double eps;
  const A *weight;  // (out_channels, channels, side, side), contiguous
  int64_t threads;

  int64_t pixels() const { return height * width; }
  int64_t rows() const { return images * height * width; }
  Affine<A> norm() const { return Affine<A>(channels, gamma, beta, mean, var, eps); }
};

// slot = dropout(conv(relu(norm(x)))), and the mean and variance of `slot` unless they are null.
template <typename A>
struct ConvolutionForward : Convolution<A> {
  const uint8_t *mask;
  double keep;
  A *slot;
  int64_t lds;
  A *slot_mean, *slot_var;

  // Apply dropout to one row of the convolution's output and store it in `slot`.
  void store(int64_t row, const A *output) const {
    drop(this->out_channels, output, mask == nullptr ? nullptr : mask + row * this->out_channels,
         keep > 0 ? static_cast<A>(1 / keep) : A(0), slot + row * lds);
  }
};

// The backward pass, given d_output, the gradient of the convolution's output. With g the gradient of norm(x), it
// computes out = accumulator + scale g, the sums of g and of g (x - mean), (2, channels), and d_weight if not null.
template <typename A>
struct ConvolutionBackward : Convolution<A> {
  const A *d_output;
  int64_t ldd;
  const A *accumulator;
  int64_t ldc;
  A *out;
  int64_t ldo;
  A *sums, *d_weight;

  // Compute `count` channels of one row of `out` from the rectified row and its gradient, and add to the row's sums.
  void add_row(int64_t row, const A *rectified, const A *d_rectified, const A *scale, A *sum, int64_t first,
               int64_t count) const {
    const A *values = this->x + row * this->ldx + first, *means = this->mean + first;
    A *to = out + row * ldo + first;
    if (accumulator == nullptr)
      add_row<false>(count, values, means, rectified, d_rectified, scale + first, nullptr, to, sum);
    else
      add_row<true>(count, values, means, rectified, d_rectified, scale + first, accumulator + row * ldc + first, to,
                    sum);
  }

  // Add up the sums of all groups, (groups, 2, channels), in order.
  void add_groups(const std::vector<double> &partial) const {
    const size_t width = 2 * this->channels;
    for (size_t c = 0; c < width; ++c) {
      double total = 0;
      for (size_t at = c; at < partial.size(); at += width) total += partial[at];
      sums[c] = static_cast<A>(total);
    }
  }

 private:
  // `kCarried` is a template argument because a masked vector load from a null pointer takes a slow, silent fault.
  template <bool kCarried>
  static void add_row(int64_t count, const A *__restrict values, const A *__restrict means,
                      const A *__restrict rectified, const A *__restrict d_rectified, const A *__restrict scale,
                      const A *before, A *to, A *__restrict sum) {
    A *__restrict moment = sum + count;
#pragma omp simd
    for (int64_t c = 0; c < count; ++c) {
      const A g = rectified[c] <= 0 ? A(0) : d_rectified[c];
      to[c] = kCarried ? before[c] + scale[c] * g : scale[c] * g;
      sum[c] += g;
      moment[c] += g * (values[c] - means[c]);
    }
  }
};

// The partial gradients of a weight, one for each group of rows (1x1) or images (3x3).
template <typename A>
class Gradients {
 public:
  Gradients(int64_t groups, int64_t rows, int64_t columns)
      : rows_(rows), groups_(groups), all_(groups * rows, columns) {}
  A *row(int64_t group, int64_t number) { return all_.row(group * rows_ + number); }

  // Sum one row over all groups, in order: (columns,).
  void sum(int64_t number, std::vector<double> &total) const {
    std::fill(total.begin(), total.end(), 0.0);
    for (int64_t group = 0; group < groups_; ++group) {
      const A *values = all_.row(group * rows_ + number);
      for (size_t c = 0; c < total.size(); ++c) total[c] += values[c];
    }
  }

 private:
  int64_t rows_, groups_;
  Matrix<A> all_;
};

}  // namespace
