// Inner loops of the training step, one table per instruction set (isa.hpp). Plain data and raw pointers only; layouts
// are drawn in thalweg/training.hpp.
#pragma once

#include <cstddef>
#include <cstdint>

namespace thalweg {

inline constexpr int kCell = 32;       // floats
inline constexpr int kImaginary = 16;  // where the imaginary parts of a cell start
inline constexpr int kSecond = 8;      // where its second channel starts
inline constexpr int kGroup = 16;      // samples
inline constexpr int kHidden = 10;     // channels
inline constexpr int kHiddenCells = kHidden / 2;
inline constexpr int kFewCells = (kHidden + 3) / 4, kFewChannels = 4 * kFewCells;
inline constexpr int kMostSpecies = 16;

/// Blocks of 8 kernels that correlate's sums come in: outputs 0 .. 7 of each channel, then outputs 8 and 9 of four
/// channels each.
constexpr int sum_blocks(int channels) { return channels + (channels + 3) / 4; }
/// Where the kernel from a channel to an output is in them.
constexpr int sum_at(int channels, int output, int channel) {
  return output < 8 ? 8 * channel + output : 8 * channels + 2 * channel + output - 8;
}
static_assert(kHidden == 10);

/// A mixed-radix transform of n points (Stockham, self-sorting).
struct Fft {
  int n, stages;
  int radix[16];          // 2, 3, 4, 5, 7 or 13 each
  const float* twiddles;  // (n, 2) exp(-2 pi i j / n)
};

/// `count` transforms of lines of cells; the points of a line beyond in_count are zero, frequencies beyond out_count
/// are not written. inverse: not normalised.
struct Lines {
  bool inverse;
  int count, in_count, out_count;
  const float* in;
  float* out;
  /// Floats from line to line, from element to element, and to what a later line will want, which hardware does not
  /// foresee; 0: it does, or it is in the cache.
  struct Steps {
    std::ptrdiff_t line, element, later;
  } in_steps, out_steps;
};

/// Frequencies f and -f of some spectra.
struct Pairs {
  std::ptrdiff_t plane;  // floats from one channel pair to the next
  int count;
  const std::int32_t* pair;  // (count, 2) cells within the plane; equal where f is its own negative
};

/// What lies inside the grid, 0 or 1: mask[d] (extent[d], kCell) of direction d; mask[0] null: everything.
struct Box {
  int extent[3];
  const float* mask[3];
};

/// Sizes of a full convolution out[n + t] = sum kernel[n] taps[t]. kernel: dense. taps (kHidden, z, y, tap_row): a row
/// starts with tap_begin >= kernel[2] - 1 zeros and has zeros up to tap_begin + out_row. out (kHidden, z, y, out_row):
/// out_row a multiple of 8, at least kernel[2] - 1 + taps[2] rounded up to a multiple of 8.
struct Stamp {
  int kernel[3], taps[3], tap_row, tap_begin;
  int out[3], out_row;
};

/// Rows of a stamp (of channel 0) and where they go in images; width: floats, a multiple of 8.
struct Piece {
  std::size_t stamp, image;
  int rows, width;
};

struct TrainingKernels {
  /// scratch: 2 n cells.
  void (*lines)(const Fft&, const Lines&, float* scratch);
  /// out_h(f) = sum_i conj(w_hi(f)) in_i(f), kHidden channels from `channels`, or forward = false: out_i(f) = sum_h
  /// w_hi(f) in_h(f); w_hi at [pair][h channels + i], imaginary parts `weight_cells` x 32 floats later.
  void (*multiply)(const Pairs&, const float* weights, std::size_t weight_cells, int channels, bool forward,
                   const float* in, float* out);
  /// sums[pair][re, im][sum_at(channels, output, channel)] = sum over samples of a_channel(f) conj(d_output(f)), -f
  /// conjugated on top. add: on top of what is there. d: kHidden channels. later: floats to the a of the next call.
  void (*correlate)(const Pairs&, int channels, const float* a, std::ptrdiff_t later, const float* d, bool add,
                    float* sums);
  /// Groups of at most 8 samples: a cell holds channels c, c + 1 | c + 2, c + 3 instead of twice as many samples. The
  /// spectrum of each channel is that of a real image: unpack gives it for f alone, [pair][kFewChannels][re 8, im 8,
  /// im 8, - re 8], and pack goes back from [pair][kFewChannels][re 8, im 8, any 16]. The others are multiply and
  /// correlate of kHidden to kHidden channels.
  void (*unpack)(const Pairs&, const float* packed, float* x);
  void (*pack)(const Pairs&, const float* y, float* packed);
  void (*multiply_few)(int pairs, const float* weights, std::size_t weight_cells, bool conjugate, const float* in,
                       float* out);
  void (*correlate_few)(int pairs, const float* a, const float* d, bool add, float* sums);
  /// plane = leaky(plane + bias), zero outside the box's mask. bias: of each eighth float of a cell. signs: per cell
  /// one bit for each value above 0.
  void (*activate)(const Box&, const float* bias, float slope, float* plane, std::uint32_t* signs);
  /// d *= leaky' by the signs inside the mask, else 0.
  void (*pull)(const Box&, float slope, const std::uint32_t* signs, float* d);
  /// weights[pair][re, im][kernel] = scale * spectrum of each real kernel; spectrum: kernel 32 j + r (r < 16) is the
  /// real part of lane r of plane j, kernel 32 j + 16 + r its imaginary part.
  void (*split)(const Pairs&, std::size_t cells, const float* spectrum, float scale, float* weights);
  /// The opposite for gradients: adds up the sums of all slots; kernel = sum_at.
  void (*join)(const Pairs&, int channels, int slots, const float* const* sums, std::size_t cells, float scale,
               float* spectrum);
  /// u (species, kGroup) = sum over channels and points of w (species, kHidden, points) a; a: kHiddenCells planes.
  void (*last)(int points, int species, const float* w, const float* a, float* u);
  /// d = sum_s w_s du_s, and dw (species, kHidden, points) += sum over samples of du_s a.
  void (*last_back)(int points, int species, const float* w, const float* a, const float* du, float* d, float* dw);
  /// Adds the pieces' rows of stamps to those of images, or the other way round.
  void (*add_rows)(const Piece* pieces, int count, bool to_images, float* stamps, std::ptrdiff_t stamp_row,
                   float* images, std::ptrdiff_t image_row);
  /// Eight lanes of a plane of `rows` x `width` cells (lanes: the first of them in the first cell) from one image per
  /// sample, and back.
  void (*interleave)(int rows, int width, const float* images, std::ptrdiff_t image, std::ptrdiff_t row, float* lanes);
  void (*separate)(int rows, int width, const float* lanes, float* images, std::ptrdiff_t image, std::ptrdiff_t row);
  /// Sum of all cells of a plane.
  void (*total)(std::size_t points, const float* plane, float* cell);
  /// out += kernel convolved with taps, per channel; see Stamp. Eight floats behind the kernel are read.
  void (*stamp)(const Stamp&, const float* kernel, const float* taps, float* out);
  /// Its transposes: by_taps += , by_kernel += .
  void (*stamp_taps)(const Stamp&, const float* kernel, const float* out, float* by_taps);
  void (*stamp_kernel)(const Stamp&, const float* taps, const float* out, float* by_kernel);
  void (*adam)(std::size_t n, const float* gradient, float beta1, float beta2, float rate, float scale, float epsilon,
               float* parameters, float* first, float* second);
};

}  // namespace thalweg
