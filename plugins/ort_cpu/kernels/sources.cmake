# Kernel sources and the instruction-set flags of each. Flags belong to single files: the rest of the library,
# and the dispatch itself, must run on any CPU of the architecture. -ffp-contract=off: floats are computed as
# written, so that equal C++ gives equal results on every instruction set.
set(DFSSM_KERNEL_DIR "${CMAKE_CURRENT_LIST_DIR}")
set(DFSSM_KERNEL_SOURCES
    "${DFSSM_KERNEL_DIR}/dispatch.cpp"
    "${DFSSM_KERNEL_DIR}/kernels__scalar.cpp"
    "${DFSSM_KERNEL_DIR}/packing.cpp")
set_source_files_properties(${DFSSM_KERNEL_SOURCES} PROPERTIES COMPILE_OPTIONS "-ffp-contract=off")

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(DFSSM_AVX2_SOURCES
      "${DFSSM_KERNEL_DIR}/float__avx2.cpp"
      "${DFSSM_KERNEL_DIR}/matmul__avx2.cpp")
  set_source_files_properties(${DFSSM_AVX2_SOURCES} PROPERTIES
      COMPILE_OPTIONS "-ffp-contract=off;-mavx2;-mfma;-mf16c")

  set(DFSSM_AVX512_SOURCES
      "${DFSSM_KERNEL_DIR}/float__avx512vnni.cpp"
      "${DFSSM_KERNEL_DIR}/matmul__avx512vnni.cpp")
  set(DFSSM_AVX512_FLAGS
      -ffp-contract=off -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    # gcc's own AVX-512 intrinsics trip these (gcc bug 105593).
    list(APPEND DFSSM_AVX512_FLAGS -Wno-uninitialized -Wno-maybe-uninitialized)
  endif()
  set_source_files_properties(${DFSSM_AVX512_SOURCES} PROPERTIES COMPILE_OPTIONS "${DFSSM_AVX512_FLAGS}")

  list(APPEND DFSSM_KERNEL_SOURCES ${DFSSM_AVX2_SOURCES} ${DFSSM_AVX512_SOURCES})
  set_source_files_properties("${DFSSM_KERNEL_DIR}/dispatch.cpp" PROPERTIES
      COMPILE_DEFINITIONS "DFSSM_X86_KERNELS=1")
endif()
