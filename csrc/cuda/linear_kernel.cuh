// Log-likelihoods straight from hidden (R, H) and weight (V, H) on Hopper: logits exist in registers only.
//
// A block is one producer warp, which has the copy engine fill a ring of kStages stages of shared memory, and two consumer
// warpgroups, each with 64 rows x 256 columns of logits in its accumulators. Two blocks of a cluster work on the same columns
// of different rows: each fetches half of the weight's tile and sends it to both.
#pragma once

#include "cuda/hopper.h"
#include "cuda/launch.h"
#include "cuda/linear_keep.cuh"

namespace cpo::linear {

constexpr int kStages = 4;
constexpr int kWarpgroup = 128;
constexpr int kConsumers = 2;
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kConsumerWarps = kConsumers * kWarpgroup / 32;
constexpr int kConsumerRows = kTileRows / kConsumers;
constexpr int kProducerRegisters = 24;
constexpr int kConsumerRegisters = 240;
static_assert((kProducerRegisters + kConsumers * kConsumerRegisters) * kWarpgroup <= 65536, "registers of a multiprocessor");

constexpr std::uint32_t kRowBytes = kTileDepth * 2;
constexpr std::uint32_t kHiddenBytes = kTileRows * kRowBytes;
constexpr int kBoxRows = 128;  // of one copy: a tile of the hidden vectors, or half of the weight's
constexpr std::uint32_t kBoxBytes = kBoxRows * kRowBytes;
constexpr std::uint32_t kStageBytes = kHiddenBytes + 2 * kBoxBytes;
constexpr std::uint32_t kAlignment = 1024;  // of the swizzle
constexpr std::uint32_t kSharedBytes = kStages * kStageBytes + 2 * kStages * 8 + kAlignment;
static_assert(kSharedBytes <= 227 * 1024, "shared memory of a block");

struct KernelArgs {
  Schedule schedule;
  std::int64_t rows;
  int vocab, depth;
  const std::int64_t* targets;     // (N,)
  const std::int64_t* row_starts;  // (R + 1,), or null
  float* target_logits;            // (N,) out
  float* maxima;                   // (splits, R) out
  float* sums;                     // (splits, R) out
  Kept kept;                       // out, where a gradient is to follow
};

struct CombineArgs {
  std::int64_t rows;
  int vocab, splits;
  const std::int64_t* targets;
  const std::int64_t* row_starts;
  const float* maxima;  // (splits, R)
  const float* sums;    // (splits, R)
  float* top;           // (R,) out
  float* log_sum;       // (R,) out
  float* logps;         // (N,) logits of the targets in, log-probabilities out
};

#if !defined(__CUDACC__) || defined(CPO_HOPPER)

// A place of the ring, and the parity of the phase in which it is used. The barriers lie behind the ring.
struct Slot {
  std::uint32_t ring, stage = 0, parity = 0;

