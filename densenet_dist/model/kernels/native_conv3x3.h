// BN-ReLU and a 3x3 convolution with zero padding, forward and backward, by the transforms of `native_winograd.h`.
//
// An image is cut into tiles of 4 x 4 outputs, each of which reads 6 x 6 inputs. The transformed inputs V, filters U
// and outputs M are one matrix for each of the 36 points of a tile. A product over the channels per point replaces the
// convolution:
//
//   forward:  M = V U                          (tiles, C) x (C, K)
//   backward: dV = dM U^T, dU^T = dM^T V       (tiles, K) x (K, C), (K, tiles) x (tiles, C)
//
// The backward pass works on one block of channels after the other, so that for K up to about 50 the block's U^T and
// dU^T stay in an L2 cache of 1 MB.

#pragma once

#include "native_convolution.h"
#include "native_winograd.h"

namespace {

constexpr int64_t kTaps = kFilterSide * kFilterSide;
constexpr int64_t kForwardTiles = 32, kBackwardTiles = 16;  // in one product, so that its V and M stay in the L2 cache
constexpr int64_t kKeptTiles = 512;           // whose dM a thread keeps for all blocks of channels, in whole images
constexpr int64_t kMinPixels = 256;           // over which a partial gradient of a weight is summed, at least
constexpr int64_t kGradientBytes = 16 << 20;  // of all partial gradients of a weight, unless 8 are larger

constexpr int64_t ceil_div(int64_t value, int64_t by) { return (value + by - 1) / by; }

// The tiles of a batch, numbered by image, row and column.
template <typename A>
struct Tiles {
  const Convolution<A> &conv;
  int64_t rows, columns;  // of an image
  explicit Tiles(const Convolution<A> &conv)
      : conv(conv), rows(ceil_div(conv.height, kOutputSide)), columns(ceil_div(conv.width, kOutputSide)) {}

  int64_t per_image() const { return rows * columns; }

  // Call visit(index in the square, pixel, or -1 outside of the image) for the side x side pixels that begin `border`
  // pixels above and left of a tile: the outputs (border 0) or inputs (border 1).
  template <typename Visit>
  void visit(int64_t tile, int64_t side, int64_t border, const Visit &visit) const {
    const int64_t image = tile / per_image(), in_image = tile % per_image();
    const int64_t top = in_image / columns * kOutputSide - border, left = in_image % columns * kOutputSide - border;
    for (int64_t y = top; y < top + side; ++y)
      for (int64_t x = left; x < left + side; ++x) {
        const bool inside = y >= 0 && y < conv.height && x >= 0 && x < conv.width;
        visit((y - top) * side + x - left, inside ? (image * conv.height + y) * conv.width + x : -1);
      }
  }
};

// 36 matrices, one per point. They are an odd number of vectors apart: with a power of two the 36 elements of a square
// would share few sets of the L1 cache.
template <typename A>
class PointMatrices {
 public:
  PointMatrices(int64_t rows, int64_t columns)
      : ld(padded<A>(columns)), distance_((rows * ld / Simd<A>::lanes | 1) * Simd<A>::lanes),
        values_(kPoints * distance_) {}
  A *at(int point, int64_t row = 0) { return values_.data() + point * distance_ + row * ld; }
  Steps steps() const { return {kInputSide * distance_, distance_}; }  // of the squares that begin at at(0, row)
  void clear() { std::fill(values_.begin(), values_.end(), A(0)); }
  const int64_t ld;

