# Decides whether the CUDA kernels are built, and with which nvcc. Precedence: CUDACXX or
# CMAKE_CUDA_COMPILER, nvcc on PATH or in CUDA_HOME, the PyPI wheels nvidia-cuda-nvcc etc., none.
# Never asks for a GPU: a builder has none.
#
# Sets KVEVICT_CUDA_COMPILER (or an empty string), KVEVICT_CUDA_VERSION, KVEVICT_NO_CUDA_REASON.

set(KVEVICT_CUDA_COMPILER "")
set(KVEVICT_CUDA_VERSION "")
set(KVEVICT_NO_CUDA_REASON "")

if(NOT KVEVICT_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "KVEVICT_CUDA must be AUTO, ON or OFF, got ${KVEVICT_CUDA}")
endif()

if(KVEVICT_CUDA STREQUAL "OFF")
  set(KVEVICT_NO_CUDA_REASON "built with KVEVICT_CUDA=OFF")
else()
  if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
    find_program(KVEVICT_NVCC nvcc HINTS $ENV{CUDA_HOME}/bin)
    if(KVEVICT_NVCC)
      set(CMAKE_CUDA_COMPILER ${KVEVICT_NVCC})
    else()
      include(FindCUDAWheels)
    endif()
  endif()
  include(CheckLanguage)
  set(CMAKE_CUDA_ARCHITECTURES ${KVEVICT_CUDA_ARCHS})
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    find_package(CUDAToolkit)
    if(CUDAToolkit_VERSION VERSION_LESS 13.0)
      set(KVEVICT_NO_CUDA_REASON "nvcc ${CUDAToolkit_VERSION} is older than 13.0")
    else()
      enable_language(CUDA)
      set(KVEVICT_CUDA_COMPILER ${CMAKE_CUDA_COMPILER})
      set(KVEVICT_CUDA_VERSION ${CUDAToolkit_VERSION})
    endif()
  else()
    set(KVEVICT_NO_CUDA_REASON
      "no nvcc 13 on PATH, in CUDA_HOME or from the wheels in third_party/cuda-requirements.txt")
  endif()
  if(KVEVICT_CUDA STREQUAL "ON" AND NOT KVEVICT_CUDA_COMPILER)
    message(FATAL_ERROR "KVEVICT_CUDA=ON: ${KVEVICT_NO_CUDA_REASON}")
  endif()
endif()

if(KVEVICT_CUDA_COMPILER)
  message(STATUS "kvevict: CUDA ${KVEVICT_CUDA_VERSION} (${KVEVICT_CUDA_COMPILER}), "
    "architectures ${KVEVICT_CUDA_ARCHS}")
else()
  message(STATUS "kvevict: no CUDA kernels, ${KVEVICT_NO_CUDA_REASON}")
endif()
