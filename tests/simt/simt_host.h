// simt.h for a host compiler: runs kernels on a CPU, every GPU thread a fiber.
//
// Fibers run one at a time, from barrier to barrier, in an order drawn from a seed: what a missing barrier leaves to chance on a GPU
// comes out differently from seed to seed. A barrier that some thread of its block never reaches is an error, and so is an access
// to global memory that is not aligned or not inside the regions a test has declared; the first one is kept as text.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#define CPO_DEVICE inline
#define CPO_KERNEL(threads, blocks) void
#define CPO_UNROLL

namespace cpo::simt {

constexpr int kLanes = 32;
constexpr std::size_t kStackBytes = 64 * 1024;

struct Region {
  std::uintptr_t begin, end;
  bool writable;
};

// Threads that meet at a barrier, and what they leave there for each other.
struct Meeting {
  int members = 0;
  int arrived = 0;
  int round = 0;
  bool any[4] = {};                            // of block_any, by the round modulo 4
  unsigned char slots[2][kLanes][8] = {};      // of shuffles, by parity of the round
  std::vector<int> waiting;                    // fibers
};

struct Block {
  std::int64_t index = 0;
  Meeting all;
  std::vector<Meeting> warps;
  std::unique_ptr<unsigned char[]> shared;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<unsigned char[]> stack;
  Block* block = nullptr;
  int thread = 0;
};

class Machine {
 public:
  std::vector<Region> regions;
  std::string error;
  std::uint64_t seed = 0;
  Fiber* now = nullptr;
  int threads = 0;
  std::int64_t blocks = 0;

  void fail(const std::string& what) {
    if (error.empty()) error = what;
  }

  // Whether the access may be made.
  bool allowed(const void* p, std::size_t bytes, std::size_t alignment, bool write) {
    const auto address = reinterpret_cast<std::uintptr_t>(p);
    if (address % alignment != 0) {
      fail(std::to_string(bytes) + " bytes at an address that is no multiple of " + std::to_string(alignment));
      return false;
    }
    for (const Region& region : regions) {
      if (address >= region.begin && address + bytes <= region.end && (region.writable || !write)) return true;
    }
    fail(std::string(write ? "write" : "read") + " of " + std::to_string(bytes) + " bytes outside of every region" + where(address));
    return false;
  }

  std::string where(std::uintptr_t address) const {
    std::string text = ", thread " + std::to_string(now->thread) + " of block " + std::to_string(now->block->index);
    for (std::size_t r = 0; r < regions.size(); ++r) {
      text += "; " + std::to_string(static_cast<std::int64_t>(address - regions[r].begin)) + " bytes into region " +
              std::to_string(r) + " of " + std::to_string(regions[r].end - regions[r].begin);
    }
    return text;
  }

  // Runs `side_by_side` blocks at a time; a grid barrier needs all of them.
  void run(std::int64_t grid, int block_threads, std::size_t shared_bytes, std::int64_t side_by_side, std::function<void()> kernel) {
    body_ = std::move(kernel);
    threads = block_threads;
    blocks = grid;
    random_.seed(seed);
    for (std::int64_t first = 0; first < grid && error.empty(); first += side_by_side) {
      run_blocks(first, std::min(side_by_side, grid - first), shared_bytes);
    }
  }

  // Waits until every member is here; returns the round that this was.
  int meet(Meeting& meeting) {
    const int round = meeting.round;
    if (++meeting.arrived < meeting.members) {
      meeting.waiting.push_back(static_cast<int>(now - fibers_.data()));
      swapcontext(&now->context, &scheduler_);
      return round;
    }
    meeting.arrived = 0;
    ++meeting.round;
    ready_.insert(ready_.end(), meeting.waiting.begin(), meeting.waiting.end());
    meeting.waiting.clear();
    ready_.push_back(static_cast<int>(now - fibers_.data()));  // the last one to come gets no head start
    swapcontext(&now->context, &scheduler_);
    return round;
  }

  Meeting& grid_meeting() { return grid_; }

 private:
  void run_blocks(std::int64_t first, std::int64_t count, std::size_t shared_bytes) {
    std::vector<Block> here(static_cast<std::size_t>(count));
    const std::size_t total = static_cast<std::size_t>(count) * static_cast<std::size_t>(threads);
    if (fibers_.size() < total) fibers_.resize(total);
    grid_ = Meeting();
    grid_.members = static_cast<int>(total);
    ready_.clear();
    for (std::size_t b = 0; b < here.size(); ++b) {
      Block& block = here[b];
      block.index = first + static_cast<std::int64_t>(b);
      block.all.members = threads;
      block.warps.resize(static_cast<std::size_t>(threads / kLanes));
      for (Meeting& warp : block.warps) warp.members = kLanes;
      block.shared.reset(new unsigned char[shared_bytes + 16]);
      std::memset(block.shared.get(), 0xff, shared_bytes + 16);  // NaN, and no index that is in range
      for (int thread = 0; thread < threads; ++thread) start(block, thread, b);
    }
    std::size_t done = 0;
    while (!ready_.empty()) {
      const std::size_t pick = std::uniform_int_distribution<std::size_t>(0, ready_.size() - 1)(random_);
      const int id = ready_[pick];
      ready_[pick] = ready_.back();
      ready_.pop_back();
      now = &fibers_[static_cast<std::size_t>(id)];
      finished_ = false;
      swapcontext(&scheduler_, &now->context);
      done += finished_;
    }
    if (done < total) fail(std::to_string(total - done) + " threads wait at a barrier that the others do not reach");
  }

