# Sets DFSSM_TRT_HEADERS, the folder of NvInferRuntime.h. In this order: -DDFSSM_TRT_INCLUDE_DIR, the environment
# variable of the same name, a TensorRT SDK of the system, a copy fetched before or now (scripts/fetch_trt_headers.sh checks
# its sha256). The library itself is not needed: no TensorRT is linked in. Where there
# are none, DFSSM_TRT_HEADERS is empty and DFSSM_TRT_HEADERS_ERROR says why.
set(DFSSM_TRT_INCLUDE_DIR "" CACHE PATH "Folder of NvInferRuntime.h; empty: search, then fetch")
if(NOT DFSSM_TRT_INCLUDE_DIR)
  set(DFSSM_TRT_INCLUDE_DIR "$ENV{DFSSM_TRT_INCLUDE_DIR}")
endif()
set(fetched "${PROJECT_SOURCE_DIR}/.cache/trt-headers")

if(DFSSM_TRT_INCLUDE_DIR)
  find_path(trt_headers NvInferRuntime.h NO_CACHE NO_DEFAULT_PATH
    PATHS "${DFSSM_TRT_INCLUDE_DIR}" PATH_SUFFIXES include)
  if(NOT trt_headers)
    message(FATAL_ERROR "DFSSM_TRT_INCLUDE_DIR is ${DFSSM_TRT_INCLUDE_DIR}, but NvInferRuntime.h is not there")
  endif()
else()
  find_path(trt_headers NvInferRuntime.h NO_CACHE
    PATHS /opt/tensorrt /usr/local/tensorrt "$ENV{TENSORRT_ROOT}" PATH_SUFFIXES include)
  if(NOT trt_headers)
    execute_process(
      COMMAND sh "${PROJECT_SOURCE_DIR}/scripts/fetch_trt_headers.sh" "${fetched}" "${Python_EXECUTABLE}"
      RESULT_VARIABLE failed ERROR_VARIABLE report)
    if(NOT failed)
      set(trt_headers "${fetched}")
    endif()
  endif()
endif()

if(trt_headers)
  set(DFSSM_TRT_HEADERS "${trt_headers}")
  message(STATUS "TensorRT headers: ${DFSSM_TRT_HEADERS}")
else()
  set(DFSSM_TRT_HEADERS "")
  set(DFSSM_TRT_HEADERS_ERROR "the TensorRT headers are not here and could not be fetched: ${report}")
endif()
