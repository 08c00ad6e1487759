// What Hopper adds to simt.h, one small function an instruction: mbarriers, the copy engine (TMA), wgmma, clusters, registers.
//
// nvcc gets inline PTX, a host compiler tests/simt/simt_hopper.h. Addresses of shared memory are 32-bit numbers, those of
// another block of the cluster included.
#pragma once

#include "common/dtype.h"
#include "cuda/simt.h"

namespace cpo::hopper {

// Of a device.
struct Facts {
  int major, minor;
  int multiprocessors;
  std::int64_t cache_bytes;
};

}  // namespace cpo::hopper

#if defined(__CUDACC__)

#include <cuda.h>  // CUtensorMap; nothing of libcuda is linked

#define CPO_GRID_CONSTANT __grid_constant__

// Kernels have a body only where wgmma exists; elsewhere the launcher refuses.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define CPO_HOPPER 1
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
#error "compute_90 has no wgmma, and the launcher would take its empty kernels for Hopper's: compile for 90a"
#endif

namespace cpo::hopper {

CPO_DEVICE void warp_barrier() { __syncwarp(); }

}  // namespace cpo::hopper

#if defined(CPO_HOPPER)
#include "cuda/wgmma.h"

namespace cpo::hopper {

CPO_DEVICE std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- Clusters

CPO_DEVICE std::uint32_t cluster_rank() {
  std::uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of all blocks of the cluster; orders their accesses to each other's shared memory.
CPO_DEVICE void cluster_sync() {
  warp_barrier();
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;\n" ::: "memory");
}

// ---- Barriers in shared memory: 8 bytes each

// A phase ends when `count` arrivals and all expected bytes are in.
CPO_DEVICE void barrier_init(std::uint32_t barrier, std::uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// Makes initialised barriers visible to the copy engine and to the cluster, before the next cluster_sync.
CPO_DEVICE void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// One arrival, and so many bytes that the copy engine will add.
CPO_DEVICE void barrier_expect(std::uint32_t barrier, std::uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// One arrival at the barrier that block `rank` of the cluster has at the same place. Orders this block's accesses only: the
// release of a whole cluster is a fence of the device's memory, and what wgmma has read needs none.
CPO_DEVICE void barrier_arrive(std::uint32_t barrier, std::uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}\n" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

// Waits until the phase of this parity has ended; the phase before the first has parity 1.
CPO_DEVICE void barrier_wait(std::uint32_t barrier, std::uint32_t parity) {
  std::uint32_t done;
  do {
    asm volatile(
        "{\n.reg .pred done;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n}\n"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!done);
}

// ---- The copy engine

CPO_DEVICE void tma_prefetch(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Copies the box of `map` that begins at column x, row y; elements outside of the tensor are 0, and count as bytes too.
CPO_DEVICE void tma_load(std::uint32_t to, const CUtensorMap* map, std::uint32_t barrier, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(barrier)
      : "memory");
}

// The same into every block of the cluster that has its bit in `blocks`: same place, and its own barrier gets the bytes.
CPO_DEVICE void tma_load_multicast(std::uint32_t to, const CUtensorMap* map, std::uint32_t barrier, int x, int y,
                                          std::uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(barrier), "h"(blocks)
      : "memory");
}

// ---- wgmma

// Before the first wgmma that uses registers which other instructions wrote.
CPO_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

CPO_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most kPending committed groups are unfinished.
template <int kPending>
CPO_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from reading the accumulators before a wait that it does not know to be about them.
CPO_DEVICE void keep_in_order(float (&d)[128]) {
CPO_UNROLL
  for (int i = 0; i < 128; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// ---- Registers of a warpgroup: all of its warps call one of these, before what needs them

template <int kRegisters>
CPO_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
CPO_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace cpo::hopper

#endif  // CPO_HOPPER

namespace cpo::hopper {

// simt::launch for kernels of clusters, each block with more shared memory than a kernel gets unasked.
template <class... Parameters, class... Arguments>
void launch_clusters(const simt::Grid& grid, int cluster, const char* name, void (*kernel)(Parameters...),
                     const Arguments&... arguments) {
  const int shared_bytes = static_cast<int>(grid.shared_bytes);
  simt::check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), name);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = static_cast<cudaStream_t>(grid.stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  simt::check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), name);
}

}  // namespace cpo::hopper

#else
#include "simt_hopper.h"
#endif

namespace cpo::hopper {

// The swizzle in which the copy engine stores 128-byte rows, and wgmma reads them: rows in groups of 8, 1024 bytes and
// aligned to 1024; the 16-byte piece p of row r lies at p ^ r % 8.
constexpr int kSwizzleRow = 128;
constexpr int kSwizzleGroup = 8 * kSwizzleRow;

// Descriptor of a matrix whose rows (along K) are 128 bytes in that swizzle. Further elements of a row: + bytes / 16.
CPO_DEVICE std::uint64_t swizzled_matrix(std::uint32_t address) {
  constexpr std::uint64_t kSwizzle128 = std::uint64_t{1} << 62;
  constexpr std::uint64_t kStrideOfGroups = std::uint64_t{kSwizzleGroup >> 4} << 32;
  constexpr std::uint64_t kUnusedOffset = std::uint64_t{1} << 16;
  return kSwizzle128 | kStrideOfGroups | kUnusedOffset | ((address & 0x3FFFF) >> 4);
}

}  // namespace cpo::hopper
