// out = activation(conv(map, weight) + bias + residual), a 3 x 3 convolution with stride 1 and one pixel of zeros around
// the map: what a launch needs to know.
//
// The map is x, or x resized by bilinear interpolation with corners aligned (row i of H lies at i (h - 1) / (H - 1) of the
// h rows of x, at 0 where H = 1), plus an offset of each pixel's row and one of its column.
//
// Maps are channels-last and contiguous, so a pixel's channels lie beside each other.
#pragma once

#include <cstdint>

namespace vggt_mv {

struct Conv3x3Params {
  const float* x;               // [batch, in_height, in_width, in_channels]
  const float* weight;          // [out_channels, in_channels, 3, 3]
  const float* bias;            // [out_channels]; null: zero
  const float* residual;        // [batch, height, width, out_channels]; null: zero
  const float* row_offsets;     // [height, in_channels]; null: zero
  const float* column_offsets;  // [width, in_channels]; null: zero
  float* out;                   // [batch, height, width, out_channels]; may be `residual` itself, not `x`
  int64_t batch;
  int in_height;
  int in_width;
  int height;
  int width;
  int in_channels;
  int out_channels;
  bool relu;  // the activation: max(y, 0), else none
};

}  // namespace vggt_mv
