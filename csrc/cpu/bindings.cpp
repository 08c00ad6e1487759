// cpo_kernels._cpu: addresses and sizes in, nothing of torch. cpo_kernels/kernels/cpu/ has checked them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "cpu/bind_gemm.h"
#include "cpu/contrast.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/peak.h"
#include "cpu/row_dispatch.h"
#include "cuda_summary.h"  // written by setup.py

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

void row_forward(const std::string& isa, int dtype, Address logits, Size rows, Size vocab, Size row_stride, Address targets,
                 Address row_starts, Size tokens, Address bias, float mult, float cap, float slope, Address stats,
                 Address logps, int threads) {
  const cpo::Isa chosen = cpo::parse_isa(isa);
  const cpo::RowBatch batch{at<void>(logits), rows, vocab, row_stride, at<Size>(targets), at<Size>(row_starts), tokens, at<float>(bias)};
  const cpo::ForwardArgs args{batch, {mult, cap, slope}, at<float>(stats), at<float>(stats) + rows, at<float>(logps)};
  const cpo::DType type = parse_dtype(dtype);
  py::gil_scoped_release release;
  cpo::row_forward(chosen, type, args, threads);
}

void row_backward(const std::string& isa, int dtype, int out_dtype, Address logits, Size rows, Size vocab, Size row_stride,
                  Address targets, Address row_starts, Size tokens, Address bias, float mult, float cap, float slope,
                  Address stats, Address coef, Address coef_sum, Address token_grad, Address out, Size out_stride, int threads) {
  const cpo::Isa chosen = cpo::parse_isa(isa);
  const cpo::RowBatch batch{at<void>(logits), rows, vocab, row_stride, at<Size>(targets), at<Size>(row_starts), tokens, at<float>(bias)};
  const cpo::BackwardArgs args{batch,          {mult, cap, slope},    at<float>(stats), at<float>(stats) + rows, at<float>(coef),
                               at<float>(coef_sum), at<float>(token_grad), at<void>(out),    out_stride};
  const cpo::DType type = parse_dtype(dtype), out_type = parse_dtype(out_dtype);
  py::gil_scoped_release release;
  cpo::row_backward(chosen, type, out_type, args, at<float>(coef_sum), threads);
}

void column_stats(const std::string& isa, int dtype, Address grad, Size rows, Size vocab, Size row_stride, Address stats, int threads) {
  const cpo::Isa chosen = cpo::parse_isa(isa);
  const cpo::ColumnArgs args{at<void>(grad), rows, vocab, row_stride, at<float>(stats), at<float>(stats) + vocab};
  const cpo::DType type = parse_dtype(dtype);
  py::gil_scoped_release release;
  cpo::column_stats(chosen, type, args, threads);
}

void take_columns(const std::string& isa, int dtype, Address grad, Size rows, Size vocab, Size row_stride, Address row_indices,
                  Size num_rows, Address columns, Size count, Address out, int threads) {
  const cpo::Isa chosen = cpo::parse_isa(isa);
  const cpo::TakeArgs args{at<void>(grad), rows,  vocab, row_stride, at<Size>(row_indices), num_rows, at<Size>(columns),
                           count,          at<void>(out)};
  const cpo::DType type = parse_dtype(dtype);
  py::gil_scoped_release release;
  cpo::take_columns(chosen, type, args, threads);
}

cpo::GroupArgs group_args(Address segment_starts, Address lengths, Address ref_logps, Address ranks, Size segments, Size groups,
                          Size max_candidates, int loss, double beta, double label_smoothing, double margin, bool length_normalized) {
  if (loss < 0 || loss >= cpo::kNumLosses) throw std::invalid_argument("loss code " + std::to_string(loss));
  const cpo::Preference preference{static_cast<cpo::Loss>(loss), beta, label_smoothing};
  return {at<Size>(segment_starts), at<Size>(lengths), at<float>(ref_logps), at<Size>(ranks), segments, groups,
          max_candidates,           preference,        margin,               length_normalized};
}

void contrast(Address segment_starts, Address lengths, Address ref_logps, Address ranks, Size segments, Size groups,
              Size max_candidates, int loss, double beta, double label_smoothing, double margin, bool length_normalized, Address logps,
              Address token_starts, Size slots, double contrast_scale, double mle_scale, Address sums, Address coef) {
  const cpo::GroupArgs of_groups = group_args(segment_starts, lengths, ref_logps, ranks, segments, groups, max_candidates, loss, beta,
                                              label_smoothing, margin, length_normalized);
  const cpo::ContrastArgs args{at<float>(logps), at<Size>(token_starts), slots,          contrast_scale,
                               mle_scale,        at<float>(sums),        at<float>(coef)};
  py::gil_scoped_release release;
  cpo::contrast(of_groups, args);
}

