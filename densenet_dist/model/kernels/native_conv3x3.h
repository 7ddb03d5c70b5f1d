// BN-ReLU and a 3x3 convolution with zero padding, forward and backward, some image rows at a time.
//
// The convolution is computed by the products of `native_gemm.h`. Layers have few output channels (12, 35), and a
// product per tap would pad each of them to whole vectors: 12 to 16 with AVX-512, nine times. The products here put the
// taps side by side, so that only the last vector is padded (9 x 12 = 108 to 112). x[p] are the C input channels of
// pixel p, y[p] its K output channels, and p + t is the neighbor of p at tap t.
//
// 1. Forward: one product gives all taps of all pixels, and an output is a sum of nine of them.
//
//      P[p][t, k] = sum over c of x[p][c] w[k][c][t]           (pixels, C) x (C, 9 K)
//      y[p][k] = sum over t of P[p + t][t, k]
//
//    In one dimension with 3 taps (-1, 0, 1) and 4 pixels, where each row of P holds the taps a, b, c of a pixel:
//
//      P[0]: a0 b0 c0     y[0] =      b0 + c1
//      P[1]: a1 b1 c1     y[1] = a0 + b1 + c2
//      P[2]: a2 b2 c2     y[2] = a1 + b2 + c3
//      P[3]: a3 b3 c3     y[3] = a2 + b3
//
// 2. Gradient of x: the products of dy with three taps as one inner dimension, added up over the three image rows.
//
//      dx[p][c] = sum over t, k of dy[p - t][k] w[k][c][t]     (pixels, 3 K) x (3 K, C), three times
//
// 3. Gradient of the weight: the same left factor, transposed.
//
//      dw[k][c][t] = sum over p of dy[p - t][k] x[p][c]        (3 K, pixels) x (pixels, C), three times
//
// For 2 and 3, dy is copied into a frame of zeros with one zero pixel after each image row. Then the K channels of
// three neighboring pixels, for three taps, are one contiguous piece of 3 K elements: a segment of the left factor.
// For a row of 4 pixels, "0" a zero pixel:
//
//      0 d0 d1 d2 d3 0 ...       segment of pixel 0: 0 d0 d1, of pixel 1: d0 d1 d2, .., of pixel 3: d2 d3 0

#pragma once

#include "native_convolution.h"

namespace {

constexpr int64_t kTaps = 9;
constexpr int64_t kMinPixels = 256;           // over which a partial gradient of a weight is summed, at least
constexpr int64_t kGradientBytes = 16 << 20;  // of all partial gradients of a weight, unless 8 are larger

inline int64_t ceil_div(int64_t value, int64_t by) { return (value + by - 1) / by; }

// A strip is some image rows, about kChunk pixels. `pixels` is the size of its buffers, a whole number of tiles.
struct Strip {
  int64_t rows, pixels;
  Strip(int64_t height, int64_t width, int64_t pitch)
      : rows(std::min(height, ceil_div(kChunk, width))), pixels(round_up(rows * pitch, kTall)) {}
};

// The products P of three strips in a ring: the outputs of a strip are sums of its own, the one above and the one
// below.
template <typename A>
class Products {
 public:
  using Vector = typename Simd<A>::type;
  static constexpr int64_t lanes = Simd<A>::lanes;

  Products(const Convolution<A> &conv, const Strip &strip)
      : conv_(conv), strip_(strip),
        values_(3 * strip.pixels + 1, kTaps * conv.out_channels),  // a last vector may reach beyond its row
        zeros_(round_up(conv.out_channels, lanes)) {}

  // Compute P of the strip that begins at image row `top` from its rectified pixels.
  void set(int64_t top, int64_t pixels, const Matrix<A> &rectified, const Matrix<A> &weights) {
    multiply(round_up(pixels, kTall), values_.ld, Left<A>{rectified.row(0), rectified.ld, conv_.channels},
             weights.row(0), weights.ld, values_.row(top / strip_.rows % 3 * strip_.pixels), values_.ld);
  }

