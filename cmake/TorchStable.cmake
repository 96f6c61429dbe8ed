# torch_stable: headers and libtorch_cpu of the torch in the build environment, for code that uses the stable ABI only.
# Not find_package(Torch): that imports torch at configure time, wants the CUDA toolkit of a CUDA wheel, and its flags leak.
execute_process(COMMAND "${Python_EXECUTABLE}" -c
  "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
  OUTPUT_VARIABLE THALWEG_TORCH_DIR OUTPUT_STRIP_TRAILING_WHITESPACE)
if(NOT EXISTS "${THALWEG_TORCH_DIR}/include/torch/csrc/stable/library.h")
  message(FATAL_ERROR "THALWEG_TORCH=ON needs torch >= 2.10 in the build environment of ${Python_EXECUTABLE}: "
    "pip install torch, or THALWEG_TORCH=1 pip install . which brings it")
endif()
add_library(torch_stable INTERFACE)
target_include_directories(torch_stable SYSTEM INTERFACE "${THALWEG_TORCH_DIR}/include")
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=0x020a000000000000ULL)
target_link_libraries(torch_stable INTERFACE "${THALWEG_TORCH_DIR}/lib/libtorch_cpu.so")
