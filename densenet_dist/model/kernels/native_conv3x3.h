// BN-ReLU and a 3x3 convolution with zero padding, forward and backward, by the transforms of `native_winograd.h`.
//
// An image is cut into tiles of 4 x 4 outputs, each of which reads 6 x 6 inputs. For each of the 36 points a product
// over the channels replaces the convolution:
//
//   forward:  M[point] = V[point] U[point]       (tiles, C) x (C, K)
//   backward: dV[point] = dM[point] U[point]^T   (tiles, K) x (K, C);   dU[point] = dM[point]^T V[point], (K, C)
//
// V are the transformed inputs, U the filters, M the outputs. The backward pass works on a block of channels at a time,
// whose U and dU stay in the L2 cache.

#pragma once

#include "native_convolution.h"
#include "native_winograd.h"

namespace {

constexpr int64_t kTaps = kSide * kSide;
constexpr int64_t kForwardTiles = 32, kBackwardTiles = 16;  // in one product
constexpr int64_t kPassTiles = 512;           // whose dM a thread keeps, or those of one image
constexpr int64_t kMinPixels = 256;           // over which a partial gradient of a weight is summed, at least
constexpr int64_t kGradientBytes = 16 << 20;  // of all partial gradients of a weight, unless 8 are larger

inline int64_t ceil_div(int64_t value, int64_t by) { return (value + by - 1) / by; }

// The tiles of a batch, in the order of its pixels.
template <typename A>
struct Tiles {
  const Convolution<A> &conv;
  int64_t rows, columns;  // of an image
  explicit Tiles(const Convolution<A> &conv)
      : conv(conv), rows(ceil_div(conv.height, kTile)), columns(ceil_div(conv.width, kTile)) {}

  int64_t per_image() const { return rows * columns; }

  // Call visit(index in the square, pixel) for a square of pixels whose corner is `offset` pixels from that of a tile,
  // with pixel -1 outside of the image.
  template <typename Visit>
  void visit(int64_t tile, int64_t side, int64_t offset, const Visit &visit) const {
    const int64_t image = tile / per_image(), at = tile % per_image();
    const int64_t top = at / columns * kTile + offset, left = at % columns * kTile + offset;
    for (int64_t y = top; y < top + side; ++y)
      for (int64_t x = left; x < left + side; ++x) {
        const bool inside = y >= 0 && y < conv.height && x >= 0 && x < conv.width;
        visit((y - top) * side + x - left, inside ? (image * conv.height + y) * conv.width + x : -1);
      }
  }
};

// One matrix for each point of a square.
template <typename A>
class Points {
 public:
  // Matrices are an odd number of vectors apart: else the elements of a square would share few sets of the L1 cache.
  Points(int64_t rows, int64_t columns)
      : ld(padded<A>(columns)), step((rows * ld / Simd<A>::lanes | 1) * Simd<A>::lanes), values_(kPoints, step) {}
  A *row(int64_t number) { return values_.row(0) + number * ld; }
  A *at(int point) { return values_.row(point); }
  Steps steps() const { return {kInput * step, step}; }
  const int64_t ld, step;

 private:
  Matrix<A> values_;
};

// The inputs of some images, or their gradients, with zeros around each image.
template <typename A>
class Frames {
 public:
  Frames(const Tiles<A> &tiles, int64_t images, int64_t channels)
      : tiles_(tiles), width_(tiles.columns * kTile + 2), height_(tiles.rows * kTile + 2),
        values_(images * height_ * width_, channels) {}
  void clear() { std::fill(values_.values.begin(), values_.values.end(), A(0)); }
  A *pixel(int64_t image, int64_t y, int64_t x) { return values_.row((image * height_ + y + 1) * width_ + x + 1); }
  A *tile(int64_t number) {
    const int64_t image = number / tiles_.per_image(), at = number % tiles_.per_image();
    return pixel(image, at / tiles_.columns * kTile - 1, at % tiles_.columns * kTile - 1);
  }
  Steps steps() const { return {width_ * values_.ld, values_.ld}; }

