// What every launcher shares: checks of tensors, the current stream, and a launch that reports its own error.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <string>
#include <utility>

#include "scalars.cuh"

namespace smt_cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

inline std::string shape_of(const Tensor& tensor) {
  std::string text = "(";
  for (int64_t d = 0; d < tensor.dim(); ++d) text += (d ? ", " : "") + std::to_string(tensor.size(d));
  return text + ")";
}

inline void check_device(const char* op, const char* name, const Tensor& tensor, int32_t device) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == device, op, ": ", name, " is not on cuda:", device,
                  " as the first operand is; move all operands to one device");
}

inline cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// The error of this launch only, not one that an earlier call left behind.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), uint32_t ctas, uint32_t threads, cudaStream_t stream,
                   const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(ctas);
  config.blockDim = dim3(threads);
  config.stream = stream;
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  static_assert((std::is_same_v<Parameters, Arguments> && ...), "arguments are passed as they lie in memory");
  return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), pointers);
}

// Calls `body` with a value of the element type of a float dtype.
template <class Body>
void for_dtype(const char* op, const char* name, ScalarType dtype, Body&& body) {
  switch (dtype) {
    case ScalarType::Float: return body(float{});
    case ScalarType::Double: return body(double{});
    case ScalarType::BFloat16: return body(__nv_bfloat16{});
    case ScalarType::Half: return body(__half{});
    default:
      STD_TORCH_CHECK(false, op, ": ", name, " has dtype ", torch::headeronly::toString(dtype),
                      "; it must be float32, float64, bfloat16 or float16");
  }
}

}  // namespace smt_cuda
