# The LibTorch stable ABI of the installed torch: TorchStable::TorchStable.
#
# Reads torch/version.py instead of importing torch (0.1 s, not 3 s), and does not use TorchConfig,
# which drags in c10, libtorch_cuda and flags that defeat the stable ABI.

set(TorchStable_TARGET 0x020b000000000000ULL)  # runs on torch 2.11 and later

find_package(Python3 COMPONENTS Interpreter REQUIRED)
execute_process(
  COMMAND ${Python3_EXECUTABLE} -c [=[
import importlib.util, pathlib, re
root = pathlib.Path(importlib.util.find_spec("torch").origin).parent
version = re.search(r"__version__ = '([^']+)'", (root / "version.py").read_text()).group(1)
print(root, version, sep=";", end="")]=]
  OUTPUT_VARIABLE torch_root_and_version
  RESULT_VARIABLE torch_missing
  ERROR_QUIET)
if(NOT torch_missing)
  list(GET torch_root_and_version 0 torch_root)
  list(GET torch_root_and_version 1 torch_version)
  string(REGEX MATCH "^[0-9.]+" TorchStable_VERSION "${torch_version}")
  find_path(TorchStable_INCLUDE_DIR torch/csrc/stable/library.h
    HINTS ${torch_root}/include NO_DEFAULT_PATH)
  find_library(TorchStable_LIBRARY torch HINTS ${torch_root}/lib NO_DEFAULT_PATH)
  find_library(TorchStable_CPU_LIBRARY torch_cpu HINTS ${torch_root}/lib NO_DEFAULT_PATH)
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(TorchStable
  REQUIRED_VARS TorchStable_LIBRARY TorchStable_CPU_LIBRARY TorchStable_INCLUDE_DIR
  VERSION_VAR TorchStable_VERSION
  REASON_FAILURE_MESSAGE "no torch for ${Python3_EXECUTABLE}: pip install torch first")

if(TorchStable_FOUND AND NOT TARGET TorchStable::TorchStable)
  add_library(TorchStable::TorchStable INTERFACE IMPORTED)
  # libtorch.so must stay in DT_NEEDED although nothing is taken from it directly: torch loads its
  # libraries RTLD_LOCAL, and in a CUDA torch libtorch.so is what leads to libtorch_cuda.so.
  set_target_properties(TorchStable::TorchStable PROPERTIES
    INTERFACE_INCLUDE_DIRECTORIES ${TorchStable_INCLUDE_DIR}
    INTERFACE_COMPILE_DEFINITIONS "TORCH_TARGET_VERSION=${TorchStable_TARGET};USE_CUDA"
    INTERFACE_LINK_LIBRARIES
      "-Wl,--push-state,--no-as-needed;${TorchStable_LIBRARY};${TorchStable_CPU_LIBRARY};-Wl,--pop-state")
endif()
