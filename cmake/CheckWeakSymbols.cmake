# Fails if a kernel library of one instruction set defines a function outside its own namespace: the linker might give
# that copy to code that must run on any machine.
execute_process(COMMAND ${NM} --demangle --defined-only ${LIBRARY} OUTPUT_VARIABLE symbols RESULT_VARIABLE status)
if(NOT status EQUAL 0)
  message(FATAL_ERROR "${NM} could not read ${LIBRARY}")
endif()
string(REPLACE ";" "," symbols "${symbols}")
string(REPLACE "\n" ";" symbols "${symbols}")
foreach(symbol IN LISTS symbols)
  if(symbol MATCHES "^[0-9a-f]+ [TWVuDBR] (.*)$" AND NOT symbol MATCHES "vggt_mv::${ISA}::")
    message(FATAL_ERROR "${LIBRARY} defines a symbol that other code may share: ${CMAKE_MATCH_1}. Keep CPU kernels free "
                        "of templates and inline functions outside the namespace vggt_mv::VGGT_MV_ISA.")
  endif()
endforeach()
