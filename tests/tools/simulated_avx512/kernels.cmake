# DFSSM_SIMULATED_SOURCES: those kernels and dispatch.cpp, to be compiled over SIMDe, whose folder SIMDE_INCLUDE_DIR is.
include("${CMAKE_CURRENT_LIST_DIR}/../../../plugins/ort_cpu/kernels/sources.cmake")
set(simulated ${DFSSM_SOURCES_avx512vnni} ${DFSSM_SOURCES_avx512vbmi} ${DFSSM_SOURCES_avxvnni}
    "${DFSSM_KERNEL_DIR}/matmul__avx2.cpp")
set(DFSSM_SIMULATED_SOURCES "${CMAKE_CURRENT_LIST_DIR}/dispatch.cpp" ${simulated})

# The real kernels' flags, less the instruction sets. -idirafter: the folder may be /usr/include, whose place in the
# search must not change.
set_source_files_properties(${simulated} PROPERTIES
  COMPILE_OPTIONS "${DFSSM_KERNEL_FLAGS};-Wno-psabi;-idirafter${SIMDE_INCLUDE_DIR}"
  COMPILE_DEFINITIONS SIMDE_NO_INLINE
  INCLUDE_DIRECTORIES "${CMAKE_CURRENT_LIST_DIR}/include")
