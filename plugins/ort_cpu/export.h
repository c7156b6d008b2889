// How libdfssm_ort_cpu.so shows a function; exports.map lists them.
#pragma once

#define DFSSM_EXPORT extern "C" __attribute__((visibility("default")))
