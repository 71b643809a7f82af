# The instruction sets that CPU kernels are compiled for, and how a variant is compiled.
#
# Every variant defines its functions in the namespace vggt_mv::<instruction set>. What it must not do is leave behind
# functions that other code shares, such as instances of standard templates: the linker keeps one copy of those, and if
# that is the one with wide instructions, the program crashes on machines without them. CheckWeakSymbols.cmake looks.
set(VGGT_MV_ISAS portable)
set(VGGT_MV_FLAGS_portable "")
string(TOLOWER "${CMAKE_SYSTEM_PROCESSOR}" processor)
if(processor MATCHES "^(x86_64|amd64)$")
  list(APPEND VGGT_MV_ISAS avx2 avx512 avx512_bf16)
  set(VGGT_MV_FLAGS_avx2 -mavx2 -mfma -mf16c)
  set(VGGT_MV_FLAGS_avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512)
  set(VGGT_MV_FLAGS_avx512_bf16 ${VGGT_MV_FLAGS_avx512} -mavx512bf16)
endif()
# For sanitizers on machines without AVX-512: see tests/sanitizers/avx512/immintrin.h.
set(VGGT_MV_EMULATE_AVX512 OFF CACHE BOOL "Compile the AVX-512 variants of the CPU kernels to AVX2")
set(VGGT_MV_ISA_DEFINITIONS "")
if(VGGT_MV_EMULATE_AVX512)
  list(APPEND VGGT_MV_ISA_DEFINITIONS VGGT_MV_EMULATE_AVX512)
  set(VGGT_MV_FLAGS_avx512 ${VGGT_MV_FLAGS_avx2} "-I${CMAKE_CURRENT_SOURCE_DIR}/tests/sanitizers/avx512"
      -D__AVX512F__ -D__AVX512BW__ -D__AVX512DQ__ -D__AVX512VL__)
  set(VGGT_MV_FLAGS_avx512_bf16 ${VGGT_MV_FLAGS_avx512} -D__AVX512BF16__)
endif()
foreach(isa IN LISTS VGGT_MV_ISAS)
  string(TOUPPER "${isa}" upper)
  list(APPEND VGGT_MV_ISA_DEFINITIONS "VGGT_MV_HAS_${upper}")
endforeach()

set(VGGT_MV_OPTIMIZATION -O3)
if(VGGT_MV_SANITIZE)
  set(VGGT_MV_OPTIMIZATION -O1)
endif()

function(vggt_mv_add_cpu_variant isa)
  set(target vggt_mv_cpu_${isa})
  add_library(${target} STATIC ${VGGT_MV_CPU_KERNELS})
  target_compile_definitions(${target} PRIVATE VGGT_MV_ISA=${isa} VGGT_MV_ISA_IS_${isa})
  # -Wno-psabi: vectors are passed between functions of one file only, so that their calling convention may vary.
  target_compile_options(${target} PRIVATE ${VGGT_MV_FLAGS_${isa}} ${VGGT_MV_OPTIMIZATION} -ffp-contract=off -fno-math-errno -fno-trapping-math -Wno-psabi
                         -fno-exceptions)
  target_link_libraries(${target} PUBLIC vggt_mv_flags)
  if(OpenMP_CXX_FOUND)
    target_link_libraries(${target} PRIVATE OpenMP::OpenMP_CXX)
  endif()
  target_link_libraries(vggt_mv_cpu PUBLIC ${target})
  if(CMAKE_NM AND NOT VGGT_MV_SANITIZE)  # a sanitizer adds functions of its own
    add_custom_command(TARGET ${target} POST_BUILD COMMAND
      ${CMAKE_COMMAND} -DNM=${CMAKE_NM} -DLIBRARY=$<TARGET_FILE:${target}> -DISA=${isa}
        -P ${CMAKE_CURRENT_SOURCE_DIR}/cmake/CheckWeakSymbols.cmake VERBATIM)
  endif()
endfunction()
