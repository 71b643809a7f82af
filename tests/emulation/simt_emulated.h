// The names of csrc/cuda/arch/simt.cuh for the host: see there for what each one means, and machine.h for what is
// checked. Every function takes the place of its call as a defaulted last argument, which reports quote.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "machine.h"

// Attributes that mean something to nvcc alone.
#undef __launch_bounds__
#define __launch_bounds__(...)

namespace vggt_mv::simt {

using emulation::Collective;
using emulation::machine;
using emulation::Where;

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

inline int thread_index() { return machine().thread(); }
inline int block_size() { return machine().threads(); }
inline int block_index_x() { return static_cast<int>(machine().block().x); }
inline int block_index_y() { return static_cast<int>(machine().block().y); }
inline int block_index_z() { return static_cast<int>(machine().block().z); }
inline int grid_size_x() { return static_cast<int>(machine().grid().x); }
inline int grid_size_y() { return static_cast<int>(machine().grid().y); }
inline int grid_size_z() { return static_cast<int>(machine().grid().z); }
inline int lane_index() { return machine().lane(); }
inline int warp_index() { return machine().warp(); }

inline void block_barrier(Where where = Where::current()) { machine().block_barrier(where); }
inline void named_barrier_sync(int id, int threads, Where where = Where::current()) {
  machine().named_barrier(id, threads, true, where);
}
inline void named_barrier_arrive(int id, int threads, Where where = Where::current()) {
  machine().named_barrier(id, threads, false, where);
}
inline void warp_barrier(Where where = Where::current()) { machine().warp_barrier(where); }

// A byte offset into the block's shared memory; nothing is touched until load or store.
template <typename T>
class Shared {
 public:
  explicit Shared(std::ptrdiff_t byte_offset) : offset_(byte_offset) {}

  T load(int index = 0, Where where = Where::current()) const { return load_as<T>(index, where); }
  void store(int index, T value, Where where = Where::current()) const { store_as<T>(index, value, where); }

  template <typename U>
  U load_as(int index = 0, Where where = Where::current()) const {
    static_assert(sizeof(U) % emulation::kCellBytes == 0 && sizeof(U) <= 16, "2 to 16 bytes");
    U value;
    std::memcpy(static_cast<void*>(&value), machine().shared_access(at(index), sizeof(U), false, where), sizeof(U));
    return value;
  }
  template <typename U>
  void store_as(int index, U value, Where where = Where::current()) const {
    static_assert(sizeof(U) % emulation::kCellBytes == 0 && sizeof(U) <= 16, "2 to 16 bytes");
    std::memcpy(machine().shared_access(at(index), sizeof(U), true, where), static_cast<const void*>(&value),
                sizeof(U));
  }

  template <typename U>
  Shared<U> as() const {
    return Shared<U>(offset_);
  }
  Shared operator+(int elements) const { return Shared(at(elements)); }

  std::ptrdiff_t offset() const { return offset_; }

 private:
  std::ptrdiff_t at(int index) const {
    return offset_ + std::ptrdiff_t{index} * static_cast<std::ptrdiff_t>(sizeof(T));
  }

  std::ptrdiff_t offset_;
};

template <typename T>
Shared<T> dynamic_shared(int byte_offset = 0) {
  return Shared<T>(byte_offset);
}

template <typename T>
T load_global(const T* address, Where where = Where::current()) {
  machine().global_access(address, sizeof(T), false, where);
  T value;
  std::memcpy(static_cast<void*>(&value), static_cast<const void*>(address), sizeof(T));
  return value;
}
template <typename T>
T load_global_once(const T* address, Where where = Where::current()) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "2, 4, 8 or 16 bytes");
  return load_global(address, where);
}
template <typename T>
void store_global(T* address, std::type_identity_t<T> value, Where where = Where::current()) {
  machine().global_access(address, sizeof(T), true, where);
  std::memcpy(static_cast<void*>(address), static_cast<const void*>(&value), sizeof(T));
}

// ------------------------------------------------------------------------------------------------- warp collectives

