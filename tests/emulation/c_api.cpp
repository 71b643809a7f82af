// What Python (ctypes, see device.py) needs of the emulated machine.
#include <string>

#include "machine.h"

using vggt_mv::emulation::FiberOrder;
using vggt_mv::emulation::machine;
using vggt_mv::emulation::Role;

extern "C" {

void emulator_configure(int order, unsigned long long seed, int count_accesses, int multiprocessors,
                        unsigned long long max_shared_bytes) {
  auto& options = machine().options;
  options.order = static_cast<FiberOrder>(order);
  options.seed = seed;
  options.count_accesses = count_accesses != 0;
  options.multiprocessors = multiprocessors;
  options.max_shared_bytes = max_shared_bytes;
}

void emulator_clear() { machine().clear(); }

void emulator_register(const void* begin, unsigned long long bytes, const char* name, int role) {
  machine().register_range(begin, bytes, name, static_cast<Role>(role));
}

// All reports, one a line; valid until the next call.
const char* emulator_reports() {
  static std::string text;
  text.clear();
  for (const std::string& report : machine().reports()) text += report + "\n";
  return text.c_str();
}

// JSON list of access sites; valid until the next call.
const char* emulator_statistics() {
  static std::string text;
  text = machine().statistics();
  return text.c_str();
}

long long emulator_launches() { return machine().launches(); }

}  // extern "C"
