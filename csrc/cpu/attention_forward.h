// softmax(scale * q k^T + gate bias^T) v of one head, wherever its queries, keys and values lie; or, with the same scores
// for one or two results r that weigh keys differently, sum_j w_rj exp(s_ij) v_j / sum_j w_rj exp(s_ij).
//
// An operator describes a head by a `Source`, a type with these members; T is the storage type:
//   keys, width, scale           how many keys, features of queries and keys, the factor of q . k
//   bias                         whether keys have a bias (for_each_key_run gives it), rows gates (for_each_row_run)
//   kWeights                     0: one result, no weights; 1 or 2: that many results, and for_each_key_run gives weights of
//                                the first in place of biases; those of the second lie weight_stride further on
//   result(r)                    an object with the next three members, for result r
//   lse, lse_offset              [rows] float, or null: not wanted; what to add to it
//   for_each_row_run(first, count, body)   body(const T* row, stride, const float* gate, gate_stride, done, run)
//   for_each_key_run(first, count, body)   body(const T* key, const T* value, stride, const float* bias, done, run)
//   for_each_out_run(first, count, body)   body(T* out, stride, done, run)
// The last three call `body` for every run of evenly spaced rows of [first, first + count); `done` counts those before. A
// null gate is 1, a null bias 0, a null weight 1.
//
// Roofline: 4 D operations for every query and key, hundreds of operations a byte: bound by multiply-adds, as a matrix
// product is, plus one exponential for every 2 D multiply-adds (at D = 64 a tenth of the time in float, a third with the
// bfloat16 dot product). So:
//
// * Keys go by in blocks of at most kKeyBlock, packed once for a whole group of rows: keys transposed into panels for
//   q . k, values into panels for p . v. Both stay in the second-level cache while all rows of the group pass; packing costs
//   one move for `group` multiply-adds. The tokens themselves are never permuted or copied.
// * Rows pass in strips of kStripTiles tiles, whose scores and output stay in the first-level cache.
// * Softmax is the online one: a running maximum and sum for each row. Padding beyond the last key gets probability zero;
//   padding rows are zero and not stored.
// * Scores, softmax and sums are float. What is multiplied is float too, or, for bfloat16 tensors where the instruction
//   set has the dot product of pairs, bfloat16: then the probabilities are rounded once, as on every tensor core.
//
// * Weights are in (0, 1]. They are multiplied into the values as those are packed, and into the sums of p: what a result
//   costs is its product p . v. Scores, maximum and exponentials are those of all results.
//
// A row's result does not depend on its group, nor so on the number of threads. -inf in the bias shuts a key out. A row
// without any key left is 0 / 0 = NaN, as in PyTorch.
#pragma once

#include <stdlib.h>

#include "core/status.h"
#include "cpu/attention_tiles.h"

