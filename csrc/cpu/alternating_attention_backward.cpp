// Gradients of alternating_attention: formulas and layouts in core/alternating_attention.h.
//
// Work is shared out in heads of sequences, so that every sum belongs to one thread and is taken in one order: the
// result is the same whatever the number of threads, of which at most sequences * heads have work.
//
// Roofline: five matrix products instead of the forward pass's two, 10 L^2 D h operations, and one exponential a score:
// bound by multiply-adds. Scores are computed again from q, k and `lse`; nothing of size L^2 is stored.
//
//   for a block of keys:     k and v packed three ways; grad_k and grad_v of the block stay in the second-level cache
//     for a block of rows:   p = exp(q k - lse),  ds = p (grad_out v - delta)      [rows, keys], the only L^2 blocks
//                            grad_q += ds k,  grad_v += p' grad_out,  grad_k += ds' q
//
// grad_q of the whole sequence is summed in the thread's memory, L D floats, and written at the end. Each product is one
// of tiles in registers (cpu/attention_tiles.h); which operand is the broadcast one and which lies in panels is chosen
// so that no block of scores is ever transposed: p' and ds' are read down their columns.
//
// Columns of scores beyond the last key and rows beyond the last query may hold anything: no sum reaches them.
#include <stdlib.h>

#include "core/alternating_attention.h"
#include "cpu/attention_tiles.h"
#include "cpu/kernels.h"

