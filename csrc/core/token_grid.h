// The token grid [B, T, N, P]: batch, times, views, tokens of a frame. Tokens lie where they are; an attention names an
// axis, and this header turns (sequence, index in it) into an address.
//
//   axis     one sequence is           length   index in it
//   frame    one (b, t, n)             P        p
//   view     one (b, t), all n         N P      n P + p
//   time     one (b, n), all t         T P      t P + p
//   global   one b                     T N P    (t N + n) P + p
#pragma once

#include <cstdint>

namespace vggt_mv {

// The numbers stand in vggt_mv_ext too, on the other side of the binding.
enum class Axis : int { frame = 0, view = 1, time = 2, global = 3 };

struct TokenGrid {
  int batch;
  int times;
  int views;
  int tokens;
};

// Distances in elements between neighbours along each dimension of the grid.
struct TokenStrides {
  int64_t batch;
  int64_t time;
  int64_t view;
  int64_t token;
};

static constexpr int64_t token_count(const TokenGrid& grid) {
  return int64_t{grid.batch} * grid.times * grid.views * grid.tokens;
}

static constexpr int64_t frame_count(const TokenGrid& grid) { return int64_t{grid.batch} * grid.times * grid.views; }

// Offset of the first token of frame number (b T + t) N + n.
static constexpr int64_t frame_offset(const TokenGrid& grid, const TokenStrides& strides, int64_t frame) {
  const int64_t view = frame % grid.views;
  const int64_t time = frame / grid.views % grid.times;
  const int64_t batch = frame / grid.views / grid.times;
  return batch * strides.batch + time * strides.time + view * strides.view;
}

// The strides of a contiguous [B, T, N, P, width].
static constexpr TokenStrides contiguous_strides(const TokenGrid& grid, int64_t width) {
  const int64_t view = grid.tokens * width;
  return {grid.times * grid.views * view, grid.views * view, view, width};
}

static constexpr int64_t sequence_count(const TokenGrid& grid, Axis axis) {
  switch (axis) {
    case Axis::frame: return frame_count(grid);
    case Axis::view: return int64_t{grid.batch} * grid.times;
    case Axis::time: return int64_t{grid.batch} * grid.views;
    default: return grid.batch;
  }
}

static constexpr int64_t frames_per_sequence(const TokenGrid& grid, Axis axis) {
  switch (axis) {
    case Axis::frame: return 1;
    case Axis::view: return grid.views;
    case Axis::time: return grid.times;
    default: return int64_t{grid.times} * grid.views;
  }
}

static constexpr int64_t sequence_length(const TokenGrid& grid, Axis axis) {
  return frames_per_sequence(grid, axis) * grid.tokens;
}

// Number (b T + t) N + n of frame `index` of a sequence.
static constexpr int64_t frame_of_sequence(const TokenGrid& grid, Axis axis, int64_t sequence, int64_t index) {
  switch (axis) {
    case Axis::frame: return sequence;
    case Axis::view: return sequence * grid.views + index;
    case Axis::time: return (sequence / grid.views * grid.times + index) * grid.views + sequence % grid.views;
    default: return sequence * grid.times * grid.views + index;
  }
}

}  // namespace vggt_mv