 private:
  const int64_t distance_;
  std::vector<A, Aligned<A>> values_;
};

template <typename A>
void conv3x3(const ConvolutionForward<A> &conv) {
  const Affine<A> norm = conv.norm();
  const Tiles<A> tiles(conv);
  const int64_t channels = conv.channels, out_channels = conv.out_channels, per_image = tiles.per_image();
  const int64_t group = std::max<int64_t>(1, kForwardTiles / per_image);  // images that one thread computes
  const int64_t most = std::min(kForwardTiles, round_up(group * per_image, kTall));
  PointMatrices<A> filters(channels, out_channels);
  Moments<A> moments(conv.rows(), out_channels, conv.slot_mean != nullptr, group * conv.pixels());
#pragma omp parallel num_threads(conv.threads)
  {
    PointMatrices<A> inputs(most, channels), outputs(most, out_channels);
    Matrix<A> rectified(kPoints, channels), output(kOutputSide * kOutputSide, out_channels);
    std::vector<A> scratch(3 * out_channels);
#pragma omp for schedule(static)
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t k = 0; k < out_channels; ++k)
        for (int64_t tap = 0; tap < kTaps; ++tap) output.row(tap)[k] = conv.weight[(k * channels + c) * kTaps + tap];
      transform<FilterTransform>(filters.ld, output.row(0), Steps{kFilterSide * output.ld, output.ld},
                                 filters.at(0, c), filters.steps());
    }
#pragma omp for schedule(static)
    for (int64_t number = 0; number < moments.groups(); ++number) {
      const int64_t end = std::min(conv.images, (number + 1) * group);
      for (int64_t first = number * group * per_image; first < end * per_image; first += most) {
        const int64_t count = std::min(most, end * per_image - first);
        for (int64_t tile = 0; tile < count; ++tile) {
          tiles.visit(first + tile, kInputSide, 1, [&](int64_t index, int64_t pixel) {
            if (pixel < 0)
              std::fill_n(rectified.row(index), channels, A(0));
            else
              rectify(channels, conv.x + pixel * conv.ldx, norm, rectified.row(index));
          });
          transform<InputTransform>(inputs.ld, rectified.row(0), Steps{kInputSide * inputs.ld, inputs.ld},
                                    inputs.at(0, tile), inputs.steps());
        }
        for (int point = 0; point < kPoints; ++point)
          multiply(round_up(count, kTall), outputs.ld, Left<A>{inputs.at(point), inputs.ld, channels},
                   filters.at(point), filters.ld, outputs.at(point), outputs.ld);
        for (int64_t tile = 0; tile < count; ++tile) {
          transform<OutputTransform>(outputs.ld, outputs.at(0, tile), outputs.steps(), output.row(0),
                                     Steps{kOutputSide * output.ld, output.ld});
          tiles.visit(first + tile, kOutputSide, 0, [&](int64_t index, int64_t pixel) {
            if (pixel >= 0) conv.store(pixel, output.row(index));
          });
        }
      }
      const int64_t begin = number * group * conv.pixels(), stop = end * conv.pixels();
      for (int64_t row = begin; row < stop; row += kChunk)
        moments.add(begin, row, std::min(stop, row + kChunk), conv.slot, conv.lds, scratch.data());
    }
  }
  moments.finish(conv.slot_mean, conv.slot_var);
}

// The rectified inputs of some images, or their gradients, with a border: pixels outside of the image are 0 in the
// inputs and ignored in the gradients.
template <typename A>
class Frames {
 public:
  Frames(const Tiles<A> &tiles, int64_t images, int64_t channels)
      : tiles_(tiles), width_(tiles.columns * kOutputSide + 2), height_(tiles.rows * kOutputSide + 2),
        values_(images * height_ * width_, channels) {}
  A *pixel(int64_t image, int64_t y, int64_t x) { return values_.row((image * height_ + y + 1) * width_ + x + 1); }
  A *inputs(int64_t tile) {
    const int64_t image = tile / tiles_.per_image(), in_image = tile % tiles_.per_image();
    return pixel(image, in_image / tiles_.columns * kOutputSide - 1, in_image % tiles_.columns * kOutputSide - 1);
  }
  Steps steps() const { return {width_ * values_.ld, values_.ld}; }
  void clear() { std::fill(values_.values.begin(), values_.values.end(), A(0)); }

 private:
  const Tiles<A> &tiles_;
  int64_t width_, height_;
  Matrix<A> values_;
};

// What all threads of a backward pass share. Rows of `filters` are those of U^T, for one block of channels after the
// other.
template <typename A>
struct Backward3x3 {
  static constexpr int64_t block = padded<A>(kBroad * Simd<A>::lanes);  // channels

  const ConvolutionBackward<A> &conv;
  const Affine<A> norm;
  const Tiles<A> tiles;
  const int64_t blocks, group, groups;  // of channels; images over which one thread sums; groups of images
  std::vector<double> sums;             // (groups, 2, channels)
  Gradients<A> gradients;               // groups of (9 taps, K) rows
  PointMatrices<A> filters;

  explicit Backward3x3(const ConvolutionBackward<A> &conv)
      : conv(conv), norm(conv.norm()), tiles(conv), blocks(ceil_div(conv.channels, block)),
        group(std::max(ceil_div(conv.images, most_groups(conv)), ceil_div(kMinPixels, conv.pixels()))),
        groups(ceil_div(conv.images, group)), sums(groups * 2 * conv.channels),
        gradients(conv.d_weight == nullptr ? 0 : groups, kTaps * conv.out_channels, conv.channels),
        filters(blocks * conv.out_channels, block) {}

  int64_t width(int64_t channel) const { return std::min(block, conv.channels - channel); }  // of a block