namespace vggt_mv::VGGT_MV_ISA {

namespace {

// Both are multiples of kTileRows, the first of kTileColumns, too. At D = 64 and 8 lanes all blocks take 330 KiB.
constexpr int kKeyBlock = kTileColumns == 32 ? 160 : 144;
constexpr int kRowBlock = 72;
constexpr int kScoreStride = kKeyBlock + 16;
static_assert(kKeyBlock % kTileColumns == 0 && kKeyBlock % kTileRows == 0 && kRowBlock % kTileRows == 0);

// A thread's memory.
struct Scratch {
  float* grad_queries;     // [length, padded width]
  float* grad_gates;       // [length]
  float* keys_across;      // panels of k', [kKeyBlock / columns, D, columns]
  float* values_across;    // panels of v', the same
  float* keys;             // panels of scale * k, [padded width / columns, kKeyBlock, columns]
  float* bias;             // [kKeyBlock]
  float* grad_keys;        // [kKeyBlock, padded width]
  float* grad_values;      // [kKeyBlock, padded width]
  float* grad_bias;        // [kKeyBlock]
  float* queries;          // [kRowBlock, D], times scale
  float* query_panels;     // [padded width / columns, kRowBlock, columns], times scale
  float* grad_out;         // [kRowBlock, D]
  float* grad_out_panels;  // [padded width / columns, kRowBlock, columns]
  float* gate;             // [kRowBlock]
  float* lse;              // [kRowBlock]
  float* delta;            // [kRowBlock]
  float* p;                // [kRowBlock, kScoreStride]
  float* ds;               // [kRowBlock, kScoreStride]
};

int64_t layout(int64_t length, int width, float* memory, Scratch* s) {
  const int64_t padded = round_up(width, kTileColumns);
  float* at = memory;
  const auto take = [&](int64_t count) {
    float* from = at;
    at += round_up(count, 16);
    return from;
  };
  s->grad_queries = take(round_up(length, kTileRows) * padded);
  s->grad_gates = take(length);
  s->keys_across = take(int64_t{kKeyBlock} * width);
  s->values_across = take(int64_t{kKeyBlock} * width);
  s->keys = take(kKeyBlock * padded);
  s->bias = take(kKeyBlock);
  s->grad_keys = take(kKeyBlock * padded);
  s->grad_values = take(kKeyBlock * padded);
  s->grad_bias = take(kKeyBlock);
  s->queries = take(int64_t{kRowBlock} * width);
  s->query_panels = take(kRowBlock * padded);
  s->grad_out = take(int64_t{kRowBlock} * width);
  s->grad_out_panels = take(kRowBlock * padded);
  s->gate = take(kRowBlock);
  s->lse = take(kRowBlock);
  s->delta = take(kRowBlock);
  s->p = take(kRowBlock * kScoreStride);
  s->ds = take(kRowBlock * kScoreStride);
  return at - memory;
}

// One head of one sequence.
struct Item {
  int64_t sequence;
  int head;
  int64_t length;
  int64_t padded_width;
};

using Params = AlternatingAttentionBackwardParams;

template <typename T>
const T* part_of(const Params& p, int part, int head, int64_t frame, int token) {
  return static_cast<const T*>(p.qkv) + frame_offset(p.grid, p.qkv_strides.tokens, frame) +
         token * p.qkv_strides.tokens.token + part * p.qkv_strides.part + head * p.qkv_strides.head;
}

template <typename T>
T* grad_part_of(const Params& p, int part, int head, int64_t frame, int token) {
  return static_cast<T*>(p.grad_qkv) + frame_offset(p.grid, p.grad_qkv_strides.tokens, frame) +
         token * p.grad_qkv_strides.tokens.token + part * p.grad_qkv_strides.part + head * p.grad_qkv_strides.head;
}

template <typename T>
void pack_keys(const Params& p, const Item& item, int64_t first, int count, const Scratch& s) {
  const int64_t step = p.qkv_strides.tokens.token;
  const T* keys[kLanes];
  const T* values[kLanes];
  for_each_run(p.grid, p.axis, item.sequence, first, count, [&](int64_t frame, int token, int done, int run) {
    const T* key = part_of<T>(p, 1, item.head, frame, token);
    const T* value = part_of<T>(p, 2, item.head, frame, token);
    for (int i = 0; i < run; ++i, key += step, value += step) {
      const int index = done + i;
      keys[index % kLanes] = key;
      values[index % kLanes] = value;
      pack_row(key, p.width, index, int64_t{kKeyBlock} * kTileColumns, p.scale, s.keys);
      if ((index + 1) % kLanes != 0 && index + 1 != count) continue;
      const int rows = index % kLanes + 1;
      const int from = index / kLanes * kLanes;
      pack_columns<T>([&](int lane) { return keys[lane]; }, rows, p.width, from, s.keys_across);
      pack_columns<T>([&](int lane) { return values[lane]; }, rows, p.width, from, s.values_across);
    }
    for (int i = 0; p.key_bias != nullptr && i < run; ++i) {
      s.bias[done + i] = p.key_bias[frame * p.grid.tokens + token + i];
    }
  });
}

template <typename T>
void pack_rows(const Params& p, const Item& item, int64_t first, int count, const Scratch& s) {
  const int64_t out_step = int64_t{p.heads} * p.width;
  const int64_t statistics = (item.sequence * p.heads + item.head) * item.length + first;
  for_each_run(p.grid, p.axis, item.sequence, first, count, [&](int64_t frame, int token, int done, int run) {
    const T* query = part_of<T>(p, 0, item.head, frame, token);
    const T* grad =
        static_cast<const T*>(p.grad_out) + (frame * p.grid.tokens + token) * out_step + int64_t{item.head} * p.width;
    for (int i = 0; i < run; ++i, query += p.qkv_strides.tokens.token, grad += out_step) {
      const int64_t index = done + i;
      for_each_vector(p.width, [&](int d, int, auto lanes) VGGT_MV_INLINE_LAMBDA {
        store(s.queries + index * p.width + d, load(query + d, lanes) * p.scale, lanes);
        store(s.grad_out + index * p.width + d, load(grad + d, lanes), lanes);
      });
      pack_row(query, p.width, index, int64_t{kRowBlock} * kTileColumns, p.scale, s.query_panels);
      pack_row(grad, p.width, index, int64_t{kRowBlock} * kTileColumns, 1.0f, s.grad_out_panels);
      s.gate[index] =
          p.row_gate == nullptr
              ? 1.0f
              : p.row_gate[frame_offset(p.grid, p.row_gate_strides, frame) + (token + i) * p.row_gate_strides.token];
    }
  });
  for (int i = 0; i < count; ++i) {
    s.lse[i] = p.lse[statistics + i];
    s.delta[i] = p.delta[statistics + i];
  }
  for (int64_t i = count; i < round_up(count, kTileRows); ++i) {
    __builtin_memset(s.queries + i * p.width, 0, p.width * sizeof(float));
    __builtin_memset(s.grad_out + i * p.width, 0, p.width * sizeof(float));
    s.gate[i] = s.lse[i] = s.delta[i] = 0.0f;
  }
}

// p = exp(q k (+ gate bias) - lse) and ds = p (grad_out v - delta) of a block.
template <bool kBias>
void score_block(int width, int rows, int keys, const Scratch& s) {
  for (int column = 0; column < keys; column += kTileColumns) {
    for (int row = 0; row < rows; row += kTileRows) {
      Vector sums[kTileRows][kTileVectors];
      multiply_tile(s.queries + int64_t{row} * width, width, 1, s.keys_across + int64_t{column} * width, width, sums);
      float* p = s.p + row * kScoreStride + column;
#pragma GCC unroll 16
      for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 4
        for (int v = 0; v < kTileVectors; ++v) {
          Vector score = sums[i][v];
          if constexpr (kBias) {
            score = multiply_add(broadcast(s.gate[row + i]), load(s.bias + column + v * kLanes), score);
          }
          store(p + i * kScoreStride + v * kLanes, exp_of_nonpositive(score - s.lse[row + i]));
        }
      }
      multiply_tile(s.grad_out + int64_t{row} * width, width, 1, s.values_across + int64_t{column} * width, width,
                    sums);
      float* ds = s.ds + row * kScoreStride + column;
#pragma GCC unroll 16
      for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 4
        for (int v = 0; v < kTileVectors; ++v) {
          const Vector difference = sums[i][v] - s.delta[row + i];
          store(ds + i * kScoreStride + v * kLanes, load(p + i * kScoreStride + v * kLanes) * difference);
        }
      }
    }
  }
}

