// cpo_kernels._cuda: addresses and sizes in, nothing of torch. cpo_kernels/kernels/cuda/ has checked them.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cuda/bind_linear.h"
#include "cuda/bind_linear.h"
#include "cuda/device.h"
#include "cuda/launch.h"

namespace py = pybind11;
using namespace pybind11::literals;
using Address = std::uintptr_t;
using Size = std::int64_t;

namespace {

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

cpo::DType parse_dtype(int code) {
  if (code < 0 || code >= cpo::kNumDTypes) {
    throw std::invalid_argument("dtype code " + std::to_string(code) + "; expected 0 (float32), 1 (bfloat16) or 2 (float16)");
  }
  return static_cast<cpo::DType>(code);
}

cpo::Queue queue(int device, Address stream, int threads) { return {device, at<void>(stream), threads}; }

cpo::RowBatch rows_of(Address logits, Size rows, int vocab, Size row_stride, Address targets, Address row_starts, Address bias,
                      float mult, float cap, float slope) {
  return {at<void>(logits), rows, vocab, row_stride, at<Size>(targets), at<Size>(row_starts), at<float>(bias), mult, cap, slope};
}

cpo::RowStats stats_of(Address stats, Size rows) { return {at<float>(stats), at<float>(stats) + rows}; }

cpo::Preference preference_of(int loss, double beta, double label_smoothing) {
  if (loss < 0 || loss >= cpo::kNumLosses) {
    throw std::invalid_argument("loss code " + std::to_string(loss) + "; expected 0 to " + std::to_string(cpo::kNumLosses - 1));
  }
  return {static_cast<cpo::Loss>(loss), beta, label_smoothing};
}

cpo::ContrastArgs contrast_of(Address logps, Address token_starts, Address segment_starts, Address lengths, Address ref_logps,
                              Address ranks, Address num_target_tokens, Address sums, Address coef, Size groups, int max_candidates,
                              bool length_normalized, int loss, double beta, double label_smoothing, double margin,
                              double contrast_scale, double mle_scale) {
  return {at<float>(logps),     at<Size>(token_starts), at<Size>(segment_starts),
          at<Size>(lengths),    at<float>(ref_logps),   at<Size>(ranks),
          at<double>(num_target_tokens), at<float>(sums), at<float>(coef),
          groups,               max_candidates,         length_normalized,
          preference_of(loss, beta, label_smoothing),   margin,
          contrast_scale,       mle_scale};
}

// The sizes without a name are what the emulator of the tests checks accesses by.

void row_forward(int device, Address stream, int threads, int dtype, Address logits, Size rows, int vocab, Size row_stride,
                 Address targets, Address row_starts, Size, Address bias, float mult, float cap, float slope, Address stats,
                 Address logps) {
  const cpo::RowBatch batch = rows_of(logits, rows, vocab, row_stride, targets, row_starts, bias, mult, cap, slope);
  const cpo::ForwardArgs args{batch, stats_of(stats, rows), at<float>(logps)};
  const cpo::DType type = parse_dtype(dtype);
  py::gil_scoped_release release;
  cpo::row_forward(queue(device, stream, threads), type, args);
}

void row_backward(int device, Address stream, int threads, int dtype, int out_dtype, Address logits, Size rows, int vocab,
                  Size row_stride, Address targets, Address row_starts, Size, Address bias, float mult, float cap, float slope,
                  Address stats, Address coef, Address token_grad, Address out, Size out_stride, Address scale) {
  const cpo::RowBatch batch = rows_of(logits, rows, vocab, row_stride, targets, row_starts, bias, mult, cap, slope);
  const cpo::BackwardArgs args{batch, stats_of(stats, rows), at<float>(coef), at<float>(token_grad), at<void>(out), out_stride,
                               at<float>(scale)};
  const cpo::DType type = parse_dtype(dtype), out_type = parse_dtype(out_dtype);
  py::gil_scoped_release release;
  cpo::row_backward(queue(device, stream, threads), type, out_type, args);
}

void unit_forward(int device, Address stream, int threads, int dtype, int out_dtype, Address logits, Size rows, int vocab,
                  Size row_stride, Address targets, Address row_starts, Size, Address bias, float mult, float cap, float slope,
                  Address stats, Address logps, Address out, Size out_stride, Size slice_bytes) {
  const cpo::RowBatch batch = rows_of(logits, rows, vocab, row_stride, targets, row_starts, bias, mult, cap, slope);
  const cpo::ForwardArgs forward{batch, stats_of(stats, rows), at<float>(logps)};
  const cpo::UnitArgs args{forward, at<void>(out), out_stride, slice_bytes};
  const cpo::DType type = parse_dtype(dtype), out_type = parse_dtype(out_dtype);
  py::gil_scoped_release release;
  cpo::unit_forward(queue(device, stream, threads), type, out_type, args);
}

void contrast(int device, Address stream, int threads, Address logps, Address token_starts, Address segment_starts, Address lengths,
              Address ref_logps, Address ranks, Address num_target_tokens, Size, Size, Address sums, Address coef, Size groups,
              int max_candidates, bool length_normalized, int loss, double beta, double label_smoothing, double margin,
              double contrast_scale, double mle_scale) {
  const cpo::ContrastArgs args =
      contrast_of(logps, token_starts, segment_starts, lengths, ref_logps, ranks, num_target_tokens, sums, coef, groups, max_candidates,
                  length_normalized, loss, beta, label_smoothing, margin, contrast_scale, mle_scale);
  py::gil_scoped_release release;
  cpo::contrast(queue(device, stream, threads), args);
}

void cpo_loss(int device, Address stream, int threads, int dtype, Address logits, Size rows, int vocab, Size row_stride, Address targets,
              Address row_starts, Size, Address bias, float mult, float cap, float slope, Address stats, Address grad, Size grad_stride,
              Address logps, Address token_starts, Address segment_starts, Address lengths, Address ref_logps, Address ranks,
              Address num_target_tokens, Size, Size, Address sums, Address coef, Size groups, int max_candidates, bool length_normalized,
              int loss, double beta, double label_smoothing, double margin, double contrast_scale, double mle_scale) {
  const cpo::RowBatch batch = rows_of(logits, rows, vocab, row_stride, targets, row_starts, bias, mult, cap, slope);
  const cpo::ContrastArgs contrast =
      contrast_of(logps, token_starts, segment_starts, lengths, ref_logps, ranks, num_target_tokens, sums, coef, groups, max_candidates,
                  length_normalized, loss, beta, label_smoothing, margin, contrast_scale, mle_scale);
  const cpo::LossArgs args{{batch, stats_of(stats, rows), at<float>(logps)}, contrast, at<void>(grad), grad_stride};
  const cpo::DType type = parse_dtype(dtype);
  py::gil_scoped_release release;
  cpo::cpo_loss(queue(device, stream, threads), type, args);
}

void scale(int device, Address stream, int dtype, Address numbers, Size count, Address factor) {
  const cpo::DType type = parse_dtype(dtype);
  py::gil_scoped_release release;
  cpo::scale(queue(device, stream, 0), type, {at<void>(numbers), count, at<float>(factor)});
}

void check_targets(int device, Address stream, Address targets, Size count, Size vocab) {
  py::gil_scoped_release release;
  cpo::check_targets(queue(device, stream, 0), {at<Size>(targets), count, vocab});
}

}  // namespace

