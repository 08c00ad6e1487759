// The fused linear forward in cpo_kernels._cuda; cpo_kernels/kernels/cuda/hopper.py has checked the addresses.
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
                    float cap, Address workspace, Size workspace_floats, Address stats, Address logps, Address exponentials,
                    Size exponentials_stride, Address tile_tops, Address slopes) {
  LinearArgs args{};
  args.hidden = at<void>(hidden);
  args.hidden_stride = hidden_stride;
  args.weight = at<void>(weight);
  args.weight_stride = weight_stride;
  args.rows = rows;
  args.vocab = vocab;
  args.depth = depth;
  args.targets = at<Size>(targets);
  args.row_starts = at<Size>(row_starts);
  args.tokens = tokens;
  args.bias = at<float>(bias);
  args.mult = mult;
  args.cap = cap;
  args.workspace = at<float>(workspace);
  args.workspace_floats = workspace_floats;
  args.stats = {at<float>(stats), at<float>(stats) + rows};
  args.logps = at<float>(logps);
  args.exponentials = at<void>(exponentials);
  args.exponentials_stride = exponentials_stride;
  args.tile_tops = at<float>(tile_tops);
  args.slopes = at<float>(slopes);
  const DType type = half_type(dtype);
  py::gil_scoped_release release;
  linear_forward_sm90({device, at<void>(stream), 0}, type, args);
}

void kept_backward(int device, Address stream, int dtype, Address exponentials, Size exponentials_stride, Size rows, int vocab,
                   Address targets, Address row_starts, Size, Address tile_tops, Address slopes, float slope, Address stats,
                   Address logps, Address coef) {
  LinearBackwardArgs args{};
  args.batch.logits = at<void>(exponentials);
  args.batch.rows = rows;
  args.batch.vocab = vocab;
  args.batch.row_stride = exponentials_stride;
  args.batch.targets = at<Size>(targets);
  args.batch.row_starts = at<Size>(row_starts);
  args.batch.slope = slope;
  args.stats = {at<float>(stats), at<float>(stats) + rows};
  args.tile_tops = at<float>(tile_tops);
  args.slopes = at<float>(slopes);
  args.logps = at<float>(logps);
  args.coef = at<float>(coef);
  const DType type = half_type(dtype);
  py::gil_scoped_release release;
  linear_backward({device, at<void>(stream), 0}, type, args);
}

}  // namespace

void bind_linear(py::module_& m) {
  m.def("linear_workspace", &linear_workspace, py::kw_only(), "device"_a, "rows"_a, "vocab"_a, "depth"_a,
        "Floats that linear_forward needs to work in.");
  m.def("linear_forward", &linear_forward, py::kw_only(), "device"_a, "stream"_a, "dtype"_a, "hidden"_a, "hidden_stride"_a,
        "weight"_a, "weight_stride"_a, "rows"_a, "vocab"_a, "depth"_a, "targets"_a, "row_starts"_a, "tokens"_a, "bias"_a, "mult"_a,
        "cap"_a, "workspace"_a, "workspace_floats"_a, "stats"_a, "logps"_a, "exponentials"_a, "exponentials_stride"_a,
        "tile_tops"_a, "slopes"_a);
  m.def("linear_tiles", &linear_tiles, py::kw_only(), "vocab"_a, "Vocabulary tiles, each with a maximum of its own per row.");
  m.def("linear_backward", &kept_backward, py::kw_only(), "device"_a, "stream"_a, "dtype"_a, "exponentials"_a,
        "exponentials_stride"_a, "rows"_a, "vocab"_a, "targets"_a, "row_starts"_a, "tokens"_a, "tile_tops"_a, "slopes"_a,
        "slope"_a, "stats"_a, "logps"_a, "coef"_a);
}

}  // namespace cpo
