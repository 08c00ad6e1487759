// The fused linear forward for Hopper on a CPU, as functions that ctypes can call; see simt_hopper.h.
#include "cuda/linear_backward.cu"
#include "cuda/linear_sm90.cu"

using cpo::simt::machine;

namespace {

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

void simt_set_device(int major, int minor, int multiprocessors, std::int64_t cache_bytes) {
  cpo::hopper::facts = {major, minor, multiprocessors, cache_bytes};
}

int simt_linear_workspace(std::int64_t rows, std::int64_t vocab, std::int64_t depth, std::int64_t* floats) {
  return guarded([&] { *floats = cpo::linear_workspace(0, rows, vocab, depth); });
}

int simt_linear_forward(int dtype, const cpo::LinearArgs* args) {
  return guarded([&] { cpo::linear_forward_sm90({0, nullptr, 0}, static_cast<cpo::DType>(dtype), *args); });
}

std::int64_t simt_linear_tiles(std::int64_t vocab) { return cpo::linear_tiles(vocab); }

int simt_linear_backward(int dtype, const cpo::LinearBackwardArgs* args) {
  return guarded([&] { cpo::linear_backward({0, nullptr, 0}, static_cast<cpo::DType>(dtype), *args); });
}

void simt_make_schedule(std::int64_t rows, std::int64_t vocab, std::int64_t row_bytes, int multiprocessors,
                        std::int64_t cache_bytes, cpo::linear::Schedule* out) {
  *out = cpo::linear::make_schedule(rows, vocab, row_bytes, multiprocessors, cache_bytes);
}

void simt_unit_of(const cpo::linear::Schedule* schedule, int index, cpo::linear::Unit* out) {
  *out = cpo::linear::unit_of(*schedule, index);
}

}  // extern "C"
