// What the convolutions share: their arguments, and the last pass of their gradients.

#pragma once

#include "native_common.h"
#include "native_gemm.h"

namespace {

constexpr int64_t kMostGradients = 64;  // of a weight, each summed by one thread

// conv(relu(norm(x))), stride 1, "same" padding. native.py declares the same three structures.
template <typename A>
struct Convolution {
  int64_t images, height, width, channels, makes;
  const A *x;
  int64_t ldx;
  const A *gamma, *beta, *mean, *var;
  double eps;
  const A *weight;  // (makes, channels, side, side), contiguous
  int64_t threads;

  int64_t pixels() const { return height * width; }
  int64_t rows() const { return images * height * width; }
  Affine<A> norm() const { return Affine<A>(channels, gamma, beta, mean, var, eps); }
};

// slot = drop(conv(relu(norm(x)))), and the slot's mean and variance unless those are null.
template <typename A>
struct ConvolutionForward : Convolution<A> {
  const uint8_t *mask;
  double keep;
  A *slot;
  int64_t lds;
  A *slot_mean, *slot_var;

  // Drop one row of what was made, and store it.
  void store(int64_t row, const A *made) const {
    drop(this->makes, made, mask == nullptr ? nullptr : mask + row * this->makes,
         keep > 0 ? static_cast<A>(1 / keep) : A(0), slot + row * lds);
  }
};

// From d_made, the gradient of what the convolution made: out = carry + scale g, where g is the gradient of norm(x);
// the sums of g and of g (x - mean), (2, channels); and the weight's gradient, of its shape, unless d_weight is null.
template <typename A>
struct ConvolutionBackward : Convolution<A> {
  const A *d_made;
  int64_t ldd;
  const A *carry;
  int64_t ldc;
  A *out;
  int64_t ldo;
  A *sums, *d_weight;

  // One row of `out`, from what was rectified and what came back to it; adds to its sums.
  void add_row(int64_t row, const A *rectified, const A *came, const A *scale, A *sum) const {
    const A *values = this->x + row * this->ldx;
    if (carry == nullptr)
      add_row<false>(values, rectified, came, scale, nullptr, out + row * ldo, sum);
    else
      add_row<true>(values, rectified, came, scale, carry + row * ldc, out + row * ldo, sum);
  }

  // The sums of all groups, added up in order.
  void add_groups(const std::vector<double> &partial) const {
    const size_t width = 2 * this->channels;
    for (size_t c = 0; c < width; ++c) {
      double total = 0;
      for (size_t at = c; at < partial.size(); at += width) total += partial[at];
      sums[c] = static_cast<A>(total);
    }
  }

 private:
  // `kCarried` is known at compile time: a load that is masked out faults silently on a null pointer, and slowly.
  template <bool kCarried>
  void add_row(const A *__restrict values, const A *__restrict rectified, const A *__restrict came,
               const A *__restrict scale, const A *before, A *to, A *__restrict sum) const {
    const A *__restrict means = this->mean;
    A *__restrict moment = sum + this->channels;
#pragma omp simd
    for (int64_t c = 0; c < this->channels; ++c) {
      const A g = rectified[c] <= 0 ? A(0) : came[c];
      to[c] = kCarried ? before[c] + scale[c] * g : scale[c] * g;
      sum[c] += g;
      moment[c] += g * (values[c] - means[c]);
    }
  }
};

// A weight's gradient, summed by each group of pixels for itself, in one piece of memory.
template <typename A>
class Gradients {
 public:
  Gradients(int64_t groups, int64_t rows, int64_t columns)
      : rows_(rows), groups_(groups), all_(groups * rows, columns) {}
  A *row(int64_t group, int64_t number) { return all_.row(group * rows_ + number); }

  // One row summed over all groups in order: (columns,).
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
