// dW[b] = dY[:, rows_b]^T X[:, cols_b] for the chosen blocks: A^T B with A the side that is broadcast and B the side
// that fills the vector registers.
//
// A thread owns whole tiles of the result, so no two threads add to one element, and goes through the tokens in chunks
// with all its tiles, so that the part of dY and X in use stays in its cache. Every element is summed in the order of the
// tokens, chunk by chunk, whatever the number of threads.

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <type_traits>

#include "checks.h"
#include "isa.h"
#include "ops.h"

namespace smt {
namespace {

// Rows and columns of a tile of the result at most: its panels of A and B for one chunk fill a part of the L2 cache.
constexpr int64_t kTaskRows = 128, kTaskColumns = 256;
// Tasks that are few enough to be cut into fewer rows, so that every thread has some.
constexpr int64_t kFewTasks = 8, kFewestRows = 16;
// Tokens of a chunk: short where a block's cost is reading dY and X, long where it is multiplying.
constexpr int64_t kChunk = 256, kSmallChunk = 64, kSmallArea = 64 * 64;
// Multiply-adds worth a thread of their own.
constexpr int64_t kGrain = 1 << 18;

#define SMT_KERNEL_TEXT "grad_kernel.inc"
#include "each_isa.inc"

// One operand, `(tokens, features)`, read in stripes of `width` columns.
struct Operand {
  const void* data;
  ScalarType dtype;
  int64_t element, token_stride, stride, features, width;

  const char* at(int64_t token, int64_t column) const {
    return static_cast<const char*>(data) + (token * token_stride + column * stride) * element;
  }
  int64_t valid(int64_t stripe) const { return std::min(width, features - stripe * width); }
};

// A tile of the result: rows `first_row` to `last_row` of stripe `stripe` of A, by `count` blocks from `first` on, side
// by side; of a single block, its columns `first_column` to `last_column`.
struct Task {
  int64_t stripe, first_row, last_row, first, count, first_column, last_column;
  int64_t rows() const { return last_row - first_row; }
  int64_t columns(int64_t width) const { return count == 1 ? last_column - first_column : count * width; }
};

template <class T>
struct Problem {
  Operand a, b;
  // Strides of the result: from block to block, and along A and B in a block.
  int64_t block_step, a_step, b_step;
  T* grad;
  int64_t tokens;
  // Stripes of every block, sorted by (A, B), and which block of the result it is.
  std::vector<int64_t> a_stripe, b_stripe, block;
};

// Memory that a thread keeps from call to call, because the first touch of fresh pages is slow. Zeroed once, so that
// what pads a panel is a number.
template <class T>
class Scratch {
 public:
  T* get(size_t size) {
    if (size_ < size) {
      memory_.reset();
      memory_.reset(new T[size]());
      size_ = size;
    }
    return memory_.get();
  }

 private:
  std::unique_ptr<T[]> memory_;
  size_t size_ = 0;
};

template <class T>
struct Scratches {
  Scratch<T> a, b, out;
  static Scratches& of_thread() {
    static thread_local Scratches scratches;
    return scratches;
  }
};

template <class T>
void pack_columns(const Operand& from, int64_t first, int64_t count, int64_t token, int64_t tokens, T* to, int64_t ld) {
  for_dtype(from.dtype, [&](auto zero) {
    using S = decltype(zero);
    SMT_KERNEL(pack<T, S>)
    (reinterpret_cast<const S*>(from.at(token, first)), from.token_stride, from.stride, tokens, count, to, ld);
  });
}

template <class T>
class Worker {
 public:
  explicit Worker(const Problem<T>& problem)
      : p_(problem),
        panel_(SMT_KERNEL(panel_columns<T>)()),
        lanes_(SMT_KERNEL(lanes<T>)()),
        a_panel_(Scratches<T>::of_thread().a.get(kChunk * kTaskRows)),
        b_panel_(Scratches<T>::of_thread().b.get(kChunk * (kTaskColumns + panel_))),
        out_(Scratches<T>::of_thread().out.get(kTaskRows * panel_)) {}

  void run(const std::vector<Task>& tasks, int64_t begin, int64_t end, int64_t chunk) {
    for (int64_t token = 0; token < p_.tokens; token += chunk) {
      for (int64_t i = begin; i < end; ++i) {
        const bool last = i + 1 == end;
        prefetch(tasks[last ? begin : i + 1], last ? token + chunk : token, chunk);
        step(tasks[i], token, std::min(chunk, p_.tokens - token));
      }
    }
  }

