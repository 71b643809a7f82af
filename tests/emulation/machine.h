// A CUDA thread block on one CPU thread: the state behind the names of simt_emulated.h.
//
// Every thread of a block is a fiber that runs until it reaches a barrier or a warp collective and goes on when all its
// partners are there. One block runs after another. What the hardware leaves undefined is reported, not simulated:
//
//   * Happens-before is tracked exactly. Each warp has an epoch that every synchronisation advances, and knows up to
//     which epoch of every other warp it is ordered after. Each shared 2-byte cell remembers its last writer and, per
//     warp, its latest readers; an access that is not ordered after a conflicting one is a race, whether or not this
//     order of fibers happened to give the right answer. (Warps never run in lockstep here: only warp_barrier and the
//     block's barriers order anything.)
//   * Registered global memory is bounds-checked and has the same kind of record, across blocks too.
//   * An asynchronous copy delivers its bytes when its thread waits for it, not earlier.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <random>
#include <source_location>
#include <string>
#include <unordered_map>
#include <vector>

#include "fiber.h"

namespace vggt_mv::emulation {

using Where = std::source_location;

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;
constexpr int kMaxWarps = kMaxThreads / kWarp;
constexpr int kNamedBarriers = 16;
constexpr std::size_t kCellBytes = 2;  // granularity of the shadow state

enum class FiberOrder { forward, reverse, random };
enum class Role { input, output, in_out };

struct Options {
  FiberOrder order = FiberOrder::forward;
  std::uint64_t seed = 0;
  bool count_accesses = false;
  int multiprocessors = 4;
  std::size_t max_shared_bytes = 227 * 1024;  // sm_90; sm_80 has 163 KB
  std::size_t max_reports = 20;
};

// Thrown through a fiber to end it; the reason has been reported by then.
struct Aborted {};

enum class Collective { none, barrier, shuffle, vote, load_matrix, multiply_accumulate };

// Who did something, when and where. epoch == 0: nobody.
struct Access {
  std::uint32_t epoch = 0;
  std::uint32_t thread = 0;
  Where where;
};

class Machine {
 public:
  Options options;

  // ---- from the launcher
  cudaError_t launch(const void* kernel, dim3 grid, int threads, std::size_t shared_bytes,
                     const std::function<void()>& body, const Where& where);

  // ---- from tests
  void register_range(const void* begin, std::size_t bytes, const std::string& name, Role role);
  void clear();  // forgets ranges, reports and counts
  const std::vector<std::string>& reports() const { return reports_; }
  std::string statistics() const;  // JSON, see AccessSite
  std::int64_t launches() const { return launches_; }

  // ---- from kernels
  int thread() const { return current_->thread; }
  int lane() const { return current_->thread % kWarp; }
  int warp() const { return current_->thread / kWarp; }
  int threads() const { return threads_; }
  dim3 block() const { return block_; }
  dim3 grid() const { return grid_; }

  void block_barrier(const Where& where);
  void named_barrier(int id, int threads, bool wait, const Where& where);

  // All 32 lanes meet; the last to arrive calls `operation` with every lane's `mine`.
  template <typename Payload, typename Operation>
  void collective(Collective kind, Payload& mine, const Where& where, Operation&& operation) {
    Warp& group = warps_[static_cast<std::size_t>(warp())];
    if (!join_collective(group, kind, &mine, where)) return;
    std::array<Payload*, kWarp> all;
    for (std::size_t i = 0; i < kWarp; ++i) all[i] = static_cast<Payload*>(group.payload[i]);
    operation(all);
    release_collective(group);
  }
  void warp_barrier(const Where& where);

  // The address behind a checked access; throws Aborted (after a report) where there is none.
  std::byte* shared_access(std::ptrdiff_t offset, std::size_t bytes, bool write, const Where& where);
  // The same on behalf of another lane (ldmatrix), not counted.
  std::byte* shared_read_for(int thread, std::ptrdiff_t offset, std::size_t bytes, const Where& where);
  void global_access(const void* address, std::size_t bytes, bool write, const Where& where);

  void copy_async(std::ptrdiff_t destination, const void* source, std::size_t bytes, bool valid, const Where& where);
  void copy_async_commit();
  void copy_async_wait(int pending);  // pending < 0: everything, committed or not

  // Counts one request whose lanes' byte offsets are known at once (a row of ldmatrix tiles).
  void count_matrix_load(const std::ptrdiff_t* rows, int count, const Where& where);

  void report(const std::string& kind, const std::string& text, const Where& where);
  [[noreturn]] void fail(const std::string& kind, const std::string& text, const Where& where);

 private:
  enum class State { ready, at_block_barrier, at_named_barrier, at_collective, finished };

  struct Copy {
    std::size_t destination;
    std::size_t bytes;
    std::int64_t group;
    std::array<std::byte, 16> data;
    Where where;
  };

