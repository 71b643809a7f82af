// s_ij = scale * q_i . k_j + row_gate_i * key_bias_j,   out_i = sum_j softmax_j(s_ij) v_j,   lse_i = log sum_j exp(s_ij)
//
// Layouts: core/alternating_attention.h. Work is shared out in groups of rows (queries) of one head of one sequence; a
// row's result does not depend on its group, nor so on the number of threads.
//
// Roofline: 4 L^2 D h operations for each sequence of L tokens against 4 L D h elements read and written, hundreds of
// operations a byte: bound by multiply-adds, as a matrix product is, plus one exponential for every 2 D multiply-adds (about a
// tenth of the time at D = 64). So:
//
// * Keys go by in blocks of at most kKeyBlock, packed to float once for a whole group of rows: keys transposed into
//   panels for q . k, values into panels for p . v. Both stay in the second-level cache while all rows of the group
//   pass; packing costs one move for `group` multiply-adds. The grid itself is never permuted or copied.
// * Rows pass in strips of kStripTiles tiles, whose scores and output stay in the first-level cache.
// * Softmax is the online one: a running maximum and sum for each row. q is scaled as it is packed, by `scale` alone:
//   with log2(e) in it, too, the rounding of that product would show in large scores. Padding beyond the last key gets
//   probability zero; padding rows are zero and not stored.
// * Everything between load and store is float, whatever the dtype of the tensors.
//
// -inf in the bias shuts a key out. A row without any key left is 0 / 0 = NaN, as in PyTorch.
#include "core/alternating_attention.h"

#include <stdlib.h>

#include "cpu/attention_tiles.h"
#include "cpu/kernels.h"

