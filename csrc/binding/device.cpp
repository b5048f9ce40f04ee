// SPDX-License-Identifier: Apache-2.0
#include "binding/device.h"

#include <stdexcept>
#include <string>

// Lives only in libtorch_cuda.so: weak, so that the library loads where there is none.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

extern "C" __attribute__((weak)) const char* cudaGetErrorString(int error);

namespace kvevict {

void* current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  if (!aoti_torch_get_current_cuda_stream ||
      aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) != 0) {
    throw std::runtime_error("kvevict: this torch has no CUDA stream");
  }
  return stream;
}

void check_launch(int cuda_error, const char* op) {
  if (cuda_error == 0) return;
  const char* what = cudaGetErrorString ? cudaGetErrorString(cuda_error) : "no CUDA runtime";
  throw std::runtime_error("kvevict::" + std::string(op) + ": CUDA error " +
                           std::to_string(cuda_error) + " (" + what + ")");
}

}  // namespace kvevict
