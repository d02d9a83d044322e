// The blocks of a weight hold round(W + delta) for the length of one GEMM; then the base is put back, bit for bit.
//
// All of it is queued on the current stream, nothing waits for the device, and the weight's version is not touched:
// what autograd saved is still what it was when the call returns.
//
// No kernels here: the compilation passes for GPUs need not read it (2 s of headers each, 2026-11).
#ifndef __CUDA_ARCH__

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <mutex>

#include "common.cuh"
#include "ops.h"

// In libtorch since 2.13; absent before that.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace smt_cuda {
namespace {

// Serialises the swaps of one storage: between threads by the mutex, between streams by the event that the last swap
// recorded. Recursive, because a program may intercept the GEMM and come back with the same weight. Storages of a
// device share a turn when they hash alike, which costs time only.
struct Turn {
  std::recursive_mutex mutex;
  cudaEvent_t restored = nullptr;
  cudaStream_t stream = nullptr;
};

constexpr int kTurnsLog2 = 6;
// More than PyTorch can be built for.
constexpr int kDevices = 128;

Turn& turn_of(const Tensor& weight) {
  // Never destroyed: at exit the CUDA context may be gone before static objects are.
  static auto& turns = *new std::array<std::array<Turn, 1 << kTurnsLog2>, kDevices>;
  const auto storage = reinterpret_cast<uintptr_t>(weight.const_data_ptr()) -
                       static_cast<uintptr_t>(weight.storage_offset()) * weight.element_size();
  // The caching allocator hands out multiples of 512 bytes.
  const uint64_t hash = static_cast<uint64_t>(storage / 512) * 0x9e3779b97f4a7c15u;
  return turns.at(weight.get_device_index())[hash >> (64 - kTurnsLog2)];
}

// Inside a graph capture the order of streams is the capture's own; an event from outside may not enter it.
bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  STD_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

class Swapped {
 public:
  Swapped(const Tensor& weight, const Tensor& delta, const Tensor& blocks)
      : weight_(weight),
        blocks_(blocks),
        device_(weight.get_device_index()),
        guard_(device_),
        stream_(current_stream(device_)),
        capturing_(is_capturing(stream_)),
        turn_(turn_of(weight)),
        lock_(turn_.mutex) {
    if (!capturing_) await_turn();
    saved_ = swap_in(weight_, delta, blocks_);
    written_ = true;
  }

  // Only reached with the blocks still written when the GEMM threw. A launch that fails then fails because the device
  // is lost already, and the first error is the one to report.
  ~Swapped() {
    try {
      restore();
    } catch (...) {
    }
  }

  Swapped(const Swapped&) = delete;
  Swapped& operator=(const Swapped&) = delete;

  void restore() {
    if (!written_) return;
    written_ = false;
    swap_out(weight_, saved_, blocks_);
    if (!capturing_) end_turn();
  }

 private:
  void await_turn() {
    if (!turn_.restored) {
      STD_CUDA_CHECK(cudaEventCreateWithFlags(&turn_.restored, cudaEventDisableTiming));
    } else if (turn_.stream != stream_) {
      STD_CUDA_CHECK(cudaStreamWaitEvent(stream_, turn_.restored, 0));
    }
  }

  void end_turn() {
    turn_.stream = stream_;
    STD_CUDA_CHECK(cudaEventRecord(turn_.restored, stream_));
  }

  const Tensor& weight_;
  const Tensor& blocks_;
  const int32_t device_;
  const DeviceGuard guard_;
  const cudaStream_t stream_;
  const bool capturing_;
  Turn& turn_;
  const std::lock_guard<std::recursive_mutex> lock_;
  Tensor saved_;
  bool written_ = false;
};

// An ATen op through the dispatcher. The reason of a failure (out of memory, mostly) is quoted where torch tells it.
template <size_t N>
Tensor call(const char* op, std::array<StableIValue, N> stack) {
  if (torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION) != TORCH_SUCCESS) {
    const char* const reason =
        torch_exception_get_what_without_backtrace ? torch_exception_get_what_without_backtrace() : nullptr;
    STD_TORCH_CHECK(false, op, " failed between swapping blocks in and out: ",
                    reason ? reason : "its error was printed to stderr");
  }
  return torch::stable::detail::to<Tensor>(stack[0]);
}

template <class Gemm>
Tensor with_blocks(const Tensor& weight, const Tensor& delta, const Tensor& blocks, Gemm&& gemm) {
  Swapped swapped(weight, delta, blocks);
  Tensor result = gemm();
  swapped.restore();
  return result;
}

// `inner`: the axis of the weight that is summed over.
void check_operand(const char* op, const char* name, const Tensor& operand, const Tensor& weight, int64_t inner) {
  STD_TORCH_CHECK(weight.dim() == 2, op, ": weight has shape ", shape_of(weight), "; it must be a matrix");
  STD_TORCH_CHECK(operand.dim() >= 1 && operand.size(operand.dim() - 1) == weight.size(inner), op, ": ", name,
                  " has shape ", shape_of(operand), "; for a weight of shape ", shape_of(weight),
                  " its last side must be ", weight.size(inner));
  STD_TORCH_CHECK(operand.scalar_type() == weight.scalar_type(), op, ": ", name, " has dtype ",
                  torch::headeronly::toString(operand.scalar_type()), " but the weight has ",
                  torch::headeronly::toString(weight.scalar_type()), "; cast one to the other's");
  check_device(op, name, operand, weight.get_device_index());
}

}  // namespace

Tensor swap_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& delta,
                   const Tensor& blocks) {
  constexpr const char* kOp = "swap_linear";
  check_operand(kOp, "x", x, weight, 1);
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == weight.size(0), kOp, ": bias has shape ", shape_of(*bias),
                    "; for a weight of shape ", shape_of(weight), " it must be (", weight.size(0), ")");
    STD_TORCH_CHECK(bias->scalar_type() == weight.scalar_type(), kOp, ": bias has dtype ",
                    torch::headeronly::toString(bias->scalar_type()), " but the weight has ",
                    torch::headeronly::toString(weight.scalar_type()), "; cast one to the other's");
    check_device(kOp, "bias", *bias, weight.get_device_index());
  }
  return with_blocks(weight, delta, blocks, [&] {
    using torch::stable::detail::from;
    return call<3>("aten::linear", {from(x), from(weight), from(bias)});
  });
}

Tensor swap_matmul(const Tensor& dy, const Tensor& weight, const Tensor& delta, const Tensor& blocks) {
  check_operand("swap_matmul", "dy", dy, weight, 0);
  STD_TORCH_CHECK(dy.dim() == 2, "swap_matmul: dy has shape ", shape_of(dy), "; it must be (tokens, out_features)");
  return with_blocks(weight, delta, blocks, [&] {
    using torch::stable::detail::from;
    return call<2>("aten::mm", {from(dy), from(weight)});
  });
}

}  // namespace smt_cuda

#endif
