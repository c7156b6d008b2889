# Target dfssm_opset: the header dfssm_opset.h, made from the ops that the Python side has, and its folder.
find_package(Python 3.11 REQUIRED COMPONENTS Interpreter)
set(generated "${CMAKE_CURRENT_BINARY_DIR}/generated")
set(opset "${CMAKE_CURRENT_LIST_DIR}/../dfssm/opset")
file(MAKE_DIRECTORY "${generated}")
file(GLOB ops_of_header CONFIGURE_DEPENDS "${opset}/bind.h" "${opset}/*.py" "${opset}/ops/*.py")
add_custom_command(
  OUTPUT "${generated}/dfssm_opset.h"
  COMMAND "${Python_EXECUTABLE}" "${opset}/header.py" "${generated}/dfssm_opset.h"
  COMMAND "${CMAKE_COMMAND}" -E touch "${generated}/dfssm_opset.h"
  DEPENDS ${ops_of_header}
  COMMENT "Generating dfssm_opset.h")
add_custom_target(dfssm_opset_header DEPENDS "${generated}/dfssm_opset.h")
add_library(dfssm_opset INTERFACE)
add_dependencies(dfssm_opset dfssm_opset_header)
target_include_directories(dfssm_opset INTERFACE "${generated}")
