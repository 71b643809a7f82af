// out = activation(conv(x, weight) + bias + residual) by Winograd's F(4 x 4, 3 x 3). Layouts: core/conv3x3.h.
//
// The image is cut into tiles of 4 x 4 results, each of which reads 6 x 6 pixels. With the matrices A, B, G below
//
//   out tile = A^T [ sum over input channels of (G w G^T) * (B^T d B) ] A,      * element by element,
//
// so a tile takes 36 multiplications for every pair of channels where the sum over 3 x 3 taps takes 144. For each of the
// 36 places of the transformed tile the sum over channels is a product of matrices, [tiles, in] x [in, out], which is
// bound by multiply-adds; the transforms cost a few per cent of it from 128 channels on.
//
// A, B and G follow from six points at which polynomials are evaluated (Toom, Cook): 0, +-3/4, +-3/2 and infinity. The
// usual 0, +-1, +-2 round twice as badly. A and B are exact in float.
//
// * Weights are transformed in every call, in a fiftieth of the time: nothing to keep, nothing that could be out of date.
//   The memory for them and for the blocks is kept, in large pages: fresh memory cost a quarter of the time.
// * A thread takes a block of tiles through all steps. Its transformed tiles and products, some megabytes, stay in the
//   third-level cache beside the transformed weights; the panel of weights at work and the rows that it meets in the
//   first.
// * Pixels outside of the image are read from a row of zeros, so the transform has no special case. A tile asks for the
//   pixels of the next one ahead: no processor guesses that order by itself, and it more than halves the time of reading.
#include "core/conv3x3.h"

#include "cpu/attention_tiles.h"
#include "cpu/kept_memory.h"
#include "cpu/kernels.h"