namespace vggt_mv::VGGT_MV_ISA {

namespace {

constexpr int kKeyBlock = 256;
constexpr int kLeastKeys = 128;               // for wide heads, whose panels fill the caches earlier
constexpr int kKeyElements = 16384;           // of a block of keys, where that leaves kLeastKeys
constexpr int kScoreStride = kKeyBlock + 16;  // a power of two would put a strip's rows into the same cache sets
constexpr int kStripTiles = 4;
constexpr int kStripRows = kStripTiles * kTileRows;
// Elements of queries and of output that a group may hold: 96 KiB each, beside the packed keys and values in a
// second-level cache of 512 KiB at D = 64.
constexpr int kGroupElements = 24576;

struct Plan {
  int64_t length;
  int64_t group_rows;
  int64_t groups;        // of a sequence and head
  int key_block;         // keys of a block, a multiple of kTileColumns
  int64_t padded_width;  // D up to a multiple of kTileColumns
  int64_t items;
};

Plan make_plan(const AlternatingAttentionParams& p, int threads) {
  Plan plan;
  plan.length = sequence_length(p.grid, p.axis);
  plan.padded_width = round_up(p.width, kTileColumns);
  const int64_t heads = sequence_count(p.grid, p.axis) * p.heads;
  const int64_t most = kGroupElements / plan.padded_width;
  const int64_t rows = most > kStripRows ? most : kStripRows;
  int64_t groups = (plan.length + rows - 1) / rows;
  // Smaller groups where there would be too few of them to keep all threads busy.
  const int64_t wanted = (4 * int64_t{threads} + heads - 1) / heads;
  if (threads > 1 && groups < wanted) groups = wanted;
  plan.group_rows = round_up((plan.length + groups - 1) / groups, kStripRows);
  plan.groups = (plan.length + plan.group_rows - 1) / plan.group_rows;
  const int64_t fitting = kKeyElements / plan.padded_width / kTileColumns * kTileColumns;
  const int64_t most_keys = fitting > kKeyBlock ? kKeyBlock : fitting < kLeastKeys ? kLeastKeys : fitting;
  const int64_t blocks = (plan.length + most_keys - 1) / most_keys;
  plan.key_block = static_cast<int>(round_up((plan.length + blocks - 1) / blocks, kTileColumns));
  plan.items = heads * plan.groups;
  return plan;
}

// A thread's memory. `rows` are padded to whole strips.
struct Scratch {
  float* queries;  // [rows, D], scaled
  float* out;      // [rows, padded width]: sums of p v, relative to `maximum`
  float* maximum;  // [rows] of the scores so far
  float* total;    // [rows] sum of p so far
  float* gate;     // [rows]
  float* keys;     // panels of the transposed keys, [key_block / columns, D, columns]
  float* values;   // panels of the values, [padded width / columns, key_block, columns]
  float* bias;     // [key_block]
  float* scores;   // [kStripRows, kScoreStride]
  float* rescale;  // [kStripRows]
};

int64_t layout(const Plan& plan, int width, float* memory, Scratch* s) {
  float* at = memory;
  const auto take = [&](int64_t count) {
    float* from = at;
    at += round_up(count, 16);
    return from;
  };
  s->queries = take(plan.group_rows * width);
  s->out = take(plan.group_rows * plan.padded_width);
  s->maximum = take(plan.group_rows);
  s->total = take(plan.group_rows);
  s->gate = take(plan.group_rows);
  s->keys = take(int64_t{plan.key_block} * width);
  s->values = take(int64_t{plan.key_block} * plan.padded_width);
  s->bias = take(plan.key_block);
  s->scores = take(kStripRows * kScoreStride);
  s->rescale = take(kStripRows);
  return at - memory;
}

template <typename T>
const T* part_of(const AlternatingAttentionParams& p, int part, int head, int64_t frame) {
  return static_cast<const T*>(p.qkv) + frame_offset(p.grid, p.qkv_strides.tokens, frame) + part * p.qkv_strides.part +
         head * p.qkv_strides.head;
}

template <typename T>
void pack_queries(const AlternatingAttentionParams& p, int64_t sequence, int head, int64_t first, int count,
                  int padded_count, const Scratch& s) {
  for_each_run(p.grid, p.axis, sequence, first, count, [&](int64_t frame, int token, int done, int run) {
    const T* row = part_of<T>(p, 0, head, frame) + token * p.qkv_strides.tokens.token;
    for (int i = 0; i < run; ++i, row += p.qkv_strides.tokens.token) {
      float* to = s.queries + int64_t{done + i} * p.width;
      for_each_vector(p.width, [&](int d, int, auto lanes)
                                   VGGT_MV_INLINE_LAMBDA { store(to + d, load(row + d, lanes) * p.scale, lanes); });
    }
    const float* gate = p.row_gate == nullptr ? nullptr
                                              : p.row_gate + frame_offset(p.grid, p.row_gate_strides, frame) +
                                                    token * p.row_gate_strides.token;
    for (int i = 0; i < run; ++i) s.gate[done + i] = gate == nullptr ? 1.0f : gate[i * p.row_gate_strides.token];
  });
  const int64_t padding = padded_count - count;
  __builtin_memset(s.queries + int64_t{count} * p.width, 0, padding * p.width * sizeof(float));
  for (int i = count; i < padded_count; ++i) s.gate[i] = 0.0f;
}

template <typename T>
void pack_keys(const AlternatingAttentionParams& p, const Plan& plan, int64_t sequence, int head, int64_t first,
               int count, const Scratch& s) {
  const int64_t token_stride = p.qkv_strides.tokens.token;
  const T* columns[kLanes];
  for_each_run(p.grid, p.axis, sequence, first, count, [&](int64_t frame, int token, int done, int run) {
    const T* key = part_of<T>(p, 1, head, frame) + token * token_stride;
    const T* value = part_of<T>(p, 2, head, frame) + token * token_stride;
    for (int i = 0; i < run; ++i) {
      const int index = done + i;
      columns[index % kLanes] = key + i * token_stride;
      pack_row(value + i * token_stride, p.width, index, int64_t{plan.key_block} * kTileColumns, 1.0f, s.values);
      if ((index + 1) % kLanes != 0 && index + 1 != count) continue;
      pack_columns<T>([&](int lane) { return columns[lane]; }, index % kLanes + 1, p.width, index / kLanes * kLanes,
                      s.keys);
    }
    if (p.key_bias == nullptr) return;
    const float* bias = p.key_bias + frame * p.grid.tokens + token;
    for (int i = 0; i < run; ++i) s.bias[done + i] = bias[i];
  });
  for (int i = count; p.key_bias != nullptr && i < plan.key_block; ++i) s.bias[i] = 0.0f;
}

// scores[i, j] = q_i . k_j (+ gate_i bias_j) of `tiles` tiles of rows.
template <bool kBias>
void score_strip(const float* queries, const float* gates, int width, int keys, int tiles, const Scratch& s) {
  for (int column = 0; column < keys; column += kTileColumns) {
    const float* panel = s.keys + int64_t{column} * width;
    for (int tile = 0; tile < tiles; ++tile) {
      Vector sums[kTileRows][kTileVectors];
      multiply_tile(queries + int64_t{tile} * kTileRows * width, width, 1, panel, width, sums);
      float* to = s.scores + tile * kTileRows * kScoreStride + column;
#pragma GCC unroll 16
      for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 4
        for (int v = 0; v < kTileVectors; ++v) {
          if constexpr (kBias) {
            const Vector gate = broadcast(gates[tile * kTileRows + i]);
            sums[i][v] = multiply_add(gate, load(s.bias + column + v * kLanes), sums[i][v]);
          }
          store(to + i * kScoreStride + v * kLanes, sums[i][v]);
        }
      }
    }
  }
}

// Turns a row of scores into p = exp(score - maximum) and moves on the row's maximum and total. Returns the factor that
// takes what was summed so far to the new maximum.
VGGT_MV_INLINE float softmax_row(float* scores, int keys, float* maximum_so_far, float* total_so_far) {
  const Vector minus_infinity = broadcast(-__builtin_inff());
  const int full = keys / kLanes * kLanes;
  if (full < keys) {
    IntVector lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    store(scores + full, select((IntVector)(lane < keys - full), load(scores + full), minus_infinity));
  }
  const int end = full < keys ? full + kLanes : full;

  Vector best[4] = {minus_infinity, minus_infinity, minus_infinity, minus_infinity};
  int j = 0;
  for (; j + 4 * kLanes <= end; j += 4 * kLanes) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) best[v] = maximum(load(scores + j + v * kLanes), best[v]);
  }
  for (; j < end; j += kLanes) best[0] = maximum(load(scores + j), best[0]);
  const Vector before = broadcast(*maximum_so_far);
  const Vector found = maximum_of_lanes(maximum(maximum(best[0], best[1]), maximum(best[2], best[3])));
  const Vector now = maximum(found, before);
  // A row whose keys are all shut out so far: -inf - 0 keeps their p at zero where -inf - -inf would be NaN.
  const Vector shift = select((IntVector)(now == minus_infinity), Vector{}, now);

  Vector totals[2] = {};
  for (j = 0; j + 2 * kLanes <= end; j += 2 * kLanes) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const Vector p = exp_of_nonpositive(load(scores + j + v * kLanes) - shift);
      store(scores + j + v * kLanes, p);
      totals[v] += p;
    }
  }
  if (j < end) {
    const Vector p = exp_of_nonpositive(load(scores + j) - shift);
    store(scores + j, p);
    totals[0] += p;
  }
  const float factor = exp_of_nonpositive(before - shift)[0];
  *maximum_so_far = now[0];
  *total_so_far = *total_so_far * factor + total_of_lanes(totals[0] + totals[1])[0];
  return factor;
}