namespace vggt_mv::VGGT_MV_ISA {

// What is added to a score: nothing, its key's bias, or that times its row's gate.
enum class Bias { none, plain, gated };

// What a storage type is multiplied as: Element is one feature (or key), or a pair of them.
template <typename T>
struct Arithmetic {
  using Element = float;
  static constexpr int kPack = 1;
};
#if defined(__AVX512BF16__)
template <>
struct Arithmetic<Bfloat16> {
  using Element = Bfloat16Pair;
  static constexpr int kPack = 2;
};
#endif

constexpr int kKeyBlock = 256;
constexpr int kLeastKeys = 128;               // for wide heads, whose panels fill the caches earlier
constexpr int kKeyElements = 16384;           // of a block of keys, where that leaves kLeastKeys
constexpr int kScoreStride = kKeyBlock + 16;  // a power of two would put a strip's rows into the same cache sets
constexpr int kRowsAhead = 16;                // of the row that is packed: fetched meanwhile
constexpr int kStripTiles = 4;
constexpr int kStripRows = kStripTiles * kTileRows;
// Elements of queries and of output that a group may hold: 96 KiB each, beside the packed keys and values in a
// second-level cache of 512 KiB at D = 64.
constexpr int kGroupElements = 24576;

template <typename Source>
constexpr int kResults = Source::kWeights == 0 ? 1 : Source::kWeights;

// How heads of `rows` queries and at most `keys` keys are cut up.
struct ForwardPlan {
  int64_t rows;
  int64_t group_rows;
  int64_t groups;        // of a head
  int key_block;         // keys of a block, a multiple of kTileColumns
  int depth;             // D in elements of the arithmetic
  int64_t padded_width;  // D up to a multiple of kTileColumns
  int results;           // of a head
  int64_t items;         // groups of all heads
};

static ForwardPlan make_forward_plan(int64_t heads, int64_t rows, int64_t keys, int width, int results, int pack,
                                     int threads) {
  ForwardPlan plan;
  plan.rows = rows;
  plan.results = results;
  plan.depth = (width + pack - 1) / pack;
  plan.padded_width = round_up(width, kTileColumns);
  const int64_t most = kGroupElements / plan.padded_width;
  const int64_t group_rows = most > kStripRows ? most : kStripRows;
  int64_t groups = (rows + group_rows - 1) / group_rows;
  // Smaller groups where there would be too few of them to keep all threads busy.
  const int64_t wanted = heads == 0 ? 1 : (4 * int64_t{threads} + heads - 1) / heads;
  if (threads > 1 && groups < wanted) groups = wanted;
  plan.group_rows = groups == 0 ? kStripRows : round_up((rows + groups - 1) / groups, kStripRows);
  plan.groups = (rows + plan.group_rows - 1) / plan.group_rows;
  const int64_t fitting = kKeyElements / plan.padded_width / kTileColumns * kTileColumns;
  const int64_t most_keys = fitting > kKeyBlock ? kKeyBlock : fitting < kLeastKeys ? kLeastKeys : fitting;
  const int64_t blocks = (keys + most_keys - 1) / most_keys;
  plan.key_block = blocks == 0 ? kTileColumns : static_cast<int>(round_up((keys + blocks - 1) / blocks, kTileColumns));
  plan.items = heads * plan.groups;
  return plan;
}

// A thread's memory. `rows` are padded to whole strips. Every element has the size of a float.
template <typename Element>
struct ForwardScratch {
  Element* queries;  // [rows, depth]; floats are scaled
  Element* keys;     // panels of the transposed keys, [key_block / columns, depth, columns]
  Element* values;   // panels of the weighted values, [results, padded width / columns, key_block / pack, columns]
  float* out;        // [rows, results, padded width]: sums of w p v, relative to `maximum`
  float* maximum;    // [rows] of the scores so far
  float* total;      // [rows, results] sums of w p so far
  float* gate;       // [rows]
  float* bias;       // [key_block]
  float* weights;    // [results, kKeyBlock]
  float* scores;     // [kStripRows, kScoreStride]; turned into probabilities in place
  float* rescale;    // [kStripRows]
};

// Places the scratch in `memory` and returns how many floats it takes; with null it only counts.
template <typename Element>
static int64_t place_scratch(const ForwardPlan& plan, float* memory, ForwardScratch<Element>* s) {
  static_assert(sizeof(Element) == sizeof(float));
  int64_t used = 0;
  const auto take = [&](int64_t count) {
    float* from = memory == nullptr ? nullptr : memory + used;
    used += round_up(count, 16);
    return from;
  };
  s->queries = reinterpret_cast<Element*>(take(plan.group_rows * plan.depth));
  s->keys = reinterpret_cast<Element*>(take(int64_t{plan.key_block} * plan.depth));
  s->values = reinterpret_cast<Element*>(take(plan.results * plan.key_block * plan.padded_width));
  s->out = take(plan.group_rows * plan.results * plan.padded_width);
  s->maximum = take(plan.group_rows);
  s->total = take(plan.group_rows * plan.results);
  s->gate = take(plan.group_rows);
  s->bias = take(plan.key_block);
  s->weights = take(plan.results * kKeyBlock);
  s->scores = take(kStripRows * kScoreStride);
  s->rescale = take(kStripRows);
  return used;
}

// float is scaled here, by `scale` alone: with log2(e) in it, too, the rounding of that product would show in large
// scores. Pairs keep the bits that they have, and their scores are scaled.
template <typename T>
VGGT_MV_INLINE void pack_query(const T* row, int width, float scale, float* to) {
  for_each_vector(
      width, [&](int d, int, auto lanes) VGGT_MV_INLINE_LAMBDA { store(to + d, load(row + d, lanes) * scale, lanes); });
}

VGGT_MV_INLINE void pack_query(const Bfloat16* row, int width, float, Bfloat16Pair* to) {
  if (width % 2 != 0) to[width / 2] = {};
  __builtin_memcpy(to, row, width * sizeof(Bfloat16));
}

template <typename Source, typename Element>
VGGT_MV_INLINE void pack_queries(const Source& source, const ForwardPlan& plan, int64_t first, int count,
                                 int padded_count, const ForwardScratch<Element>& s) {
  source.for_each_row_run(
      first, count,
      [&](const auto* row, int64_t stride, const float* gate, int64_t gate_stride, int done, int run)
          VGGT_MV_INLINE_LAMBDA {
            for (int i = 0; i < run; ++i) {
              pack_query(row + i * stride, source.width, source.scale, s.queries + int64_t{done + i} * plan.depth);
              s.gate[done + i] = gate == nullptr ? 1.0f : gate[i * gate_stride];
            }
          });
  __builtin_memset(s.queries + int64_t{count} * plan.depth, 0, (padded_count - count) * plan.depth * sizeof(Element));
  for (int i = count; i < padded_count; ++i) s.gate[i] = 0.0f;
}

// Key `index` of a block: its value, weighted for every result, into the panels; its bias or its weights beside them.
template <typename Source, typename Element>
VGGT_MV_INLINE void pack_value(const Source& source, const ForwardPlan& plan, const typename Source::Storage* value,
                               const float* bias, int index, const ForwardScratch<Element>& s) {
  const int64_t panel = int64_t{plan.key_block} / Arithmetic<typename Source::Storage>::kPack * kTileColumns;
  if constexpr (Source::kWeights == 0) {
    pack_row(value, source.width, index, panel, 1.0f, s.values);
    if (source.bias != Bias::none) s.bias[index] = bias == nullptr ? 0.0f : *bias;
  } else {
    for (int r = 0; r < Source::kWeights; ++r) {
      const float weight = bias == nullptr ? 1.0f : bias[r * source.weight_stride];
      pack_row(value, source.width, index, panel, weight, s.values + r * (plan.padded_width / kTileColumns * panel));
      s.weights[r * kKeyBlock + index] = weight;
    }
  }
}

template <typename Source, typename Element>
VGGT_MV_INLINE void pack_keys(const Source& source, const ForwardPlan& plan, int64_t first, int count,
                              const ForwardScratch<Element>& s) {
  using T = typename Source::Storage;
  const T* columns[kLanes];
  source.for_each_key_run(
      first, count,
      [&](const T* key, const T* value, int64_t stride, const float* bias, int done, int run) VGGT_MV_INLINE_LAMBDA {
        for (int i = 0; i < run; ++i) {
          const int index = done + i;
          if (i + kRowsAhead < run) {
            prefetch_row(key + (i + kRowsAhead) * stride, source.width);
            prefetch_row(value + (i + kRowsAhead) * stride, source.width);
          }
          columns[index % kLanes] = key + i * stride;
          pack_value(source, plan, value + i * stride, bias == nullptr ? nullptr : bias + i, index, s);
          if ((index + 1) % kLanes != 0 && index + 1 != count) continue;
          pack_columns<T>([&](int lane) { return columns[lane]; }, index % kLanes + 1, source.width,
                          index / kLanes * kLanes, s.keys);
        }
      });
  for (int i = count; source.bias != Bias::none && i < plan.key_block; ++i) s.bias[i] = 0.0f;
  for (int r = 0; r < Source::kWeights; ++r) {
    for (int i = count; i < plan.key_block; ++i) s.weights[r * kKeyBlock + i] = 0.0f;
  }
}

VGGT_MV_INLINE Vector scaled_score(Vector score, float, float) { return score; }
VGGT_MV_INLINE Vector scaled_score(Vector score, Bfloat16Pair, float scale) { return score * scale; }
VGGT_MV_INLINE Vector biased_score(Vector score, float, float, Vector bias) { return score + bias; }
VGGT_MV_INLINE Vector biased_score(Vector score, Bfloat16Pair, float scale, Vector bias) {
  return multiply_add(score, broadcast(scale), bias);
}

// scores[i, j] = scale q_i . k_j (+ bias_j, or + gate_i bias_j) of `tiles` tiles of rows.
template <Bias kBias, typename Element>
void score_strip(const Element* queries, const float* gates, int depth, float scale, int keys, int tiles,
                 const ForwardScratch<Element>& s) {
  for (int column = 0; column < keys; column += kTileColumns) {
    const Element* panel = s.keys + int64_t{column} * depth;
    for (int tile = 0; tile < tiles; ++tile) {
      Vector sums[kTileRows][kTileVectors];
      multiply_tile(queries + int64_t{tile} * kTileRows * depth, depth, 1, panel, depth, sums);
      float* to = s.scores + tile * kTileRows * kScoreStride + column;
#pragma GCC unroll 16
      for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 4
        for (int v = 0; v < kTileVectors; ++v) {
          Vector score;
          if constexpr (kBias == Bias::plain) {
            score = biased_score(sums[i][v], Element{}, scale, load(s.bias + column + v * kLanes));
          } else {
            score = scaled_score(sums[i][v], Element{}, scale);
          }
          if constexpr (kBias == Bias::gated) {
            const Vector gate = broadcast(gates[tile * kTileRows + i]);
            score = multiply_add(gate, load(s.bias + column + v * kLanes), score);
          }
          store(to + i * kScoreStride + v * kLanes, score);
        }
      }
    }
  }
}