  // Compute one image row of the output, in whole vectors; pixels are `ld` elements apart.
  void sum(int64_t y, A *to, int64_t ld) const {
    const A *rows[3];
    for (int64_t i = 0; i < 3; ++i) {
      const int64_t above = y + i - 1;
      rows[i] = above >= 0 && above < conv_.height ? row(above) + 3 * i * conv_.out_channels : nullptr;
    }
    for (int64_t x = 0; x < conv_.width; ++x, to += ld) {
      const A *taps[kTaps];
      for (int64_t tap = 0; tap < kTaps; ++tap) {
        const int64_t left = x + tap % 3 - 1;
        const bool inside = rows[tap / 3] != nullptr && left >= 0 && left < conv_.width;
        taps[tap] = inside ? rows[tap / 3] + left * values_.ld + tap % 3 * conv_.out_channels : zeros_.data();
      }
      for (int64_t k = 0; k < conv_.out_channels; k += lanes) {
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
  // Return P of the first pixel of an image row.
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
  const int64_t height = conv.height, width = conv.width, channels = conv.channels, out_channels = conv.out_channels;
  Matrix<A> weights(channels, kTaps * out_channels);
  for (int64_t k = 0; k < out_channels; ++k)
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t tap = 0; tap < kTaps; ++tap)
        weights.row(c)[tap * out_channels + k] = conv.weight[(k * channels + c) * kTaps + tap];
  const Strip strip(height, width, width);
  const int64_t group = std::max<int64_t>(1, kGroup / conv.pixels());  // images whose statistics one thread computes
  Moments<A> moments(conv.rows(), out_channels, conv.slot_mean != nullptr, group * conv.pixels());
  const int64_t groups = moments.groups();
#pragma omp parallel num_threads(conv.threads)
  {
    Matrix<A> rectified(strip.pixels, channels), output(width, out_channels);
    Products<A> products(conv, strip);
    std::vector<A> scratch(3 * out_channels);
#pragma omp for schedule(static)
    for (int64_t number = 0; number < groups; ++number) {
      const int64_t last_image = std::min(conv.images, (number + 1) * group);
      for (int64_t image = number * group; image < last_image; ++image) {
        const int64_t origin = image * conv.pixels();
        const auto multiply_strip = [&](int64_t top) {
          const int64_t first = origin + top * width, count = (std::min(height, top + strip.rows) - top) * width;
          for (int64_t p = 0; p < count; ++p)
            rectify(channels, conv.x + (first + p) * conv.ldx, norm, rectified.row(p));
          products.set(top, count, rectified, weights);
        };
        multiply_strip(0);
        for (int64_t top = 0; top < height; top += strip.rows) {
          const int64_t bottom = std::min(height, top + strip.rows);
          if (bottom < height) multiply_strip(bottom);  // a strip's last row needs the first row of the next strip
          for (int64_t y = top; y < bottom; ++y) {
            products.sum(y, output.row(0), output.ld);
            for (int64_t x = 0; x < width; ++x) conv.store(origin + y * width + x, output.row(x));
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
  const int64_t height = conv.height, width = conv.width, channels = conv.channels, out_channels = conv.out_channels;
  const int64_t pitch = width + 1;  // pixels from one image row to the next, with the zero between them
  const int64_t segment = 3 * out_channels, segment_rows = round_up(segment, kTall);
  Matrix<A> weights(kTaps * out_channels, channels);
  for (int64_t tap = 0; tap < kTaps; ++tap)
    for (int64_t k = 0; k < out_channels; ++k)
      for (int64_t c = 0; c < channels; ++c)
        weights.row(tap * out_channels + k)[c] = conv.weight[(k * channels + c) * kTaps + kTaps - 1 - tap];
  const Strip strip(height, width, pitch);
  // The number of images over which one thread sums depends on shapes only.
  const int64_t bytes = 3 * segment_rows * weights.ld * static_cast<int64_t>(sizeof(A));
  const int64_t most_groups = std::clamp<int64_t>(kGradientBytes / bytes, 8, kMaxGradients);
  const int64_t group = std::max(ceil_div(conv.images, most_groups), ceil_div(kMinPixels, conv.pixels()));
  const int64_t groups = ceil_div(conv.images, group);
  std::vector<double> partial(groups * 2 * channels);
  Gradients<A> gradients(conv.d_weight == nullptr ? 0 : groups, 3 * segment_rows, channels);
#pragma omp parallel num_threads(conv.threads)
  {
    Matrix<A> rectified(strip.pixels, channels), d_rectified(strip.pixels, channels);
    // dy in its frame of zeros, and room for a tile that reaches beyond the end.
    std::vector<A> d_output(((height + 2) * pitch + 2 + kTall) * out_channels + kTall), sums(2 * channels);
#pragma omp for schedule(static)
    for (int64_t number = 0; number < groups; ++number) {
      const int64_t last_image = std::min(conv.images, (number + 1) * group);
      for (int64_t image = number * group; image < last_image; ++image) {
        const int64_t origin = image * conv.pixels();
        for (int64_t y = 0; y < height; ++y)
          for (int64_t x = 0; x < width; ++x)
            std::copy_n(conv.d_output + (origin + y * width + x) * conv.ldd, out_channels,
                        d_output.data() + ((y + 1) * pitch + 1 + x) * out_channels);
        for (int64_t top = 0; top < height; top += strip.rows) {
          const int64_t bottom = std::min(height, top + strip.rows), count = (bottom - top) * pitch;
          for (int64_t y = top; y < bottom; ++y)
            for (int64_t x = 0; x < width; ++x)
              rectify(channels, conv.x + (origin + y * width + x) * conv.ldx, norm,
                      rectified.row((y - top) * pitch + x));
          const A *above = d_output.data() + top * pitch * out_channels;  // up and left of the strip's first pixel
          for (int64_t i = 0; i < 3 && conv.d_weight != nullptr; ++i)
            multiply<true>(segment_rows, rectified.ld, Left<A>{above + i * pitch * out_channels, out_channels, count},
                           rectified.row(0), rectified.ld, gradients.row(number, i * segment_rows), rectified.ld, true);
          multiply(round_up(count, kTall), d_rectified.ld,
                   Left<A>{above, out_channels, segment, 3, pitch * out_channels}, weights.row(0), weights.ld,
                   d_rectified.row(0), d_rectified.ld);
          std::fill(sums.begin(), sums.end(), A(0));
          for (int64_t y = top; y < bottom; ++y)
            for (int64_t x = 0; x < width; ++x) {
              const int64_t at = (y - top) * pitch + x;
              conv.add_row(origin + y * width + x, rectified.row(at), d_rectified.row(at), norm.scale.data(),
                           sums.data());
            }
          for (int64_t c = 0; c < 2 * channels; ++c) partial[number * 2 * channels + c] += sums[c];
        }
      }
    }
  }
  conv.add_groups(partial);
  if (conv.d_weight == nullptr) return;
#pragma omp parallel for num_threads(conv.threads) schedule(static)
  for (int64_t k = 0; k < out_channels; ++k)
    for (int64_t tap = 0; tap < kTaps; ++tap) {
      std::vector<double> total(channels);
      gradients.sum(tap / 3 * segment_rows + tap % 3 * out_channels + k, total);
      for (int64_t c = 0; c < channels; ++c)
        conv.d_weight[(k * channels + c) * kTaps + kTaps - 1 - tap] = static_cast<A>(total[c]);
    }
}

}  // namespace