 private:
  // Return the most groups; like `group`, it does not depend on the number of threads.
  static int64_t most_groups(const ConvolutionBackward<A> &conv) {
    const int64_t bytes = kTaps * conv.out_channels * padded<A>(conv.channels) * static_cast<int64_t>(sizeof(A));
    return std::clamp<int64_t>(kGradientBytes / bytes, 8, kMaxGradients);
  }
};

// One thread of a backward pass.
template <typename A>
class Backward3x3Thread {
  static constexpr int64_t block = Backward3x3<A>::block;

 public:
  explicit Backward3x3Thread(Backward3x3<A> &all)
      : all_(all), conv_(all.conv), tiles_(all.tiles), per_image_(tiles_.per_image()),
        kept_images_(std::min(all.group, ceil_div(kKeptTiles, per_image_))),
        frame_images_(std::min(kept_images_, ceil_div(kBackwardTiles, per_image_))),
        filter_rows_(round_up(conv_.out_channels, kTall)), inputs_(kBackwardTiles, block),
        d_inputs_(kBackwardTiles, block), d_filters_(all.blocks * filter_rows_, block),
        // A product may begin at any tile, and reads whole tiles of `multiply_tile`.
        d_outputs_(kept_images_ * per_image_ + kTall - 1, conv_.out_channels),
        rectified_(tiles_, frame_images_, block), d_rectified_(tiles_, frame_images_, block),
        d_output_(kOutputSide * kOutputSide, conv_.out_channels), filter_(kTaps, block), sums_(2 * block) {}

  // Compute one row of U^T, (k, block).
  void transform_filter(int64_t row) {
    const int64_t k = row % conv_.out_channels, channel = row / conv_.out_channels * block;
    for (int64_t c = 0; c < all_.width(channel); ++c)
      for (int64_t tap = 0; tap < kTaps; ++tap)
        filter_.row(tap)[c] = conv_.weight[(k * conv_.channels + channel + c) * kTaps + tap];
    transform<FilterTransform>(block, filter_.row(0), Steps{kFilterSide * block, block}, all_.filters.at(0, row),
                               all_.filters.steps());
  }

  // Compute the gradients of a group of images.
  void run(int64_t number) {
    const int64_t last = std::min(conv_.images, (number + 1) * all_.group);
    d_filters_.clear();
    for (int64_t first = number * all_.group; first < last; first += kept_images_) {
      const int64_t end = std::min(last, first + kept_images_);
      transform_d_outputs(first, end);
      for (int64_t channel = 0; channel < conv_.channels; channel += block)
        for (int64_t image = first; image < end; image += frame_images_) {
          const int64_t images = std::min(frame_images_, end - image);
          rectify_inputs(image, images, channel);
          for (int64_t tile = 0; tile < images * per_image_; tile += kBackwardTiles)
            multiply_tiles(tile, std::min(kBackwardTiles, images * per_image_ - tile),
                           (image - first) * per_image_ + tile, channel);
          add_rows(number, image, images, channel);
        }
    }
    if (conv_.d_weight != nullptr) store_filters(number);
  }

 private:
  // Compute dM of whole images.
  void transform_d_outputs(int64_t first, int64_t end) {
    for (int64_t tile = first * per_image_; tile < end * per_image_; ++tile) {
      tiles_.visit(tile, kOutputSide, 0, [&](int64_t index, int64_t pixel) {
        if (pixel < 0)
          std::fill_n(d_output_.row(index), conv_.out_channels, A(0));
        else
          std::copy_n(conv_.d_output + pixel * conv_.ldd, conv_.out_channels, d_output_.row(index));
      });
      transform<OutputAdjoint>(d_output_.ld, d_output_.row(0), Steps{kOutputSide * d_output_.ld, d_output_.ld},
                               d_outputs_.at(0, tile - first * per_image_), d_outputs_.steps());
    }
  }

  // Call visit(pixel, its place in `rectified_`, its place in `d_rectified_`).
  template <typename Visit>
  void each_pixel(int64_t image, int64_t images, const Visit &visit) {
    for (int64_t i = 0; i < images; ++i)
      for (int64_t y = 0; y < conv_.height; ++y)
        for (int64_t x = 0; x < conv_.width; ++x)
          visit(((image + i) * conv_.height + y) * conv_.width + x, rectified_.pixel(i, y, x),
                d_rectified_.pixel(i, y, x));
  }

  void rectify_inputs(int64_t image, int64_t images, int64_t channel) {
    d_rectified_.clear();
    each_pixel(image, images, [&](int64_t pixel, A *to, A *) {
      rectify(all_.width(channel), conv_.x + pixel * conv_.ldx + channel, all_.norm, to, channel);
    });
  }