// sums [kTileRows, width] += A panels, `depth` deep; panels are `panel_rows` rows apart.
VGGT_MV_INLINE void add_product(const float* a, int64_t row_stride, int64_t depth_stride, const float* panels,
                                int panel_rows, int depth, int width, int64_t padded_width, float* sums) {
  for (int column = 0; column < width; column += kTileColumns) {
    Vector tile[kTileRows][kTileVectors];
    multiply_tile(a, row_stride, depth_stride, panels + int64_t{column} * panel_rows, depth, tile);
    float* to = sums + column;
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) {
        float* at = to + i * padded_width + v * kLanes;
        store(at, load(at) + tile[i][v]);
      }
    }
  }
}

void add_gradients(const Params& p, const Item& item, int64_t first, int rows, int keys, const Scratch& s) {
  for (int row = 0; row < rows; row += kTileRows) {
    add_product(s.ds + row * kScoreStride, kScoreStride, 1, s.keys, kKeyBlock, keys, p.width, item.padded_width,
                s.grad_queries + (first + row) * item.padded_width);
  }
  for (int key = 0; key < keys; key += kTileRows) {
    add_product(s.p + key, 1, kScoreStride, s.grad_out_panels, kRowBlock, rows, p.width, item.padded_width,
                s.grad_values + key * item.padded_width);
    add_product(s.ds + key, 1, kScoreStride, s.query_panels, kRowBlock, rows, p.width, item.padded_width,
                s.grad_keys + key * item.padded_width);
  }
  if (p.grad_key_bias != nullptr) {
    for (int row = 0; row < rows; ++row) {
      const Vector gate = broadcast(s.gate[row]);
      for_each_vector(keys, [&](int j, int, auto lanes) VGGT_MV_INLINE_LAMBDA {
        const Vector ds = load(s.ds + row * kScoreStride + j, lanes);
        store(s.grad_bias + j, multiply_add(ds, gate, load(s.grad_bias + j, lanes)), lanes);
      });
    }
  }
  if (p.grad_row_gate != nullptr) {
    for (int row = 0; row < rows; ++row) {
      Vector sums[kSlots] = {};
      for_each_vector(keys, [&](int j, int slot, auto lanes) VGGT_MV_INLINE_LAMBDA {
        sums[slot] = multiply_add(load(s.ds + row * kScoreStride + j, lanes), load(s.bias + j, lanes), sums[slot]);
      });
      s.grad_gates[first + row] += sum_of_slots(sums);
    }
  }
}

template <typename T>
VGGT_MV_INLINE void store_row(const float* from, T* to, int width) {
  for_each_vector(width,
                  [&](int d, int, auto lanes) VGGT_MV_INLINE_LAMBDA { store(to + d, load(from + d, lanes), lanes); });
}

template <typename T>
void store_keys(const Params& p, const Item& item, int64_t first, int count, const Scratch& s) {
  for_each_run(p.grid, p.axis, item.sequence, first, count, [&](int64_t frame, int token, int done, int run) {
    for (int i = 0; i < run; ++i) {
      const int64_t at = (done + i) * item.padded_width;
      store_row(s.grad_keys + at, grad_part_of<T>(p, 1, item.head, frame, token + i), p.width);
      store_row(s.grad_values + at, grad_part_of<T>(p, 2, item.head, frame, token + i), p.width);
    }
    if (p.grad_key_bias == nullptr) return;
    float* to = p.grad_key_bias + item.head * token_count(p.grid) + frame * p.grid.tokens + token;
    for (int i = 0; i < run; ++i) to[i] = s.grad_bias[done + i];
  });
}

