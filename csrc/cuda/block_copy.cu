// Gather, scatter, swap in, swap out: one launch over all blocks of a weight.
#include "block_copy.cuh"

#include <torch/csrc/stable/ops.h>

#include <limits>

#include "common.cuh"
#include "ops.h"

namespace smt_cuda {
namespace {

template <Copy kind, class W, class P, int N>
__global__ void __launch_bounds__(kCopyThreads) copy_kernel(const BlockCopy copy) {
  copy_thread<kind, W, P, N>(copy, blockIdx.x, threadIdx.x);
}

template <Copy kind, class W, class P>
void run(const char* op, BlockCopy& copy, cudaStream_t stream) {
  constexpr int kWidth = kCopyWidth<W, P>;
  const bool wide = can_copy_wide<W, P>(copy);
  const uint64_t ctas = tile(copy, wide ? kWidth : 1);
  STD_TORCH_CHECK(ctas <= std::numeric_limits<int32_t>::max(), op, ": ", copy.num_blocks, " blocks of ",
                  copy.block_lines, " x ", copy.block_length, " elements are more than one launch can copy");
  STD_CUDA_CHECK(launch(wide ? copy_kernel<kind, W, P, kWidth> : copy_kernel<kind, W, P, 1>,
                        static_cast<uint32_t>(ctas), kCopyThreads, stream, copy));
}

BlockCopy check(const char* op, const Tensor& weight, const Tensor& blocks, int64_t block_rows, int64_t block_cols) {
  STD_TORCH_CHECK(weight.dim() == 2, op, ": weight has shape ", shape_of(weight), "; it must be a matrix");
  const int64_t rows = weight.size(0), cols = weight.size(1);
  const bool transposed = !weight.is_contiguous();
  STD_TORCH_CHECK(!transposed || ((rows <= 1 || weight.stride(0) == 1) && (cols <= 1 || weight.stride(1) == rows)), op,
                  ": weight has strides (", weight.stride(0), ", ", weight.stride(1), ") for shape ", shape_of(weight),
                  "; it must be contiguous or the transpose of a contiguous matrix");
  STD_TORCH_CHECK(blocks.scalar_type() == ScalarType::Int, op, ": blocks have dtype ",
                  torch::headeronly::toString(blocks.scalar_type()), "; they must be int32");
  STD_TORCH_CHECK(blocks.dim() == 2 && blocks.size(1) == 2, op, ": blocks have shape ", shape_of(blocks),
                  "; it must be (number of blocks, 2)");
  STD_TORCH_CHECK(blocks.is_contiguous(), op, ": blocks are not contiguous; call .contiguous()");
  check_device(op, "blocks", blocks, weight.get_device_index());
  STD_TORCH_CHECK(block_rows > 0 && block_cols > 0 && block_rows <= std::numeric_limits<int32_t>::max() &&
                      block_cols <= std::numeric_limits<int32_t>::max(),
                  op, ": blocks of ", block_rows, " x ", block_cols, " elements; both sides must be positive");
  return describe(weight.mutable_data_ptr(), rows, cols, transposed,
                  static_cast<const int32_t*>(blocks.const_data_ptr()), blocks.size(0), block_rows, block_cols);
}

BlockCopy check_with_packed(const char* op, const char* name, const Tensor& weight, const Tensor& packed,
                            const Tensor& blocks) {
  STD_TORCH_CHECK(packed.dim() == 3, op, ": ", name, " has shape ", shape_of(packed),
                  "; it must be (blocks, block rows, block columns)");
  BlockCopy copy = check(op, weight, blocks, packed.size(1), packed.size(2));
  STD_TORCH_CHECK(packed.size(0) == copy.num_blocks, op, ": ", name, " holds ", packed.size(0),
                  " blocks but the index has shape ", shape_of(blocks), "; both must come from one selection");
  check_device(op, name, packed, weight.get_device_index());
  set_packed(copy, const_cast<void*>(packed.const_data_ptr()), packed.strides().data());
  return copy;
}

}  // namespace

Tensor block_gather(const Tensor& weight, const Tensor& blocks, int64_t block_rows, int64_t block_cols) {
  constexpr const char* kOp = "block_gather";
  const int32_t device = weight.get_device_index();
  BlockCopy copy = check(kOp, weight, blocks, block_rows, block_cols);
  Tensor packed;
  for_dtype(kOp, "weight", weight.scalar_type(), [&](auto w_value) {
    using W = std::decay_t<decltype(w_value)>;
    const DeviceGuard guard(device);
    packed = torch::stable::new_empty(weight, {copy.num_blocks, block_rows, block_cols});
    if (copy.num_blocks == 0) return;
    set_packed(copy, packed.mutable_data_ptr(), packed.strides().data());
    run<Copy::kGather, W, W>(kOp, copy, current_stream(device));
  });
  return packed;
}

void block_scatter_(const Tensor& weight, const Tensor& packed, const Tensor& blocks) {
  constexpr const char* kOp = "block_scatter_";
  const int32_t device = weight.get_device_index();
  BlockCopy copy = check_with_packed(kOp, "packed", weight, packed, blocks);
  for_dtype(kOp, "weight", weight.scalar_type(), [&](auto w_value) {
    for_dtype(kOp, "packed", packed.scalar_type(), [&](auto p_value) {
      if (copy.num_blocks == 0) return;
      const DeviceGuard guard(device);
      using W = std::decay_t<decltype(w_value)>;
      using P = std::decay_t<decltype(p_value)>;
      run<Copy::kScatter, W, P>(kOp, copy, current_stream(device));
    });
  });
}

Tensor swap_in(const Tensor& weight, const Tensor& delta, const Tensor& blocks) {
  constexpr const char* kOp = "swap";
  const int32_t device = weight.get_device_index();
  BlockCopy copy = check_with_packed(kOp, "delta", weight, delta, blocks);
  Tensor saved;
  for_dtype(kOp, "weight", weight.scalar_type(), [&](auto w_value) {
    for_dtype(kOp, "delta", delta.scalar_type(), [&](auto p_value) {
      const DeviceGuard guard(device);
      // As the blocks lie in the matrix: both passes over it are then dense in either orientation.
      saved = torch::stable::new_empty(weight, {copy.num_blocks, copy.block_lines, copy.block_length});
      if (copy.num_blocks == 0) return;
      copy.saved = saved.mutable_data_ptr();
      using W = std::decay_t<decltype(w_value)>;
      using P = std::decay_t<decltype(p_value)>;
      run<Copy::kSwapIn, W, P>(kOp, copy, current_stream(device));
    });
  });
  return saved;
}

void swap_out(const Tensor& weight, const Tensor& saved, const Tensor& blocks) {
  const bool transposed = !weight.is_contiguous();
  block_scatter_(weight, transposed ? torch::stable::transpose(saved, 1, 2) : saved, blocks);
}

}  // namespace smt_cuda
