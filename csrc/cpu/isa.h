// Instruction sets of CPU kernels: which were compiled, which this machine has, which one is in use.
#pragma once

#include <string>
#include <vector>

namespace vggt_mv {

struct CpuKernels;  // csrc/cpu/kernels.h

// Compiled into this build, the best one last.
std::vector<std::string> compiled_isas();

// Compiled into this build and present on this machine, the best one last.
std::vector<std::string> usable_isas();

// The one in use: at first the one that the environment variable VGGT_MV_CPU_ISA names, else the best usable one.
std::string cpu_isa();

// Throws std::invalid_argument, naming `source`, where `name` is not one of usable_isas().
void set_cpu_isa(const std::string& name, const char* source = "set_cpu_isa, name");

// Reads VGGT_MV_CPU_ISA. Called when the module is loaded, so that a wrong value is an error there.
void select_cpu_isa();

// The kernels of the instruction set in use.
const CpuKernels& cpu_kernels();

}  // namespace vggt_mv
