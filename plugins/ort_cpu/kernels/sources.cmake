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

# dfssm_isa(NAME FLAGS TEST): the kernel table NAME, of its files float__NAME.cpp and matmul__NAME.cpp. They are compiled
# with FLAGS; TEST, in C++, is whether this CPU runs them. A set that adds integer products alone has no float file: its
# table is in that of the set it extends.
set(isas "// Written by kernels/sources.cmake: DFSSM_ISA(name, whether this CPU can run it), the plainest first.\n")
macro(dfssm_isa name flags test)
  file(GLOB DFSSM_SOURCES_${name} "${DFSSM_KERNEL_DIR}/*__${name}.cpp")
  set_source_files_properties(${DFSSM_SOURCES_${name}} PROPERTIES COMPILE_OPTIONS "${DFSSM_KERNEL_FLAGS};${flags}")
  list(APPEND DFSSM_KERNEL_SOURCES ${DFSSM_SOURCES_${name}})
  string(APPEND isas "DFSSM_ISA(${name}, ${test})\n")
endmacro()

# dfssm_x86_isa(NAME FEATURE... [ON VENDOR]): for CPUs with these features, as gcc names them: -mFEATURE compiles for one,
# __builtin_cpu_supports("FEATURE") asks for it. ON: for those of the vendor alone.
macro(dfssm_x86_isa name)
  cmake_parse_arguments(isa "" "ON" "" ${ARGN})
  set(features ${isa_UNPARSED_ARGUMENTS})
  list(TRANSFORM features REPLACE "(.+)" "-m\\1" OUTPUT_VARIABLE flags)
  list(TRANSFORM features REPLACE "(.+)" "__builtin_cpu_supports(\"\\1\")")
  if(isa_ON)
    list(APPEND features "__builtin_cpu_is(\"${isa_ON}\")")
  endif()
  list(JOIN features " && " supported)
  dfssm_isa(${name} "${flags}" "${supported}")
endmacro()

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  dfssm_x86_isa(avx2 avx2 fma f16c)
  dfssm_x86_isa(avxvnni avx2 fma f16c avxvnni)
  set(avx512 avx2 fma f16c avx512f avx512bw avx512dq avx512vl)
  dfssm_x86_isa(avx512vnni ${avx512} avx512vnni)
  # By their ports, Intel's cores permute at half the rate at which they multiply, and look-ups would gain nothing there;
  # not measured.
  dfssm_x86_isa(avx512vbmi ${avx512} avx512vnni avx512vbmi ON amd)
elseif(CMAKE_SYSTEM_PROCESSOR STREQUAL "aarch64")
  set(has_dotprod "getauxval(AT_HWCAP) & HWCAP_ASIMDDP")
  dfssm_isa(dotprod -march=armv8.2-a+dotprod "${has_dotprod}")
  dfssm_isa(i8mm -march=armv8.2-a+dotprod+i8mm "(${has_dotprod}) && (getauxval(AT_HWCAP2) & HWCAP2_I8MM)")
endif()

set(DFSSM_KERNEL_INCLUDES "${DFSSM_KERNEL_DIR}" "${CMAKE_CURRENT_BINARY_DIR}/kernels")
file(CONFIGURE OUTPUT "${CMAKE_CURRENT_BINARY_DIR}/kernels/isas.h" CONTENT "${isas}" @ONLY)