 private:
  // Into the L2 cache what the next step reads: rows of few lines each, far apart, which no hardware foresees.
  void prefetch(const Task& task, int64_t token, int64_t chunk) {
    if (task.count > 1 || p_.a.stride != 1 || p_.b.stride != 1) return;
    const int64_t a = task.stripe * p_.a.width + task.first_row;
    const int64_t b = p_.b_stripe[task.first] * p_.b.width + task.first_column;
    const int64_t b_bytes = (task.last_column - task.first_column) * p_.b.element;
    for (int64_t t = token; t < std::min(token + chunk, p_.tokens); ++t) {
      for (int64_t o = 0; o < task.rows() * p_.a.element; o += 64) __builtin_prefetch(p_.a.at(t, a) + o, 0, 2);
      for (int64_t o = 0; o < b_bytes; o += 64) __builtin_prefetch(p_.b.at(t, b) + o, 0, 2);
    }
  }

  void step(const Task& task, int64_t token, int64_t tokens) {
    const int64_t rows = task.rows(), columns = task.columns(p_.b.width);
    const int64_t a_first = task.stripe * p_.a.width + task.first_row;
    const bool direct = task.count == 1 && p_.b_step == 1;
    const bool narrow = direct && columns == p_.b.width && SMT_KERNEL(has_narrow<T>)(rows, columns);
    T* grad = p_.grad + p_.block[task.first] * p_.block_step + task.first_row * p_.a_step + task.first_column;
    if (narrow || (direct && columns == lanes_)) {
      int64_t lda, ldb;
      const T* a = view(p_.a, a_first, rows, token, tokens, a_panel_, &lda);
      const int64_t b_first = p_.b_stripe[task.first] * p_.b.width + task.first_column;
      const T* b = view(p_.b, b_first, columns, token, tokens, b_panel_, &ldb);
      const auto kernel = narrow ? SMT_KERNEL(narrow<T>) : SMT_KERNEL(multiply<T>);
      kernel(rows, columns, tokens, a, lda, b, ldb, grad, p_.a_step);
      return;
    }
    const auto multiply = SMT_KERNEL(multiply<T>);
    pack_columns(p_.a, a_first, rows, token, tokens, a_panel_, rows);
    pack_b(task, token, tokens);
    for (int64_t j = 0; j < columns; j += panel_) {
      const int64_t real = std::min(panel_, columns - j);
      const int64_t wide = (real + lanes_ - 1) / lanes_ * lanes_;
      const T* b = b_panel_ + j * tokens;
      if (direct && real == wide) {
        multiply(rows, wide, tokens, a_panel_, rows, b, panel_, grad + j, p_.a_step);
      } else {
        std::fill(out_, out_ + rows * panel_, T(0));
        multiply(rows, wide, tokens, a_panel_, rows, b, panel_, out_, panel_);
        spread(task, j, real);
      }
    }
  }

  // The operand itself where the kernels can read it, else a packed copy.
  const T* view(const Operand& x, int64_t first, int64_t count, int64_t token, int64_t tokens, T* copy, int64_t* ld) {
    constexpr ScalarType kOwn = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
    if (x.dtype == kOwn && x.stride == 1) {
      *ld = x.token_stride;
      return reinterpret_cast<const T*>(x.at(token, first));
    }
    *ld = count;
    pack_columns(x, first, count, token, tokens, copy, count);
    return copy;
  }

  // The columns of a task as panels of `panel_` columns, each `[token][column]`. What lies right of the last real column
  // is never added to the result.
  void pack_b(const Task& task, int64_t token, int64_t tokens) {
    for (int64_t k = 0, at = 0; k < task.count; ++k) {
      const int64_t stripe = p_.b_stripe[task.first + k];
      const int64_t end = task.count == 1 ? task.last_column : p_.b.width;
      for (int64_t j = task.count == 1 ? task.first_column : 0; j < end;) {
        const int64_t inside = at % panel_;
        const int64_t run = std::min(end - j, panel_ - inside);
        const int64_t valid = std::clamp<int64_t>(p_.b.valid(stripe) - j, 0, run);
        T* to = b_panel_ + (at - inside) * tokens + inside;
        pack_columns(p_.b, stripe * p_.b.width + j, valid, token, tokens, to, panel_);
        if (valid < run)
          for (int64_t t = 0; t < tokens; ++t) std::fill(to + t * panel_ + valid, to + t * panel_ + run, T(0));
        j += run;
        at += run;
      }
    }
  }

  // Adds `out_` to the blocks whose columns it holds, from column `column` of the task on.
  void spread(const Task& task, int64_t column, int64_t count) {
    int64_t k = task.count == 1 ? 0 : column / p_.b.width;
    int64_t j = task.count == 1 ? task.first_column + column : column % p_.b.width;
    for (int64_t q = 0; q < count; ++q) {
      T* to = p_.grad + p_.block[task.first + k] * p_.block_step + task.first_row * p_.a_step + j * p_.b_step;
      for (int64_t i = 0; i < task.rows(); ++i) to[i * p_.a_step] += out_[i * panel_ + q];
      if (++j == p_.b.width && task.count > 1) j = 0, ++k;
    }
  }

