// Which block of the fused linear forward computes which tiles of the logits, in an order that the L2 cache likes.
//
// A unit is one row tile for each block of a cluster, times one split: a contiguous share of the vocabulary tiles. Clusters take
// units in turn. Units that run together share row tiles in groups: the weight is then read from memory once a group, and
// the group's hidden vectors, read again for every vocabulary tile, fill at most half of the cache.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "common/host_device.h"

namespace cpo::linear {

constexpr int kTileRows = 128;
constexpr int kTileColumns = 256;
constexpr int kTileDepth = 64;  // 128 bytes of hidden units: one row of the swizzle

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

struct Schedule {
  int cluster;      // blocks that share the weight's tiles: 1 or 2
  int clusters;     // of the grid
  int row_groups;   // row tiles / cluster, rounded up
  int splits;       // of the vocabulary
  int together;     // row groups that run together
  int split_tiles;  // vocabulary tiles of a split; the last may have fewer
  int vocab_tiles;

  CPO_HOST_DEVICE int units() const { return row_groups * splits; }
};

struct Unit {
  int row_group;
  int split;
  int first_tile, last_tile;  // vocabulary tiles [first, last)
};

CPO_HOST_DEVICE Unit unit_of(const Schedule& s, int index) {
  const int group_units = s.together * s.splits;
  const int first = index / group_units * s.together, within = index % group_units;
  const int size = s.row_groups - first < s.together ? s.row_groups - first : s.together;
  const int split = within / size, last = (split + 1) * s.split_tiles;
  return {first + within % size, split, split * s.split_tiles, last < s.vocab_tiles ? last : s.vocab_tiles};
}

// What a read of the whole weight costs, in rows of products: 4 TB/s beside 700 TFLOP/s make 175, about half of which is hidden.
constexpr std::int64_t kRowsPerRead = 88;

// The number of splits for which the busiest cluster computes few tiles and the weight is read from memory few times; `row_bytes` are
// those of a hidden vector.
inline Schedule make_schedule(std::int64_t rows, std::int64_t vocab, std::int64_t row_bytes, int multiprocessors,
                              std::int64_t cache_bytes) {
  Schedule best{};
  const std::int64_t row_tiles = ceil_div(rows, kTileRows), vocab_tiles = ceil_div(vocab, kTileColumns);
  best.cluster = row_tiles > 1 && multiprocessors > 1 ? 2 : 1;
  best.vocab_tiles = static_cast<int>(vocab_tiles);
  best.row_groups = static_cast<int>(ceil_div(row_tiles, best.cluster));
  const std::int64_t slots = multiprocessors / best.cluster;
  std::int64_t least = 0;
  for (const bool cached : {true, false}) {  // without a choice that the cache holds, any
    for (std::int64_t wanted = 1; wanted <= vocab_tiles && wanted <= slots; ++wanted) {
      const std::int64_t split_tiles = ceil_div(vocab_tiles, wanted), splits = ceil_div(vocab_tiles, split_tiles);
      const std::int64_t fit = slots / splits > 1 ? slots / splits : 1;
      const std::int64_t reads = ceil_div(best.row_groups, fit), together = ceil_div(best.row_groups, reads);
      if (cached && 2 * together * best.cluster * kTileRows * row_bytes > cache_bytes) continue;
      const std::int64_t tiles = ceil_div(best.row_groups * splits, slots) * split_tiles;
      const std::int64_t cost = tiles * (rows + kRowsPerRead * reads);
      if (least != 0 && cost >= least) continue;
      least = cost;
      best.splits = static_cast<int>(splits);
      best.split_tiles = static_cast<int>(split_tiles);
      best.together = static_cast<int>(together);
    }
    if (least != 0) break;
  }
  best.clusters = static_cast<int>(best.units() < slots ? best.units() : slots);
  return best;
}

}  // namespace cpo::linear
