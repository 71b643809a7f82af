// s_ij = scale * q_i . k_j + key_bias_j,   out_i = sum_j softmax_j(s_ij) v_j,   lse_i = log sum_j exp(s_ij)
//
// for the queries and keys that core/gathered_attention.h tells of. How it is computed: attention_forward.h. Keys are copied
// as they are packed, from wherever they lie, so that a list of tokens or frames costs what a contiguous sequence does: no
// gathered copy and no dense mask exists. Heads of all batch elements, and of all frames where each has a list of its own,
// are shared out to threads, and the rows of a head where there are few of them.
#include "core/gathered_attention.h"

#include "cpu/attention_forward.h"
#include "cpu/kernels.h"

namespace vggt_mv::VGGT_MV_ISA {

namespace {

int64_t tokens_of_scene(const GatheredAttentionParams& p) {
  return int64_t{p.grid.times} * p.grid.views * p.grid.tokens;
}

bool each_frame_has_a_list(const GatheredAttentionParams& p) { return p.token_keys == TokenKeys::listed_frames; }

// Sequences of one head: a batch element, or one frame of it.
int64_t sequences(const GatheredAttentionParams& p) {
  return each_frame_has_a_list(p) ? frame_count(p.grid) : p.grid.batch;
}

int64_t queries_of_sequence(const GatheredAttentionParams& p) {
  return p.memory_queries ? p.memory_tokens : each_frame_has_a_list(p) ? p.grid.tokens : tokens_of_scene(p);
}

// Keys of a sequence, at most: a list of frames may have places that name none.
int64_t most_keys(const GatheredAttentionParams& p) {
  switch (p.token_keys) {
    case TokenKeys::none: return p.memory_tokens;
    case TokenKeys::all: return p.memory_tokens + tokens_of_scene(p);
    case TokenKeys::listed_tokens: return p.memory_tokens + int64_t{p.list_length};
    case TokenKeys::listed_frames: return p.memory_tokens + int64_t{p.list_length} * p.grid.tokens;
  }
  return 0;
}

// One head of one sequence.
template <typename T>
struct GatheredSource {
  using Storage = T;
  static constexpr int kWeights = 0;

  GatheredSource(const GatheredAttentionParams& params, int64_t index)
      : p(params),
        width(params.width),
        scale(params.scale),
        bias(params.key_bias == nullptr ? Bias::none : Bias::plain),
        head(static_cast<int>(index % params.heads)) {
    const int64_t sequence = index / p.heads;
    const int64_t frames = int64_t{p.grid.times} * p.grid.views;
    batch = each_frame_has_a_list(p) ? sequence / frames : sequence;
    frame = each_frame_has_a_list(p) ? sequence % frames : 0;
    keys = most_keys(p);
    if (each_frame_has_a_list(p)) {
      list = p.listed + frame * p.list_length;
      for (int i = 0; i < p.list_length; ++i) keys -= list[i] < 0 ? p.grid.tokens : 0;
    } else if (p.token_keys == TokenKeys::listed_tokens) {
      list = p.listed + batch * p.list_length;
    }
    if (p.lse != nullptr) {
      const int64_t all = p.memory_queries ? p.memory_tokens : tokens_of_scene(p);
      lse = p.lse + (batch * p.heads + head) * all + frame * p.grid.tokens;
    }
  }

  const GatheredSource& result(int) const { return *this; }

  // Query, key or value (0, 1, 2) of a token of frame `number` of the batch element.
  const T* token_part(int which, int64_t number, int64_t token) const {
    const int64_t frames = int64_t{p.grid.times} * p.grid.views;
    return static_cast<const T*>(p.qkv) + frame_offset(p.grid, p.qkv_strides.tokens, batch * frames + number) +
           token * p.qkv_strides.tokens.token + which * p.qkv_strides.part + head * p.qkv_strides.head;
  }

  const T* memory_part(int which, int64_t token) const {
    return static_cast<const T*>(p.memory_qkv) + batch * p.memory_strides.batch + token * p.memory_strides.token +
           which * p.memory_strides.part + head * p.memory_strides.head;
  }

