// out = activation(conv(x, weight) + bias + residual), a 3 x 3 convolution with stride 1 and one pixel of zeros around
// the image: what a launch needs to know.
//
// Maps are channels-last and contiguous, so a pixel's channels lie beside each other.
#pragma once

#include <cstdint>

namespace vggt_mv {

struct Conv3x3Params {
  const float* x;         // [batch, height, width, in_channels]
  const float* weight;    // [out_channels, in_channels, 3, 3]
  const float* bias;      // [out_channels]; null: zero
  const float* residual;  // [batch, height, width, out_channels]; null: zero
  float* out;             // [batch, height, width, out_channels]; may be `residual` itself, not `x`
  int64_t batch;
  int height;
  int width;
  int in_channels;
  int out_channels;
  bool relu;  // the activation: max(y, 0), else none
};

}  // namespace vggt_mv