PYBIND11_MODULE(_cuda, m, py::mod_gil_not_used()) {
  m.doc() = "Kernels on NVIDIA GPUs; device addresses, sizes and a stream in. Nothing here waits for the device.";
  m.def("runtime_version", &cpo::runtime_version, "CUDA version of the build, as 13000.");
  m.def("driver_version", &cpo::driver_version, "Newest CUDA version of the driver; 0 without one.");
  cpo::bind_linear(m);
  m.def("row_forward", &row_forward, py::kw_only(), "device"_a, "stream"_a, "threads"_a, "dtype"_a, "logits"_a, "rows"_a, "vocab"_a,
        "row_stride"_a, "targets"_a, "row_starts"_a, "tokens"_a, "bias"_a, "mult"_a, "cap"_a, "slope"_a, "stats"_a, "logps"_a);
  m.def("row_backward", &row_backward, py::kw_only(), "device"_a, "stream"_a, "threads"_a, "dtype"_a, "out_dtype"_a, "logits"_a,
        "rows"_a, "vocab"_a, "row_stride"_a, "targets"_a, "row_starts"_a, "tokens"_a, "bias"_a, "mult"_a, "cap"_a, "slope"_a,
        "stats"_a, "coef"_a, "token_grad"_a, "out"_a, "out_stride"_a, "scale"_a);
  m.def("unit_forward_bytes", &cpo::unit_forward_bytes, py::kw_only(), "device"_a, "Bytes of the longest row that unit_forward takes.");
  m.def("unit_forward", &unit_forward, py::kw_only(), "device"_a, "stream"_a, "threads"_a, "dtype"_a, "out_dtype"_a, "logits"_a,
        "rows"_a, "vocab"_a, "row_stride"_a, "targets"_a, "row_starts"_a, "tokens"_a, "bias"_a, "mult"_a, "cap"_a, "slope"_a,
        "stats"_a, "logps"_a, "out"_a, "out_stride"_a, "slice_bytes"_a);
  m.def("scale", &scale, py::kw_only(), "device"_a, "stream"_a, "dtype"_a, "numbers"_a, "count"_a, "factor"_a);
  m.def("check_targets", &check_targets, py::kw_only(), "device"_a, "stream"_a, "targets"_a, "count"_a, "vocab"_a);
  m.def("contrast", &contrast, py::kw_only(), "device"_a, "stream"_a, "threads"_a, "logps"_a, "token_starts"_a, "segment_starts"_a,
        "lengths"_a, "ref_logps"_a, "ranks"_a, "num_target_tokens"_a, "segments"_a, "slots"_a, "sums"_a, "coef"_a, "groups"_a,
        "max_candidates"_a, "length_normalized"_a, "loss"_a, "beta"_a, "label_smoothing"_a, "margin"_a, "contrast_scale"_a,
        "mle_scale"_a);
  m.def("cpo_loss", &cpo_loss, py::kw_only(), "device"_a, "stream"_a, "threads"_a, "dtype"_a, "logits"_a, "rows"_a, "vocab"_a,
        "row_stride"_a, "targets"_a, "row_starts"_a, "tokens"_a, "bias"_a, "mult"_a, "cap"_a, "slope"_a, "stats"_a, "grad"_a,
        "grad_stride"_a, "logps"_a, "token_starts"_a, "segment_starts"_a, "lengths"_a, "ref_logps"_a, "ranks"_a,
        "num_target_tokens"_a, "segments"_a, "slots"_a, "sums"_a, "coef"_a, "groups"_a, "max_candidates"_a, "length_normalized"_a,
        "loss"_a, "beta"_a, "label_smoothing"_a, "margin"_a, "contrast_scale"_a, "mle_scale"_a);
}
