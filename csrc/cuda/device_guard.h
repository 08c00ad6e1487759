// Makes a device current and restores the one that was.
#pragma once

#include "cuda/simt.h"

namespace cpo {

#if defined(__CUDACC__)
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    simt::check(cudaGetDevice(&before_), "cudaGetDevice");
    if (device != before_) simt::check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = device != before_;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};
#else
struct DeviceGuard {
  explicit DeviceGuard(int) {}
};
#endif

}  // namespace cpo