 private:
  const Tiles<A> &tiles_;
  int64_t width_, height_;
  Matrix<A> values_;
};

template <typename A>
void conv3x3(const ConvolutionForward<A> &conv) {
  const Affine<A> norm = conv.norm();
  const Tiles<A> tiles(conv);
  const int64_t channels = conv.channels, out_channels = conv.out_channels;
  const int64_t group = std::max<int64_t>(1, kForwardTiles / tiles.per_image());  // images
  const int64_t most = std::min(kForwardTiles, round_up(group * tiles.per_image(), kTall));
  Points<A> filters(channels, out_channels);
  Moments<A> moments(conv.rows(), out_channels, conv.slot_mean != nullptr, group * conv.pixels());
#pragma omp parallel num_threads(conv.threads)
  {
    Points<A> inputs(most, channels), outputs(most, out_channels);
    Matrix<A> rectified(kPoints, channels), output(kTile * kTile, out_channels);
    std::vector<A> sums(3 * out_channels);
#pragma omp for schedule(static)
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t k = 0; k < out_channels; ++k)
        for (int64_t tap = 0; tap < kTaps; ++tap) output.row(tap)[k] = conv.weight[(k * channels + c) * kTaps + tap];
      transform<FilterTransform>(filters.ld, output.row(0), Steps{kSide * output.ld, output.ld}, filters.row(c),
                                 filters.steps());
    }
#pragma omp for schedule(static)
    for (int64_t number = 0; number < moments.groups(); ++number) {
      const int64_t end = std::min(conv.images, (number + 1) * group);
      for (int64_t first = number * group * tiles.per_image(); first < end * tiles.per_image(); first += most) {
        const int64_t count = std::min(most, end * tiles.per_image() - first);
        for (int64_t tile = 0; tile < count; ++tile) {
          tiles.visit(first + tile, kInput, -1, [&](int64_t index, int64_t pixel) {
            if (pixel < 0)
              std::fill_n(rectified.row(index), channels, A(0));
            else
              rectify(channels, conv.x + pixel * conv.ldx, norm, rectified.row(index));
          });
          transform<InputTransform>(inputs.ld, rectified.row(0), Steps{kInput * inputs.ld, inputs.ld},
                                    inputs.row(tile), inputs.steps());
        }
        for (int point = 0; point < kPoints; ++point)
          multiply(round_up(count, kTall), outputs.ld, Left<A>{inputs.at(point), inputs.ld, channels},
                   filters.at(point), filters.ld, outputs.at(point), outputs.ld);
        for (int64_t tile = 0; tile < count; ++tile) {
          transform<OutputTransform>(outputs.ld, outputs.row(tile), outputs.steps(), output.row(0),
                                     Steps{kTile * output.ld, output.ld});
          tiles.visit(first + tile, kTile, 0, [&](int64_t index, int64_t pixel) {
            if (pixel >= 0) conv.store(pixel, output.row(index));
          });
        }
      }
      const int64_t begin = number * group * conv.pixels(), stop = end * conv.pixels();
      for (int64_t row = begin; row < stop; row += kChunk)
        moments.add(begin, row, std::min(stop, row + kChunk), conv.slot, conv.lds, sums.data());
    }
  }
  moments.finish(conv.slot_mean, conv.slot_var);
}

