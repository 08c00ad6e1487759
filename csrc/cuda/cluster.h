// Clusters of thread blocks that read each other's shared memory (sm_90 and later); elsewhere, a cluster is one block.
#pragma once

#include "cuda/simt.h"

#if defined(__CUDACC__)
namespace cpo::simt {

CPO_DEVICE int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}

CPO_DEVICE int cluster_size() {
#if __CUDA_ARCH__ >= 900
  int size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
#else
  return 1;
#endif
}

// What any of the cluster's threads has written before, all of them see after it.
CPO_DEVICE void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
#else
  __syncthreads();
#endif
}

// No block is past it before all have reached it; it waits for nothing that they have written.
CPO_DEVICE void cluster_meet() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait;" ::: "memory");
#else
  __syncthreads();
#endif
}

// What block `rank` of the cluster has at the place of `p` in its own shared memory.
CPO_DEVICE float load_remote(const float* p, int rank) {
#if __CUDA_ARCH__ >= 900
  float value;
  asm volatile(
      "{\n.reg .u32 remote;\n"
      "mapa.shared::cluster.u32 remote, %1, %2;\n"
      "ld.shared::cluster.f32 %0, [remote];\n}"
      : "=f"(value)
      : "r"(static_cast<unsigned>(__cvta_generic_to_shared(p))), "r"(rank)
      : "memory");
  return value;
#else
  return *p;
#endif
}

// Blocks of a cluster at most, and shared memory of a block at most.
struct ClusterLimits {
  int blocks;
  std::size_t shared_bytes;
};

// Of a kernel on the current device: code that was compiled for an older GPU has no clusters on a new one either.
template <class... Parameters>
ClusterLimits cluster_limits(int device, void (*kernel)(Parameters...)) {
  int clusters = 0, shared = 0;
  check(cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
  cudaFuncAttributes code{};
  check(cudaFuncGetAttributes(&code, kernel), "cudaFuncGetAttributes");
  return {clusters && code.ptxVersion >= 90 ? 8 : 1, static_cast<std::size_t>(shared)};
}

// The kernel may use as much shared memory as a block can have: a limit of its own launch would be another thread's too.
template <class... Parameters, class... Arguments>
void launch_cluster(const Grid& grid, int cluster, const ClusterLimits& limits, const char* name, void (*kernel)(Parameters...),
                    const Arguments&... arguments) {
  const auto shared = static_cast<int>(limits.shared_bytes);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), name);
  cudaLaunchConfig_t config = launch_config(grid, name);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), name);
}

}  // namespace cpo::simt
#else
#include "simt_cluster.h"
#endif