VGGT_MV_INLINE Vector probability(Vector x, float) { return exp_of_nonpositive(x); }
// Two vectors of probabilities over the scores they came from, or over the first half of those.
VGGT_MV_INLINE void store_probabilities(float* row, int j, const Vector (&p)[2], float) {
  store(row + j, p[0]);
  store(row + j + kLanes, p[1]);
}

#if defined(__AVX512BF16__)
VGGT_MV_INLINE Vector probability(Vector x, Bfloat16Pair) { return rough_exp_of_nonpositive(x); }

VGGT_MV_INLINE void store_probabilities(float* row, int j, const Vector (&p)[2], Bfloat16Pair) {
  store_pairs(reinterpret_cast<Bfloat16Pair*>(row) + j / 2, p[0], p[1]);
}
#endif

// Turns a row of scores into p = exp(score - maximum) and moves on the row's maximum and its total of every result. Returns
// the factor that takes what was summed so far to the new maximum. The row is kTileColumns-padded; p is zero beyond `keys`.
template <int kWeights, typename Element>
VGGT_MV_INLINE float softmax_row(float* scores, int keys, const float* weights, float* maximum_so_far,
                                 float* totals_so_far) {
  static_assert(kTileVectors == 2);
  const Vector minus_infinity = broadcast(-__builtin_inff());
  const int end = static_cast<int>(round_up(keys, kTileColumns));
  for (int j = keys / kLanes * kLanes; j < end; j += kLanes) {
    IntVector lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    store(scores + j, select((IntVector)(lane < keys - j), load(scores + j), minus_infinity));
  }
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

  constexpr int kTotals = kWeights == 0 ? 1 : kWeights;
  Vector totals[kTotals][2] = {};
  for (j = 0; j < end; j += 2 * kLanes) {
    Vector p[2];
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      p[v] = probability(load(scores + j + v * kLanes) - shift, Element{});
      if constexpr (kWeights == 0) totals[0][v] += p[v];
#pragma GCC unroll 2
      for (int r = 0; r < kWeights; ++r) {
        totals[r][v] = multiply_add(p[v], load(weights + r * kKeyBlock + j + v * kLanes), totals[r][v]);
      }
    }
    store_probabilities(scores, j, p, Element{});
  }
  const float factor = exp_of_nonpositive(before - shift)[0];
  *maximum_so_far = now[0];
  for (int r = 0; r < kTotals; ++r) {
    totals_so_far[r] = totals_so_far[r] * factor + total_of_lanes(totals[r][0] + totals[r][1])[0];
  }
  return factor;
}