namespace detail {

template <typename T>
T exchange(T value, int source_lane, const Where& where) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "4 or 8 bytes");
  struct Lane {
    T given, received;
    int source;
  } mine{value, value, source_lane};
  machine().collective(Collective::shuffle, mine, where, [](std::array<Lane*, kWarpSize>& lanes) {
    for (Lane* lane : lanes) lane->received = lanes[static_cast<std::size_t>(lane->source)]->given;
  });
  return mine.received;
}

}  // namespace detail

template <typename T>
T shuffle(T value, int source_lane, Where where = Where::current()) {
  return detail::exchange(value, source_lane & (kWarpSize - 1), where);
}
template <typename T>
T shuffle_xor(T value, int lane_mask, Where where = Where::current()) {
  return detail::exchange(value, (lane_index() ^ lane_mask) & (kWarpSize - 1), where);
}
template <typename T>
T shuffle_down(T value, int distance, Where where = Where::current()) {
  const int source = lane_index() + distance;
  return detail::exchange(value, source < kWarpSize ? source : lane_index(), where);
}

inline unsigned ballot(bool predicate, Where where = Where::current()) {
  struct Lane {
    bool given;
    unsigned all;
  } mine{predicate, 0};
  machine().collective(Collective::vote, mine, where, [](std::array<Lane*, kWarpSize>& lanes) {
    unsigned all = 0;
    for (std::size_t i = 0; i < lanes.size(); ++i) all |= lanes[i]->given ? 1u << i : 0u;
    for (Lane* lane : lanes) lane->all = all;
  });
  return mine.all;
}
inline bool any_lane(bool predicate, Where where = Where::current()) { return ballot(predicate, where) != 0; }
inline bool all_lanes(bool predicate, Where where = Where::current()) { return ballot(predicate, where) == kAllLanes; }

template <typename T>
T warp_sum(T value, Where where = Where::current()) {
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask, where);
  return value;
}
inline float warp_max(float value, Where where = Where::current()) {
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) value = fmaxf(value, shuffle_xor(value, mask, where));
  return value;
}

// -------------------------------------------------------------------------------------------------------- cp.async

template <int kBytes, typename T>
void copy_async(Shared<T> destination, const void* source, bool valid = true, Where where = Where::current()) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async moves 4, 8 or 16 bytes");
  machine().copy_async(destination.offset(), source, kBytes, valid, where);
}
inline void copy_async_commit() { machine().copy_async_commit(); }
template <int kPending>
void copy_async_wait() {
  machine().copy_async_wait(kPending);
}
inline void copy_async_wait_all() { machine().copy_async_wait(-1); }

// ------------------------------------------------------------------------------------------------------ tensor core

namespace detail {

template <int kTiles, bool kTransposed, typename T>
void load_matrix(unsigned (&tiles)[kTiles], Shared<T> row, const Where& where) {
  static_assert(sizeof(T) == 2, "tiles of 16-bit elements");
  struct Lane {
    std::ptrdiff_t row;
    unsigned* tiles;
  } mine{row.offset(), tiles};
  machine().collective(Collective::load_matrix, mine, where, [&where](std::array<Lane*, kWarpSize>& lanes) {
    const int first_thread = machine().warp() * kWarpSize;
    std::ptrdiff_t rows[8 * kTiles];
    std::uint16_t element[kTiles][8][8];
    for (int i = 0; i < 8 * kTiles; ++i) {
      rows[i] = lanes[static_cast<std::size_t>(i)]->row;
      std::memcpy(element[i / 8][i % 8], machine().shared_read_for(first_thread + i, rows[i], 16, where), 16);
    }
    if (machine().options.count_accesses) machine().count_matrix_load(rows, 8 * kTiles, where);
    for (int tile = 0; tile < kTiles; ++tile) {
      for (int lane = 0; lane < kWarpSize; ++lane) {
        const int a = lane / 4, b = 2 * (lane % 4);
        const std::uint16_t low = kTransposed ? element[tile][b][a] : element[tile][a][b];
        const std::uint16_t high = kTransposed ? element[tile][b + 1][a] : element[tile][a][b + 1];
        lanes[static_cast<std::size_t>(lane)]->tiles[tile] = low | static_cast<unsigned>(high) << 16;
      }
    }
  });
}

template <typename T>
float element_of(unsigned pair, int index) {
  const auto bits = static_cast<std::uint16_t>(pair >> (16 * index));
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
  } else {
    return __half2float(__half(__half_raw{bits}));
  }
}

}  // namespace detail