  template <typename Body>
  VGGT_MV_INLINE void for_each_row_run(int64_t first, int count, Body body) const {
    if (p.memory_queries) {
      body(memory_part(0, first), p.memory_strides.token, static_cast<const float*>(nullptr), int64_t{0}, 0, count);
      return;
    }
    for_each_frame_run(frame, first, count, [&](int64_t number, int64_t token, int done, int run) {
      body(token_part(0, number, token), p.qkv_strides.tokens.token, static_cast<const float*>(nullptr), int64_t{0},
           done, run);
    });
  }

  template <typename Body>
  VGGT_MV_INLINE void for_each_out_run(int64_t first, int count, Body body) const {
    const int64_t all = p.memory_queries ? p.memory_tokens : tokens_of_scene(p);
    const int64_t row = batch * all + frame * p.grid.tokens + first;
    body(static_cast<T*>(p.out) + (row * p.heads + head) * p.width, int64_t{p.heads} * p.width, 0, count);
  }

  template <typename Body>
  VGGT_MV_INLINE void for_each_key_run(int64_t first, int count, Body body) const {
    int done = 0;
    if (first < p.memory_tokens) {
      const int64_t left = p.memory_tokens - first;
      done = static_cast<int>(left < count ? left : count);
      body(memory_part(1, first), memory_part(2, first), p.memory_strides.token, static_cast<const float*>(nullptr), 0,
           done);
    }
    const int64_t place = first + done - p.memory_tokens;
    const int left = count - done;
    const auto run_of_tokens = [&](int64_t number, int64_t token, int before, int run) {
      const int64_t bias = (batch * p.grid.times * p.grid.views + number) * p.grid.tokens + token;
      body(token_part(1, number, token), token_part(2, number, token), p.qkv_strides.tokens.token,
           p.key_bias == nullptr ? nullptr : p.key_bias + bias, done + before, run);
    };
    switch (left == 0 ? TokenKeys::none : p.token_keys) {
      case TokenKeys::none: break;
      case TokenKeys::all: for_each_frame_run(0, place, left, run_of_tokens); break;
      case TokenKeys::listed_tokens:
        for (int i = 0; i < left; ++i) {
          run_of_tokens(list[place + i] / p.grid.tokens, list[place + i] % p.grid.tokens, i, 1);
        }
        break;
      case TokenKeys::listed_frames: for_each_listed_run(place, left, run_of_tokens); break;
    }
  }

  // Tokens [first, first + count) after the first one of frame `begin`, cut at the ends of frames.
  template <typename Body>
  VGGT_MV_INLINE void for_each_frame_run(int64_t begin, int64_t first, int count, Body body) const {
    int64_t number = begin + first / p.grid.tokens;
    int64_t token = first % p.grid.tokens;
    for (int done = 0; done < count; ++number, token = 0) {
      const int64_t left = p.grid.tokens - token;
      const int run = static_cast<int>(left < count - done ? left : count - done);
      body(number, token, done, run);
      done += run;
    }
  }

  // The same of the frames that the list names, one after the other.
  template <typename Body>
  VGGT_MV_INLINE void for_each_listed_run(int64_t first, int count, Body body) const {
    int64_t skip = first;
    for (int i = 0, done = 0; done < count; ++i) {
      if (list[i] < 0) continue;
      if (skip >= p.grid.tokens) {
        skip -= p.grid.tokens;
        continue;
      }
      const int64_t left = p.grid.tokens - skip;
      const int run = static_cast<int>(left < count - done ? left : count - done);
      body(list[i], skip, done, run);
      done += run;
      skip = 0;
    }
  }

  const GatheredAttentionParams& p;
  int width;
  float scale;
  Bias bias;
  int head;
  int64_t batch;
  int64_t frame;  // whose list it is; 0 where all queries share one
  int64_t keys;
  const int64_t* list = nullptr;
  float* lse = nullptr;
  static constexpr float lse_offset = 0.0f;
};

template <typename T>
Status forward(const GatheredAttentionParams& p, int num_threads) {
  return attend<GatheredSource<T>>(sequences(p) * p.heads, queries_of_sequence(p), most_keys(p), p.width, num_threads,
                                   [&](int64_t index) { return GatheredSource<T>(p, index); });
}

}  // namespace

Status gathered_attention(const GatheredAttentionParams& params, int num_threads) {
  return for_dtype(params.dtype, [&](auto element) { return forward<decltype(element)>(params, num_threads); });
}

}  // namespace vggt_mv::VGGT_MV_ISA