  CPO_DEVICE explicit Slot(std::uint32_t address) : ring(address) {}
  CPO_DEVICE std::uint32_t hidden() const { return ring + stage * kStageBytes; }
  CPO_DEVICE std::uint32_t weight() const { return hidden() + kHiddenBytes; }
  CPO_DEVICE std::uint32_t full() const { return ring + kStages * kStageBytes + stage * 8; }
  CPO_DEVICE std::uint32_t empty() const { return full() + kStages * 8; }
  CPO_DEVICE void advance() {
    stage = stage + 1 == kStages ? 0 : stage + 1;
    parity ^= stage == 0;
  }
};

CPO_DEVICE void init_barriers(Slot slot, int blocks) {
  for (int i = 0; i < kStages; ++i) {
    hopper::barrier_init(slot.full(), 1);
    hopper::barrier_init(slot.empty(), kConsumerWarps * blocks);
    slot.advance();
  }
  hopper::barrier_init_fence();
}

// This block's half of the weight's tile to both blocks, or both halves where there is no other block.
CPO_DEVICE void load_weight(const Slot& slot, const CUtensorMap* weight, int depth, int column, int rank, int blocks) {
  if (blocks == 2) {
    hopper::tma_load_multicast(slot.weight() + rank * kBoxBytes, weight, slot.full(), depth, column + rank * kBoxRows, 3);
  } else {
    hopper::tma_load(slot.weight(), weight, slot.full(), depth, column);
    hopper::tma_load(slot.weight() + kBoxBytes, weight, slot.full(), depth, column + kBoxRows);
  }
}

// One thread fills the ring.
CPO_DEVICE void produce(Slot slot, const CUtensorMap* hidden, const CUtensorMap* weight, const KernelArgs& args) {
  const int rank = hopper::cluster_rank(), blocks = args.schedule.cluster;
  for (int i = static_cast<int>(simt::block_index()) / blocks; i < args.schedule.units(); i += args.schedule.clusters) {
    const Unit unit = unit_of(args.schedule, i);
    const int row = (unit.row_group * blocks + rank) * kTileRows;
    for (int tile = unit.first_tile; tile < unit.last_tile; ++tile) {
      for (int depth = 0; depth < args.depth; depth += kTileDepth) {
        // Empty in both blocks, as this one writes into both.
        hopper::barrier_wait(slot.empty(), slot.parity ^ 1);
        hopper::barrier_expect(slot.full(), kStageBytes);
        hopper::tma_load(slot.hidden(), hidden, slot.full(), depth, row);
        load_weight(slot, weight, depth, tile * kTileColumns, rank, blocks);
        slot.advance();
      }
    }
  }
}

// This warp has read its part of a stage: tells the producers of all blocks, which write there.
CPO_DEVICE void release(std::uint32_t empty, int blocks) {
  const int lane = simt::thread_index() % 32;
  if (lane < blocks) hopper::barrier_arrive(empty, lane);
  hopper::warp_barrier();
}

// y = hidden tile @ weight tile.T for the 64 rows of this warpgroup.
template <class T>
CPO_DEVICE void multiply(float (&y)[kAccumulators], Slot& slot, int consumer, const KernelArgs& args) {
  std::uint32_t previous = 0;
  for (int depth = 0; depth < args.depth; depth += kTileDepth) {
    hopper::barrier_wait(slot.full(), slot.parity);
    const std::uint64_t a = hopper::swizzled_matrix(slot.hidden() + consumer * kConsumerRows * kRowBytes);
    const std::uint64_t b = hopper::swizzled_matrix(slot.weight());
    hopper::wgmma_fence();
    CPO_UNROLL
    for (int k = 0; k < kTileDepth / 16; ++k) hopper::wgmma<T>(y, a + 2 * k, b + 2 * k, depth + k > 0);
    hopper::wgmma_commit();
    // While this stage is multiplied, the one before it is free.
    hopper::wgmma_wait<1>();
    if (depth > 0) release(previous, args.schedule.cluster);
    previous = slot.empty();
    slot.advance();
  }
  hopper::wgmma_wait<0>();
  hopper::keep_in_order(y);
  release(previous, args.schedule.cluster);
}

CPO_DEVICE void store_partial(const OnlineSum& sum, int quad_lane, std::int64_t row, int split, const KernelArgs& args) {
  const OnlineSum whole = merge_quad(sum);
  if (quad_lane != 0 || row >= args.rows) return;
  simt::store(args.maxima + split * args.rows + row, whole.top);
  simt::store(args.sums + split * args.rows + row, whole.mass);
}

// What a thread does with a tile of its two rows.
template <class T, bool kKeep, class Head>
CPO_DEVICE void reduce_tile(float (&y)[kAccumulators], OnlineSum (&sums)[2], const RowTokens (&tokens)[2], int row,
                            const Head& head, int tile, const KernelArgs& args) {
  const int quad_lane = simt::thread_index() % 4, column = tile * kTileColumns;
  const TargetLogits out{args.targets, args.row_starts, args.target_logits, args.kept.slopes};
  transform_tile<kKeep>(y, head, quad_lane, column, args.vocab);
  store_target_logits<0, kKeep>(out, tokens[0], row, y, head, quad_lane, column, args.vocab);
  store_target_logits<1, kKeep>(out, tokens[1], row + 8, y, head, quad_lane, column, args.vocab);
  hopper::warp_barrier();
  if constexpr (kKeep) {
    keep_columns<0, T>(sums[0], y, head, args.kept, row, args.rows, quad_lane, tile, args.vocab);
    keep_columns<1, T>(sums[1], y, head, args.kept, row + 8, args.rows, quad_lane, tile, args.vocab);
    hopper::warp_barrier();
  } else {
    add_columns<0>(sums[0], y);
    add_columns<1>(sums[1], y);
  }
}

// A warpgroup multiplies what is in the ring, and reduces the logits to their statistics.
template <class T, bool kKeep, class Head>
CPO_DEVICE void consume(Slot slot, int consumer, const Head& head, const KernelArgs& args) {
  const int rank = hopper::cluster_rank(), blocks = args.schedule.cluster;
  const int thread = simt::thread_index() % kWarpgroup, quad_lane = thread % 4;
  const int first_row = consumer * kConsumerRows + thread / 32 * 16 + thread % 32 / 4;  // and 8 further
  float y[kAccumulators];
  for (int i = static_cast<int>(simt::block_index()) / blocks; i < args.schedule.units(); i += args.schedule.clusters) {
    const Unit unit = unit_of(args.schedule, i);
    const int row = (unit.row_group * blocks + rank) * kTileRows + first_row;
    const RowTokens tokens[2] = {find_tokens(args.targets, args.row_starts, row, args.rows, args.vocab),
                                 find_tokens(args.targets, args.row_starts, row + 8, args.rows, args.vocab)};
    OnlineSum sums[2];
    for (int tile = unit.first_tile; tile < unit.last_tile; ++tile) {
      multiply<T>(y, slot, consumer, args);
      reduce_tile<T, kKeep>(y, sums, tokens, row, head, tile, args);
    }
    store_partial(sums[0], quad_lane, row, unit.split, args);
    store_partial(sums[1], quad_lane, row + 8, unit.split, args);
    hopper::warp_barrier();
  }
}

#endif

// Target logits, and what the columns of each split add to the statistics of each row; with kKeep also what a gradient needs.
template <class T, bool kKeep, class Head>
CPO_KERNEL(kThreads, 1)
linear_forward_kernel(const CPO_GRID_CONSTANT CUtensorMap hidden, const CPO_GRID_CONSTANT CUtensorMap weight,
                      const CPO_GRID_CONSTANT KernelArgs args, const Head head) {
#if !defined(__CUDACC__) || defined(CPO_HOPPER)
  const std::uint32_t address = hopper::shared_address(&simt::shared_memory<unsigned char>());
  const Slot slot((address + kAlignment - 1) / kAlignment * kAlignment);
  if (simt::thread_index() == 0) {
    hopper::tma_prefetch(&hidden);
    hopper::tma_prefetch(&weight);
    init_barriers(slot, args.schedule.cluster);
  }
  hopper::cluster_sync();  // no barrier is used, by this block or another, before it exists
  if (simt::thread_index() < kWarpgroup) {
    hopper::give_registers<kProducerRegisters>();
    if (simt::thread_index() == 0) produce(slot, &hidden, &weight, args);
  } else {
    hopper::take_registers<kConsumerRegisters>();
    consume<T, kKeep>(slot, simt::thread_index() / kWarpgroup - 1, head, args);
  }
  hopper::cluster_sync();  // no block leaves while another still sends to it
#endif
}

// Statistics and log-probabilities from the partial sums, a thread a row; splits in ascending order.
CPO_KERNEL(kWarpgroup, 1)
combine_splits_kernel(const CombineArgs args) {
  const std::int64_t row = simt::block_index() * simt::thread_count() + simt::thread_index();
  if (row >= args.rows) return;
  float top = -INFINITY, mass = 0.0f;
  for (int split = 0; split < args.splits; ++split) top = fmaxf(top, simt::load(args.maxima + split * args.rows + row));
  // A row of nothing but -inf has no distribution: -inf - -inf makes it NaN here.
  for (int split = 0; split < args.splits; ++split) {
    const std::int64_t at = split * args.rows + row;
    mass += expf(simt::load(args.maxima + at) - top) * simt::load(args.sums + at);
  }
  const float log_sum = logf(mass);
  simt::store(args.top + row, top);
  simt::store(args.log_sum + row, log_sum);
  const std::int64_t begin = args.row_starts ? simt::load(args.row_starts + row) : row;
  const std::int64_t end = args.row_starts ? simt::load(args.row_starts + row + 1) : row + 1;
  for (std::int64_t n = begin; n < end; ++n) {
    const std::int64_t target = simt::load(args.targets + n);
    float logp = target == kNoToken ? 0.0f : NAN;
    if (column_of(target, args.vocab) >= 0) logp = simt::load(args.logps + n) - top - log_sum;
    simt::store(args.logps + n, logp);
  }
}

}  // namespace cpo::linear