  // Add to dU, and to the gradient of the inputs of `count` tiles in the frames. Their dM begin at row `d_row`.
  void multiply_tiles(int64_t first, int64_t count, int64_t d_row, int64_t channel) {
    for (int64_t tile = 0; tile < count; ++tile)
      transform<InputTransform>(block, rectified_.inputs(first + tile), rectified_.steps(), inputs_.at(0, tile),
                                inputs_.steps());
    for (int point = 0; point < kPoints; ++point) {
      const A *d_outputs = d_outputs_.at(point, d_row);
      if (conv_.d_weight != nullptr)
        multiply<true>(filter_rows_, block, Left<A>{d_outputs, d_outputs_.ld, count}, inputs_.at(point), block,
                       d_filters_.at(point, channel / block * filter_rows_), block, true);
      multiply(round_up(count, kTall), block, Left<A>{d_outputs, d_outputs_.ld, conv_.out_channels},
               all_.filters.at(point, channel / block * conv_.out_channels), block, d_inputs_.at(point), block);
    }
    for (int64_t tile = 0; tile < count; ++tile)
      transform<InputAdjoint, true>(block, d_inputs_.at(0, tile), d_inputs_.steps(), d_rectified_.inputs(first + tile),
                                    d_rectified_.steps());
  }

  // Compute `out` of a block of channels, and add to the group's sums, kChunk pixels at a time.
  void add_rows(int64_t number, int64_t image, int64_t images, int64_t channel) {
    const int64_t width = all_.width(channel);
    int64_t summed = 0;
    each_pixel(image, images, [&](int64_t pixel, const A *rectified, const A *d_rectified) {
      conv_.add_row(pixel, rectified, d_rectified, all_.norm.scale.data(), sums_.data(), channel, width);
      if (++summed % kChunk != 0 && summed != images * conv_.pixels()) return;
      double *total = all_.sums.data() + number * 2 * conv_.channels + channel;
      for (int64_t c = 0; c < width; ++c) {
        total[c] += sums_[c];
        total[conv_.channels + c] += sums_[width + c];
      }
      std::fill(sums_.begin(), sums_.end(), A(0));
    });
  }

  // Store dU as the group's partial gradient.
  void store_filters(int64_t number) {
    for (int64_t k = 0; k < conv_.out_channels; ++k)
      for (int64_t channel = 0; channel < conv_.channels; channel += block) {
        transform<FilterAdjoint>(block, d_filters_.at(0, channel / block * filter_rows_ + k), d_filters_.steps(),
                                 filter_.row(0), Steps{kFilterSide * block, block});
        for (int64_t tap = 0; tap < kTaps; ++tap)
          std::copy_n(filter_.row(tap), all_.width(channel),
                      all_.gradients.row(number, tap * conv_.out_channels + k) + channel);
      }
  }

  Backward3x3<A> &all_;
  const ConvolutionBackward<A> &conv_;
  const Tiles<A> &tiles_;
  const int64_t per_image_;     // tiles
  const int64_t kept_images_;   // whose dM is in `d_outputs_`
  const int64_t frame_images_;  // in the frames
  const int64_t filter_rows_;   // K, rounded up
  PointMatrices<A> inputs_, d_inputs_, d_filters_, d_outputs_;
  Frames<A> rectified_, d_rectified_;
  Matrix<A> d_output_, filter_;  // of one tile; of one k
  std::vector<A> sums_;
};

template <typename A>
void conv3x3_backward(const ConvolutionBackward<A> &conv) {
  Backward3x3<A> all(conv);
  const int64_t channels = conv.channels, out_channels = conv.out_channels;
#pragma omp parallel num_threads(conv.threads)
  {
    Backward3x3Thread<A> thread(all);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < all.blocks * out_channels; ++row) thread.transform_filter(row);
#pragma omp for schedule(static)
    for (int64_t number = 0; number < all.groups; ++number) thread.run(number);
  }
  conv.add_groups(all.sums);
  if (conv.d_weight == nullptr) return;
#pragma omp parallel for num_threads(conv.threads) schedule(static)
  for (int64_t k = 0; k < out_channels; ++k)
    for (int64_t tap = 0; tap < kTaps; ++tap) {
      std::vector<double> total(channels);
      all.gradients.sum(tap * out_channels + k, total);
      for (int64_t c = 0; c < channels; ++c)
        conv.d_weight[(k * channels + c) * kTaps + tap] = static_cast<A>(total[c]);
    }
}

}  // namespace
