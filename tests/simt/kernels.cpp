// The CUDA kernels for a CPU, as functions that ctypes can call; see simt_host.h.
#include "cuda/check_targets.cu"
#include "cuda/contrast.cu"
#include "cuda/cpo_loss.cu"
#include "cuda/row_backward.cu"
#include "cuda/row_forward.cu"
#include "cuda/scale.cu"
#include "cuda/unit_forward.cu"

using cpo::simt::machine;

namespace {

cpo::Queue queue(int threads) { return {0, nullptr, threads}; }

// 0, or 1 with the text of what went wrong in machine.error.
template <class Run>
int guarded(Run run) {
  try {
    run();
  } catch (const std::exception& error) {
    machine.fail(error.what());
  }
  return machine.error.empty() ? 0 : 1;
}

}  // namespace

extern "C" {

void simt_begin(std::uint64_t seed) {
  machine.regions.clear();
  machine.error.clear();
  machine.seed = seed;
}

void simt_region(const void* begin, std::int64_t bytes, int writable) {
  const auto address = reinterpret_cast<std::uintptr_t>(begin);
  machine.regions.push_back({address, address + static_cast<std::uintptr_t>(bytes), writable != 0});
}

const char* simt_error() { return machine.error.c_str(); }

int simt_row_forward(int dtype, const cpo::ForwardArgs* args, int threads) {
  return guarded([&] { cpo::row_forward(queue(threads), static_cast<cpo::DType>(dtype), *args); });
}

int simt_row_backward(int dtype, int out_dtype, const cpo::BackwardArgs* args, int threads) {
  return guarded([&] {
    cpo::row_backward(queue(threads), static_cast<cpo::DType>(dtype), static_cast<cpo::DType>(out_dtype), *args);
  });
}

std::int64_t simt_unit_forward_bytes() { return cpo::unit_forward_bytes(0); }

int simt_unit_forward(int dtype, int out_dtype, const cpo::UnitArgs* args, int threads) {
  return guarded([&] {
    cpo::unit_forward(queue(threads), static_cast<cpo::DType>(dtype), static_cast<cpo::DType>(out_dtype), *args);
  });
}

int simt_scale(int dtype, const cpo::ScaleArgs* args) {
  return guarded([&] { cpo::scale(queue(0), static_cast<cpo::DType>(dtype), *args); });
}

int simt_check_targets(const cpo::TargetArgs* args) {
  return guarded([&] { cpo::check_targets(queue(0), *args); });
}

int simt_contrast(const cpo::ContrastArgs* args, int threads) {
  return guarded([&] { cpo::contrast(queue(threads), *args); });
}

int simt_cpo_loss(int dtype, const cpo::LossArgs* args, int threads) {
  return guarded([&] { cpo::cpo_loss(queue(threads), static_cast<cpo::DType>(dtype), *args); });
}

}  // extern "C"
