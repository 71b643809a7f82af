// u = LayerNorm(q) * weight + bias over the D features of every query and key, turned by the position of its token; and
// the gradients. Formula and layouts: core/qk_norm_rope.h.
//
// Bound by memory: q and k are read and written once (v, too, where the result is a new tensor), with about 15 operations
// an element. Tokens are shared out to threads; a token's cosines and sines are laid out once, row and column apart, for
// its 2 h heads. Forward, the heads of a token are gone through three times in the first-level cache: their means, their
// variances about those (no cancellation where a mean is large), the result. The next token is fetched meanwhile. D = 64
// is compiled by itself. A pair is read before it is written, which makes working in place safe. Backward, a head
// passes through buffers of D floats.
#include "core/qk_norm_rope.h"

#include <stdlib.h>

#include "core/residual_scale_norm.h"  // first_row_of_block
#include "cpu/kernels.h"
#include "cpu/vector_math.h"

namespace vggt_mv::VGGT_MV_ISA {

namespace {

// Below this many elements waking up other threads costs more than it saves.
constexpr int64_t kSerialElements = 16384;

// A thread's memory, D floats each: [0, D/2) of the cosines and sines turn with the row, the rest with the column; in
// a half, entry j belongs to the pair (j, j + D/4).
struct Buffers {
  float* cosines;  // [2, D / 4]
  float* sines;    // [2, D / 4]
  float* head;     // [D]
  float* other;    // [D]
};

constexpr int kBuffers = 4;

Buffers place(float* memory, int width) { return {memory, memory + width, memory + 2 * width, memory + 3 * width}; }

// Where a patch or special token stands.
template <typename Params, typename Width>
VGGT_MV_INLINE void load_rotation(const Params& p, Width width, int token, const Buffers& buffers) {
  const int patch = token - p.special;
  const int position[2] = {patch < 0 ? p.special_position : patch / p.grid_width + 1,
                           patch < 0 ? p.special_position : patch % p.grid_width + 1};
  const int pairs = width / 4;
  for (int half = 0; half < 2; ++half) {
    const float* table = p.cos_sin + int64_t{position[half]} * pairs * 2;
    for (int j = 0; j < pairs; ++j) {
      buffers.cosines[half * pairs + j] = table[2 * j];
      buffers.sines[half * pairs + j] = table[2 * j + 1];
    }
  }
}

struct Statistics {
  float mean;
  float rstd;
};

VGGT_MV_INLINE float total_of_slots(const Vector (&v)[kSlots]) {
  return total_of_lanes((v[0] + v[1]) + (v[2] + v[3]))[0];
}

template <typename T>
VGGT_MV_INLINE Statistics statistics_of(const T* row, int width, float eps) {
  Vector sums[kSlots] = {};
  for_each_vector(width,
                  [&](int d, int slot, auto lanes) VGGT_MV_INLINE_LAMBDA { sums[slot] += load(row + d, lanes); });
  const float mean = total_of_slots(sums) / static_cast<float>(width);
  Vector squares[kSlots] = {};
  for_each_vector(width, [&](int d, int slot, auto lanes) VGGT_MV_INLINE_LAMBDA {
    const Vector distance = keep(load(row + d, lanes) - mean, lanes);
    squares[slot] = multiply_add(distance, distance, squares[slot]);
  });
  return {mean, 1.0f / __builtin_sqrtf(total_of_slots(squares) / static_cast<float>(width) + eps)};
}

template <typename T>
VGGT_MV_INLINE void copy_head(const T* from, T* to, int width) {
  __builtin_memcpy(to, from, width * sizeof(T));
}

// Turns the pairs of a head by their angles (sign 1) or back (sign -1); value(d, lanes) is what stands at d. A pair is
// asked for before it is written, so that a head may be turned in place.
template <typename Width, typename Value, typename To>
VGGT_MV_INLINE void rotate(Value value, To* to, Width width, float sign, const Buffers& buffers) {
  const int pairs = width / 4;
  for (int half = 0; half < 2; ++half) {
    const int first = half * 2 * pairs;
    for_each_vector(pairs, [&](int j, int, auto lanes) VGGT_MV_INLINE_LAMBDA {
      const Vector cosine = load(buffers.cosines + half * pairs + j, lanes);
      const Vector sine = load(buffers.sines + half * pairs + j, lanes) * sign;
      const Vector a = value(first + j, lanes);
      const Vector b = value(first + pairs + j, lanes);
      const Vector turned_a = multiply_add(a, cosine, -(b * sine)), turned_b = multiply_add(b, cosine, a * sine);
      if (pairs == kLanes) return store_two(to + first, turned_a, turned_b);
      store(to + first + j, turned_a, lanes);
      store(to + first + pairs + j, turned_b, lanes);
    });
  }
}

// A width that the compiler knows: it unrolls every loop over it.
template <int kWidth>
struct Fixed {
  constexpr operator int() const { return kWidth; }
};

// Statistics are taken of so many heads before any of them is written: one head's are a chain of sums over lanes, a root
// and a division, some 100 cycles in which the arithmetic units would wait.
constexpr int kHeadsTogether = 16;
static_assert(kHeadsTogether % kLanes == 0 && kHeadsTogether % 4 == 0);

struct HeadStatistics {
  float means[kHeadsTogether];
  float rstds[kHeadsTogether];
};

// means[h] = the sum that term(sum so far, x[h][d], h, lanes) leaves over all d, by the width. Four heads at a time, since
// the lanes of four vectors are added up in little more time than those of one; where heads are missing of four, the last
// one is taken again.
template <typename T, typename Width, typename Term>
VGGT_MV_INLINE void means_of_heads(const T* x, int64_t stride, int heads, Width width, float* means, Term term) {
  for (int first = 0; first < heads; first += 4) {
    Vector sums[4] = {};
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const int head = first + i < heads ? first + i : heads - 1;
      for_each_value(x + head * stride, width, [&](Vector value, auto lanes) VGGT_MV_INLINE_LAMBDA {
        sums[i] = term(sums[i], value, head, lanes);
      });
    }
    store_four(means + first, totals_of_four(sums) / static_cast<float>(width));
  }
}

template <typename T, typename Width>
VGGT_MV_INLINE void statistics_of_heads(const T* x, int64_t stride, int heads, Width width, float eps,
                                        HeadStatistics& of) {
  means_of_heads(x, stride, heads, width, of.means,
                 [](Vector sum, Vector value, int, auto) VGGT_MV_INLINE_LAMBDA { return sum + value; });
  means_of_heads(x, stride, heads, width, of.rstds,
                 [&](Vector sum, Vector value, int head, auto lanes) VGGT_MV_INLINE_LAMBDA {
                   const Vector distance = keep(value - of.means[head], lanes);
                   return multiply_add(distance, distance, sum);
                 });
  for (int i = 0; i < kHeadsTogether; i += kLanes) store(of.rstds + i, reciprocal_root(load(of.rstds + i) + eps));
}

// At most kHeadsTogether heads; `next` is how far the same heads of the next token are.
template <typename T, typename Width>
VGGT_MV_INLINE void forward_heads(const T* from, int64_t from_stride, T* to, int64_t to_stride, const float* weight,
                                  const float* bias, int heads, Width width, float eps, int64_t next,
                                  const Buffers& buffers) {
  if (weight == nullptr) {
    for (int head = 0; head < heads; ++head) {
      const T* x = from + head * from_stride;
      rotate([&](int d, auto lanes) VGGT_MV_INLINE_LAMBDA { return load(x + d, lanes); }, to + head * to_stride, width,
             1.0f, buffers);
    }
    return;
  }
  HeadStatistics statistics = {};
  statistics_of_heads(from, from_stride, heads, width, eps, statistics);
  for (int head = 0; head < heads; ++head) {
    const T* x = from + head * from_stride;
    prefetch_row(x + next, width);  // on another page, where the hardware's own look-ahead begins anew
    const Vector mean = broadcast(statistics.means[head]), rstd = broadcast(statistics.rstds[head]);
    rotate(
        [&](int d, auto lanes) VGGT_MV_INLINE_LAMBDA {
          return multiply_add((load(x + d, lanes) - mean) * rstd, load(weight + d, lanes), load(bias + d, lanes));
        },
        to + head * to_stride, width, 1.0f, buffers);
  }
}

template <typename T, typename Width>
void forward_token(const QkNormRopeParams& p, Width width, int64_t frame, int token, const Buffers& buffers) {
  const T* from = static_cast<const T*>(p.qkv) + frame_offset(p.grid, p.qkv_strides.tokens, frame) +
                  token * p.qkv_strides.tokens.token;
  T* to =
      static_cast<T*>(p.out) + frame_offset(p.grid, p.out_strides.tokens, frame) + token * p.out_strides.tokens.token;
  const float* weights[2] = {static_cast<const float*>(p.q_weight), static_cast<const float*>(p.k_weight)};
  const float* biases[2] = {static_cast<const float*>(p.q_bias), static_cast<const float*>(p.k_bias)};
  const int64_t next = token + 1 < p.grid.tokens ? p.qkv_strides.tokens.token : 0;
  load_rotation(p, width, token, buffers);
  for (int part = 0; part < 2; ++part) {
    for (int head = 0; head < p.heads; head += kHeadsTogether) {
      const int heads = p.heads - head < kHeadsTogether ? p.heads - head : kHeadsTogether;
      forward_heads(from + part * p.qkv_strides.part + head * p.qkv_strides.head, p.qkv_strides.head,
                    to + part * p.out_strides.part + head * p.out_strides.head, p.out_strides.head, weights[part],
                    biases[part], heads, width, p.eps, next, buffers);
    }
  }
  if (p.qkv == p.out) return;
  for (int head = 0; head < p.heads; ++head) {
    copy_head(from + 2 * p.qkv_strides.part + head * p.qkv_strides.head,
              to + 2 * p.out_strides.part + head * p.out_strides.head, p.width);
  }
}

// Runs body(block, buffers) for every block on `threads` threads, each with buffers of its own.
template <typename Body>
Status for_each_block(int blocks, int width, int threads, Body body) {
  bool failed = false;
#pragma omp parallel num_threads(threads)
  {
    float* memory = static_cast<float*>(aligned_alloc(64, kBuffers * sizeof(float) * width));
    if (memory == nullptr) {
#pragma omp atomic write
      failed = true;
    }
#pragma omp barrier
#pragma omp for schedule(static)
    for (int block = 0; block < blocks; ++block) {
      if (!failed) body(block, place(memory, width));
    }
    free(memory);
  }
  return failed ? Status::out_of_memory : Status::ok;
}

template <typename Params>
int threads_for(const Params& p, int num_threads) {
  return num_threads < 1 || token_count(p.grid) * p.heads * p.width <= kSerialElements ? 1 : num_threads;
}

template <typename T, typename Width>
Status forward(const QkNormRopeParams& p, Width width, int num_threads) {
  const int64_t tokens = token_count(p.grid);
  const int threads = threads_for(p, num_threads);
  return for_each_block(threads, p.width, threads, [&](int block, const Buffers& buffers) {
    const int64_t end = first_row_of_block(block + 1, tokens, threads);
    for (int64_t i = first_row_of_block(block, tokens, threads); i < end; ++i) {
      forward_token<T>(p, width, i / p.grid.tokens, static_cast<int>(i % p.grid.tokens), buffers);
    }
  });
}

// `sums` [2 (weight, bias), D] of this block; null where the norm wants none.
template <typename T>
VGGT_MV_INLINE void backward_head(const T* grad, const T* x, T* grad_x, const float* weight, int width, float eps,
                                  float* sums, const Buffers& buffers) {
  const auto value = [&](int d, auto lanes) VGGT_MV_INLINE_LAMBDA { return load(grad + d, lanes); };
  if (weight == nullptr) {
    rotate(value, buffers.head, width, -1.0f, buffers);
    for_each_vector(width, [&](int d, int, auto lanes)
                               VGGT_MV_INLINE_LAMBDA { store(grad_x + d, load(buffers.head + d, lanes), lanes); });
    return;
  }
  rotate(value, buffers.head, width, -1.0f, buffers);
  const Statistics row = statistics_of(x, width, eps);
  Vector totals[kSlots] = {};
  Vector products[kSlots] = {};
  for_each_vector(width, [&](int d, int slot, auto lanes) VGGT_MV_INLINE_LAMBDA {
    const Vector turned = load(buffers.head + d, lanes);
    const Vector n = (load(x + d, lanes) - row.mean) * row.rstd;
    const Vector g = turned * load(weight + d, lanes);
    totals[slot] += g;
    products[slot] = multiply_add(g, keep(n, lanes), products[slot]);
    store(buffers.other + d, n, lanes);
    if (sums == nullptr) return;
    store(sums + d, multiply_add(turned, n, load(sums + d, lanes)), lanes);
    store(sums + width + d, load(sums + width + d, lanes) + turned, lanes);
  });
  const float mean_g = total_of_slots(totals) / static_cast<float>(width);
  const float mean_gn = total_of_slots(products) / static_cast<float>(width);
  for_each_vector(width, [&](int d, int, auto lanes) VGGT_MV_INLINE_LAMBDA {
    const Vector g = load(buffers.head + d, lanes) * load(weight + d, lanes);
    store(grad_x + d, (g - mean_g - load(buffers.other + d, lanes) * mean_gn) * row.rstd, lanes);
  });
}

template <typename T>
void backward_token(const QkNormRopeBackwardParams& p, int block, int64_t frame, int token, const Buffers& buffers) {
  const T* grad = static_cast<const T*>(p.grad_out) + frame_offset(p.grid, p.grad_out_strides.tokens, frame) +
                  token * p.grad_out_strides.tokens.token;
  const T* x = static_cast<const T*>(p.qkv) + frame_offset(p.grid, p.qkv_strides.tokens, frame) +
               token * p.qkv_strides.tokens.token;
  T* grad_x = static_cast<T*>(p.grad_qkv) + frame_offset(p.grid, p.grad_qkv_strides.tokens, frame) +
              token * p.grad_qkv_strides.tokens.token;
  const float* weights[2] = {static_cast<const float*>(p.q_weight), static_cast<const float*>(p.k_weight)};
  load_rotation(p, p.width, token, buffers);
  for (int part = 0; part < 2; ++part) {
    float* sums =
        p.partial_sums == nullptr ? nullptr : p.partial_sums + (int64_t{part} * p.blocks + block) * 2 * p.width;
    for (int head = 0; head < p.heads; ++head) {
      backward_head(grad + part * p.grad_out_strides.part + head * p.grad_out_strides.head,
                    x + part * p.qkv_strides.part + head * p.qkv_strides.head,
                    grad_x + part * p.grad_qkv_strides.part + head * p.grad_qkv_strides.head, weights[part], p.width,
                    p.eps, sums, buffers);
    }
  }
  for (int head = 0; head < p.heads; ++head) {
    copy_head(grad + 2 * p.grad_out_strides.part + head * p.grad_out_strides.head,
              grad_x + 2 * p.grad_qkv_strides.part + head * p.grad_qkv_strides.head, p.width);
  }
}

template <typename T>
Status backward(const QkNormRopeBackwardParams& p, int num_threads) {
  const int64_t tokens = token_count(p.grid);
  const int64_t size = 2 * int64_t{p.width};
  const Status status =
      for_each_block(p.blocks, p.width, threads_for(p, num_threads), [&](int block, const Buffers& b) {
        for (int part = 0; part < 2 && p.partial_sums != nullptr; ++part) {
          __builtin_memset(p.partial_sums + (int64_t{part} * p.blocks + block) * size, 0, size * sizeof(float));
        }
        const int64_t end = first_row_of_block(block + 1, tokens, p.blocks);
        for (int64_t i = first_row_of_block(block, tokens, p.blocks); i < end; ++i) {
          backward_token<T>(p, block, i / p.grid.tokens, static_cast<int>(i % p.grid.tokens), b);
        }
      });
  if (p.partial_sums == nullptr || status != Status::ok) return status;
  // Stage two: the blocks in order, so that the sums do not depend on the number of threads.
  for (int part = 0; part < 2; ++part) {
    float* total = p.grad_norms + part * size;
    __builtin_memset(total, 0, size * sizeof(float));
    for (int block = 0; block < p.blocks; ++block) {
      const float* partial = p.partial_sums + (int64_t{part} * p.blocks + block) * size;
      for (int64_t i = 0; i < size; ++i) total[i] += partial[i];
    }
  }
  return status;
}

// Calls run(T{}) with the storage type; norms are in float.
template <typename Params, typename Run>
Status with_float_norms(const Params& p, Run run) {
  return p.norm_dtype == DType::f32 ? for_dtype(p.dtype, run) : Status::unsupported_dtypes;
}

}  // namespace

Status qk_norm_rope(const QkNormRopeParams& params, int num_threads) {
  return with_float_norms(params, [&](auto element) {
    using T = decltype(element);
    return params.width == 64 ? forward<T>(params, Fixed<64>{}, num_threads)
                              : forward<T>(params, params.width, num_threads);
  });
}

Status qk_norm_rope_backward(const QkNormRopeBackwardParams& params, int num_threads) {
  return with_float_norms(params, [&](auto element) { return backward<decltype(element)>(params, num_threads); });
}

}  // namespace vggt_mv::VGGT_MV_ISA
