// What an instruction set's row kernels make of a problem.
#pragma once

#include "cases.h"
#include "cpu/row_dispatch.h"

namespace vectors {

constexpr int kThreads = 2;  // the largest problems are shared out

// A gradient as it lies in memory, guards and all.
struct Gradient {
  DType dtype;
  std::int64_t row_stride, first;  // elements
  std::vector<std::uint8_t> buffer;

  Gradient(const Problem& p, DType out_dtype) : dtype(out_dtype), buffer(p.buffer) {
    const std::int64_t ratio = size_of(p.spec.dtype) / size_of(dtype);
    row_stride = p.row_stride * ratio;
    first = p.first * ratio;
  }
  float at(std::int64_t row, std::int64_t column) const {
    return value_of(buffer.data() + (first + row * row_stride + column) * size_of(dtype), dtype);
  }
};

// Results start as NaN, or as the guard, so that one that is not written is seen.
struct Forward {
  std::vector<float> max, logsum, logps;

  explicit Forward(const Problem& p) : max(static_cast<std::size_t>(p.rows), kNaN), logsum(max), logps(p.targets.size(), kNaN) {}
};

inline Forward run_forward(cpo::Isa isa, const Problem& p) {
  Forward out(p);
  const cpo::ForwardArgs args{p.batch(p.buffer.data()), p.spec.head->transform, out.max.data(), out.logsum.data(), out.logps.data()};
  cpo::row_forward(isa, p.spec.dtype, args, kThreads);
  return out;
}

// The gradient written over the logits, in their dtype or in 16 bits over float32.
inline Gradient run_backward(cpo::Isa isa, const Problem& p, const Forward& stats, DType out_dtype) {
  Gradient out(p, out_dtype);
  std::vector<float> coef_sum(static_cast<std::size_t>(p.rows)), token_grad(p.targets.size());
  const cpo::RowBatch batch = p.batch(out.buffer.data());
  const cpo::BackwardArgs args{batch,           p.spec.head->transform, stats.max.data(),  stats.logsum.data(),
                               p.coef.data(),   coef_sum.data(),        token_grad.data(), const_cast<void*>(batch.logits),
                               out.row_stride};
  cpo::row_backward(isa, p.spec.dtype, out_dtype, args, coef_sum.data(), kThreads);
  return out;
}

struct Columns {
  std::vector<float> largest, total;

  explicit Columns(const Problem& p) : largest(static_cast<std::size_t>(p.spec.vocab), kNaN), total(largest) {}
};

inline Columns run_column_stats(cpo::Isa isa, const Problem& p) {
  Columns out(p);
  const cpo::RowBatch batch = p.batch(p.buffer.data());
  const cpo::ColumnArgs args{batch.logits, p.rows, p.spec.vocab, p.row_stride, out.largest.data(), out.total.data()};
  cpo::column_stats(isa, p.spec.dtype, args, kThreads);
  return out;
}

struct Taken {
  std::vector<std::int64_t> rows, columns;
  std::vector<std::uint8_t> out;  // (k, c + 1) of the logits' dtype

  explicit Taken(const Problem& p) : rows{6, 0, 7} {
    for (std::int64_t j = p.spec.vocab - 1; j >= 0; j -= 3) columns.push_back(j);
    out.assign(rows.size() * (columns.size() + 1) * static_cast<std::size_t>(size_of(p.spec.dtype)), kGuard);
  }
  const std::uint8_t* at(const Problem& p, std::size_t row, std::size_t column) const {
    return out.data() + (row * (columns.size() + 1) + column) * static_cast<std::size_t>(size_of(p.spec.dtype));
  }
};

inline Taken run_take_columns(cpo::Isa isa, const Problem& p) {
  Taken taken(p);
  const cpo::RowBatch batch = p.batch(p.buffer.data());
  const cpo::TakeArgs args{batch.logits,         p.rows,
                           p.spec.vocab,         p.row_stride,
                           taken.rows.data(),    static_cast<std::int64_t>(taken.rows.size()),
                           taken.columns.data(), static_cast<std::int64_t>(taken.columns.size()),
                           taken.out.data()};
  cpo::take_columns(isa, p.spec.dtype, args, kThreads);
  return taken;
}

// The dtypes of a gradient of logits of this one.
inline std::vector<DType> gradient_dtypes(DType dtype) {
  if (dtype == DType::kF32) return {DType::kF32, DType::kBF16, DType::kF16};
  return {dtype};
}

struct Results {
  Forward forward;
  std::vector<Gradient> gradients;
  Columns columns;
  Taken taken;

  // Room for them.
  explicit Results(const Problem& p) : forward(p), columns(p), taken(p) {
    for (const DType dtype : gradient_dtypes(p.spec.dtype)) gradients.emplace_back(p, dtype);
  }
  // Gradients start from given statistics, so that they are compared on their own.
  Results(cpo::Isa isa, const Problem& p, const Forward& stats)
      : forward(run_forward(isa, p)), columns(run_column_stats(isa, p)), taken(run_take_columns(isa, p)) {
    for (const DType dtype : gradient_dtypes(p.spec.dtype)) gradients.push_back(run_backward(isa, p, stats, dtype));
  }
};

}  // namespace vectors
