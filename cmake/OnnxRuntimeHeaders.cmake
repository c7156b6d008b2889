# Sets DFSSM_ORT_HEADERS, the folder of onnxruntime_c_api.h. In this order: -DDFSSM_ORT_INCLUDE_DIR, the environment
# variable of the same name, the system, a copy fetched before or now (scripts/fetch_ort_headers.sh checks its sha256).
# The library itself is not needed: ONNX Runtime hands its functions to the plugin when it loads it.
if(NOT DFSSM_ORT_INCLUDE_DIR)
  set(DFSSM_ORT_INCLUDE_DIR "$ENV{DFSSM_ORT_INCLUDE_DIR}")
endif()
set(fetched "${PROJECT_SOURCE_DIR}/.cache/ort-headers")

if(DFSSM_ORT_INCLUDE_DIR)
  find_path(ort_headers onnxruntime_c_api.h NO_CACHE NO_DEFAULT_PATH
    PATHS "${DFSSM_ORT_INCLUDE_DIR}" PATH_SUFFIXES onnxruntime onnxruntime/core/session)
  if(NOT ort_headers)
    message(FATAL_ERROR "DFSSM_ORT_INCLUDE_DIR is ${DFSSM_ORT_INCLUDE_DIR}, but onnxruntime_c_api.h is not there")
  endif()
else()
  find_path(ort_headers onnxruntime_c_api.h NO_CACHE PATH_SUFFIXES onnxruntime onnxruntime/core/session)
  if(NOT ort_headers)
    execute_process(COMMAND sh "${PROJECT_SOURCE_DIR}/scripts/fetch_ort_headers.sh" "${fetched}"
      RESULT_VARIABLE failed ERROR_VARIABLE report)
    if(failed)
      message(FATAL_ERROR "The ONNX Runtime headers are not here and could not be fetched:\n${report}")
    endif()
    set(ort_headers "${fetched}")
  endif()
endif()

set(DFSSM_ORT_HEADERS "${ort_headers}")
message(STATUS "ONNX Runtime headers: ${DFSSM_ORT_HEADERS}")
