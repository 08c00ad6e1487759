// Arithmetic that the GPU and the host share.
#pragma once

#if defined(__CUDACC__)
#define CPO_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define CPO_HOST_DEVICE inline
#endif