namespace vggt_mv::VGGT_MV_ISA {

namespace {

constexpr int kOut = 4;          // results along a side of a tile
constexpr int kSide = kOut + 2;  // what they read
constexpr int kPlaces = kSide * kSide;
constexpr int kBlockTiles = 48;    // with fewer, reading weights takes longer than multiplying; more crowd the caches
constexpr int kWeightInputs = 16;  // input channels of a block of weights

constexpr float kA = 0.75f, kB = 1.5f;  // the points
constexpr float kA2 = kA * kA, kB2 = kB * kB;

// B^T d, for six rows or columns.
VGGT_MV_INLINE void transform_input(const Vector (&d)[kSide], Vector (&to)[kSide]) {
  const Vector even_a = multiply_add(d[2], broadcast(-kB2), d[4]), odd_a = multiply_add(d[1], broadcast(-kB2), d[3]);
  const Vector even_b = multiply_add(d[2], broadcast(-kA2), d[4]), odd_b = multiply_add(d[1], broadcast(-kA2), d[3]);
  to[0] = multiply_add(d[0], broadcast(kA2 * kB2), multiply_add(d[2], broadcast(-kA2 - kB2), d[4]));
  to[1] = multiply_add(odd_a, broadcast(kA), even_a);
  to[2] = multiply_add(odd_a, broadcast(-kA), even_a);
  to[3] = multiply_add(odd_b, broadcast(kB), even_b);
  to[4] = multiply_add(odd_b, broadcast(-kB), even_b);
  to[5] = multiply_add(d[1], broadcast(kA2 * kB2), multiply_add(d[3], broadcast(-kA2 - kB2), d[5]));
}

// G w, for three taps.
VGGT_MV_INLINE void transform_weight(Vector w0, Vector w1, Vector w2, Vector (&to)[kSide]) {
  constexpr float kOfZero = 1 / (kA2 * kB2), kOfA = 1 / (2 * kA2 * (kA2 - kB2)), kOfB = 1 / (2 * kB2 * (kB2 - kA2));
  const Vector even_a = multiply_add(w2, broadcast(kA2), w0), even_b = multiply_add(w2, broadcast(kB2), w0);
  to[0] = w0 * kOfZero;
  to[1] = multiply_add(w1, broadcast(kA), even_a) * kOfA;
  to[2] = multiply_add(w1, broadcast(-kA), even_a) * kOfA;
  to[3] = multiply_add(w1, broadcast(kB), even_b) * kOfB;
  to[4] = multiply_add(w1, broadcast(-kB), even_b) * kOfB;
  to[5] = w2;
}

// A^T m, for six rows or columns.
VGGT_MV_INLINE void transform_output(const Vector (&m)[kSide], Vector (&to)[kOut]) {
  const Vector even_a = m[1] + m[2], odd_a = m[1] - m[2];
  const Vector even_b = m[3] + m[4], odd_b = m[3] - m[4];
  to[0] = m[0] + even_a + even_b;
  to[1] = multiply_add(odd_a, broadcast(kA), odd_b * kB);
  to[2] = multiply_add(even_a, broadcast(kA2), even_b * kB2);
  to[3] = multiply_add(odd_a, broadcast(kA2 * kA), multiply_add(odd_b, broadcast(kB2 * kB), m[5]));
}

// How the work is cut up. Strides count floats; an odd number of vectors more than a power of two keeps the 36 places of
// a tile out of the same cache sets.
struct Plan {
  int tile_rows, tile_columns;  // of an image
  int64_t tiles;                // of all images
  int block_tiles;              // a multiple of kTileRows
  int64_t blocks;
  int64_t in_stride, out_stride;              // from tile to tile
  int64_t in_place, out_place, weight_place;  // from place to place
  int panels;                                 // of kTileColumns output channels
  int64_t block_floats;                       // a thread's memory
};

Plan make_plan(const Conv3x3Params& p, int threads) {
  Plan plan;
  plan.tile_rows = (p.height + kOut - 1) / kOut;
  plan.tile_columns = (p.width + kOut - 1) / kOut;
  plan.tiles = p.batch * plan.tile_rows * plan.tile_columns;
  plan.panels = (p.out_channels + kTileColumns - 1) / kTileColumns;
  plan.in_stride = round_up(p.in_channels, kLanes);
  plan.out_stride = int64_t{plan.panels} * kTileColumns;
  const int64_t shared_out = (plan.tiles + threads - 1) / threads;
  plan.block_tiles = static_cast<int>(round_up(shared_out < kBlockTiles ? shared_out : kBlockTiles, kTileRows));
  plan.blocks = (plan.tiles + plan.block_tiles - 1) / plan.block_tiles;
  plan.in_place = plan.block_tiles * plan.in_stride + kLanes;
  plan.out_place = plan.block_tiles * plan.out_stride + kLanes;
  plan.weight_place = round_up(int64_t{plan.panels} * p.in_channels * kTileColumns, kLanes) + kLanes;
  plan.block_floats = round_up(kPlaces * (plan.in_place + plan.out_place) + plan.in_stride, 16);
  return plan;
}

// G w G^T of kLanes output channels and `inputs` input channels from `first_in` on, into panels
// [place, panel, in_channels, kTileColumns]; zero beyond the last output channel.
void transform_weights(const Conv3x3Params& p, const Plan& plan, int first_out, int first_in, float* panels) {
  const int outs = p.out_channels - first_out < kLanes ? p.out_channels - first_out : kLanes;
  const int end = first_in + kWeightInputs < p.in_channels ? first_in + kWeightInputs : p.in_channels;
  float* to = panels + first_out / kTileColumns * int64_t{p.in_channels} * kTileColumns + first_out % kTileColumns;
  for (int in = first_in; in < end; ++in) {
    float taps[9][kLanes] = {};
    for (int lane = 0; lane < outs; ++lane) {
      const float* from = p.weight + ((first_out + lane) * int64_t{p.in_channels} + in) * 9;
      for (int tap = 0; tap < 9; ++tap) taps[tap][lane] = from[tap];
    }
    Vector columns[3][kSide];
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j) transform_weight(load(taps[j]), load(taps[3 + j]), load(taps[6 + j]), columns[j]);
#pragma GCC unroll 6
    for (int i = 0; i < kSide; ++i) {
      Vector row[kSide];
      transform_weight(columns[0][i], columns[1][i], columns[2][i], row);
#pragma GCC unroll 6
      for (int j = 0; j < kSide; ++j) store(to + (i * kSide + j) * plan.weight_place + in * kTileColumns, row[j]);
    }
  }
}

// Where a tile's results begin.
struct Tile {
  int64_t image;
  int row, column;
};

Tile tile_at(const Plan& plan, int64_t index) {
  const int64_t line = index / plan.tile_columns;
  return {line / plan.tile_rows, static_cast<int>(line % plan.tile_rows) * kOut,
          static_cast<int>(index % plan.tile_columns) * kOut};
}

// B^T d B of a tile, d(i, j, c, lanes) being its pixels: channels of place i at to + i * in_place.
template <typename Pixel>
VGGT_MV_INLINE void transform_tile(const Conv3x3Params& p, const Plan& plan, float* to, Pixel d) {
  for_each_vector(p.in_channels, [&](int c, int, auto lanes) VGGT_MV_INLINE_LAMBDA {
    Vector columns[kSide][kSide];
#pragma GCC unroll 6
    for (int j = 0; j < kSide; ++j) {
      Vector column[kSide];
#pragma GCC unroll 6
      for (int i = 0; i < kSide; ++i) column[i] = d(i, j, c, lanes);
      transform_input(column, columns[j]);
    }
#pragma GCC unroll 6
    for (int i = 0; i < kSide; ++i) {
      Vector row[kSide], result[kSide];
#pragma GCC unroll 6
      for (int j = 0; j < kSide; ++j) row[j] = columns[j][i];
      transform_input(row, result);
#pragma GCC unroll 6
      for (int j = 0; j < kSide; ++j) store(to + (i * kSide + j) * plan.in_place + c, result[j]);
    }
  });
}

void read_tile(const Conv3x3Params& p, const Plan& plan, const Tile& tile, const float* zeros, float* to) {
  const float* pixels[kSide][kSide];
  for (int i = 0; i < kSide; ++i) {
    for (int j = 0; j < kSide; ++j) {
      const int row = tile.row + i - 1, column = tile.column + j - 1;
      const bool inside = row >= 0 && row < p.height && column >= 0 && column < p.width;
      pixels[i][j] = inside ? p.x + ((tile.image * p.height + row) * p.width + column) * int64_t{p.in_channels} : zeros;
    }
  }
  transform_tile(p, plan, to, [&](int i, int j, int c, auto lanes) VGGT_MV_INLINE_LAMBDA {
    // Beyond the image nothing is read: a prefetch cannot fail.
    if (j >= kSide - kOut) __builtin_prefetch(pixels[i][j] + int64_t{kOut} * p.in_channels + c);
    return load(pixels[i][j] + c, lanes);
  });
}

// A row or column of the resized map: what it is made of, or zeros around the image. The position is a fraction of
// integers, so that nothing of it is rounded but the two factors.
struct Between {
  int64_t lower, upper;
  float of_lower, of_upper;
  const float* offset;
};

Between between(int index, int size, int in_size, const float* offsets, int channels, const float* zeros) {
  if (index < 0 || index >= size) return {0, 0, 0.0f, 0.0f, zeros};
  const int64_t steps = size > 1 ? size - 1 : 1, at = int64_t{index} * (in_size - 1);
  const int64_t lower = size > 1 ? at / steps : 0, rest = size > 1 ? at % steps : 0;
  const float whole = static_cast<float>(steps);
  return {lower, lower + 1 < in_size ? lower + 1 : lower, static_cast<float>(steps - rest) / whole,
          static_cast<float>(rest) / whole, offsets == nullptr ? zeros : offsets + int64_t{index} * channels};
}

template <bool kOffsets>
void read_resized_tile(const Conv3x3Params& p, const Plan& plan, const Tile& tile, const float* zeros, float* to) {
  const float* lines[kSide][2];
  Between rows[kSide], columns[kSide];
  const int channels = p.in_channels;
  for (int i = 0; i < kSide; ++i) {
    rows[i] = between(tile.row + i - 1, p.height, p.in_height, p.row_offsets, channels, zeros);
    columns[i] = between(tile.column + i - 1, p.width, p.in_width, p.column_offsets, channels, zeros);
    columns[i].lower *= channels;
    columns[i].upper *= channels;
    lines[i][0] = p.x + (tile.image * p.in_height + rows[i].lower) * p.in_width * channels;
    lines[i][1] = p.x + (tile.image * p.in_height + rows[i].upper) * p.in_width * channels;
  }
  const int64_t next = (int64_t{kOut} * p.in_width / p.width + 1) * channels;
  transform_tile(p, plan, to, [&](int i, int j, int c, auto lanes) VGGT_MV_INLINE_LAMBDA {
    const Between &row = rows[i], &column = columns[j];
    if (j >= kSide - kOut) __builtin_prefetch(lines[i][1] + column.upper + next + c);
    Vector on_line[2];
#pragma GCC unroll 2
    for (int k = 0; k < 2; ++k) {
      Vector start = load(lines[i][k] + column.lower + c, lanes) * column.of_lower;
      if (kOffsets) start += load(column.offset + c, lanes);
      on_line[k] = multiply_add(load(lines[i][k] + column.upper + c, lanes), broadcast(column.of_upper), start);
    }
    Vector value = on_line[0] * row.of_lower;
    if (kOffsets)
      value = multiply_add(load(row.offset + c, lanes), broadcast(column.of_lower + column.of_upper), value);
    return multiply_add(on_line[1], broadcast(row.of_upper), value);
  });
}

// products[place, tile, out] = sum over in of tiles[place, tile, in] weights[place, in, out], for `rows` tiles.
void multiply(const Conv3x3Params& p, const Plan& plan, const float* weights, const float* tiles, int rows,
              float* products) {
  for (int place = 0; place < kPlaces; ++place) {
    for (int panel = 0; panel < plan.panels; ++panel) {
      const float* b = weights + place * plan.weight_place + int64_t{panel} * p.in_channels * kTileColumns;
      const bool narrow = p.out_channels - panel * kTileColumns <= kLanes;
      for (int row = 0; row < rows; row += kTileRows) {
        const float* a = tiles + place * plan.in_place + row * plan.in_stride;
        float* to = products + place * plan.out_place + row * plan.out_stride + panel * kTileColumns;
        if (narrow) {
          Vector sums[kTileRows][1];
          multiply_tile(a, plan.in_stride, 1, b, p.in_channels, sums);
#pragma GCC unroll 16
          for (int i = 0; i < kTileRows; ++i) store(to + i * plan.out_stride, sums[i][0]);
        } else {
          Vector sums[kTileRows][kTileVectors];
          multiply_tile(a, plan.in_stride, 1, b, p.in_channels, sums);
#pragma GCC unroll 16
          for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 4
            for (int v = 0; v < kTileVectors; ++v) store(to + i * plan.out_stride + v * kLanes, sums[i][v]);
          }
        }
      }
    }
  }
}

