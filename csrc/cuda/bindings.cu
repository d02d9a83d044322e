// The CUDA implementations of the operations that the CPU library defines.
//
// No kernels here: the compilation passes for GPUs need not read it (2 s of headers each, 2026-11).
#ifndef __CUDA_ARCH__

#include <torch/csrc/stable/library.h>

#include "ops.h"

STABLE_TORCH_LIBRARY_IMPL(smt_native, CUDA, m) {
  m.impl("block_gather", TORCH_BOX(&smt_cuda::block_gather));
  m.impl("block_scatter_", TORCH_BOX(&smt_cuda::block_scatter_));
  m.impl("swap_linear", TORCH_BOX(&smt_cuda::swap_linear));
  m.impl("swap_matmul", TORCH_BOX(&smt_cuda::swap_matmul));
  m.impl("block_adamw_", TORCH_BOX(&smt_cuda::block_adamw_));
}

#endif