  void start(Block& block, int thread, std::size_t slot) {
    const std::size_t id = slot * static_cast<std::size_t>(threads) + static_cast<std::size_t>(thread);
    Fiber& fiber = fibers_[id];
    if (!fiber.stack) fiber.stack.reset(new unsigned char[kStackBytes]);
    fiber.block = &block;
    fiber.thread = thread;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = &scheduler_;
    makecontext(&fiber.context, &Machine::enter, 0);
    ready_.push_back(static_cast<int>(id));
  }

  static void enter();

  std::function<void()> body_;
  std::vector<Fiber> fibers_;
  std::vector<int> ready_;
  Meeting grid_;
  ucontext_t scheduler_;
  bool finished_ = false;
  std::mt19937_64 random_;
};

inline Machine machine;

inline void Machine::enter() {
  machine.body_();
  machine.finished_ = true;
}

inline int thread_index() { return machine.now->thread; }
inline int thread_count() { return machine.threads; }
inline std::int64_t block_index() { return machine.now->block->index; }
inline std::int64_t block_count() { return machine.blocks; }

inline void block_barrier() { machine.meet(machine.now->block->all); }

// Takes two rounds. A slot is used again two calls on, when no thread has it still to read or to clear.
inline bool block_any(bool value) {
  Meeting& all = machine.now->block->all;
  all.any[all.round % 4] |= value;
  const int round = machine.meet(all);
  const bool result = all.any[round % 4];
  machine.meet(all);
  all.any[round % 4] = false;
  return result;
}

inline void grid_barrier() { machine.meet(machine.grid_meeting()); }

template <class T>
inline T shuffle_xor(T value, int mask) {
  static_assert(sizeof(T) <= 8);
  Meeting& warp = machine.now->block->warps[static_cast<std::size_t>(machine.now->thread / kLanes)];
  const int lane = machine.now->thread % kLanes;
  std::memcpy(warp.slots[warp.round % 2][lane], &value, sizeof(T));
  // A lane overwrites a slot two rounds on at the earliest, when the others have been through the round between.
  const int round = machine.meet(warp);
  std::memcpy(&value, warp.slots[round % 2][lane ^ mask], sizeof(T));
  return value;
}

inline void stop_at_target(std::int64_t token, std::int64_t target, std::int64_t vocab) {
  machine.fail("target of token " + std::to_string(token) + " is " + std::to_string(target) + ", expected [0, " + std::to_string(vocab) +
               ") or -100");
}

template <class T>
inline T& shared_memory() {
  void* p = machine.now->block->shared.get();
  std::size_t space = sizeof(T) + 16;
  return *static_cast<T*>(std::align(16, sizeof(T), p, space));
}

struct alignas(16) Words4 {
  std::uint32_t word[4];
};
struct alignas(8) Words2 {
  std::uint32_t word[2];
};

template <class T>
inline T load(const T* p) {
  T value{};
  if (machine.allowed(p, sizeof(T), alignof(T), false)) std::memcpy(&value, p, sizeof(T));
  return value;
}

template <class T>
inline void store(T* p, T value) {
  if (machine.allowed(p, sizeof(T), alignof(T), true)) std::memcpy(p, &value, sizeof(T));
}

// As the GPU's instructions: results that would be subnormal are 0.
inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
}

inline float rsqrt_approx(float x) { return 1.0f / std::sqrt(x); }

inline float float_of_bits(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline std::uint32_t bits_of_float(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline std::uint32_t round_to_bf16(float x) {
  const std::uint32_t bits = bits_of_float(x);
  if (x != x) return 0x7fff;
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

inline std::uint32_t pack_bf16(float low, float high) { return round_to_bf16(low) | round_to_bf16(high) << 16; }

inline std::uint32_t round_to_f16(float x) {
  const _Float16 rounded = static_cast<_Float16>(x);
  std::uint16_t bits;
  std::memcpy(&bits, &rounded, 2);
  return bits;
}

inline std::uint32_t pack_f16(float low, float high) { return round_to_f16(low) | round_to_f16(high) << 16; }

inline float f16_to_float(std::uint16_t bits) {
  _Float16 x;
  std::memcpy(&x, &bits, 2);
  return static_cast<float>(x);
}

struct Grid {
  std::int64_t blocks;
  int threads;
  std::size_t shared_bytes;
  void* stream;
};

template <class... Parameters, class... Arguments>
void launch(const Grid& grid, const char*, void (*kernel)(Parameters...), const Arguments&... arguments) {
  machine.run(grid.blocks, grid.threads, grid.shared_bytes, 1, [&] { kernel(Parameters(arguments)...); });
}

constexpr std::int64_t kResidentBlocks = 3;

template <class... Parameters, class... Arguments>
void launch_cooperative(Grid grid, int, const char*, void (*kernel)(Parameters...), const Arguments&... arguments) {
  grid.blocks = std::min(grid.blocks, kResidentBlocks);
  machine.run(grid.blocks, grid.threads, grid.shared_bytes, grid.blocks, [&] { kernel(Parameters(arguments)...); });
}

}  // namespace cpo::simt
