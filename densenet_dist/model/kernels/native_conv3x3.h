// BN-ReLU and a 3x3 convolution with zero padding, forward and backward, some image rows at a time.
//
// All of it is products of `native_gemm.h`, arranged so that the few maps a layer makes (12, 35) are not padded one by one
// to whole vectors. With pixels p, taps t of the weight, and the maps x and y that the convolution reads and makes:
//
//   forward   P[p][t, k] = sum over c of x[p][c] w[k][c][t];  y[p][k] = sum over t of P[p + t][t, k]
//   backward  dx[p][c] = sum over t, k of dy[p - t][k] w[k][c][t];  dw[k][c][t] = sum over p of dy[p - t][k] x[p][c]
//
// dy is copied next to zeros, with one zero pixel after each image row, so that the dy[p - t][k] of three taps side by
// side are one contiguous piece: a segment of the left factor.

#pragma once

#include "native_convolution.h"

namespace {

constexpr int64_t kTaps = 9;
constexpr int64_t kLeastPixels = 256;  // of the images that share a weight's gradient
constexpr int64_t kGradientBytes = 16 << 20;  // of a weight's gradients that are summed at the same time

inline int64_t ceil_div(int64_t value, int64_t by) { return (value + by - 1) / by; }

// Image rows are taken in strips of about kChunk pixels: `rows` of them, at most `pixels`, with room for whole tiles.
struct Strip {
  int64_t rows, pixels;
  Strip(int64_t height, int64_t width, int64_t pitch)
      : rows(std::min(height, ceil_div(kChunk, width))), pixels(round_up(rows * pitch, kTall)) {}
};

// The products P of three strips, one after the other: what a strip's outputs are sums of.
template <typename A>
class Products {
 public:
  using Vector = typename Simd<A>::type;
  static constexpr int64_t lanes = Simd<A>::lanes;

  Products(const Convolution<A> &conv, const Strip &strip)
      : conv_(conv), strip_(strip), values_(3 * strip.pixels + 1, kTaps * conv.makes),  // vectors may reach beyond
        zeros_(round_up(conv.makes, lanes)) {}

  // The strip that begins at image row `top`, from its rectified pixels.
  void set(int64_t top, int64_t pixels, const Matrix<A> &rectified, const Matrix<A> &weights) {
    multiply(round_up(pixels, kTall), values_.ld, Left<A>{rectified.row(0), rectified.ld, conv_.channels},
             weights.row(0), weights.ld, values_.row(top / strip_.rows % 3 * strip_.pixels), values_.ld);
  }

  // y of one image row, in whole vectors, `ld` elements apart.
  void sum(int64_t y, A *to, int64_t ld) const {
    const A *rows[3];
    for (int64_t i = 0; i < 3; ++i) {
      const int64_t above = y + i - 1;
      rows[i] = above >= 0 && above < conv_.height ? row(above) + 3 * i * conv_.makes : nullptr;
    }
    for (int64_t x = 0; x < conv_.width; ++x, to += ld) {
      const A *taps[kTaps];
      for (int64_t tap = 0; tap < kTaps; ++tap) {
        const int64_t left = x + tap % 3 - 1;
        const bool inside = rows[tap / 3] != nullptr && left >= 0 && left < conv_.width;
        taps[tap] = inside ? rows[tap / 3] + left * values_.ld + tap % 3 * conv_.makes : zeros_.data();
      }
      for (int64_t k = 0; k < conv_.makes; k += lanes) {
        Vector sum = {};
        for (const A *tap : taps) {
          Vector part;
          std::memcpy(&part, tap + k, kVectorBytes);
          sum += part;
        }
        std::memcpy(to + k, &sum, kVectorBytes);
      }
    }
  }

 private:
  // The first pixel of an image row.
  const A *row(int64_t y) const {
    return values_.row(y / strip_.rows % 3 * strip_.pixels + y % strip_.rows * conv_.width);
  }

  const Convolution<A> &conv_;
  const Strip &strip_;
  Matrix<A> values_;
  std::vector<A> zeros_;
};

template <typename A>
void conv3x3(const ConvolutionForward<A> &conv) {
  const Affine<A> norm = conv.norm();
  const int64_t height = conv.height, width = conv.width, channels = conv.channels, makes = conv.makes;
  Matrix<A> weights(channels, kTaps * makes);
  for (int64_t k = 0; k < makes; ++k)
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t tap = 0; tap < kTaps; ++tap)
        weights.row(c)[tap * makes + k] = conv.weight[(k * channels + c) * kTaps + tap];
  const Strip strip(height, width, width);
  const int64_t group = std::max<int64_t>(1, kGroup / conv.pixels());  // images whose statistics one thread takes
  Moments<A> moments(conv.rows(), makes, conv.slot_mean != nullptr, group * conv.pixels());
  const int64_t groups = moments.groups();
#pragma omp parallel num_threads(conv.threads)
  {
    Matrix<A> rectified(strip.pixels, channels), made(width, makes);
    Products<A> products(conv, strip);
    std::vector<A> scratch(3 * makes);
#pragma omp for schedule(static)
    for (int64_t number = 0; number < groups; ++number) {
      const int64_t last_image = std::min(conv.images, (number + 1) * group);
      for (int64_t image = number * group; image < last_image; ++image) {
        const int64_t origin = image * conv.pixels();
        const auto multiply_strip = [&](int64_t top) {
          const int64_t first = origin + top * width, few = (std::min(height, top + strip.rows) - top) * width;
          for (int64_t p = 0; p < few; ++p)
            rectify(channels, conv.x + (first + p) * conv.ldx, norm, rectified.row(p));
          products.set(top, few, rectified, weights);
        };
        multiply_strip(0);
        for (int64_t top = 0; top < height; top += strip.rows) {
          const int64_t bottom = std::min(height, top + strip.rows);
          if (bottom < height) multiply_strip(bottom);  // a strip's last row needs the first one of the next
          for (int64_t y = top; y < bottom; ++y) {
            products.sum(y, made.row(0), made.ld);
            for (int64_t x = 0; x < width; ++x) conv.store(origin + y * width + x, made.row(x));
          }
          moments.add(number * group * conv.pixels(), origin + top * width, origin + bottom * width, conv.slot,
                      conv.lds, scratch.data());
        }
      }
    }
  }
  moments.finish(conv.slot_mean, conv.slot_var);
}

