// A head of alternating_attention as attention_forward.h wants it: what an axis of the token grid makes of a sequence, a run
// of tokens for every frame, read and written where they lie.
#pragma once

#include "core/alternating_attention.h"
#include "cpu/attention_forward.h"

namespace vggt_mv::VGGT_MV_ISA {

// One head of one sequence.
template <typename T>
struct GridSource {
  using Storage = T;
  static constexpr int kWeights = 0;

  GridSource(const AlternatingAttentionParams& params, int64_t index)
      : p(params),
        keys(sequence_length(params.grid, params.axis)),
        width(params.width),
        scale(params.scale),
        bias(params.key_bias == nullptr   ? Bias::none
             : params.row_gate == nullptr ? Bias::plain
                                          : Bias::gated),
        sequence(index / params.heads),
        head(static_cast<int>(index % params.heads)),
        lse(params.lse == nullptr ? nullptr : params.lse + index * keys) {}

  const GridSource& result(int) const { return *this; }

  const T* part(int which, int64_t frame, int token) const {
    return static_cast<const T*>(p.qkv) + frame_offset(p.grid, p.qkv_strides.tokens, frame) +
           token * p.qkv_strides.tokens.token + which * p.qkv_strides.part + head * p.qkv_strides.head;
  }

  template <typename Body>
  VGGT_MV_INLINE void for_each_row_run(int64_t first, int count, Body body) const {
    for_each_run(p.grid, p.axis, sequence, first, count, [&](int64_t frame, int token, int done, int run) {
      const float* gate = p.row_gate == nullptr ? nullptr
                                                : p.row_gate + frame_offset(p.grid, p.row_gate_strides, frame) +
                                                      token * p.row_gate_strides.token;
      body(part(0, frame, token), p.qkv_strides.tokens.token, gate, p.row_gate_strides.token, done, run);
    });
  }

  template <typename Body>
  VGGT_MV_INLINE void for_each_key_run(int64_t first, int count, Body body) const {
    for_each_run(p.grid, p.axis, sequence, first, count, [&](int64_t frame, int token, int done, int run) {
      const float* bias = p.key_bias == nullptr ? nullptr : p.key_bias + frame * p.grid.tokens + token;
      body(part(1, frame, token), part(2, frame, token), p.qkv_strides.tokens.token, bias, done, run);
    });
  }

  template <typename Body>
  VGGT_MV_INLINE void for_each_out_run(int64_t first, int count, Body body) const {
    const int64_t stride = int64_t{p.heads} * p.width;
    for_each_run(p.grid, p.axis, sequence, first, count, [&](int64_t frame, int token, int done, int run) {
      body(static_cast<T*>(p.out) + (frame * p.grid.tokens + token) * stride + int64_t{head} * p.width, stride, done,
           run);
    });
  }

  const AlternatingAttentionParams& p;
  int64_t keys;
  int width;
  float scale;
  Bias bias;
  int64_t sequence;
  int head;
  float* lse;
  float lse_offset = 0.0f;  // of the weights' unit, where there are some
};

}  // namespace vggt_mv::VGGT_MV_ISA
