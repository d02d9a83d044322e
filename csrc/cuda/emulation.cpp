// The kernels run on a CPU, one thread after the other: the same code per thread, loops in the place of the grid.
// Compiled by tests/ops/test_cuda_sources.py, which checks every element; no part of the extension.
#include <algorithm>
#include <memory>
#include <vector>

#include "adamw.cuh"
#include "block_copy.cuh"

using namespace smt_cuda;

namespace {

template <class Body>
void for_dtype(int dtype, Body&& body) {
  switch (dtype) {
    case 0: return body(float{});
    case 1: return body(double{});
    case 2: return body(__nv_bfloat16{});
    case 3: return body(__half{});
    default: return body(uint8_t{});
  }
}

template <Copy kind, class W, class P>
void copy_grid(BlockCopy copy, bool wide) {
  constexpr int kWidth = kCopyWidth<W, P>;
  const uint64_t ctas = tile(copy, wide ? kWidth : 1);
  for (uint64_t work = 0; work < ctas * kCopyThreads; ++work) {
    const auto cta = static_cast<uint32_t>(work / kCopyThreads), thread = static_cast<uint32_t>(work % kCopyThreads);
    if (wide) copy_thread<kind, W, P, kWidth>(copy, cta, thread);
    else copy_thread<kind, W, P, 1>(copy, cta, thread);
  }
}

template <class P, class G, class M>
void adamw_grid(const AdamwBatch& batch, uint32_t ctas) {
  using Thread = AdamwThread<P, G, M>;
  if (batch.numbers.skip && *batch.numbers.skip != 0) return;
  Codebook books[2];
  for (int i = 0; Thread::kCoded && i < 256; ++i) {
    books[0].fill(i, batch.numbers.avg_code);
    books[1].fill(i, batch.numbers.sq_code);
  }
  for (uint32_t cta = 0; cta < ctas; ++cta) {
    const AdamwTensor& tensor = batch.tensors[find_tensor(batch, cta)];
    const AdamwStep step = adamw_step(batch.numbers, *tensor.step);
    for (int work = 0; work < kChunkRounds * kAdamwThreads / kWarp; ++work) {
      constexpr int kWarps = kAdamwThreads / kWarp;
      const int64_t block = Thread::block_of(tensor, cta, work / kWarps, work % kWarps);
      if (block * kQuantBlock >= static_cast<int64_t>(tensor.numel)) continue;
      Thread warp[kWarp];
      uint32_t avg_most = 0, sq_most = 0;
      for (int lane = 0; lane < kWarp; ++lane) {
        warp[lane].update(batch.numbers, step, tensor, block, lane, books);
        avg_most = std::max(avg_most, warp[lane].largest(warp[lane].m));
        sq_most = std::max(sq_most, warp[lane].largest(warp[lane].v));
      }
      for (int lane = 0; lane < kWarp; ++lane) warp[lane].store(tensor, block, lane, avg_most, sq_most, books);
    }
  }
}

}  // namespace

extern "C" {

// Returns whether 16 bytes were moved at a time, as a launch would, or -1 for dtypes that have no kernel.
// kind: 0 gather, 1 scatter, 2 swap in. `strides`: of the packed blocks (B, r, c).
int copy_blocks(int kind, int weight_dtype, int packed_dtype, void* matrix, int64_t rows, int64_t cols, int transposed,
                void* packed, const int64_t* strides, void* saved, const int32_t* index, int64_t num_blocks,
                int64_t block_rows, int64_t block_cols) {
  BlockCopy copy = describe(matrix, rows, cols, transposed, index, num_blocks, block_rows, block_cols);
  set_packed(copy, packed, strides);
  copy.saved = saved;
  int wide = -1;
  for_dtype(weight_dtype, [&](auto w) {
    for_dtype(packed_dtype, [&](auto p) {
      using W = std::decay_t<decltype(w)>;
      using P = std::decay_t<decltype(p)>;
      if constexpr (!std::is_same_v<W, uint8_t> && !std::is_same_v<P, uint8_t>) {
        wide = can_copy_wide<W, P>(copy);
        if constexpr (std::is_same_v<W, P>) {
          if (kind == 0) copy_grid<Copy::kGather, W, P>(copy, wide);
        }
        if (kind == 1) copy_grid<Copy::kScatter, W, P>(copy, wide);
        if (kind == 2) copy_grid<Copy::kSwapIn, W, P>(copy, wide);
      }
    });
  });
  return wide;
}

// Per tensor: seven pointers (parameter, gradient, both moments, both scales, step), then numel, the ordinal and the
// elements that share a step (0: all).
// Returns how many of them were aligned, or -1 for dtypes that have no kernel.
int adamw(int param_dtype, int grad_dtype, int moment_dtype, int64_t count, const int64_t* rows,
          const float* coefficient, const float* skip, const float* avg_code, const float* sq_code, double lr,
          double beta1, double beta2, double eps, double weight_decay, int64_t seed) {
  const auto batch = std::make_unique<AdamwBatch>();
  batch->numbers = adamw_numbers(lr, beta1, beta2, eps, weight_decay);
  batch->numbers.coefficient = coefficient;
  batch->numbers.skip = skip;
  batch->numbers.avg_code = avg_code;
  batch->numbers.sq_code = sq_code;
  int aligned = -1;
  for_dtype(param_dtype, [&](auto p) {
    for_dtype(grad_dtype, [&](auto g) {
      for_dtype(moment_dtype, [&](auto m) {
        using P = std::decay_t<decltype(p)>;
        using G = std::decay_t<decltype(g)>;
        using M = std::decay_t<decltype(m)>;
        constexpr bool kParam = std::is_same_v<P, float> || std::is_same_v<P, __nv_bfloat16>;
        constexpr bool kGrad = !std::is_same_v<G, double> && !std::is_same_v<G, uint8_t>;
        constexpr bool kMoment = !std::is_same_v<M, double> && !std::is_same_v<M, __half>;
        if constexpr (kParam && kGrad && kMoment) {
          aligned = 0;
          uint32_t chunks = 0;
          for (int64_t i = 0; i < count; ++i, rows += 10) {
            AdamwTensor tensor{};
            memcpy(static_cast<void*>(&tensor), rows, 7 * sizeof(int64_t));
            tensor.numel = rows[7];
            tensor.key = adamw_key(seed, static_cast<uint32_t>(rows[8]));
            tensor.per_step = rows[9];
            tensor.aligned = AdamwThread<P, G, M>::is_aligned(tensor);
            tensor.first_chunk = chunks;
            chunks += adamw_chunks(tensor.numel);
            aligned += tensor.aligned;
            batch->tensors[batch->count++] = tensor;
          }
          adamw_grid<P, G, M>(*batch, chunks);
        }
      });
    });
  });
  return aligned;
}

void round_bf16(const float* values, int64_t numel, int64_t seed, uint32_t ordinal, uint32_t salt, uint16_t* rounded) {
  const uint32_t key = fmix32(adamw_key(seed, ordinal) + salt);
  for (int64_t i = 0; i < numel; ++i) {
    rounded[i] = bit_cast<uint16_t>(round_stochastically(values[i], static_cast<uint32_t>(i), key));
  }
}

void nearest_codes(const float* values, int64_t numel, const float* code, uint8_t* codes) {
  Codebook book;
  for (int i = 0; i < 256; ++i) book.fill(i, code);
  for (int64_t i = 0; i < numel; ++i) codes[i] = book.nearest(values[i]);
}

int adamw_capacity() { return kAdamwTensors; }
}