// A^T m A of a tile, bias, residual, activation, and what of it lies in the image.
void write_tile(const Conv3x3Params& p, const Plan& plan, const Tile& tile, const float* products) {
  const int rows = p.height - tile.row < kOut ? p.height - tile.row : kOut;
  const int columns = p.width - tile.column < kOut ? p.width - tile.column : kOut;
  const int64_t first = ((tile.image * p.height + tile.row) * p.width + tile.column) * p.out_channels;
  for_each_vector(p.out_channels, [&](int c, int, auto lanes) VGGT_MV_INLINE_LAMBDA {
    Vector sums[kSide][kOut];
#pragma GCC unroll 6
    for (int j = 0; j < kSide; ++j) {
      Vector column[kSide];
#pragma GCC unroll 6
      for (int i = 0; i < kSide; ++i) column[i] = load(products + (i * kSide + j) * plan.out_place + c);
      transform_output(column, sums[j]);
    }
    const Vector bias = p.bias == nullptr ? Vector{} : load(p.bias + c, lanes);
#pragma GCC unroll 4
    for (int i = 0; i < kOut; ++i) {
      if (i >= rows) break;
      Vector row[kSide], result[kOut];
#pragma GCC unroll 6
      for (int j = 0; j < kSide; ++j) row[j] = sums[j][i];
      transform_output(row, result);
#pragma GCC unroll 4
      for (int j = 0; j < kOut; ++j) {
        if (j >= columns) break;
        const int64_t at = first + (int64_t{i} * p.width + j) * p.out_channels + c;
        Vector y = result[j] + bias;
        if (p.residual != nullptr) y += load(p.residual + at, lanes);
        if (p.relu) y = maximum(Vector{}, y);
        store(p.out + at, y, lanes);
      }
    }
  });
}

