// All that a kernel asks of the GPU: indices, barriers, shuffles, shared memory, 16-byte accesses, approximate functions, launches.
//
// Kernels include nothing of CUDA. nvcc gets the device; a host compiler gets tests/simt/simt_host.h, which runs the same sources
// on a CPU, thread by thread, and checks every access to global memory.
#pragma once

#if defined(__CUDACC__)
#include "cuda/simt_device.h"
#else
#include "simt_host.h"
#endif
