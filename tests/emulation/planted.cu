// Kernels with one planted bug each, and their correct twins: what test_emulator.py proves the emulator with.
// `kBug` selects the twin; the comment at the place says what is wrong.
#include <cstring>

#include "cuda/arch/simt.cuh"

namespace vggt_mv::planted {

struct Params {
  const float* input;  // [n]
  const __half* a;     // [16, 16] row-major
  const __half* b;     // [16, 8] row-major
  float* output;       // [n], or what the kernel says
  int n;
};

constexpr int kThreads = 128;

// output[i] = input[n - 1 - i], by way of shared memory; n = 128.
template <bool kBug>
__global__ void reverse_missing_barrier(const __grid_constant__ Params p) {
  const auto tile = simt::dynamic_shared<float>();
  const int i = simt::thread_index();
  tile.store(i, simt::load_global(p.input + i));
  if constexpr (!kBug) simt::block_barrier();  // bug: read without it
  simt::store_global(p.output + i, tile.load(kThreads - 1 - i));
}

// The upper half of the block reads what the lower half has written: forward order shows a read-after-write race,
// reverse order an uninitialised read and then a write-after-read race.
template <bool kBug>
__global__ void handover_missing_barrier(const __grid_constant__ Params p) {
  const auto tile = simt::dynamic_shared<float>();
  const int i = simt::thread_index();
  if (i < 64) tile.store(i, simt::load_global(p.input + i));
  if constexpr (!kBug) simt::block_barrier();
  if (i >= 64) simt::store_global(p.output + i - 64, tile.load(i - 64));
}

// Running sums over two tiles: the second tile may overwrite the first only when everybody has read it.
template <bool kBug>
__global__ void tiles_missing_barrier(const __grid_constant__ Params p) {
  const auto tile = simt::dynamic_shared<float>();
  const int i = simt::thread_index();
  float sum = 0.0f;
  for (int first = 0; first < p.n; first += kThreads) {
    tile.store(i, simt::load_global(p.input + first + i));
    simt::block_barrier();
    sum += tile.load((i + 32) % kThreads);
    if constexpr (!kBug) simt::block_barrier();  // bug: the next round's store races with this round's loads
  }
  simt::store_global(p.output + i, sum);
}

// One writer for each cell.
template <bool kBug>
__global__ void two_writers(const __grid_constant__ Params p) {
  const auto tile = simt::dynamic_shared<float>();
  const int i = simt::thread_index();
  if (kBug || i < 64) tile.store(i % 64, simt::load_global(p.input + i % 64));  // bug: threads i and i + 64
  simt::block_barrier();
  if (i < 64) simt::store_global(p.output + i, tile.load(i));
}

// Lanes of one warp are not in lockstep: they need a warp barrier.
template <bool kBug>
__global__ void warp_exchange(const __grid_constant__ Params p) {
  const auto tile = simt::dynamic_shared<float>();
  const int i = simt::thread_index();
  tile.store(i, simt::load_global(p.input + i));
  if constexpr (kBug) {
    simt::shuffle_xor(0.0f, 1);  // bug: a shuffle orders no memory
  } else {
    simt::warp_barrier();
  }
  simt::store_global(p.output + i, tile.load(i ^ 1));
}

// The block has n floats of shared memory.
template <bool kBug>
__global__ void shared_bounds(const __grid_constant__ Params p) {
  const auto tile = simt::dynamic_shared<float>();
  const int i = simt::thread_index();
  tile.store(i + (kBug ? 1 : 0), simt::load_global(p.input + i));
  simt::block_barrier();
  simt::store_global(p.output + i, tile.load(i));
}

template <bool kBug>
__global__ void misaligned_vector(const __grid_constant__ Params p) {
  const auto tile = simt::dynamic_shared<float>();
  const int i = simt::thread_index();
  tile.store(i, simt::load_global(p.input + i));
  simt::block_barrier();
  const auto pair = tile.load_as<float2>((i / 2) * 2 + (kBug ? 1 : 0) * (i < 2));
  simt::store_global(p.output + i, i % 2 == 0 ? pair.x : pair.y);
}

// output[i] = 2 input[i], any n.
template <bool kBug>
__global__ void double_elements(const __grid_constant__ Params p) {
  const int i = simt::block_index_x() * kThreads + simt::thread_index();
  if (kBug || i < p.n) simt::store_global(p.output + i, 2.0f * simt::load_global(p.input + i));  // bug: no tail mask
}

// output[0] = max(input), n <= 512, tail filled with zeros by the copy.
template <bool kBug>
__global__ void maximum_unmasked_tail(const __grid_constant__ Params p) {
  const auto tile = simt::dynamic_shared<float>();
  const int lane = simt::lane_index();
  float maximum = -__builtin_inff();
  for (int i = lane; i < 512; i += 32) simt::copy_async<4>(tile + i, p.input + (i < p.n ? i : 0), i < p.n);
  simt::copy_async_commit();
  simt::copy_async_wait<0>();
  simt::warp_barrier();
  for (int i = lane; i < 512; i += 32) {
    if (kBug || i < p.n) maximum = fmaxf(maximum, tile.load(i));  // bug: zeros win over negative inputs
  }
  maximum = simt::warp_max(maximum);
  if (lane == 0) simt::store_global(p.output, maximum);
}

// output[16, 8] = a b on one warp.
template <bool kBug>
__global__ void matrix_product(const __grid_constant__ Params p) {
  const auto a = simt::dynamic_shared<__half>();
  const auto b = simt::dynamic_shared<__half>(512);
  const int lane = simt::lane_index();
  simt::copy_async<16>(a + lane * 8, p.a + lane * 8);
  if (lane < 16) simt::copy_async<16>(b + lane * 8, p.b + lane * 8);
  simt::copy_async_commit();
  simt::copy_async_wait<0>();
  simt::warp_barrier();
  unsigned left[4], right[2];
  float sum[4] = {};
  simt::load_matrix_x4(left, a + (lane % 16) * 16 + (lane / 16) * 8);
  if constexpr (kBug) {
    simt::load_matrix_x2(right, b + (lane % 16) * 8);  // bug: b lies [k, n] and must be transposed
  } else {
    simt::load_matrix_x2_transposed(right, b + (lane % 16) * 8);
  }
  simt::multiply_accumulate_16x8x16<__half>(sum, left, right);
  for (int i = 0; i < 4; ++i) {
    simt::store_global(p.output + (lane / 4 + 8 * (i / 2)) * 8 + 2 * (lane % 4) + i % 2, sum[i]);
  }
}

// output = input by way of asynchronous copies.
template <bool kBug>
__global__ void copy_missing_wait(const __grid_constant__ Params p) {
  const auto tile = simt::dynamic_shared<float>();
  const int i = simt::thread_index();
  simt::copy_async<4>(tile + i, p.input + i);
  simt::copy_async_commit();
  if constexpr (!kBug) simt::copy_async_wait<0>();
  simt::block_barrier();
  simt::store_global(p.output + i, tile.load(kThreads - 1 - i));
}

// Two copies in flight; the bug waits for all but the one it needs.
template <bool kBug>
__global__ void copy_short_wait(const __grid_constant__ Params p) {
  const auto tile = simt::dynamic_shared<float>();
  const int i = simt::thread_index();
  for (int stage = 0; stage < 2; ++stage) {
    simt::copy_async<4>(tile + stage * kThreads + i, p.input + stage * kThreads + i);
    simt::copy_async_commit();
  }
  float sum = 0.0f;
  for (int stage = 0; stage < 2; ++stage) {
    if (stage == 0 || kBug) {
      simt::copy_async_wait<1>();
    } else {
      simt::copy_async_wait<0>();
    }
    simt::block_barrier();
    sum += tile.load(stage * kThreads + (i ^ 1));
  }
  simt::store_global(p.output + i, sum);
}

// A wait covers this thread's own copies only: others need a barrier too.
template <bool kBug>
__global__ void copy_missing_barrier(const __grid_constant__ Params p) {
  const auto tile = simt::dynamic_shared<float>();
  const int i = simt::thread_index();
  simt::copy_async<4>(tile + i, p.input + i);
  simt::copy_async_wait_all();
  if constexpr (!kBug) simt::block_barrier();
  simt::store_global(p.output + i, tile.load(kThreads - 1 - i));
}

// A copy into a buffer that others may still be reading.
template <bool kBug>
__global__ void copy_too_early(const __grid_constant__ Params p) {
  const auto tile = simt::dynamic_shared<float>();
  const int i = simt::thread_index();
  float sum = 0.0f;
  for (int first = 0; first < p.n; first += kThreads) {
    simt::copy_async<4>(tile + i, p.input + first + i);
    simt::copy_async_wait_all();
    simt::block_barrier();
    sum += tile.load((i + 32) % kThreads);
    if constexpr (!kBug) simt::block_barrier();
  }
  simt::store_global(p.output + i, sum);
}

template <bool kBug>
__global__ void copy_never_awaited(const __grid_constant__ Params p) {
  const auto tile = simt::dynamic_shared<float>();
  const int i = simt::thread_index();
  simt::copy_async<4>(tile + i, p.input + i);
  if constexpr (!kBug) simt::copy_async_wait_all();
  simt::store_global(p.output + i, simt::load_global(p.input + i));
}

template <bool kBug>
__global__ void divergent_block_barrier(const __grid_constant__ Params p) {
  const int i = simt::thread_index();
  if (!kBug || i < 64) simt::block_barrier();
  simt::store_global(p.output + i, simt::load_global(p.input + i));
}

template <bool kBug>
__global__ void barriers_of_two_branches(const __grid_constant__ Params p) {
  const int i = simt::thread_index();
  if (kBug && i < 64) {
    simt::block_barrier();
  } else {
    simt::block_barrier();
  }
  simt::store_global(p.output + i, simt::load_global(p.input + i));
}

template <bool kBug>
__global__ void divergent_shuffle(const __grid_constant__ Params p) {
  const int i = simt::thread_index();
  float value = simt::load_global(p.input + i);
  if (!kBug || simt::lane_index() < 16) value += simt::shuffle_xor(value, 1);
  simt::store_global(p.output + i, value);
}

// Warps 0 and 1 fill, warps 2 and 3 use: full and empty are named barriers of all 128 threads.
template <bool kBug>
__global__ void producer_consumer(const __grid_constant__ Params p) {
  const auto tile = simt::dynamic_shared<float>();
  const int i = simt::thread_index();
  const int rounds = p.n / 64;
  constexpr int kFull = 1, kEmpty = 2;
  if (i < 64) {
    for (int round = 0; round < rounds; ++round) {
      if (round > 0) simt::named_barrier_sync(kEmpty, kThreads);
      tile.store(i, simt::load_global(p.input + round * 64 + i));
      simt::named_barrier_arrive(kFull, kThreads);
    }
  } else {
    float sum = 0.0f;
    for (int round = 0; round < rounds; ++round) {
      simt::named_barrier_sync(kFull, kThreads);
      if (kBug && round + 1 < rounds) simt::named_barrier_arrive(kEmpty, kThreads);  // bug: empty before it is read
      sum += tile.load(127 - i);
      if (!kBug && round + 1 < rounds) simt::named_barrier_arrive(kEmpty, kThreads);
    }
    simt::store_global(p.output + i - 64, sum);
  }
}

// The full barrier lacks its arrivals: nobody ever passes.
template <bool kBug>
__global__ void producer_never_arrives(const __grid_constant__ Params p) {
  const auto tile = simt::dynamic_shared<float>();
  const int i = simt::thread_index();
  if (i < 64) {
    tile.store(i, simt::load_global(p.input + i));
    if constexpr (!kBug) simt::named_barrier_arrive(1, kThreads);
  } else {
    simt::named_barrier_sync(1, kThreads);
    simt::store_global(p.output + i - 64, tile.load(i - 64));
  }
}

// Every block adds into the same cell without an atomic; the twin gives each block its own.
template <bool kBug>
__global__ void blocks_share_a_cell(const __grid_constant__ Params p) {
  if (simt::thread_index() == 0) {
    const int block = simt::block_index_x();
    simt::store_global(p.output + (kBug ? 0 : block), simt::load_global(p.input + block));
  }
}

template <bool kBug>
__global__ void reads_its_output(const __grid_constant__ Params p) {
  const int i = simt::thread_index();
  if constexpr (!kBug) simt::store_global(p.output + i, 0.0f);
  simt::store_global(p.output + i, simt::load_global(p.output + i) + simt::load_global(p.input + i));
}

template <bool kBug>
__global__ void writes_its_input(const __grid_constant__ Params p) {
  const int i = simt::thread_index();
  simt::store_global(kBug ? const_cast<float*>(p.input) + i : p.output + i, simt::load_global(p.input + i));
  if constexpr (kBug) simt::store_global(p.output + i, 0.0f);
}

// Transposes a 32 x 32 tile on one warp: without padding every column lies in one bank.
template <bool kBug>
__global__ void transpose_bank_conflict(const __grid_constant__ Params p) {
  const auto tile = simt::dynamic_shared<float>();
  const int lane = simt::lane_index();
  constexpr int kStride = kBug ? 32 : 33;
  for (int row = 0; row < 32; ++row) tile.store(row * kStride + lane, simt::load_global(p.input + row * 32 + lane));
  simt::warp_barrier();
  for (int row = 0; row < 32; ++row) simt::store_global(p.output + row * 32 + lane, tile.load(lane * kStride + row));
}

// What each lane holds after ldmatrix of the 16 x 16 matrix a (output: [32 lanes, 8] plain, then transposed).
__global__ void dump_fragments(const __grid_constant__ Params p) {
  const auto a = simt::dynamic_shared<__half>();
  const int lane = simt::lane_index();
  simt::copy_async<16>(a + lane * 8, p.a + lane * 8);
  simt::copy_async_wait_all();
  simt::warp_barrier();
  unsigned plain[4], transposed[4];
  simt::load_matrix_x4(plain, a + (lane % 16) * 16 + (lane / 16) * 8);
  simt::load_matrix_x4_transposed(transposed, a + (lane % 16) * 16 + (lane / 16) * 8);
  for (int i = 0; i < 4; ++i) {
    const auto low = [](unsigned pair) { return __half2float(__ushort_as_half(static_cast<unsigned short>(pair))); };
    simt::store_global(p.output + lane * 8 + 2 * i, low(plain[i] & 0xffffu));
    simt::store_global(p.output + lane * 8 + 2 * i + 1, low(plain[i] >> 16));
    simt::store_global(p.output + 256 + lane * 8 + 2 * i, low(transposed[i] & 0xffffu));
    simt::store_global(p.output + 256 + lane * 8 + 2 * i + 1, low(transposed[i] >> 16));
  }
}

// output [8, 32]: every warp function on input [32].
__global__ void dump_warp_functions(const __grid_constant__ Params p) {
  const int lane = simt::lane_index();
  const float value = simt::load_global(p.input + lane);
  const auto put = [&](int row, float result) { simt::store_global(p.output + row * 32 + lane, result); };
  put(0, simt::shuffle(value, 5));
  put(1, simt::shuffle_xor(value, 8));
  put(2, simt::shuffle_down(value, 3));
  put(3, simt::warp_sum(value));
  put(4, simt::warp_max(value));
  put(5, static_cast<float>(simt::ballot(value > 0.0f) % 65536u));
  put(6, simt::any_lane(value > 1e9f) ? 1.0f : 0.0f);
  put(7, simt::all_lanes(value > -1e9f) ? 1.0f : 0.0f);
}

// ------------------------------------------------------------------------------------------------------- launchers

struct Entry {
  const char* name;
  cudaError_t (*run)(const Params&, bool);
};

template <auto kCorrect, auto kBuggy, int kBlockThreads, int kSharedBytes>
cudaError_t one_block(const Params& p, bool bug) {
  return simt::launch(bug ? kBuggy : kCorrect, dim3(1), kBlockThreads, kSharedBytes, nullptr, p);
}

cudaError_t launch_double(const Params& p, bool bug) {
  const unsigned blocks = static_cast<unsigned>((p.n + kThreads - 1) / kThreads);
  return simt::launch(bug ? double_elements<true> : double_elements<false>, dim3(blocks), kThreads, 0, nullptr, p);
}

// Bug: rounds down, so the tail is never computed.
cudaError_t launch_wrong_grid(const Params& p, bool bug) {
  const unsigned blocks = static_cast<unsigned>((p.n + (bug ? 0 : kThreads - 1)) / kThreads);
  return simt::launch(double_elements<false>, dim3(blocks), kThreads, 0, nullptr, p);
}

// Bug: a block that is no multiple of a warp.
cudaError_t launch_wrong_block(const Params& p, bool bug) {
  return simt::launch(double_elements<false>, dim3(1), bug ? 100 : kThreads, 0, nullptr, p);
}

// Bug: more shared memory than a multiprocessor has.
cudaError_t launch_too_much_shared(const Params& p, bool bug) {
  return simt::launch(double_elements<false>, dim3(1), kThreads, bug ? 256 * 1024 : 1024, nullptr, p);
}

cudaError_t launch_blocks_share(const Params& p, bool bug) {
  return simt::launch(bug ? blocks_share_a_cell<true> : blocks_share_a_cell<false>, dim3(static_cast<unsigned>(p.n)),
                      kThreads, 0, nullptr, p);
}

#define VGGT_MV_PLANTED(name, threads, shared_bytes) \
  {#name, one_block<&name<false>, &name<true>, threads, shared_bytes>}

constexpr Entry kEntries[] = {
    VGGT_MV_PLANTED(reverse_missing_barrier, 128, 512),
    VGGT_MV_PLANTED(handover_missing_barrier, 128, 256),
    VGGT_MV_PLANTED(tiles_missing_barrier, 128, 512),
    VGGT_MV_PLANTED(two_writers, 128, 256),
    VGGT_MV_PLANTED(warp_exchange, 128, 512),
    VGGT_MV_PLANTED(shared_bounds, 128, 512),
    VGGT_MV_PLANTED(misaligned_vector, 128, 512),
    VGGT_MV_PLANTED(maximum_unmasked_tail, 32, 2048),
    VGGT_MV_PLANTED(matrix_product, 32, 768),
    VGGT_MV_PLANTED(copy_missing_wait, 128, 512),
    VGGT_MV_PLANTED(copy_short_wait, 128, 1024),
    VGGT_MV_PLANTED(copy_missing_barrier, 128, 512),
    VGGT_MV_PLANTED(copy_too_early, 128, 512),
    VGGT_MV_PLANTED(copy_never_awaited, 128, 512),
    VGGT_MV_PLANTED(divergent_block_barrier, 128, 0),
    VGGT_MV_PLANTED(barriers_of_two_branches, 128, 0),
    VGGT_MV_PLANTED(divergent_shuffle, 128, 0),
    VGGT_MV_PLANTED(producer_consumer, 128, 256),
    VGGT_MV_PLANTED(producer_never_arrives, 128, 256),
    VGGT_MV_PLANTED(reads_its_output, 128, 0),
    VGGT_MV_PLANTED(writes_its_input, 128, 0),
    VGGT_MV_PLANTED(transpose_bank_conflict, 32, 33 * 32 * 4),
    {"dump_fragments", one_block<&dump_fragments, &dump_fragments, 32, 512>},
    {"dump_warp_functions", one_block<&dump_warp_functions, &dump_warp_functions, 32, 0>},
    {"double_elements", launch_double},
    {"wrong_grid", launch_wrong_grid},
    {"wrong_block", launch_wrong_block},
    {"too_much_shared", launch_too_much_shared},
    {"blocks_share_a_cell", launch_blocks_share},
};

}  // namespace vggt_mv::planted

extern "C" int planted_run(const char* name, int bug, const float* input, const void* a, const void* b, float* output,
                           int n) {
  using namespace vggt_mv::planted;
  const Params params{input, static_cast<const __half*>(a), static_cast<const __half*>(b), output, n};
  for (const Entry& entry : kEntries) {
    if (std::strcmp(entry.name, name) == 0) return static_cast<int>(entry.run(params, bug != 0));
  }
  return -1;
}
