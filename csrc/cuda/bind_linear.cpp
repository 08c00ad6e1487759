// The fused linear forward in cpo_kernels._cuda; cpo_kernels/backends/native_hopper.py has checked the addresses.
#include "cuda/bind_linear.h"

#include <stdexcept>
#include <string>

#include "cuda/linear_sm90.h"

namespace cpo {
namespace {

namespace py = pybind11;
using namespace pybind11::literals;
using Address = std::uintptr_t;
using Size = std::int64_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

DType half_type(int code) {
  const auto dtype = static_cast<DType>(code);
  if (dtype == DType::kBF16 || dtype == DType::kF16) return dtype;
  throw std::invalid_argument("dtype code " + std::to_string(code) + "; expected 1 (bfloat16) or 2 (float16)");
}

void linear_forward(int device, Address stream, int dtype, Address hidden, Size hidden_stride, Address weight, Size weight_stride,
                    Size rows, Size vocab, Size depth, Address targets, Address row_starts, Size tokens, Address bias, float mult,
                    float cap, Address workspace, Size workspace_floats, Address stats, Address logps) {
  const LinearArgs args{at<void>(hidden), hidden_stride,     at<void>(weight),
                        weight_stride,    rows,              vocab,
                        depth,            at<Size>(targets), at<Size>(row_starts),
                        tokens,           at<float>(bias),   mult,
                        cap,              at<float>(workspace), workspace_floats,
                        {at<float>(stats), at<float>(stats) + rows}, at<float>(logps)};
  const DType type = half_type(dtype);
  py::gil_scoped_release release;
  linear_forward_sm90({device, at<void>(stream), 0}, type, args);
}

}  // namespace

void bind_linear(py::module_& m) {
  m.def("linear_workspace", &linear_workspace, py::kw_only(), "device"_a, "rows"_a, "vocab"_a, "depth"_a,
        "Floats that linear_forward needs to work in.");
  m.def("linear_forward", &linear_forward, py::kw_only(), "device"_a, "stream"_a, "dtype"_a, "hidden"_a, "hidden_stride"_a,
        "weight"_a, "weight_stride"_a, "rows"_a, "vocab"_a, "depth"_a, "targets"_a, "row_starts"_a, "tokens"_a, "bias"_a, "mult"_a,
        "cap"_a, "workspace"_a, "workspace_floats"_a, "stats"_a, "logps"_a);
}

}  // namespace cpo