#define VGGT_MV_LOAD_MATRIX(name, tile_count, transposed)                                   \
  template <typename T>                                                                     \
  void name(unsigned (&tiles)[tile_count], Shared<T> row, Where where = Where::current()) { \
    detail::load_matrix<tile_count, transposed>(tiles, row, where);                         \
  }
VGGT_MV_LOAD_MATRIX(load_matrix_x1, 1, false)
VGGT_MV_LOAD_MATRIX(load_matrix_x2, 2, false)
VGGT_MV_LOAD_MATRIX(load_matrix_x4, 4, false)
VGGT_MV_LOAD_MATRIX(load_matrix_x1_transposed, 1, true)
VGGT_MV_LOAD_MATRIX(load_matrix_x2_transposed, 2, true)
VGGT_MV_LOAD_MATRIX(load_matrix_x4_transposed, 4, true)
#undef VGGT_MV_LOAD_MATRIX

// Products of 16-bit elements are exact in fp32; they are added to the sum one after another, in fp32.
template <typename T>
void multiply_accumulate_16x8x16(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                                 Where where = Where::current()) {
  struct Lane {
    float* sum;
    const unsigned* a;
    const unsigned* b;
  } mine{sum, a, b};
  machine().collective(Collective::multiply_accumulate, mine, where, [](std::array<Lane*, kWarpSize>& lanes) {
    float left[16][16], right[16][8], total[16][8];
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const Lane& own = *lanes[static_cast<std::size_t>(lane)];
      const int g = lane / 4, t = 2 * (lane % 4);
      for (int i = 0; i < 2; ++i) {
        left[g][t + i] = detail::element_of<T>(own.a[0], i);
        left[g + 8][t + i] = detail::element_of<T>(own.a[1], i);
        left[g][t + 8 + i] = detail::element_of<T>(own.a[2], i);
        left[g + 8][t + 8 + i] = detail::element_of<T>(own.a[3], i);
        right[t + i][g] = detail::element_of<T>(own.b[0], i);
        right[t + 8 + i][g] = detail::element_of<T>(own.b[1], i);
        total[g][t + i] = own.sum[i];
        total[g + 8][t + i] = own.sum[2 + i];
      }
    }
    for (int row = 0; row < 16; ++row) {
      for (int k = 0; k < 16; ++k) {
        for (int column = 0; column < 8; ++column) total[row][column] += left[row][k] * right[k][column];
      }
    }
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const int g = lane / 4, t = 2 * (lane % 4);
      for (int i = 0; i < 2; ++i) {
        lanes[static_cast<std::size_t>(lane)]->sum[i] = total[g][t + i];
        lanes[static_cast<std::size_t>(lane)]->sum[2 + i] = total[g + 8][t + i];
      }
    }
  });
}

// ------------------------------------------------------------------------------------------------------- arithmetic

inline float exp2_approximate(float x) { return std::exp2(x); }
inline float log2_approximate(float x) { return std::log2(x); }
inline float reciprocal_square_root(float x) { return 1.0f / std::sqrt(x); }
inline float reciprocal(float x) { return 1.0f / x; }

// ------------------------------------------------------------------------------------------------- host: launching

template <typename Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, int threads, std::size_t shared_bytes, cudaStream_t,
                   const std::type_identity_t<Params>& params, Where where = Where::current()) {
  return machine().launch(
      reinterpret_cast<const void*>(kernel), grid, threads, shared_bytes, [&] { kernel(params); }, where);
}

inline cudaError_t multiprocessor_count(int* count) {
  *count = machine().options.multiprocessors;
  return cudaSuccess;
}

}  // namespace vggt_mv::simt