template <typename A>
void conv3x3_backward(const ConvolutionBackward<A> &conv) {
  const Affine<A> norm = conv.norm();
  const int64_t height = conv.height, width = conv.width, channels = conv.channels, makes = conv.makes;
  const int64_t pitch = width + 1;  // pixels from one image row to the next, the zero between them included
  const int64_t segment = 3 * makes, segment_rows = round_up(segment, kTall);
  Matrix<A> weights(kTaps * makes, channels);
  for (int64_t tap = 0; tap < kTaps; ++tap)
    for (int64_t k = 0; k < makes; ++k)
      for (int64_t c = 0; c < channels; ++c)
        weights.row(tap * makes + k)[c] = conv.weight[(k * channels + c) * kTaps + kTaps - 1 - tap];
  const Strip strip(height, width, pitch);
  // Images that one thread sums: their number depends on shapes alone.
  const int64_t bytes = 3 * segment_rows * weights.ld * static_cast<int64_t>(sizeof(A));
  const int64_t most_groups = std::clamp<int64_t>(kGradientBytes / bytes, 8, kMostGradients);
  const int64_t group = std::max(ceil_div(conv.images, most_groups), ceil_div(kLeastPixels, conv.pixels()));
  const int64_t groups = ceil_div(conv.images, group);
  std::vector<double> partial(groups * 2 * channels);
  Gradients<A> gradients(conv.d_weight == nullptr ? 0 : groups, 3 * segment_rows, channels);
#pragma omp parallel num_threads(conv.threads)
  {
    Matrix<A> rectified(strip.pixels, channels), came(strip.pixels, channels);
    // dy with zeros around it; a tile of rows may reach beyond the end.
    std::vector<A> d_made(((height + 2) * pitch + 2 + kTall) * makes + kTall), sums(2 * channels);
#pragma omp for schedule(static)
    for (int64_t number = 0; number < groups; ++number) {
      const int64_t last_image = std::min(conv.images, (number + 1) * group);
      for (int64_t image = number * group; image < last_image; ++image) {
        const int64_t origin = image * conv.pixels();
        for (int64_t y = 0; y < height; ++y)
          for (int64_t x = 0; x < width; ++x)
            std::copy_n(conv.d_made + (origin + y * width + x) * conv.ldd, makes,
                        d_made.data() + ((y + 1) * pitch + 1 + x) * makes);
        for (int64_t top = 0; top < height; top += strip.rows) {
          const int64_t bottom = std::min(height, top + strip.rows), few = (bottom - top) * pitch;
          for (int64_t y = top; y < bottom; ++y)
            for (int64_t x = 0; x < width; ++x)
              rectify(channels, conv.x + (origin + y * width + x) * conv.ldx, norm,
                      rectified.row((y - top) * pitch + x));
          const A *above = d_made.data() + top * pitch * makes;  // the pixel above and left of the strip's first one
          for (int64_t i = 0; i < 3 && conv.d_weight != nullptr; ++i)
            multiply<true>(segment_rows, rectified.ld, Left<A>{above + i * pitch * makes, makes, few}, rectified.row(0),
                           rectified.ld, gradients.row(number, i * segment_rows), rectified.ld, true);
          multiply(round_up(few, kTall), came.ld, Left<A>{above, makes, segment, 3, pitch * makes}, weights.row(0),
                   weights.ld, came.row(0), came.ld);
          std::fill(sums.begin(), sums.end(), A(0));
          for (int64_t y = top; y < bottom; ++y)
            for (int64_t x = 0; x < width; ++x) {
              const int64_t at = (y - top) * pitch + x;
              conv.add_row(origin + y * width + x, rectified.row(at), came.row(at), norm.scale.data(), sums.data());
            }
          for (int64_t c = 0; c < 2 * channels; ++c) partial[number * 2 * channels + c] += sums[c];
        }
      }
    }
  }
  conv.add_groups(partial);
  if (conv.d_weight == nullptr) return;
#pragma omp parallel for num_threads(conv.threads) schedule(static)
  for (int64_t k = 0; k < makes; ++k)
    for (int64_t tap = 0; tap < kTaps; ++tap) {
      std::vector<double> total(channels);
      gradients.sum(tap / 3 * segment_rows + tap % 3 * makes + k, total);
      for (int64_t c = 0; c < channels; ++c)
        conv.d_weight[(k * channels + c) * kTaps + kTaps - 1 - tap] = static_cast<A>(total[c]);
    }
}

}  // namespace
