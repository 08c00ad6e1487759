// cluster.h for a host compiler: the blocks of a cluster run side by side.
#pragma once

#include "simt_host.h"

namespace cpo::simt {

inline int cluster_blocks = 1;

inline int cluster_size() { return cluster_blocks; }
inline int cluster_rank() { return static_cast<int>(block_index() % cluster_blocks); }
inline void cluster_barrier() { machine.meet(machine.grid_meeting()); }

inline void cluster_meet() { cluster_barrier(); }

inline unsigned char* shared_base(Block& block) {
  void* p = block.shared.get();
  std::size_t space = 32;
  return static_cast<unsigned char*>(std::align(16, 16, p, space));
}

inline float load_remote(const float* p, int rank) {
  Block* here = machine.now->block;
  const auto offset = reinterpret_cast<const unsigned char*>(p) - shared_base(*here);
  float value;
  std::memcpy(&value, shared_base(here[rank - cluster_rank()]) + offset, sizeof(value));
  return value;
}

struct ClusterLimits {
  int blocks;
  std::size_t shared_bytes;
};

// A Hopper's.
template <class... Parameters>
ClusterLimits cluster_limits(int, void (*)(Parameters...)) {
  return {8, 227 * 1024};
}

template <class... Parameters, class... Arguments>
void launch_cluster(const Grid& grid, int cluster, const ClusterLimits&, const char*, void (*kernel)(Parameters...),
                    const Arguments&... arguments) {
  cluster_blocks = cluster;
  machine.run(grid.blocks, grid.threads, grid.shared_bytes, cluster, [&] { kernel(Parameters(arguments)...); });
}

}  // namespace cpo::simt