// out = out * rescale + p v for `tiles` tiles of rows and one panel of values.
template <int kVectors, typename Element>
void accumulate_panel(const Element* panel, int depth, int tiles, int64_t out_stride, float* out,
                      const ForwardScratch<Element>& s) {
  const Element* probabilities = reinterpret_cast<const Element*>(s.scores);
  for (int tile = 0; tile < tiles; ++tile) {
    Vector sums[kTileRows][kVectors];
    multiply_tile(probabilities + tile * kTileRows * kScoreStride, kScoreStride, 1, panel, depth, sums);
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

template <typename Source, typename Element>
VGGT_MV_INLINE void store_rows(const Source& source, const ForwardPlan& plan, int64_t first, int count,
                               const ForwardScratch<Element>& s) {
  for (int r = 0; r < kResults<Source>; ++r) {
    const auto& result = source.result(r);
    result.for_each_out_run(first, count, [&](auto* to, int64_t stride, int done, int run) VGGT_MV_INLINE_LAMBDA {
      for (int i = done; i < done + run; ++i, to += stride) {
        const int64_t index = int64_t{i} * kResults<Source> + r;
        const float* from = s.out + index * plan.padded_width;
        const float total = s.total[index];
        for_each_vector(source.width, [&](int d, int, auto lanes)
                                          VGGT_MV_INLINE_LAMBDA { store(to + d, load(from + d) / total, lanes); });
      }
    });
    for (int i = 0; i < count && result.lse != nullptr; ++i) {
      result.lse[first + i] = s.maximum[i] + __builtin_logf(s.total[i * kResults<Source> + r]) + result.lse_offset;
    }
  }
}

// One strip of `tiles` tiles of rows from `row` on against the packed block of `keys` keys.
template <typename Source, typename Element>
VGGT_MV_INLINE void run_strip(const Source& source, const ForwardPlan& plan, int row, int tiles, int keys,
                              const ForwardScratch<Element>& s) {
  constexpr int kPack = Arithmetic<typename Source::Storage>::kPack;
  const Element* queries = s.queries + int64_t{row} * plan.depth;
  const float* gates = s.gate + row;
  if (source.bias == Bias::none) {
    score_strip<Bias::none>(queries, gates, plan.depth, source.scale, keys, tiles, s);
  } else if (source.bias == Bias::plain) {
    score_strip<Bias::plain>(queries, gates, plan.depth, source.scale, keys, tiles, s);
  } else {
    score_strip<Bias::gated>(queries, gates, plan.depth, source.scale, keys, tiles, s);
  }
  for (int i = 0; i < tiles * kTileRows; ++i) {
    s.rescale[i] = softmax_row<Source::kWeights, Element>(s.scores + i * kScoreStride, keys, s.weights,
                                                          s.maximum + row + i, s.total + (row + i) * kResults<Source>);
  }
  const int depth = (keys + kPack - 1) / kPack;
  const int64_t stride = kResults<Source> * plan.padded_width;
  for (int r = 0; r < kResults<Source>; ++r) {
    for (int column = 0; column < source.width; column += kTileColumns) {
      const int64_t place = r * plan.padded_width + column;
      const Element* panel = s.values + place * (plan.key_block / kPack);
      float* out = s.out + row * stride + place;
      if (source.width - column > kLanes) {
        accumulate_panel<kTileVectors>(panel, depth, tiles, stride, out, s);
      } else {
        accumulate_panel<1>(panel, depth, tiles, stride, out, s);
      }
    }
  }
}

template <typename Source, typename Element>
void run_group(const Source& source, const ForwardPlan& plan, int64_t group, const ForwardScratch<Element>& s) {
  const int64_t first = group * plan.group_rows;
  const int64_t left = plan.rows - first;
  const int rows = static_cast<int>(left < plan.group_rows ? left : plan.group_rows);
  const int padded_rows = static_cast<int>(round_up(rows, kTileRows));

  pack_queries(source, plan, first, rows, padded_rows, s);
  __builtin_memset(s.out, 0, padded_rows * kResults<Source> * plan.padded_width * sizeof(float));
  __builtin_memset(s.total, 0, padded_rows * kResults<Source> * sizeof(float));
  for (int i = 0; i < padded_rows; ++i) s.maximum[i] = -__builtin_inff();
  for (int64_t first_key = 0; first_key < source.keys; first_key += plan.key_block) {
    const int64_t keys_left = source.keys - first_key;
    const int keys = static_cast<int>(keys_left < plan.key_block ? keys_left : plan.key_block);
    pack_keys(source, plan, first_key, keys, s);
    for (int row = 0; row < padded_rows; row += kStripRows) {
      const int tiles = (padded_rows - row < kStripRows ? padded_rows - row : kStripRows) / kTileRows;
      run_strip(source, plan, row, tiles, keys, s);
    }
  }
  store_rows(source, plan, first, rows, s);
}

// Runs `heads` heads of `rows` queries and at most `keys` keys each; source_of(i) describes head i.
template <typename Source, typename SourceOf>
VGGT_MV_INLINE Status attend(int64_t heads, int64_t rows, int64_t keys, int width, int num_threads,
                             SourceOf source_of) {
  using Form = Arithmetic<typename Source::Storage>;
  using Element = typename Form::Element;
  const int threads = num_threads < 1 ? 1 : num_threads;
  const ForwardPlan plan = make_forward_plan(heads, rows, keys, width, kResults<Source>, Form::kPack, threads);
  if (plan.items == 0) return Status::ok;
  ForwardScratch<Element> unplaced;
  const int64_t size = place_scratch(plan, nullptr, &unplaced);
  bool failed = false;
#pragma omp parallel num_threads(threads < plan.items ? threads : static_cast<int>(plan.items))
  {
    float* memory = static_cast<float*>(aligned_alloc(64, round_up(size * sizeof(float), 64)));
    if (memory == nullptr) {
#pragma omp atomic write
      failed = true;
    }
#pragma omp barrier
    ForwardScratch<Element> scratch;
    if (memory != nullptr) place_scratch(plan, memory, &scratch);
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < plan.items; ++item) {
      if (!failed) run_group(source_of(item / plan.groups), plan, item % plan.groups, scratch);
    }
    free(memory);
  }
  return failed ? Status::out_of_memory : Status::ok;
}

}  // namespace vggt_mv::VGGT_MV_ISA
