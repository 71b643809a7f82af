// What a CPU kernel returns; the binding turns anything but ok into an exception.
#pragma once

namespace vggt_mv {

enum class Status : int { ok = 0, unsupported_dtypes = 1, out_of_memory = 2 };

static constexpr const char* describe(Status status) {
  switch (status) {
    case Status::ok: return "ok";
    case Status::unsupported_dtypes: return "this combination of dtypes has no kernel";
    case Status::out_of_memory: return "out of memory";
  }
  return "unknown status";
}

}  // namespace vggt_mv