template <typename A>
void conv3x3_backward(const ConvolutionBackward<A> &conv) {
  constexpr int64_t block = kBroad * Simd<A>::lanes;  // channels
  const Affine<A> norm = conv.norm();
  const Tiles<A> tiles(conv);
  const int64_t channels = conv.channels, out_channels = conv.out_channels, blocks = ceil_div(channels, block);
  const int64_t filter_rows = round_up(out_channels, kTall), in_image = tiles.per_image();
  // The number of images over which one thread sums depends on shapes only.
  const int64_t bytes = kTaps * out_channels * padded<A>(channels) * static_cast<int64_t>(sizeof(A));
  const int64_t most_groups = std::clamp<int64_t>(kGradientBytes / bytes, 8, kMaxGradients);
  const int64_t group = std::max(ceil_div(conv.images, most_groups), ceil_div(kMinPixels, conv.pixels()));
  const int64_t groups = ceil_div(conv.images, group);
  const int64_t pass = std::min(group, ceil_div(kPassTiles, in_image));       // images whose dM is kept
  const int64_t several = std::min(pass, ceil_div(kBackwardTiles, in_image));  // images in the frames
  std::vector<double> partial(groups * 2 * channels);
  Gradients<A> gradients(conv.d_weight == nullptr ? 0 : groups, kTaps * out_channels, channels);
  Points<A> filters(blocks * out_channels, block);
#pragma omp parallel num_threads(conv.threads)
  {
    Points<A> inputs(kBackwardTiles, block), d_inputs(kBackwardTiles, block), d_filters(blocks * filter_rows, block);
    Points<A> d_outputs(pass * in_image, out_channels);
    Frames<A> rectified(tiles, several, block), d_rectified(tiles, several, block);
    Matrix<A> d_output(kTile * kTile, out_channels), filter(kTaps, block);
    const Steps filter_steps{kSide * block, block};
    std::vector<A> sums(2 * block);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < blocks * out_channels; ++row) {
      const int64_t k = row % out_channels, channel = row / out_channels * block;
      for (int64_t c = 0; c < std::min(block, channels - channel); ++c)
        for (int64_t tap = 0; tap < kTaps; ++tap)
          filter.row(tap)[c] = conv.weight[(k * channels + channel + c) * kTaps + tap];
      transform<FilterTransform>(block, filter.row(0), filter_steps, filters.row(row), filters.steps());
    }
#pragma omp for schedule(static)
    for (int64_t number = 0; number < groups; ++number) {
      const int64_t last_image = std::min(conv.images, (number + 1) * group);
      std::fill_n(d_filters.at(0), kPoints * d_filters.step, A(0));
      for (int64_t from = number * group; from < last_image; from += pass) {
        const int64_t pass_end = std::min(last_image, from + pass);
        for (int64_t tile = from * in_image; tile < pass_end * in_image; ++tile) {
          tiles.visit(tile, kTile, 0, [&](int64_t index, int64_t pixel) {
            if (pixel < 0)
              std::fill_n(d_output.row(index), out_channels, A(0));
            else
              std::copy_n(conv.d_output + pixel * conv.ldd, out_channels, d_output.row(index));
          });
          transform<OutputAdjoint>(d_output.ld, d_output.row(0), Steps{kTile * d_output.ld, d_output.ld},
                                   d_outputs.row(tile - from * in_image), d_outputs.steps());
        }
        for (int64_t channel = 0; channel < channels; channel += block) {
          const int64_t width = std::min(block, channels - channel);
          for (int64_t image = from; image < pass_end; image += several) {
            const int64_t images = std::min(several, pass_end - image);
            d_rectified.clear();
            const auto each_pixel = [&](const auto &visit) {
              for (int64_t i = 0; i < images; ++i)
                for (int64_t y = 0; y < conv.height; ++y)
                  for (int64_t x = 0; x < conv.width; ++x)
                    visit(((image + i) * conv.height + y) * conv.width + x, rectified.pixel(i, y, x),
                          d_rectified.pixel(i, y, x));
            };
            each_pixel([&](int64_t pixel, A *to, A *) {
              rectify(width, conv.x + pixel * conv.ldx + channel, norm, to, channel);
            });
            for (int64_t first = 0; first < images * in_image; first += kBackwardTiles) {
              const int64_t count = std::min(kBackwardTiles, images * in_image - first);
              const int64_t d_row = ((image - from) * in_image + first) * d_outputs.ld;
              for (int64_t tile = 0; tile < count; ++tile)
                transform<InputTransform>(block, rectified.tile(first + tile), rectified.steps(), inputs.row(tile),
                                          inputs.steps());
              for (int point = 0; point < kPoints; ++point) {
                const A *d_points = d_outputs.at(point) + d_row;
                if (conv.d_weight != nullptr)
                  multiply<true>(filter_rows, block, Left<A>{d_points, d_outputs.ld, count}, inputs.at(point), block,
                                 d_filters.at(point) + channel * filter_rows, block, true);
                multiply(round_up(count, kTall), block, Left<A>{d_points, d_outputs.ld, out_channels},
                         filters.at(point) + channel * out_channels, block, d_inputs.at(point), block);
              }
              for (int64_t tile = 0; tile < count; ++tile)
                transform<InputAdjoint, true>(block, d_inputs.row(tile), d_inputs.steps(),
                                              d_rectified.tile(first + tile), d_rectified.steps());
            }
            int64_t summed = 0;
            each_pixel([&](int64_t pixel, const A *values, const A *gradient) {
              conv.add_row(pixel, values, gradient, norm.scale.data(), sums.data(), channel, width);
              if (++summed % kChunk != 0 && summed != images * conv.pixels()) return;
              double *total = partial.data() + number * 2 * channels + channel;
              for (int64_t c = 0; c < width; ++c) {
                total[c] += sums[c];
                total[channels + c] += sums[width + c];
              }
              std::fill(sums.begin(), sums.end(), A(0));
            });
          }
        }
      }
      for (int64_t row = 0; row < blocks * out_channels && conv.d_weight != nullptr; ++row) {
        const int64_t k = row % out_channels, channel = row / out_channels * block;
        transform<FilterAdjoint>(block, d_filters.row(row / out_channels * filter_rows + k), d_filters.steps(),
                                 filter.row(0), filter_steps);
        for (int64_t tap = 0; tap < kTaps; ++tap)
          std::copy_n(filter.row(tap), std::min(block, channels - channel),
                      gradients.row(number, tap * out_channels + k) + channel);
      }
    }
  }
  conv.add_groups(partial);
  if (conv.d_weight == nullptr) return;
#pragma omp parallel for num_threads(conv.threads) schedule(static)
  for (int64_t k = 0; k < out_channels; ++k)
    for (int64_t tap = 0; tap < kTaps; ++tap) {
      std::vector<double> total(channels);
      gradients.sum(tap * out_channels + k, total);
      for (int64_t c = 0; c < channels; ++c)
        conv.d_weight[(k * channels + c) * kTaps + tap] = static_cast<A>(total[c]);
    }
}

}  // namespace