void summarize(Address segment_starts, Address lengths, Address ref_logps, Address ranks, Size segments, Size groups,
               Size max_candidates, int loss, double beta, double label_smoothing, double margin, bool length_normalized, Address sums,
               double contrast_weight, double mle_weight, double num_groups, double num_target_tokens, Address logps, Address rewards,
               Address numbers) {
  const cpo::GroupArgs of_groups = group_args(segment_starts, lengths, ref_logps, ranks, segments, groups, max_candidates, loss, beta,
                                              label_smoothing, margin, length_normalized);
  const cpo::SummaryArgs args{at<float>(sums),   contrast_weight,   mle_weight,         num_groups,
                              num_target_tokens, at<float>(logps), at<float>(rewards), at<float>(numbers)};
  py::gil_scoped_release release;
  cpo::summarize(of_groups, args);
}

Size count_targets(Address segment_starts, Address lengths, Address ranks, Size segments, Size groups, Size max_candidates,
                   bool contrasts) {
  const cpo::GroupArgs args = group_args(segment_starts, lengths, 0, ranks, segments, groups, max_candidates, 0, 1.0, 0.0, 0.0, false);
  return cpo::count_targets(args, contrasts);
}

double peak_multiply_adds(int dtype, int threads, double seconds) {
  const cpo::DType type = parse_dtype(dtype);
  py::gil_scoped_release release;
  return cpo::peak_multiply_adds(type, threads, seconds);
}

void use_openmp(Address parallel, Address thread_num, Address num_threads) {
  cpo::use_openmp({reinterpret_cast<decltype(cpo::OpenMp::GOMP_parallel)>(parallel),
                   reinterpret_cast<decltype(cpo::OpenMp::omp_get_thread_num)>(thread_num),
                   reinterpret_cast<decltype(cpo::OpenMp::omp_get_num_threads)>(num_threads)});
}

std::string compiler() {
#if defined(__clang__)
  return "Clang " __clang_version__;
#else
  return "GCC " __VERSION__;
#endif
}

}  // namespace

PYBIND11_MODULE(_cpu, m, py::mod_gil_not_used()) {
  m.doc() = "Row kernels on the CPU; addresses and sizes in, results written through the addresses.";
  m.attr("compiler") = compiler();
  m.attr("cuda_summary") = CPO_CUDA_SUMMARY;
  m.def("use_openmp", &use_openmp, "Takes threads from the OpenMP runtime whose functions lie at these addresses.", "GOMP_parallel"_a,
        "omp_get_thread_num"_a, "omp_get_num_threads"_a);
  m.def("compiled_isas", &cpo::compiled_isas, "Instruction sets compiled in, slowest first.");
  m.def("supported_isas", &cpo::supported_isas, "Those of them that this machine runs, slowest first.");
  m.def("peak_multiply_adds", &peak_multiply_adds, py::kw_only(), "dtype"_a, "threads"_a, "seconds"_a,
        "Multiply-adds a second on registers alone, 0 where this machine has no kernel for them.");
  cpo::bind_gemm(m);
  m.def("row_forward", &row_forward, py::kw_only(), "isa"_a, "dtype"_a, "logits"_a, "rows"_a, "vocab"_a, "row_stride"_a,
        "targets"_a, "row_starts"_a, "tokens"_a, "bias"_a, "mult"_a, "cap"_a, "slope"_a, "stats"_a, "logps"_a, "threads"_a);
  m.def("row_backward", &row_backward, py::kw_only(), "isa"_a, "dtype"_a, "out_dtype"_a, "logits"_a, "rows"_a, "vocab"_a,
        "row_stride"_a, "targets"_a, "row_starts"_a, "tokens"_a, "bias"_a, "mult"_a, "cap"_a, "slope"_a, "stats"_a, "coef"_a,
        "coef_sum"_a, "token_grad"_a, "out"_a, "out_stride"_a, "threads"_a);
  m.def("column_stats", &column_stats, py::kw_only(), "isa"_a, "dtype"_a, "grad"_a, "rows"_a, "vocab"_a, "row_stride"_a, "stats"_a,
        "threads"_a);
  m.def("take_columns", &take_columns, py::kw_only(), "isa"_a, "dtype"_a, "grad"_a, "rows"_a, "vocab"_a, "row_stride"_a,
        "row_indices"_a, "num_rows"_a, "columns"_a, "count"_a, "out"_a, "threads"_a);
  m.def("contrast", &contrast, py::kw_only(), "segment_starts"_a, "lengths"_a, "ref_logps"_a, "ranks"_a, "segments"_a, "groups"_a,
        "max_candidates"_a, "loss"_a, "beta"_a, "label_smoothing"_a, "margin"_a, "length_normalized"_a, "logps"_a, "token_starts"_a,
        "slots"_a, "contrast_scale"_a, "mle_scale"_a, "sums"_a, "coef"_a);
  m.def("count_targets", &count_targets, py::kw_only(), "segment_starts"_a, "lengths"_a, "ranks"_a, "segments"_a, "groups"_a,
        "max_candidates"_a, "contrasts"_a);
  m.def("summarize", &summarize, py::kw_only(), "segment_starts"_a, "lengths"_a, "ref_logps"_a, "ranks"_a, "segments"_a, "groups"_a,
        "max_candidates"_a, "loss"_a, "beta"_a, "label_smoothing"_a, "margin"_a, "length_normalized"_a, "sums"_a, "contrast_weight"_a,
        "mle_weight"_a, "num_groups"_a, "num_target_tokens"_a, "logps"_a, "rewards"_a, "numbers"_a);
}
