#include "cpu/bind_gemm.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/softmax.h"

namespace py = pybind11;
using namespace pybind11::literals;
using Address = std::uintptr_t;
using Size = std::int64_t;

namespace cpo {
namespace {

GemmOperand operand(Address data, int dtype, Size row_stride, Size col_stride) {
  return {reinterpret_cast<const void*>(data), static_cast<DType>(dtype), row_stride, col_stride};
}

const GemmKernel& kernel_for(const std::string& isa, const GemmArgs& args) {
  const GemmKernel* kernel = gemm_kernel(parse_isa(isa), args.a.dtype, args.b.dtype);
  if (kernel == nullptr) throw std::invalid_argument("there is no matrix product for instruction set '" + isa + "'");
  return *kernel;
}

Size workspace_bytes(const std::string& isa, Size m, Size n, Size k, int a_dtype, int b_dtype, int out_dtype, int threads, bool softmax) {
  const SoftmaxArgs any{};
  GemmArgs args{m, n, k, operand(0, a_dtype, k, 1), operand(0, b_dtype, n, 1), nullptr, static_cast<DType>(out_dtype), n, nullptr, false, threads,
                softmax ? &any : nullptr};
  const GemmKernel& kernel = kernel_for(isa, args);
  const Size whole = kernel.workspace_bytes(args);
  if (!softmax) return whole;
  args.n = std::min(n, kSampleColumns);  // the product that references are chosen from
  args.out_dtype = DType::kF32;
  args.softmax = nullptr;
  return std::max(whole, kernel.workspace_bytes(args));
}

// Bounds of rows and columns, as GemmKernel::shares gives them.
std::vector<std::array<Size, 4>> shares(const std::string& isa, Size m, Size n, Size k, int dtype, int threads, bool softmax) {
  const SoftmaxArgs any{};
  const GemmArgs args{m, n, k, operand(0, dtype, k, 1), operand(0, dtype, n, 1), nullptr, static_cast<DType>(dtype), n, nullptr, false, threads,
                      softmax ? &any : nullptr};
  std::vector<std::array<Size, 4>> found(static_cast<std::size_t>(threads));
  found.resize(static_cast<std::size_t>(kernel_for(isa, args).shares(args, found[0].data())));
  return found;
}

// The most that the three products of a call take, whichever blocks of its rows and tiles of its vocabulary they are of: a
// product of fewer may take more, because blocks are evened out. Beyond what threads pack at once nothing grows.
Size most_workspace_bytes(const std::string& isa, Size rows, Size vocab, Size hidden, int dtype, int threads) {
  constexpr Size kStep = 8, kFew = 4096, kPacked = 2048;
  const Size step = 2 * kStep * threads, limit = kPacked * threads;
  Size most = 0;
  const auto take = [&](Size r, Size w) {
    for (const auto& [m, n, k] : {std::array<Size, 3>{r, w, hidden}, {r, hidden, w}, {w, hidden, r}}) {
      most = std::max(most, workspace_bytes(isa, m, n, k, dtype, dtype, dtype, threads, false));
    }
    most = std::max(most, workspace_bytes(isa, r, w, hidden, dtype, dtype, dtype, threads, true));
  };
  take(rows, vocab);
  for (Size r = kStep; r < std::min(rows, kFew); r += kStep) take(r, vocab);
  for (Size r = step; r < std::min(rows, limit); r += step) take(r, vocab);
  for (Size w = step; w < std::min(vocab, limit); w += step) take(rows, w);
  return most;
}

void gemm(const std::string& isa, Size m, Size n, Size k, Address a, int a_dtype, Size a_row_stride, Size a_col_stride, Address b,
          int b_dtype, Size b_row_stride, Size b_col_stride, Address out, int out_dtype, Size out_stride, Address low, bool accumulate,
          int threads, Address workspace) {
  const GemmArgs args{m, n, k, operand(a, a_dtype, a_row_stride, a_col_stride), operand(b, b_dtype, b_row_stride, b_col_stride),
                      reinterpret_cast<void*>(out), static_cast<DType>(out_dtype), out_stride,
                      reinterpret_cast<std::uint16_t*>(low), accumulate, threads};
  const GemmKernel& kernel = kernel_for(isa, args);
  py::gil_scoped_release release;
  kernel.run(args, reinterpret_cast<void*>(workspace));
}

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

Size softmax_forward(const std::string& isa, Size rows, Size vocab, Size hidden_size, int dtype, Address hidden, Size hidden_row_stride,
                        Size hidden_col_stride, Address weight, Size weight_row_stride, Size weight_col_stride, Address targets,
                        Address row_starts, Size tokens, Address bias, float mult, float cap, float slope, Address out, Size out_stride,
                        Address reference, Address logsum, Address logps, Address sums, Address target_y, Address sample, int threads,
                        Address workspace) {
  const RowBatch batch{at<void>(out), rows, vocab, out_stride, at<Size>(targets), at<Size>(row_starts), tokens, at<float>(bias)};
  const SoftmaxArgs softmax{batch, {mult, cap, slope}, at<float>(reference), at<float>(sums), at<float>(target_y)};
  const GemmArgs args{rows, vocab, hidden_size, operand(hidden, dtype, hidden_row_stride, hidden_col_stride),
                      operand(weight, dtype, weight_col_stride, weight_row_stride), at<void>(out), static_cast<DType>(dtype), out_stride,
                      nullptr, false, threads, &softmax};
  const GemmKernel& kernel = kernel_for(isa, args);
  py::gil_scoped_release release;
  return softmax_of_product(kernel, args, {at<void>(out), out_stride, at<float>(logsum), at<float>(logps)}, at<float>(sample), at<void>(workspace));
}

void softmax_scale(const std::string& isa, Size rows, Size vocab, int dtype, Address targets, Address row_starts, Size tokens, float mult,
                   float cap, float slope, Address out, Size out_stride, Address reference, Address logsum, Address logps, Address coef,
                   Address coef_sum, Address token_coef, Address scale, bool in_place, int threads) {
  const RowBatch batch{at<void>(out), rows, vocab, out_stride, at<Size>(targets), at<Size>(row_starts), tokens, nullptr};
  const ScaleArgs args{batch, {mult, cap, slope}, at<float>(reference), at<float>(logsum), at<float>(logps), at<float>(coef_sum),
                       at<float>(token_coef), at<void>(out), out_stride, at<float>(scale), in_place};
  const GemmArgs of_dtype{0, 0, 0, operand(0, dtype, 0, 1), operand(0, dtype, 0, 1), nullptr, static_cast<DType>(dtype), 0, nullptr, false, 1};
  const GemmKernel& kernel = kernel_for(isa, of_dtype);
  py::gil_scoped_release release;
  scale_softmax(kernel, static_cast<DType>(dtype), args, at<float>(coef), at<float>(coef_sum), at<float>(token_coef), threads);
}

}  // namespace

void bind_gemm(py::module_& m) {
  m.def("has_amx_bf16", &machine_has_amx_bf16);
  m.def("gemm_available", [](const std::string& isa) { return gemm_kernel(parse_isa(isa), DType::kF32, DType::kF32) != nullptr; }, "isa"_a);
  m.def("gemm_workspace_bytes", &workspace_bytes, py::kw_only(), "isa"_a, "m"_a, "n"_a, "k"_a, "a_dtype"_a, "b_dtype"_a, "out_dtype"_a,
        "threads"_a, "softmax"_a = false);
  m.def("gemm_shares", &shares, py::kw_only(), "isa"_a, "m"_a, "n"_a, "k"_a, "dtype"_a, "threads"_a, "softmax"_a);
  m.attr("softmax_sum_columns") = kSumColumns;
  m.attr("softmax_sample_columns") = kSampleColumns;
  m.def("most_workspace_bytes", &most_workspace_bytes, py::kw_only(), "isa"_a, "rows"_a, "vocab"_a, "hidden"_a, "dtype"_a, "threads"_a);
  m.def("gemm", &gemm, py::kw_only(), "isa"_a, "m"_a, "n"_a, "k"_a, "a"_a, "a_dtype"_a, "a_row_stride"_a, "a_col_stride"_a, "b"_a,
        "b_dtype"_a, "b_row_stride"_a, "b_col_stride"_a, "out"_a, "out_dtype"_a, "out_stride"_a, "low"_a, "accumulate"_a, "threads"_a, "workspace"_a);
  m.def("softmax_forward", &softmax_forward, py::kw_only(), "isa"_a, "rows"_a, "vocab"_a, "hidden_size"_a, "dtype"_a, "hidden"_a,
        "hidden_row_stride"_a, "hidden_col_stride"_a, "weight"_a, "weight_row_stride"_a, "weight_col_stride"_a, "targets"_a, "row_starts"_a,
        "tokens"_a, "bias"_a, "mult"_a, "cap"_a, "slope"_a, "out"_a, "out_stride"_a, "reference"_a, "logsum"_a, "logps"_a, "sums"_a,
        "target_y"_a, "sample"_a, "threads"_a, "workspace"_a);
  m.def("softmax_scale", &softmax_scale, py::kw_only(), "isa"_a, "rows"_a, "vocab"_a, "dtype"_a, "targets"_a, "row_starts"_a, "tokens"_a,
        "mult"_a, "cap"_a, "slope"_a, "out"_a, "out_stride"_a, "reference"_a, "logsum"_a, "logps"_a, "coef"_a, "coef_sum"_a, "token_coef"_a,
        "scale"_a, "in_place"_a, "threads"_a);
}

}  // namespace cpo