// out = out * rescale + p v for `tiles` tiles of rows and one panel of values.
template <int kVectors>
void accumulate_panel(const float* panel, int keys, int tiles, int64_t out_stride, float* out, const Scratch& s) {
  for (int tile = 0; tile < tiles; ++tile) {
    Vector sums[kTileRows][kVectors];
    multiply_tile(s.scores + tile * kTileRows * kScoreStride, kScoreStride, 1, panel, keys, sums);
    float* to = out + tile * kTileRows * out_stride;
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) {
      const Vector factor = broadcast(s.rescale[tile * kTileRows + i]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        float* at = to + i * out_stride + v * kLanes;
        store(at, multiply_add(load(at), factor, sums[i][v]));
      }
    }
  }
}

template <typename T>
void store_rows(const AlternatingAttentionParams& p, const Plan& plan, int64_t sequence, int head, int64_t first,
                int count, const Scratch& s) {
  const int64_t stride = int64_t{p.heads} * p.width;
  for_each_run(p.grid, p.axis, sequence, first, count, [&](int64_t frame, int token, int done, int run) {
    T* to = static_cast<T*>(p.out) + (frame * p.grid.tokens + token) * stride + int64_t{head} * p.width;
    for (int i = 0; i < run; ++i, to += stride) {
      const float* from = s.out + (done + i) * plan.padded_width;
      const float total = s.total[done + i];
      for_each_vector(
          p.width, [&](int d, int, auto lanes) VGGT_MV_INLINE_LAMBDA { store(to + d, load(from + d) / total, lanes); });
    }
  });
  if (p.lse == nullptr) return;
  float* lse = p.lse + (sequence * p.heads + head) * plan.length + first;
  for (int i = 0; i < count; ++i) lse[i] = s.maximum[i] + __builtin_logf(s.total[i]);
}

