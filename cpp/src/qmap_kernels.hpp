// Inner loops of the Q-map (qmap_isa.cpp), chosen at run time. Plain arrays only: see the RULE in isa.hpp.
//
// Complex numbers travel as `lanes` real parts and, somewhere else, `lanes` imaginary parts; steps and strides count
// floats. "Runs" are the `channels` numbers of one voxel: they lie side by side in every array of voxels.
#pragma once

#include <cstdint>

#include "isa.hpp"

namespace thalweg {

/// Fourier transform of a fixed length n = radix[0] ... radix[passes - 1], radices 2 to 6.
struct FftPlan {
  std::int32_t n, passes;
  std::int32_t radix[10];
  const float*
      twiddle;  // per pass but the last, p = 0 .. m - 1, j = 1 .. radix - 1: cos and -sin of 2 pi p j / (m radix)
};
constexpr int kMostFft = 256;  // longest n

/// `count` transforms of one plan; swapping re and im of both sides gives the inverse (without 1 / n).
struct FftRun {
  std::int64_t count;
  const float *in_re, *in_im;
  std::int64_t in_step, in_stride;  // from transform to transform, from element to element
  std::int32_t valid;               // elements from here on read as zero
  float *out_re, *out_im;           // may be the input
  std::int64_t out_step, out_stride;
  std::int32_t from, to;  // only these elements are written
  std::int64_t ahead;     // this far from what is read lies what comes next: asks for it
};

/// out[column][o] = sum over i of weight[i][o] in[column][i], all complex, at frequencies k = 0 .. count - 1 of in[0]
/// and, if paired, at frequencies -k of in[1], where the weights are conjugate.
struct SpectrumProduct {
  std::int32_t count, columns, inputs, outputs;
  bool paired;
  const float*
      weights;  // per frequency (inputs, outputs) real, then imaginary parts; may be read `lanes` beyond the end
  std::int64_t weight_step, weights_ahead;  // the second: how far from what is read to ask for more, or 0
  const float* in[2];  // `lanes` floats behind each of the two parts may be read; the second is not used unless paired,
                       // but must be a pointer that may be moved
  float* out[2];       // `lanes` floats behind each of the two parts are overwritten
  std::int64_t in_step, in_im, out_step, out_im;
};

/// One row of a convolution: out[x][o] = bias[o] + sum over rows r, taps t, inputs i of
/// weights[weight_row[r] + t][i][o] in[in_row[r] + t tap_step + x inputs + i].
struct DirectRow {
  std::int32_t rows, taps, inputs, outputs, padded_outputs;  // the last: a multiple of lanes
  const std::int64_t *in_row, *weight_row;
  std::int64_t tap_step;
  const float* weights;  // (tap, inputs, padded_outputs)
  const float* bias;     // (padded_outputs)
};

/// The last layer at chosen voxels: out[o] = bias[o] + sum over rows r, k of weights[r][o][k] in[start + row + k].
struct Gather {
  std::int32_t rows_z, rows_y, outputs, padded;  // padded: length of a row of weights, a multiple of lanes
  std::int32_t step;                             // dilation
  const std::int64_t *plane, *row, *column;      // offsets of z, y (first tap) and x
  std::int64_t plane_stride, row_stride;         // far from walls
  const float* weights;                          // (rows_z rows_y, outputs, padded), on a cache line
  const float* bias;
  const float* in;
};

struct QmapKernels {
  std::int32_t lanes;
  void (*fft)(const FftPlan& plan, const FftRun& run);
  void (*product)(const SpectrumProduct& job);
  void (*direct_row)(const DirectRow& row, const float* in, float* out, std::int64_t n);
  /// voxels: (n, 3) z, y, x. out: (n, outputs)
  void (*gather)(const Gather& job, const std::int32_t* voxels, std::int64_t n, float* out);
  /// Runs of `length` are copied. What is copied soon lies `ahead` floats behind `in`.
  void (*copy_runs)(std::int64_t n, std::int32_t length, const float* in, std::int64_t in_step, std::int64_t ahead,
                    float* out, std::int64_t out_step);
  /// Runs of `channels` are added to what is there.
  void (*add_runs)(std::int64_t n, std::int32_t channels, const float* in, std::int64_t in_step, float* out,
                   std::int64_t out_step);
  /// out[run k] += weight * in[run k]
  void (*scaled_runs)(std::int64_t n, std::int32_t channels, float weight, const float* in, std::int64_t in_step,
                      float* out, std::int64_t out_step);
  /// Activations at `state + offset[k]` get their pre-activation changed by change[k]; change becomes the change of the
  /// activation, saved what was there. What comes soon lies `ahead` floats behind `state`. linear: activations are
  /// pre-activations.
  void (*update)(std::int64_t n, std::int32_t channels, bool linear, const std::int64_t* offset, float* state,
                 std::int64_t ahead, float* change, float* saved);
  /// Exchanges state and saved.
  void (*exchange)(std::int64_t n, std::int32_t channels, const std::int64_t* offset, float* state, std::int64_t ahead,
                   float* saved);
  void (*leaky)(std::int64_t n, float* x);
  void (*tanh)(std::int64_t n, float* x);
};

THALWEG_DISPATCH(QmapKernels, qmap_kernels)

}  // namespace thalweg
