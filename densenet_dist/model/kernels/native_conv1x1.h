// BN-ReLU and a 1x1 convolution, forward and backward, one chunk of rows (pixels) at a time, so that the rectified maps
// and their gradient stay in the caches. Separate passes would write them to memory and read them again.
//
// For float and double only: on processors with bfloat16 instructions oneDNN is faster in bfloat16.

#pragma once

#include "native_convolution.h"

namespace {

template <typename A>
void conv1x1(const ConvolutionForward<A> &conv) {
  const Affine<A> norm = conv.norm();
  const int64_t rows = conv.rows(), channels = conv.channels, out_channels = conv.out_channels;
  Matrix<A> transposed(channels, out_channels);
  for (int64_t k = 0; k < out_channels; ++k)
    for (int64_t c = 0; c < channels; ++c) transposed.row(c)[k] = conv.weight[k * channels + c];
  Moments<A> moments(rows, out_channels, conv.slot_mean != nullptr);
  const int64_t groups = moments.groups();
#pragma omp parallel num_threads(conv.threads)
  {
    Matrix<A> rectified(kChunk, channels), output(kChunk, out_channels);
    std::vector<A> scratch(3 * out_channels);
#pragma omp for schedule(static)
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t begin = group * kGroup, end = std::min(rows, begin + kGroup);
      for (int64_t first = begin; first < end; first += kChunk) {
        const int64_t last = std::min(end, first + kChunk);
        for (int64_t row = first; row < last; ++row)
          rectify(channels, conv.x + row * conv.ldx, norm, rectified.row(row - first));
        multiply(round_up(last - first, kTall), output.ld, Left<A>{rectified.row(0), rectified.ld, channels},
                 transposed.row(0), transposed.ld, output.row(0), output.ld);
        for (int64_t row = first; row < last; ++row) conv.store(row, output.row(row - first));
        moments.add(begin, first, last, conv.slot, conv.lds, scratch.data());
      }
    }
  }
  moments.finish(conv.slot_mean, conv.slot_var);
}

// Rows over which one thread sums a weight's gradient: a multiple of kGroup that depends on the shape only.
inline int64_t rows_per_gradient(int64_t rows) {
  return round_up(std::max(kGroup, (rows + kMaxGradients - 1) / kMaxGradients), kGroup);
}

template <typename A>
void conv1x1_backward(const ConvolutionBackward<A> &conv) {
  const Affine<A> norm = conv.norm();
  const int64_t rows = conv.rows(), channels = conv.channels, out_channels = conv.out_channels, width = 2 * channels;
  Matrix<A> weights(out_channels, channels);
  for (int64_t k = 0; k < out_channels; ++k) std::copy_n(conv.weight + k * channels, channels, weights.row(k));
  const int64_t group_rows = rows_per_gradient(rows), groups = (rows + group_rows - 1) / group_rows;
  std::vector<double> partial(groups * width);
  Gradients<A> gradients(conv.d_weight == nullptr ? 0 : groups, padded<A>(channels), out_channels);
#pragma omp parallel num_threads(conv.threads)
  {
    Matrix<A> rectified(kChunk, channels), d_rectified(kChunk, channels), d_output_copy(kChunk, out_channels);
    std::vector<A> sums(width);
#pragma omp for schedule(static)
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t begin = group * group_rows, end = std::min(rows, begin + group_rows);
      for (int64_t first = begin; first < end; first += kChunk) {
        const int64_t last = std::min(end, first + kChunk), count = last - first;
        for (int64_t row = first; row < last; ++row)
          rectify(channels, conv.x + row * conv.ldx, norm, rectified.row(row - first));
        const bool in_place = out_channels == d_output_copy.ld && count % kTall == 0;  // d_output needs no padding
        const A *d_output = in_place ? conv.d_output + first * conv.ldd : d_output_copy.row(0);
        const int64_t ldd = in_place ? conv.ldd : d_output_copy.ld;
        for (int64_t row = first; row < last && !in_place; ++row)
          std::copy_n(conv.d_output + row * conv.ldd, out_channels, d_output_copy.row(row - first));
        if (conv.d_weight != nullptr)
          multiply<true>(rectified.ld, d_output_copy.ld, Left<A>{rectified.row(0), rectified.ld, count}, d_output, ldd,
                         gradients.row(group, 0), d_output_copy.ld, true);
        multiply(round_up(count, kTall), d_rectified.ld, Left<A>{d_output, ldd, out_channels}, weights.row(0),
                 weights.ld, d_rectified.row(0), d_rectified.ld);
        std::fill(sums.begin(), sums.end(), A(0));
        for (int64_t row = first; row < last; ++row)
          conv.add_row(row, rectified.row(row - first), d_rectified.row(row - first), norm.scale.data(), sums.data(), 0,
                       channels);
        for (int64_t c = 0; c < width; ++c) partial[group * width + c] += sums[c];
      }
    }
  }
  conv.add_groups(partial);
  if (conv.d_weight == nullptr) return;
#pragma omp parallel for num_threads(conv.threads) schedule(static)
  for (int64_t c = 0; c < channels; ++c) {
    std::vector<double> total(out_channels);
    gradients.sum(c, total);
    for (int64_t k = 0; k < out_channels; ++k) conv.d_weight[k * channels + c] = static_cast<A>(total[k]);
  }
}

}  // namespace