// delta_i = sum_d grad_out_id out_id
template <typename T>
void compute_delta(const Params& p, const Item& item) {
  const int64_t step = int64_t{p.heads} * p.width;
  float* delta = p.delta + (item.sequence * p.heads + item.head) * item.length;
  const int64_t frames = frames_per_sequence(p.grid, p.axis);
  for (int64_t index = 0; index < frames; ++index) {
    const int64_t frame = frame_of_sequence(p.grid, p.axis, item.sequence, index);
    int64_t at = frame * p.grid.tokens * step + int64_t{item.head} * p.width;
    for (int token = 0; token < p.grid.tokens; ++token, at += step) {
      const T* grad = static_cast<const T*>(p.grad_out) + at;
      const T* out = static_cast<const T*>(p.out) + at;
      Vector sums[kSlots] = {};
      for_each_vector(p.width, [&](int d, int slot, auto lanes) VGGT_MV_INLINE_LAMBDA {
        sums[slot] = multiply_add(load(grad + d, lanes), load(out + d, lanes), sums[slot]);
      });
      delta[index * p.grid.tokens + token] = sum_of_slots(sums);
    }
  }
}

template <typename T>
void run_item(const Params& p, const Item& item, const Scratch& s) {
  compute_delta<T>(p, item);
  __builtin_memset(s.grad_queries, 0, round_up(item.length, kTileRows) * item.padded_width * sizeof(float));
  __builtin_memset(s.grad_gates, 0, item.length * sizeof(float));
  for (int64_t first_key = 0; first_key < item.length; first_key += kKeyBlock) {
    const int64_t keys_left = item.length - first_key;
    const int keys = static_cast<int>(keys_left < kKeyBlock ? keys_left : kKeyBlock);
    pack_keys<T>(p, item, first_key, keys, s);
    __builtin_memset(s.grad_keys, 0, kKeyBlock * item.padded_width * sizeof(float));
    __builtin_memset(s.grad_values, 0, kKeyBlock * item.padded_width * sizeof(float));
    __builtin_memset(s.grad_bias, 0, kKeyBlock * sizeof(float));
    for (int64_t first = 0; first < item.length; first += kRowBlock) {
      const int rows = static_cast<int>(item.length - first < kRowBlock ? item.length - first : kRowBlock);
      pack_rows<T>(p, item, first, rows, s);
      if (p.key_bias != nullptr) {
        score_block<true>(p.width, rows, keys, s);
      } else {
        score_block<false>(p.width, rows, keys, s);
      }
      add_gradients(p, item, first, rows, keys, s);
    }
    store_keys<T>(p, item, first_key, keys, s);
  }
  for (int64_t first = 0; first < item.length; first += kRowBlock) {
    const int rows = static_cast<int>(item.length - first < kRowBlock ? item.length - first : kRowBlock);
    for_each_run(p.grid, p.axis, item.sequence, first, rows, [&](int64_t frame, int token, int done, int run) {
      for (int i = 0; i < run; ++i) {
        store_row(s.grad_queries + (first + done + i) * item.padded_width,
                  grad_part_of<T>(p, 0, item.head, frame, token + i), p.width);
      }
      if (p.grad_row_gate == nullptr) return;
      float* to = p.grad_row_gate + item.head * token_count(p.grid) + frame * p.grid.tokens + token;
      for (int i = 0; i < run; ++i) to[i] = s.grad_gates[first + done + i];
    });
  }
}

template <typename T>
Status backward(const Params& p, int num_threads) {
  if (token_count(p.grid) == 0) return Status::ok;
  const int64_t length = sequence_length(p.grid, p.axis);
  const int64_t items = sequence_count(p.grid, p.axis) * p.heads;
  const int threads = num_threads < 1 ? 1 : num_threads;
  Scratch unplaced;
  const int64_t size = layout(length, p.width, nullptr, &unplaced);
  bool failed = false;
#pragma omp parallel num_threads(threads < items ? threads : static_cast<int>(items))
  {
    float* memory = static_cast<float*>(aligned_alloc(64, round_up(size * sizeof(float), 64)));
    if (memory == nullptr) {
#pragma omp atomic write
      failed = true;
    }
#pragma omp barrier
    Scratch scratch;
    if (memory != nullptr) layout(length, p.width, memory, &scratch);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < items; ++i) {
      const Item item = {i / p.heads, static_cast<int>(i % p.heads), length, round_up(p.width, kTileColumns)};
      if (!failed) run_item<T>(p, item, scratch);
    }
    free(memory);
  }
  return failed ? Status::out_of_memory : Status::ok;
}

}  // namespace

Status alternating_attention_backward(const AlternatingAttentionBackwardParams& params, int num_threads) {
  return for_dtype(params.dtype, [&](auto element) { return backward<decltype(element)>(params, num_threads); });
}

}  // namespace vggt_mv::VGGT_MV_ISA
