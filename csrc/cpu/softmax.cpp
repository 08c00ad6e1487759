#include "cpu/softmax.h"

#include <algorithm>
#include <atomic>

#include "cpu/row_dispatch.h"
#include "cpu/row_tokens.h"

namespace cpo {
namespace {

// Columns at equal distances; where there are fewer than a sample holds, the first one stands for what is missing.
void choose_references(const GemmKernel& kernel, const GemmArgs& args, float* sample, void* workspace) {
  const std::int64_t step = std::max<std::int64_t>(1, args.n / kSampleColumns), columns = std::min(args.n, kSampleColumns);
  GemmArgs few = args;
  few.n = columns;
  few.b.col_stride = args.b.col_stride * step;
  few.out = sample;
  few.out_dtype = DType::kF32;
  few.out_stride = kSampleColumns;
  few.softmax = nullptr;
  kernel.run(few, workspace);
  const float* const bias = args.softmax->batch.bias;
  float sample_bias[kSampleColumns];
  for (std::int64_t j = 0; j < kSampleColumns; ++j) sample_bias[j] = bias ? bias[j < columns ? j * step : 0] : 0.0f;
  for (std::int64_t row = 0; row < args.m; ++row) {
    float* const x = sample + row * kSampleColumns;
    std::fill(x + columns, x + kSampleColumns, x[0]);
  }
  kernel.softmax->choose(*args.softmax, sample, bias ? sample_bias : nullptr, 0, args.m);
}

}  // namespace

std::int64_t softmax_of_product(const GemmKernel& kernel, const GemmArgs& args, const SoftmaxResult& result, float* sample, void* workspace) {
  const SoftmaxArgs& softmax = *args.softmax;
  check_tokens(softmax.batch);
  if (sample) choose_references(kernel, args, sample, workspace);
  kernel.run(args, workspace);
  std::atomic<std::int64_t> far{0};
  const auto finish = kernel.softmax->finish[static_cast<int>(args.out_dtype)];
  for_row_shares(softmax.batch, args.threads, [&](std::int64_t begin, std::int64_t end) { far += finish(softmax, result, begin, end); });
  return far;
}

void scale_softmax(const GemmKernel& kernel, DType dtype, const ScaleArgs& args, const float* coef, float* coef_sum, float* token_coef,
                   int threads) {
  check_tokens(args.batch);
  sum_coefs(args.batch, coef, coef_sum, token_coef);
  const auto scale = kernel.softmax->scale[static_cast<int>(dtype)];
  for_row_shares(args.batch, threads, [&](std::int64_t begin, std::int64_t end) { scale(args, begin, end); });
}

}  // namespace cpo
