// What libdfssm_ort_cpu.so tells besides its ops, as C functions: a program asks with dlsym
// (targets/cpu_library.py), no build for its Python is needed.
#pragma once

#include <cstdint>

#define DFSSM_EXPORT extern "C" __attribute__((visibility("default")))

// Names of the kernel tables that this CPU can run, the plainest first, separated by spaces.
DFSSM_EXPORT const char* dfssm_cpu_isas();

// Name of the table in use: $DFSSM_ISA where it is set, else the best. If that names no usable table:
// nullptr, and dfssm_cpu_error() is one line that says so (otherwise nullptr).
DFSSM_EXPORT const char* dfssm_cpu_isa();
DFSSM_EXPORT const char* dfssm_cpu_error();

// GB/s of one pass over `bytes` of memory by `threads` threads, each over a range of its own: the fastest
// plain read we know. 0 if the memory or the threads are not to be had, or bytes < 1 MiB.
DFSSM_EXPORT double dfssm_read_bandwidth(int64_t bytes, int threads);