  struct Fiber {
    Context context;
    int thread = 0;
    State state = State::finished;
    Where where;
    int barrier = 0;
    std::vector<Copy> copies;
    std::int64_t groups = 0;  // committed so far
  };

  struct Warp {
    int arrived = 0;
    Collective kind = Collective::none;
    Where where;
    std::array<void*, kWarp> payload{};
    std::uint32_t epoch = 0;
    std::array<std::uint32_t, kMaxWarps> known{};  // ordered after these epochs of the other warps
  };

  struct NamedBarrier {
    int expected = 0;
    int arrived = 0;
    std::array<std::uint32_t, kMaxWarps> lanes{};  // which lanes of each warp have arrived
    std::array<std::uint32_t, kMaxWarps> released{};
    Where where;
  };

  struct Readers {
    std::uint32_t epoch = 0;
    std::uint32_t lanes = 0;
    Where where;
  };

  struct SharedCell {
    Access writer;
    std::uint32_t pending = 0;  // 1 + thread whose copy is under way
    Where pending_where;
  };

  struct GlobalCell {
    Access writer, reader;
    std::int64_t writer_block = -1, reader_block = -1;
    std::int64_t launch = -1;  // the one that writer and reader belong to
    bool written = false;      // since registration
    bool many_readers = false;
  };

  struct Range {
    std::uintptr_t begin, end;
    std::string name;
    Role role;
    std::vector<GlobalCell> cells;
  };

  // One load or store statement and what its warps' requests cost.
  struct AccessSite {
    std::string space;  // "shared load", "shared store", "shared matrix load", "shared copy", "global load", ...
    std::size_t bytes = 0;
    std::int64_t requests = 0, units = 0, ideal_units = 0;  // wavefronts (shared) or 32-byte sectors (global)
  };
  struct OpenRequest {
    std::uint32_t lanes = 0;
    std::array<std::uintptr_t, kWarp> address{};
  };
  struct OpenSite {
    Where where;
    std::size_t bytes = 0;
    std::array<std::size_t, kWarp> occurrence{};
    std::size_t first = 0;
    std::vector<OpenRequest> requests;
  };

  static void fiber_entry();
  void run_block();
  void reset_block(std::size_t shared_bytes);
  bool run_ready_fibers();
  void abandon_block();
  void report_deadlock();
  void suspend(State state, const Where& where);
  bool join_collective(Warp& group, Collective kind, void* payload, const Where& where);
  void release_collective(Warp& group);

  bool ordered(int thread, std::uint32_t epoch, int now_thread) const;
  void check_shared(int thread, std::size_t offset, std::size_t bytes, bool write, const Where& where);
  void check_bounds(int thread, std::ptrdiff_t offset, std::size_t bytes, const Where& where);
  Range* find_range(std::uintptr_t address);
  void check_global_cell(Range& range, std::size_t index, bool write, const Where& where);
  void deliver(const Copy& copy);

  void count(const char* space, std::uintptr_t address, std::size_t bytes, const Where& where);
  void close_request(const Where& where, const char* space, std::size_t bytes, const OpenRequest& request);
  void flush_counts();

  std::string thread_name(int thread) const;

  // launch
  std::string kernel_;
  dim3 grid_, block_;
  int threads_ = 0;
  std::int64_t launches_ = 0;
  std::int64_t block_number_ = 0;
  bool failed_ = false;  // this launch has a report
  const std::function<void()>* body_ = nullptr;

  // block
  StackPool stacks_;
  Context scheduler_;
  std::vector<Fiber> fibers_;
  Fiber* current_ = nullptr;
  std::vector<int> sequence_;
  std::mt19937_64 random_;
  bool aborting_ = false;
  int at_barrier_ = 0;
  Where barrier_where_;
  std::array<Warp, kMaxWarps> warps_;
  std::array<NamedBarrier, kNamedBarriers> named_;
  std::uint32_t first_epoch_ = 1;

  // memory
  std::vector<std::byte> shared_storage_;
  std::byte* shared_ = nullptr;
  std::size_t shared_bytes_ = 0;
  std::vector<SharedCell> cells_;
  std::vector<Readers> readers_;  // [cell][warp]
  std::vector<Range> ranges_;
  std::size_t last_range_ = 0;

  // results
  std::vector<std::string> reports_;
  std::map<std::string, int> seen_;
  struct OpenKey {
    const char* file;
    std::uint_least32_t line, column;
    const char* space;
    int warp;
    auto operator<=>(const OpenKey&) const = default;
  };
  std::map<OpenKey, OpenSite> open_sites_;
  std::map<std::pair<std::string, std::string>, AccessSite> sites_;  // (file:line, space)
};

// The machine that kernels of this library run on.
Machine& machine();

// file:line of a place in the sources, without folders.
std::string place(const Where& where);

}  // namespace vggt_mv::emulation