template <typename T>
void run_group(const AlternatingAttentionParams& p, const Plan& plan, int64_t item, const Scratch& s) {
  const int64_t first = item % plan.groups * plan.group_rows;
  const int head = static_cast<int>(item / plan.groups % p.heads);
  const int64_t sequence = item / plan.groups / p.heads;
  const int64_t left = plan.length - first;
  const int rows = static_cast<int>(left < plan.group_rows ? left : plan.group_rows);
  const int padded_rows = static_cast<int>(round_up(rows, kTileRows));

  pack_queries<T>(p, sequence, head, first, rows, padded_rows, s);
  __builtin_memset(s.out, 0, padded_rows * plan.padded_width * sizeof(float));
  for (int i = 0; i < padded_rows; ++i) {
    s.maximum[i] = -__builtin_inff();
    s.total[i] = 0.0f;
  }
  for (int64_t first_key = 0; first_key < plan.length; first_key += plan.key_block) {
    const int64_t keys_left = plan.length - first_key;
    const int keys = static_cast<int>(keys_left < plan.key_block ? keys_left : plan.key_block);
    pack_keys<T>(p, plan, sequence, head, first_key, keys, s);
    for (int row = 0; row < padded_rows; row += kStripRows) {
      const int tiles = (padded_rows - row < kStripRows ? padded_rows - row : kStripRows) / kTileRows;
      const float* queries = s.queries + int64_t{row} * p.width;
      if (p.key_bias != nullptr) {
        score_strip<true>(queries, s.gate + row, p.width, keys, tiles, s);
      } else {
        score_strip<false>(queries, s.gate + row, p.width, keys, tiles, s);
      }
      for (int i = 0; i < tiles * kTileRows; ++i) {
        s.rescale[i] = softmax_row(s.scores + i * kScoreStride, keys, s.maximum + row + i, s.total + row + i);
      }
      for (int column = 0; column < p.width; column += kTileColumns) {
        const float* panel = s.values + int64_t{column} * plan.key_block;
        float* out = s.out + row * plan.padded_width + column;
        if (p.width - column > kLanes) {
          accumulate_panel<kTileVectors>(panel, keys, tiles, plan.padded_width, out, s);
        } else {
          accumulate_panel<1>(panel, keys, tiles, plan.padded_width, out, s);
        }
      }
    }
  }
  store_rows<T>(p, plan, sequence, head, first, rows, s);
}

template <typename T>
Status forward(const AlternatingAttentionParams& p, int num_threads) {
  const int threads = num_threads < 1 ? 1 : num_threads;
  if (token_count(p.grid) == 0) return Status::ok;
  const Plan plan = make_plan(p, threads);
  Scratch unplaced;
  const int64_t size = layout(plan, p.width, nullptr, &unplaced);
  bool failed = false;
#pragma omp parallel num_threads(threads < plan.items ? threads : static_cast<int>(plan.items))
  {
    float* memory = static_cast<float*>(aligned_alloc(64, round_up(size * sizeof(float), 64)));
    if (memory == nullptr) {
#pragma omp atomic write
      failed = true;
    }
#pragma omp barrier
    Scratch scratch;
    if (memory != nullptr) layout(plan, p.width, memory, &scratch);
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < plan.items; ++item) {
      if (!failed) run_group<T>(p, plan, item, scratch);
    }
    free(memory);
  }
  return failed ? Status::out_of_memory : Status::ok;
}

}  // namespace

Status alternating_attention(const AlternatingAttentionParams& params, int num_threads) {
  switch (params.dtype) {
    case DType::f32: return forward<float>(params, num_threads);
    case DType::f16: return forward<Half>(params, num_threads);
    case DType::bf16: return forward<Bfloat16>(params, num_threads);
  }
  return Status::unsupported_dtypes;
}

}  // namespace vggt_mv::VGGT_MV_ISA
