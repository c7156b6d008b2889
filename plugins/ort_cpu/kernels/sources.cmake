# Kernel sources and the instruction-set flags of each. Flags belong to single files: the rest of the library,
# and the dispatch itself, must run on any CPU of the architecture. -ffp-contract=off: floats are computed as
# written, so that equal C++ gives equal results on every instruction set.
set(DFSSM_KERNEL_DIR "${CMAKE_CURRENT_LIST_DIR}")
set(DFSSM_KERNEL_SOURCES
    "${DFSSM_KERNEL_DIR}/dispatch.cpp"
    "${DFSSM_KERNEL_DIR}/kernels__scalar.cpp")
set(DFSSM_KERNEL_FLAGS -ffp-contract=off)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  # gcc's own AVX-512 intrinsics trip these (gcc bug 105593).
  list(APPEND DFSSM_KERNEL_FLAGS -Wno-uninitialized -Wno-maybe-uninitialized)
endif()
set_source_files_properties(${DFSSM_KERNEL_SOURCES} PROPERTIES COMPILE_OPTIONS "${DFSSM_KERNEL_FLAGS}")

# dfssm_isa(NAME FEATURE...): the kernel table NAME, made by float__NAME.cpp and matmul__NAME.cpp, for CPUs with
# these features, as gcc names them: -mFEATURE compiles for one, __builtin_cpu_supports("FEATURE") asks for it.
set(isas "// Written by kernels/sources.cmake: DFSSM_ISA(name, whether this CPU can run it), the plainest first.\n")
macro(dfssm_isa name)
  set(DFSSM_SOURCES_${name} "${DFSSM_KERNEL_DIR}/float__${name}.cpp" "${DFSSM_KERNEL_DIR}/matmul__${name}.cpp")
  set(flags ${ARGN})
  list(TRANSFORM flags PREPEND "-m")
  set_source_files_properties(${DFSSM_SOURCES_${name}} PROPERTIES COMPILE_OPTIONS "${DFSSM_KERNEL_FLAGS};${flags}")
  list(APPEND DFSSM_KERNEL_SOURCES ${DFSSM_SOURCES_${name}})
  set(supported ${ARGN})
  list(TRANSFORM supported REPLACE "(.+)" "__builtin_cpu_supports(\"\\1\")")
  list(JOIN supported " && " supported)
  string(APPEND isas "DFSSM_ISA(${name}, ${supported})\n")
endmacro()

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  dfssm_isa(avx2 avx2 fma f16c)
  dfssm_isa(avx512vnni avx2 fma f16c avx512f avx512bw avx512dq avx512vl avx512vnni)
endif()

set(DFSSM_KERNEL_INCLUDES "${DFSSM_KERNEL_DIR}" "${CMAKE_CURRENT_BINARY_DIR}/kernels")
file(CONFIGURE OUTPUT "${CMAKE_CURRENT_BINARY_DIR}/kernels/isas.h" CONTENT "${isas}" @ONLY)