  const Problem<T>& p_;
  const int64_t panel_, lanes_;
  T *const a_panel_, *const b_panel_, *const out_;
};

template <class T>
std::vector<Task> tasks_of(const Problem<T>& p) {
  const int64_t panel = SMT_KERNEL(panel_columns<T>)(), count = p.block.size();
  const int64_t together = p.b.width >= panel ? 1 : kTaskColumns / p.b.width;
  const int64_t across = count * ((p.b.width - 1) / kTaskColumns + 1);
  int64_t task_rows = kTaskRows;
  while (task_rows > kFewestRows && across * ((p.a.width - 1) / task_rows + 1) < kFewTasks) task_rows /= 2;
  std::vector<Task> tasks;
  for (int64_t first = 0, last; first < count; first = last) {
    const int64_t stripe = p.a_stripe[first];
    for (last = first + 1; last < count && last - first < together && p.a_stripe[last] == stripe;) ++last;
    const int64_t columns = last - first == 1 ? p.b.valid(p.b_stripe[first]) : 1;
    for (int64_t i = 0; i < p.a.valid(stripe); i += task_rows)
      for (int64_t j = 0; j < columns; j += kTaskColumns)
        tasks.push_back({stripe, i, std::min(i + task_rows, p.a.valid(stripe)), first, last - first, j,
                         std::min(j + kTaskColumns, columns)});
  }
  return tasks;
}

template <class T>
void run(const Blocks& blocks, const Operand& dy, const Operand& x, T* grad, int64_t tokens) {
  const int64_t r = dy.width, c = x.width;
  // The columns fill the registers, unless the rows would be fewer than a tile has: then the other way round.
  const bool turned = r < 8 && c > r;
  Problem<T> p{turned ? x : dy, turned ? dy : x, r * c, turned ? 1 : c, turned ? c : 1, grad, tokens, {}, {}, {}};
  for (int64_t b = 0; b < blocks.count; ++b) p.block.push_back(b);
  const auto a_of = [&](int64_t b) { return turned ? blocks.col(b) : blocks.row(b); };
  const auto b_of = [&](int64_t b) { return turned ? blocks.row(b) : blocks.col(b); };
  std::sort(p.block.begin(), p.block.end(), [&](int64_t i, int64_t j) {
    return a_of(i) != a_of(j) ? a_of(i) < a_of(j) : b_of(i) < b_of(j);
  });
  for (const int64_t b : p.block) {
    p.a_stripe.push_back(a_of(b));
    p.b_stripe.push_back(b_of(b));
  }
  const std::vector<Task> tasks = tasks_of(p);
  int64_t area = 0;
  for (const Task& task : tasks) area = std::max(area, task.rows() * task.columns(p.b.width));
  const int64_t chunk = area <= kSmallArea ? kSmallChunk : kChunk;
  const int64_t work = blocks.count * r * c * tokens / tasks.size() + 1;
  torch::stable::parallel_for(0, tasks.size(), std::max<int64_t>(1, kGrain / work),
                              [&](int64_t begin, int64_t end) { Worker<T>(p).run(tasks, begin, end, chunk); });
}

Operand operand_of(const char* name, const Tensor& tensor, int64_t width) {
  check_float("block_grad_", name, tensor);
  STD_TORCH_CHECK(tensor.dim() == 2, "block_grad_: ", name, " has shape ", shape_of(tensor),
                  "; it must be (tokens, features)");
  return {tensor.const_data_ptr(), tensor.scalar_type(), static_cast<int64_t>(tensor.element_size()), tensor.stride(0),
          tensor.stride(1), tensor.size(1), width};
}

}  // namespace

void block_grad_(const Tensor& grad, const Tensor& dy, const Tensor& x, const Tensor& blocks, bool accumulate) {
  check_packed("block_grad_", "grad", grad, blocks);
  const int64_t r = grad.size(1), c = grad.size(2);
  const Operand dy_operand = operand_of("dy", dy, r), x_operand = operand_of("x", x, c);
  STD_TORCH_CHECK(dy.size(0) == x.size(0), "block_grad_: dy has ", dy.size(0), " tokens and x has ", x.size(0),
                  "; both must come from one pass");
  const bool wide = dy.scalar_type() == ScalarType::Double || x.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(grad.scalar_type() == (wide ? ScalarType::Double : ScalarType::Float) && grad.is_contiguous(),
                  "block_grad_: grad has dtype ", torch::headeronly::toString(grad.scalar_type()),
                  "; it must be contiguous and ", wide ? "float64, as an operand is" : "float32");
  const Blocks list = check_blocks("block_grad_", blocks, dy.size(1), x.size(1), r, c);
  if (!accumulate && grad.numel() > 0) std::memset(grad.mutable_data_ptr(), 0, grad.numel() * grad.element_size());
  if (list.count == 0 || dy.size(0) == 0) return;
  if (wide)
    run<double>(list, dy_operand, x_operand, static_cast<double*>(grad.mutable_data_ptr()), dy.size(0));
  else
    run<float>(list, dy_operand, x_operand, static_cast<float*>(grad.mutable_data_ptr()), dy.size(0));
}

}  // namespace smt