void run_block(const Conv3x3Params& p, const Plan& plan, int64_t block, const float* weights, float* memory) {
  const int64_t first = block * plan.block_tiles;
  const int64_t left = plan.tiles - first;
  const int count = static_cast<int>(left < plan.block_tiles ? left : plan.block_tiles);
  float* tiles = memory;
  float* products = tiles + kPlaces * plan.in_place;
  const float* zeros = memory + plan.block_floats - plan.in_stride;
  const bool offsets = p.row_offsets != nullptr || p.column_offsets != nullptr;
  const auto read = offsets                                            ? read_resized_tile<true>
                    : p.in_height != p.height || p.in_width != p.width ? read_resized_tile<false>
                                                                       : read_tile;
  for (int i = 0; i < count; ++i) read(p, plan, tile_at(plan, first + i), zeros, tiles + i * plan.in_stride);
  // Rows beyond the last tile hold what was there before; their products are never read.
  multiply(p, plan, weights, tiles, static_cast<int>(round_up(count, kTileRows)), products);
  for (int i = 0; i < count; ++i) write_tile(p, plan, tile_at(plan, first + i), products + i * plan.out_stride);
}

KeptMemory kept_memory;

}  // namespace

Status conv3x3(const Conv3x3Params& p, int num_threads) {
  const int threads = num_threads < 1 ? 1 : num_threads;
  const Plan plan = make_plan(p, threads);
  if (plan.tiles == 0 || p.out_channels == 0) return Status::ok;
  const int64_t weight_floats = kPlaces * plan.weight_place;
  const int64_t size = round_up(weight_floats, 16) + threads * plan.block_floats;
  float* memory = kept_memory.take(size);
  if (memory == nullptr) return Status::out_of_memory;
  float* blocks = memory + round_up(weight_floats, 16);
  const int out_vectors = plan.panels * kTileVectors;
  const int in_blocks = (p.in_channels + kWeightInputs - 1) / kWeightInputs;
  int64_t next = 0;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(dynamic)
    for (int i = 0; i < out_vectors * in_blocks; ++i) {
      transform_weights(p, plan, i / in_blocks * kLanes, i % in_blocks * kWeightInputs, memory);
    }
    // A part of the memory for each thread, which takes block after block.
#pragma omp for schedule(static)
    for (int part = 0; part < threads; ++part) {
      float* own = blocks + part * plan.block_floats;
      __builtin_memset(own + plan.block_floats - plan.in_stride, 0, plan.in_stride * sizeof(float));
      while (true) {
        int64_t block;
#pragma omp atomic capture
        block = next++;
        if (block >= plan.blocks) break;
        run_block(p, plan, block, memory, own);
      }
    }
  }
  kept_memory.give_back(memory);
  return Status::ok;
}

}  // namespace vggt_mv::VGGT_MV_ISA
