#include "machine.h"

#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <set>
#include <sstream>

namespace vggt_mv::emulation {

namespace {

const char* collective_name(Collective kind) {
  switch (kind) {
    case Collective::barrier: return "warp_barrier";
    case Collective::shuffle: return "shuffle";
    case Collective::vote: return "vote";
    case Collective::load_matrix: return "load_matrix";
    case Collective::multiply_accumulate: return "multiply_accumulate";
    default: return "nothing";
  }
}

bool same_place(const Where& a, const Where& b) {
  return a.line() == b.line() && a.column() == b.column() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

// "residual_kernel<float, 4>" from the address of its entry, or an empty string.
std::string symbol_name(const void* kernel) {
  Dl_info info{};
  if (dladdr(kernel, &info) == 0 || info.dli_sname == nullptr || info.dli_saddr != kernel) return {};
  int status = 0;
  char* demangled = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
  std::string name = status == 0 ? demangled : info.dli_sname;
  std::free(demangled);
  // "void ns::kernel<...>(ns::Params)" -> "kernel<...>"
  int depth = 0;
  std::size_t begin = 0, end = name.size();
  for (std::size_t i = 0; i < name.size(); ++i) {
    if (name[i] == '<') ++depth;
    if (name[i] == '>') --depth;
    if (depth == 0 && name[i] == '(' && name.compare(i, 21, "(anonymous namespace)") != 0) {
      end = i;
      break;
    }
    if (depth == 0 && (name[i] == ' ' || name[i] == ':')) begin = i + 1;
  }
  return name.substr(begin, end - begin);
}

std::string bytes_text(std::size_t begin, std::size_t bytes) {
  return "bytes [" + std::to_string(begin) + ", " + std::to_string(begin + bytes) + ")";
}

}  // namespace

std::string place(const Where& where) {
  const char* name = std::strrchr(where.file_name(), '/');
  return std::string(name != nullptr ? name + 1 : where.file_name()) + ":" + std::to_string(where.line());
}

Machine& machine() {
  static Machine instance;
  return instance;
}

// ---------------------------------------------------------------------------------------------------------- reports

std::string Machine::thread_name(int thread) const {
  return "thread " + std::to_string(thread) + " (warp " + std::to_string(thread / kWarp) + ", lane " +
         std::to_string(thread % kWarp) + ")";
}

void Machine::report(const std::string& kind, const std::string& text, const Where& where) {
  failed_ = true;
  // One report for each kind and place: a missing barrier shows in every thread of every block.
  if (seen_[kind + place(where)]++ > 0 || reports_.size() >= options.max_reports) return;
  std::ostringstream line;
  line << place(where) << ": " << kind << ": " << text << " [kernel " << kernel_;
  if (current_ != nullptr) line << ", block (" << block_.x << ", " << block_.y << ", " << block_.z << ")";
  line << "]";
  reports_.push_back(line.str());
}

void Machine::fail(const std::string& kind, const std::string& text, const Where& where) {
  report(kind, text, where);
  aborting_ = true;
  throw Aborted{};
}

void Machine::clear() {
  ranges_.clear();
  last_range_ = 0;
  reports_.clear();
  seen_.clear();
  sites_.clear();
  open_sites_.clear();
  launches_ = 0;
}

void Machine::register_range(const void* begin, std::size_t bytes, const std::string& name, Role role) {
  const auto address = reinterpret_cast<std::uintptr_t>(begin);
  ranges_.push_back({address, address + bytes, name, role, {}});
  if (role != Role::input) ranges_.back().cells.resize((bytes + kCellBytes - 1) / kCellBytes);
  std::sort(ranges_.begin(), ranges_.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
  last_range_ = 0;
}

// ------------------------------------------------------------------------------------------------- launch and fibers

cudaError_t Machine::launch(const void* kernel, dim3 grid, int threads, std::size_t shared_bytes,
                            const std::function<void()>& body, const Where& where) {
  kernel_ = symbol_name(kernel);
  if (kernel_.empty()) kernel_ = "launched at " + place(where);
  ++launches_;
  failed_ = false;
  current_ = nullptr;
  std::ostringstream shape;
  shape << "grid (" << grid.x << ", " << grid.y << ", " << grid.z << "), " << threads << " threads, " << shared_bytes
        << " bytes of shared memory";
  const bool valid = threads > 0 && threads <= kMaxThreads && threads % kWarp == 0 && grid.x > 0 && grid.y > 0 &&
                     grid.z > 0 && grid.x <= 0x7fffffffu && grid.y <= 65535 && grid.z <= 65535 &&
                     shared_bytes <= options.max_shared_bytes;
  if (!valid) {
    report("invalid launch", shape.str(), where);
    return cudaErrorInvalidConfiguration;
  }

  grid_ = grid;
  threads_ = threads;
  body_ = &body;
  const auto count = static_cast<std::size_t>(threads);
  if (fibers_.size() < count) fibers_.resize(count);
  stacks_.reserve(threads);
  sequence_.resize(count);
  std::iota(sequence_.begin(), sequence_.end(), 0);
  if (options.order == FiberOrder::reverse) std::reverse(sequence_.begin(), sequence_.end());
  random_.seed(options.seed);

  std::vector<std::int64_t> blocks(static_cast<std::size_t>(grid.x) * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), std::int64_t{0});
  if (options.order == FiberOrder::reverse) std::reverse(blocks.begin(), blocks.end());
  if (options.order == FiberOrder::random) std::shuffle(blocks.begin(), blocks.end(), random_);
  for (const std::int64_t number : blocks) {
    block_number_ = number;
    block_ = dim3(static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
                  static_cast<unsigned>(number / grid.x / grid.y));
    reset_block(shared_bytes);
    run_block();
    if (aborting_) break;
  }
  current_ = nullptr;
  return failed_ ? cudaErrorLaunchFailure : cudaSuccess;
}

void Machine::reset_block(std::size_t shared_bytes) {
  const auto warps = static_cast<std::size_t>(threads_ / kWarp);
  shared_bytes_ = shared_bytes;
  constexpr std::size_t kAlignment = 1024;
  if (shared_storage_.size() < shared_bytes + kAlignment) shared_storage_.resize(shared_bytes + kAlignment);
  const auto begin = reinterpret_cast<std::uintptr_t>(shared_storage_.data());
  shared_ = reinterpret_cast<std::byte*>((begin + kAlignment - 1) / kAlignment * kAlignment);
  std::memset(shared_, 0xff, shared_bytes);  // NaN in every floating-point type

  // Epochs only grow, so what the cells remember of earlier blocks is older than first_epoch_ and means nothing.
  const std::size_t cells = (shared_bytes + kCellBytes - 1) / kCellBytes;
  if (cells_.size() < cells) cells_.resize(cells);
  if (readers_.size() < cells * warps) readers_.resize(cells * warps);
  for (std::size_t i = 0; i < cells; ++i) cells_[i].pending = 0;
  for (std::size_t i = 0; i < warps; ++i) first_epoch_ = std::max(first_epoch_, warps_[i].epoch + 1);
  for (std::size_t i = 0; i < warps; ++i) {
    Warp fresh;
    fresh.epoch = first_epoch_;
    fresh.known.fill(first_epoch_ - 1);
    warps_[i] = fresh;
  }
  named_.fill({});
  at_barrier_ = 0;
  aborting_ = false;
}

void Machine::fiber_entry() {
  Machine& self = machine();
  try {
    if (!self.aborting_) (*self.body_)();
    if (!self.aborting_ && !self.current_->copies.empty()) {
      const Copy& copy = self.current_->copies.front();
      self.report("unawaited copy",
                  self.thread_name(self.thread()) + " ends with a copy to shared " +
                      bytes_text(copy.destination, copy.bytes) + " that nobody has waited for",
                  copy.where);
    }
  } catch (const Aborted&) {
  }
  self.current_->state = State::finished;
  switch_context(self.current_->context, self.scheduler_);
  std::abort();  // a finished fiber is never continued
}

void Machine::run_block() {
  for (int i = 0; i < threads_; ++i) {
    Fiber& fiber = fibers_[static_cast<std::size_t>(i)];
    fiber.thread = i;
    fiber.state = State::ready;
    fiber.copies.clear();
    fiber.groups = 0;
    prepare_context(fiber.context, stacks_.stack(i), StackPool::kStackBytes, &Machine::fiber_entry);
  }
  while (run_ready_fibers() && !aborting_) {
  }
  const bool stuck = std::any_of(fibers_.begin(), fibers_.begin() + threads_,
                                 [](const Fiber& fiber) { return fiber.state != State::finished; });
  if (stuck && !aborting_) report_deadlock();
  if (stuck) abandon_block();
  flush_counts();
}

// One pass over the fibers; false when none could run.
bool Machine::run_ready_fibers() {
  if (options.order == FiberOrder::random) std::shuffle(sequence_.begin(), sequence_.end(), random_);
  bool any = false;
  for (const int index : sequence_) {
    Fiber& fiber = fibers_[static_cast<std::size_t>(index)];
    if (fiber.state != State::ready) continue;
    any = true;
    current_ = &fiber;
    switch_context(scheduler_, fiber.context);
    if (aborting_) break;
  }
  return any;
}

// Ends the suspended fibers by an exception each, so that their stacks are unwound.
void Machine::abandon_block() {
  aborting_ = true;
  for (int i = 0; i < threads_; ++i) {
    Fiber& fiber = fibers_[static_cast<std::size_t>(i)];
    if (fiber.state == State::finished) continue;
    current_ = &fiber;
    switch_context(scheduler_, fiber.context);
  }
}

void Machine::report_deadlock() {
  std::map<std::string, std::vector<int>> groups;
  Where where;
  for (int i = 0; i < threads_; ++i) {
    const Fiber& fiber = fibers_[static_cast<std::size_t>(i)];
    std::string what;
    switch (fiber.state) {
      case State::finished: what = "have ended"; break;
      case State::at_block_barrier: what = "wait at block_barrier " + place(fiber.where); break;
      case State::at_named_barrier:
        what = "wait at named_barrier " + std::to_string(fiber.barrier) + " " + place(fiber.where);
        break;
      default:
        what = std::string("wait at ") + collective_name(warps_[static_cast<std::size_t>(i / kWarp)].kind) + " " +
               place(fiber.where);
    }
    if (fiber.state != State::finished) where = fiber.where;
    groups[what].push_back(i);
  }
  std::ostringstream text;
  for (auto group = groups.begin(); group != groups.end(); ++group) {
    if (group != groups.begin()) text << "; ";
    text << group->second.size() << " threads (first " << group->second.front() << ", last " << group->second.back()
         << ") " << group->first;
  }
  report("divergent barrier", text.str(), where);
}

void Machine::suspend(State state, const Where& where) {
  if (aborting_) throw Aborted{};
  Fiber& fiber = *current_;
  fiber.state = state;
  fiber.where = where;
  switch_context(fiber.context, scheduler_);
  if (aborting_) throw Aborted{};
}

// --------------------------------------------------------------------------------------------------------- barriers

void Machine::block_barrier(const Where& where) {
  if (at_barrier_ > 0 && !same_place(barrier_where_, where)) {
    fail("divergent barrier",
         thread_name(thread()) + " arrives here while others wait at block_barrier " + place(barrier_where_), where);
  }
  barrier_where_ = where;
  if (++at_barrier_ < threads_) {
    suspend(State::at_block_barrier, where);
    return;
  }
  at_barrier_ = 0;
  const auto warps = static_cast<std::size_t>(threads_ / kWarp);
  for (std::size_t i = 0; i < warps; ++i) {
    for (std::size_t j = 0; j < warps; ++j) warps_[i].known[j] = warps_[j].epoch;
  }
  for (std::size_t i = 0; i < warps; ++i) ++warps_[i].epoch;
  for (int i = 0; i < threads_; ++i) {
    Fiber& fiber = fibers_[static_cast<std::size_t>(i)];
    if (fiber.state == State::at_block_barrier) fiber.state = State::ready;
  }
}

void Machine::named_barrier(int id, int expected, bool wait, const Where& where) {
  if (id < 0 || id >= kNamedBarriers || expected <= 0 || expected % kWarp != 0 || expected > threads_) {
    fail("invalid barrier", "named barrier " + std::to_string(id) + " for " + std::to_string(expected) + " threads",
         where);
  }
  NamedBarrier& barrier = named_[static_cast<std::size_t>(id)];
  if (barrier.arrived > 0 && barrier.expected != expected) {
    fail("divergent barrier",
         "named barrier " + std::to_string(id) + " is used for " + std::to_string(expected) + " threads here and for " +
             std::to_string(barrier.expected) + " at " + place(barrier.where),
         where);
  }
  const auto mine = static_cast<std::size_t>(warp());
  const auto warps = static_cast<std::size_t>(threads_ / kWarp);
  barrier.expected = expected;
  barrier.where = where;
  if ((barrier.lanes[mine] >> lane()) & 1u) {
    fail("divergent barrier", thread_name(thread()) + " arrives twice at named barrier " + std::to_string(id), where);
  }
  barrier.lanes[mine] |= 1u << lane();
  if (barrier.lanes[mine] == 0xffffffffu) {
    for (std::size_t j = 0; j < warps; ++j) barrier.released[j] = std::max(barrier.released[j], warps_[mine].known[j]);
    barrier.released[mine] = std::max(barrier.released[mine], warps_[mine].epoch);
    ++warps_[mine].epoch;
  }
  if (++barrier.arrived < expected) {
    if (wait) {
      current_->barrier = id;
      suspend(State::at_named_barrier, where);
    }
    return;
  }
  const NamedBarrier complete = barrier;
  barrier = {};
  for (std::size_t i = 0; i < warps; ++i) {
    if (complete.lanes[i] != 0 && complete.lanes[i] != 0xffffffffu) {
      fail("divergent barrier",
           "only some lanes of warp " + std::to_string(i) + " arrive at named barrier " + std::to_string(id), where);
    }
  }
  for (int i = 0; i < threads_; ++i) {
    Fiber& fiber = fibers_[static_cast<std::size_t>(i)];
    const bool waits = fiber.state == State::at_named_barrier && fiber.barrier == id;
    if (!waits && !(wait && &fiber == current_)) continue;
    Warp& group = warps_[static_cast<std::size_t>(i / kWarp)];
    for (std::size_t j = 0; j < warps; ++j) group.known[j] = std::max(group.known[j], complete.released[j]);
    fiber.state = State::ready;
  }
}

// False when the others have gone on and this thread has its result; true for the last to arrive.
bool Machine::join_collective(Warp& group, Collective kind, void* payload, const Where& where) {
  if (group.arrived > 0 && (group.kind != kind || !same_place(group.where, where))) {
    fail("divergent collective",
         thread_name(thread()) + " calls " + collective_name(kind) + " while other lanes of its warp are at " +
             collective_name(group.kind) + " " + place(group.where),
         where);
  }
  group.kind = kind;
  group.where = where;
  group.payload[static_cast<std::size_t>(lane())] = payload;
  if (++group.arrived < kWarp) {
    suspend(State::at_collective, where);
    return false;
  }
  return true;
}

void Machine::release_collective(Warp& group) {
  group.arrived = 0;
  const int first = thread() - lane();
  for (int i = first; i < first + kWarp; ++i) fibers_[static_cast<std::size_t>(i)].state = State::ready;
}

void Machine::warp_barrier(const Where& where) {
  int nothing = 0;
  collective(Collective::barrier, nothing, where, [this](auto&) { ++warps_[static_cast<std::size_t>(warp())].epoch; });
}

// ---------------------------------------------------------------------------------------------------- shared memory

// Whether what `thread` did in `epoch` happens before what `now_thread` does now.
bool Machine::ordered(int thread, std::uint32_t epoch, int now_thread) const {
  if (thread == now_thread) return true;
  const auto then = static_cast<std::size_t>(thread / kWarp);
  const auto now = static_cast<std::size_t>(now_thread / kWarp);
  if (then == now) return epoch < warps_[now].epoch;
  return epoch <= warps_[now].known[then];
}

void Machine::check_bounds(int thread, std::ptrdiff_t offset, std::size_t bytes, const Where& where) {
  if (offset < 0 || static_cast<std::size_t>(offset) + bytes > shared_bytes_) {
    fail("out of bounds",
         thread_name(thread) + " accesses shared bytes [" + std::to_string(offset) + ", " +
             std::to_string(offset + static_cast<std::ptrdiff_t>(bytes)) + ") of " + std::to_string(shared_bytes_),
         where);
  }
  if (static_cast<std::size_t>(offset) % bytes != 0) {
    fail("misaligned access",
         thread_name(thread) + " accesses " + std::to_string(bytes) + " bytes at shared byte " + std::to_string(offset),
         where);
  }
}

void Machine::check_shared(int thread, std::size_t offset, std::size_t bytes, bool write, const Where& where) {
  const auto warps = static_cast<std::size_t>(threads_ / kWarp);
  const auto group = static_cast<std::size_t>(thread / kWarp);
  const std::uint32_t own_lane = 1u << (thread % kWarp);
  const std::uint32_t epoch = warps_[group].epoch;
  const auto say = [&](const char* kind, const std::string& text, const Where& other) {
    report(kind,
           thread_name(thread) + (write ? " writes shared " : " reads shared ") + bytes_text(offset, bytes) + text +
               (other.line() != 0 ? " at " + place(other) : std::string()),
           where);
  };
  for (std::size_t index = offset / kCellBytes; index < (offset + bytes + kCellBytes - 1) / kCellBytes; ++index) {
    SharedCell& cell = cells_[index];
    if (cell.pending != 0) {
      say(write ? "write-write race" : "unawaited copy",
          " while the copy of " + thread_name(static_cast<int>(cell.pending) - 1) + " is under way, started",
          cell.pending_where);
      if (!write) continue;
    }
    const bool written = cell.writer.epoch >= first_epoch_;
    const bool after_writer = !written || ordered(static_cast<int>(cell.writer.thread), cell.writer.epoch, thread);
    if (!write) {
      if (!written) say("uninitialised read", " that nobody has written", Where{});
      if (!after_writer) {
        say("read-after-write race",
            ", unordered with the write of " + thread_name(static_cast<int>(cell.writer.thread)), cell.writer.where);
      }
      Readers& reader = readers_[index * warps + group];
      if (reader.epoch != epoch) reader = {epoch, 0, where};
      reader.lanes |= own_lane;
      reader.where = where;
      continue;
    }
    if (!after_writer) {
      say("write-write race", ", unordered with the write of " + thread_name(static_cast<int>(cell.writer.thread)),
          cell.writer.where);
    }
    for (std::size_t i = 0; i < warps; ++i) {
      const Readers& reader = readers_[index * warps + i];
      if (reader.epoch < first_epoch_) continue;
      const std::uint32_t others = i == group ? reader.lanes & ~own_lane : reader.lanes;
      if (others == 0) continue;
      const int other = static_cast<int>(i) * kWarp + std::countr_zero(others);
      if (!ordered(other, reader.epoch, thread)) {
        say("write-after-read race", ", unordered with the read of " + thread_name(other), reader.where);
      }
    }
    cell.writer = {epoch, static_cast<std::uint32_t>(thread), where};
  }
}

std::byte* Machine::shared_access(std::ptrdiff_t offset, std::size_t bytes, bool write, const Where& where) {
  check_bounds(thread(), offset, bytes, where);
  check_shared(thread(), static_cast<std::size_t>(offset), bytes, write, where);
  if (options.count_accesses) {
    count(write ? "shared store" : "shared load", static_cast<std::uintptr_t>(offset), bytes, where);
  }
  return shared_ + offset;
}

std::byte* Machine::shared_read_for(int reader, std::ptrdiff_t offset, std::size_t bytes, const Where& where) {
  check_bounds(reader, offset, bytes, where);
  check_shared(reader, static_cast<std::size_t>(offset), bytes, false, where);
  return shared_ + offset;
}

// ---------------------------------------------------------------------------------------------------- global memory

Machine::Range* Machine::find_range(std::uintptr_t address) {
  if (last_range_ < ranges_.size()) {
    Range& last = ranges_[last_range_];
    if (address >= last.begin && address < last.end) return &last;
  }
  auto next = std::upper_bound(ranges_.begin(), ranges_.end(), address,
                               [](std::uintptr_t value, const Range& range) { return value < range.begin; });
  if (next == ranges_.begin()) return nullptr;
  --next;
  if (address >= next->end) return nullptr;
  last_range_ = static_cast<std::size_t>(next - ranges_.begin());
  return &*next;
}

void Machine::global_access(const void* pointer, std::size_t bytes, bool write, const Where& where) {
  const auto address = reinterpret_cast<std::uintptr_t>(pointer);
  if (address % bytes != 0) {
    fail("misaligned access",
         thread_name(thread()) + " accesses " + std::to_string(bytes) +
             " bytes of global memory at an address that is " + std::to_string(address % bytes) +
             " past a multiple of them",
         where);
  }
  if (ranges_.empty()) return;
  const char* verb = write ? " writes " : " reads ";
  Range* range = find_range(address);
  if (range == nullptr || address + bytes > range->end) {
    std::string nearest;
    std::uintptr_t distance = 1 << 16;
    for (const Range& other : ranges_) {
      const std::uintptr_t past = address + bytes - other.end;  // huge where the access ends before the range does
      const std::uintptr_t before = other.begin - address;
      if (std::min(past, before) >= distance) continue;
      distance = std::min(past, before);
      nearest = ", " + std::to_string(distance) + " bytes " + (past < before ? "past the end of '" : "before '") +
                other.name + "'";
    }
    fail(
        "out of bounds",
        thread_name(thread()) + verb + std::to_string(bytes) + " bytes of global memory outside every buffer" + nearest,
        where);
  }
  if (range->role == Role::input) {
    if (write) fail("write to an input", thread_name(thread()) + " writes '" + range->name + "'", where);
  } else {
    const std::size_t first = (address - range->begin) / kCellBytes;
    const std::size_t last = (address + bytes - range->begin + kCellBytes - 1) / kCellBytes;
    for (std::size_t index = first; index < last; ++index) check_global_cell(*range, index, write, where);
  }
  if (options.count_accesses) count(write ? "global store" : "global load", address, bytes, where);
}

void Machine::check_global_cell(Range& range, std::size_t index, bool write, const Where& where) {
  GlobalCell& cell = range.cells[index];
  if (cell.launch != launches_) {
    cell = GlobalCell{{}, {}, -1, -1, launches_, cell.written, false};
  }
  const std::uint32_t epoch = warps_[static_cast<std::size_t>(warp())].epoch;
  const auto unordered = [&](const Access& access, std::int64_t block) {
    if (block < 0) return false;
    return block != block_number_ || !ordered(static_cast<int>(access.thread), access.epoch, thread());
  };
  const auto say = [&](const char* kind, const Access& other, std::int64_t block) {
    report(kind,
           thread_name(thread()) + (write ? " writes" : " reads") + " element at byte " +
               std::to_string(index * kCellBytes) + " of '" + range.name + "', unordered with " +
               thread_name(static_cast<int>(other.thread)) + " of block number " + std::to_string(block) + " at " +
               place(other.where),
           where);
  };
  if (!write) {
    if (!cell.written && range.role == Role::output) {
      report("uninitialised read",
             thread_name(thread()) + " reads byte " + std::to_string(index * kCellBytes) + " of '" + range.name +
                 "', which nobody has written",
             where);
    }
    if (unordered(cell.writer, cell.writer_block)) say("read-after-write race", cell.writer, cell.writer_block);
    cell.many_readers = cell.many_readers || (cell.reader_block >= 0 && cell.reader_block != block_number_);
    cell.reader = {epoch, static_cast<std::uint32_t>(thread()), where};
    cell.reader_block = block_number_;
    return;
  }
  if (unordered(cell.writer, cell.writer_block)) say("write-write race", cell.writer, cell.writer_block);
  if (cell.many_readers || unordered(cell.reader, cell.reader_block)) {
    say("write-after-read race", cell.reader, cell.reader_block);
  }
  cell.writer = {epoch, static_cast<std::uint32_t>(thread()), where};
  cell.writer_block = block_number_;
  cell.written = true;
}

// ----------------------------------------------------------------------------------------------- asynchronous copies

void Machine::copy_async(std::ptrdiff_t destination, const void* source, std::size_t bytes, bool valid,
                         const Where& where) {
  check_bounds(thread(), destination, bytes, where);
  Copy copy{static_cast<std::size_t>(destination), bytes, current_->groups, {}, where};
  if (valid) {
    global_access(source, bytes, false, where);
    std::memcpy(copy.data.data(), source, bytes);
  }
  if (options.count_accesses) count("shared copy", static_cast<std::uintptr_t>(destination), bytes, where);
  // The bytes may land at any moment from here on: a write now, as far as earlier accesses are concerned.
  check_shared(thread(), copy.destination, bytes, true, where);
  std::memset(shared_ + destination, 0xff, bytes);
  for (std::size_t i = copy.destination / kCellBytes; i < (copy.destination + bytes) / kCellBytes; ++i) {
    cells_[i].pending = 1 + static_cast<std::uint32_t>(thread());
    cells_[i].pending_where = where;
  }
  current_->copies.push_back(copy);
}

void Machine::copy_async_commit() { ++current_->groups; }

void Machine::copy_async_wait(int pending) {
  Fiber& fiber = *current_;
  std::erase_if(fiber.copies, [&](const Copy& copy) {
    if (pending >= 0 && copy.group >= fiber.groups - pending) return false;
    deliver(copy);
    return true;
  });
}

void Machine::deliver(const Copy& copy) {
  std::memcpy(shared_ + copy.destination, copy.data.data(), copy.bytes);
  const std::uint32_t epoch = warps_[static_cast<std::size_t>(warp())].epoch;
  for (std::size_t i = copy.destination / kCellBytes; i < (copy.destination + copy.bytes) / kCellBytes; ++i) {
    cells_[i].pending = 0;
    cells_[i].writer = {epoch, static_cast<std::uint32_t>(thread()), copy.where};
  }
}

// ---------------------------------------------------------------------------------------------------- access counts

void Machine::count(const char* space, std::uintptr_t address, std::size_t bytes, const Where& where) {
  OpenSite& site = open_sites_[{where.file_name(), where.line(), where.column(), space, warp()}];
  site.where = where;
  site.bytes = bytes;
  const auto own = static_cast<std::size_t>(lane());
  const std::size_t number = site.occurrence[own]++;
  while (site.first + site.requests.size() <= number) site.requests.emplace_back();
  OpenRequest& request = site.requests[number - site.first];
  request.lanes |= 1u << own;
  request.address[own] = address;
  if (number == site.first && request.lanes == 0xffffffffu) {
    close_request(where, space, bytes, request);
    site.requests.erase(site.requests.begin());
    ++site.first;
  }
}

namespace {

// Shared memory serves 128 bytes of distinct banks at a time: a warp's 4-byte request in one go, its 8- and 16-byte
// requests half and quarter warp by half and quarter warp; lanes that name the same word share it.
int wavefronts(const std::uintptr_t* addresses, int count, std::size_t bytes) {
  std::array<std::set<std::uintptr_t>, 32> banks;
  for (int i = 0; i < count; ++i) {
    for (std::size_t b = 0; b < bytes; b += 4) {
      const std::uintptr_t word = (addresses[i] + b) / 4;
      banks[word % 32].insert(word);
    }
  }
  std::size_t most = 0;
  for (const auto& bank : banks) most = std::max(most, bank.size());
  return static_cast<int>(most);
}

}  // namespace

void Machine::close_request(const Where& where, const char* space, std::size_t bytes, const OpenRequest& request) {
  AccessSite& site = sites_[{place(where), space}];
  site.space = space;
  site.bytes = bytes;
  ++site.requests;
  if (std::strncmp(space, "global", 6) == 0) {
    std::set<std::uintptr_t> sectors, words;
    for (std::size_t i = 0; i < kWarp; ++i) {
      if (((request.lanes >> i) & 1u) == 0) continue;
      for (std::size_t b = 0; b < bytes; b += kCellBytes) {
        sectors.insert((request.address[i] + b) / 32);
        words.insert((request.address[i] + b) / kCellBytes);
      }
    }
    site.units += static_cast<std::int64_t>(sectors.size());
    site.ideal_units += static_cast<std::int64_t>((words.size() * kCellBytes + 31) / 32);
    return;
  }
  const std::size_t phase = bytes == 16 ? 8 : bytes == 8 ? 16 : 32;
  for (std::size_t first = 0; first < kWarp; first += phase) {
    std::array<std::uintptr_t, kWarp> addresses{};
    int active = 0;
    for (std::size_t i = first; i < first + phase; ++i) {
      if ((request.lanes >> i) & 1u) addresses[static_cast<std::size_t>(active++)] = request.address[i];
    }
    if (active == 0) continue;
    site.units += wavefronts(addresses.data(), active, bytes);
    site.ideal_units += 1;
  }
}

void Machine::count_matrix_load(const std::ptrdiff_t* rows, int count, const Where& where) {
  AccessSite& site = sites_[{place(where), "shared matrix load"}];
  site.space = "shared matrix load";
  site.bytes = 16;
  ++site.requests;
  for (int first = 0; first < count; first += 8) {
    std::array<std::uintptr_t, 8> addresses{};
    for (int i = 0; i < 8; ++i) addresses[static_cast<std::size_t>(i)] = static_cast<std::uintptr_t>(rows[first + i]);
    site.units += wavefronts(addresses.data(), 8, 16);
    site.ideal_units += 1;
  }
}

// Requests in which not every lane took part (masked tails) are complete when the block is.
void Machine::flush_counts() {
  for (const auto& [key, site] : open_sites_) {
    for (const OpenRequest& request : site.requests) {
      if (request.lanes != 0) close_request(site.where, key.space, site.bytes, request);
    }
  }
  open_sites_.clear();
}

std::string Machine::statistics() const {
  std::ostringstream json;
  json << "[";
  for (auto entry = sites_.begin(); entry != sites_.end(); ++entry) {
    const AccessSite& site = entry->second;
    if (entry != sites_.begin()) json << ", ";
    json << "{\"place\": \"" << entry->first.first << "\", \"space\": \"" << site.space
         << "\", \"bytes\": " << site.bytes << ", \"requests\": " << site.requests << ", \"units\": " << site.units
         << ", \"ideal_units\": " << site.ideal_units << "}";
  }
  json << "]";
  return json.str();
}

}  // namespace vggt_mv::emulation
