#include "cpu/bind_gemm.h"

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>

#include "cpu/gemm.h"

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

Size workspace_bytes(const std::string& isa, Size m, Size n, Size k, int a_dtype, int b_dtype, int out_dtype, int threads) {
  const GemmArgs args{m, n, k, operand(0, a_dtype, k, 1), operand(0, b_dtype, n, 1), nullptr, static_cast<DType>(out_dtype), n, nullptr, false, threads};
  return kernel_for(isa, args).workspace_bytes(args);
}

// The most that the three products of a call take, whichever blocks of its rows and tiles of its vocabulary they are of: a
// product of fewer may take more, because blocks are evened out. Beyond what threads pack at once nothing grows.
Size most_workspace_bytes(const std::string& isa, Size rows, Size vocab, Size hidden, int dtype, int threads) {
  constexpr Size kStep = 8, kFew = 4096, kPacked = 2048;
  const Size step = 2 * kStep * threads, limit = kPacked * threads;
  Size most = 0;
  const auto take = [&](Size r, Size w) {
    for (const auto& [m, n, k] : {std::array<Size, 3>{r, w, hidden}, {r, hidden, w}, {w, hidden, r}}) {
      most = std::max(most, workspace_bytes(isa, m, n, k, dtype, dtype, dtype, threads));
    }
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

}  // namespace

void bind_gemm(py::module_& m) {
  m.def("has_amx_bf16", &machine_has_amx_bf16);
  m.def("gemm_available", [](const std::string& isa) { return gemm_kernel(parse_isa(isa), DType::kF32, DType::kF32) != nullptr; }, "isa"_a);
  m.def("gemm_workspace_bytes", &workspace_bytes, py::kw_only(), "isa"_a, "m"_a, "n"_a, "k"_a, "a_dtype"_a, "b_dtype"_a, "out_dtype"_a,
        "threads"_a);
  m.def("most_workspace_bytes", &most_workspace_bytes, py::kw_only(), "isa"_a, "rows"_a, "vocab"_a, "hidden"_a, "dtype"_a, "threads"_a);
  m.def("gemm", &gemm, py::kw_only(), "isa"_a, "m"_a, "n"_a, "k"_a, "a"_a, "a_dtype"_a, "a_row_stride"_a, "a_col_stride"_a, "b"_a,
        "b_dtype"_a, "b_row_stride"_a, "b_col_stride"_a, "out"_a, "out_dtype"_a, "out_stride"_a, "low"_a, "accumulate"_a, "threads"_a, "workspace"_a);
}

}  // namespace cpo
