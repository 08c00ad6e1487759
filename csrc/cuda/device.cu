#include "cuda/device.h"

#include <cuda_runtime.h>

namespace cpo {

int runtime_version() { return CUDART_VERSION; }

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace cpo
