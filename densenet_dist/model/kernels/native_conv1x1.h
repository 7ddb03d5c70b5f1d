// BN-ReLU and a 1x1 convolution, forward and backward, a chunk of rows at a time: what is between them never leaves the
// caches. Separate passes write the rectified maps to memory and read them again, and backward their gradient too.
//
// For float and double alone: in bfloat16 the library's convolutions are faster, where the processor multiplies it.

#pragma once

#include "native_convolution.h"

namespace {

template <typename A>
void conv1x1(const ConvolutionForward<A> &conv) {
  const Affine<A> norm = conv.norm();
  const int64_t rows = conv.rows(), channels = conv.channels, makes = conv.makes;
  Matrix<A> transposed(channels, makes);
  for (int64_t k = 0; k < makes; ++k)
    for (int64_t c = 0; c < channels; ++c) transposed.row(c)[k] = conv.weight[k * channels + c];
  Moments<A> moments(rows, makes, conv.slot_mean != nullptr);
  const int64_t groups = moments.groups();
#pragma omp parallel num_threads(conv.threads)
  {
    Matrix<A> rectified(kChunk, channels), made(kChunk, makes);
    std::vector<A> scratch(3 * makes);
#pragma omp for schedule(static)
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t begin = group * kGroup, end = std::min(rows, begin + kGroup);
      for (int64_t first = begin; first < end; first += kChunk) {
        const int64_t last = std::min(end, first + kChunk);
        for (int64_t row = first; row < last; ++row)
          rectify(channels, conv.x + row * conv.ldx, norm, rectified.row(row - first));
        multiply(round_up(last - first, kTall), made.ld, Left<A>{rectified.row(0), rectified.ld, channels},
                 transposed.row(0), transposed.ld, made.row(0), made.ld);
        for (int64_t row = first; row < last; ++row) conv.store(row, made.row(row - first));
        moments.add(begin, first, last, conv.slot, conv.lds, scratch.data());
      }
    }
  }
  moments.finish(conv.slot_mean, conv.slot_var);
}

// Rows that one thread sums a weight's gradient of: a multiple of kGroup, by the shape alone.
inline int64_t rows_a_gradient(int64_t rows) {
  return round_up(std::max(kGroup, (rows + kMostGradients - 1) / kMostGradients), kGroup);
}

template <typename A>
void conv1x1_backward(const ConvolutionBackward<A> &conv) {
  const Affine<A> norm = conv.norm();
  const int64_t rows = conv.rows(), channels = conv.channels, makes = conv.makes, width = 2 * channels;
  Matrix<A> weights(makes, channels);
  for (int64_t k = 0; k < makes; ++k) std::copy_n(conv.weight + k * channels, channels, weights.row(k));
  const int64_t per_group = rows_a_gradient(rows), groups = (rows + per_group - 1) / per_group;
  std::vector<double> partial(groups * width);
  Gradients<A> gradients(conv.d_weight == nullptr ? 0 : groups, padded<A>(channels), makes);
#pragma omp parallel num_threads(conv.threads)
  {
    Matrix<A> rectified(kChunk, channels), came(kChunk, channels), made(kChunk, makes);
    std::vector<A> sums(width);
#pragma omp for schedule(static)
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t begin = group * per_group, end = std::min(rows, begin + per_group);
      for (int64_t first = begin; first < end; first += kChunk) {
        const int64_t last = std::min(end, first + kChunk), few = last - first;
        for (int64_t row = first; row < last; ++row)
          rectify(channels, conv.x + row * conv.ldx, norm, rectified.row(row - first));
        const bool whole = makes == made.ld && few % kTall == 0;  // d_made needs no padding
        const A *d_made = whole ? conv.d_made + first * conv.ldd : made.row(0);
        const int64_t ldd = whole ? conv.ldd : made.ld;
        for (int64_t row = first; row < last && !whole; ++row)
          std::copy_n(conv.d_made + row * conv.ldd, makes, made.row(row - first));
        if (conv.d_weight != nullptr)
          multiply<true>(rectified.ld, made.ld, Left<A>{rectified.row(0), rectified.ld, few}, d_made, ldd,
                         gradients.row(group, 0), made.ld, true);
        multiply(round_up(few, kTall), came.ld, Left<A>{d_made, ldd, makes}, weights.row(0), weights.ld, came.row(0),
                 came.ld);
        std::fill(sums.begin(), sums.end(), A(0));
        for (int64_t row = first; row < last; ++row)
          conv.add_row(row, rectified.row(row - first), came.row(row - first), norm.scale.data(), sums.data());
        for (int64_t c = 0; c < width; ++c) partial[group * width + c] += sums[c];
      }
    }
  }
  conv.add_groups(partial);
  if (conv.d_weight == nullptr) return;
#pragma omp parallel for num_threads(conv.threads) schedule(static)
  for (int64_t c = 0; c < channels; ++c) {
    std::vector<double> total(makes);
    gradients.sum(c, total);
    for (int64_t k = 0; k < makes; ++k) conv.d_weight[k * channels + c] = static_cast<A>(total[k]);
  }
}

}  // namespace
