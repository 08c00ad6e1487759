// hopper.h for a host compiler: the copy engine, mbarriers, wgmma and clusters in software.
//
// What is asynchronous on the GPU is late here: a copy happens at some moment while others wait, a product no sooner than it is
// waited for. So a stage that is given back too early, or read before it is full, shows as a wrong number. Descriptors and
// swizzles are decoded from the bits that the hardware gets. As in simt_host.h, the first error is kept as text.
#pragma once

#include <map>
#include <tuple>
#include <utility>

// ---- The driver's interface of tensor maps, as far as it is used

using cuuint32_t = std::uint32_t;
using cuuint64_t = std::uint64_t;
enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_FLOAT16 = 6, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_128B = 3 };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3 };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };

struct alignas(64) CUtensorMap {
  const unsigned char* data;
  std::int64_t columns, rows, row_bytes;
  int box_columns, box_rows;
};

// The conditions that the documentation of cuTensorMapEncodeTiled names, for two dimensions of 16-bit numbers.
inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* data, const cuuint64_t* sizes,
                                       const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps, CUtensorMapInterleave,
                                       CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  constexpr cuuint64_t kLargestSize = cuuint64_t{1} << 32, kLargestStride = cuuint64_t{1} << 40;
  bool valid = rank == 2 && swizzle == CU_TENSOR_MAP_SWIZZLE_128B && reinterpret_cast<std::uintptr_t>(data) % 16 == 0;
  for (int i = 0; i < 2; ++i) {
    valid &= sizes[i] >= 1 && sizes[i] <= kLargestSize && box[i] >= 1 && box[i] <= 256 && steps[i] == 1;
  }
  valid &= strides[0] % 16 == 0 && strides[0] < kLargestStride && strides[0] >= sizes[0] * 2;
  valid &= box[0] * 2 % 16 == 0 && box[0] * 2 <= 128;
  if (!valid) return CUDA_ERROR_INVALID_VALUE;
  *map = {static_cast<const unsigned char*>(data), static_cast<std::int64_t>(sizes[0]), static_cast<std::int64_t>(sizes[1]),
          static_cast<std::int64_t>(strides[0]), static_cast<int>(box[0]), static_cast<int>(box[1])};
  return CUDA_SUCCESS;
}

#define CPO_GRID_CONSTANT

namespace cpo::hopper {

using simt::machine;

inline Facts facts{9, 0, 4, std::int64_t{50} << 20};

// The window of shared memory in the 32-bit address space: not at a multiple of the swizzle's alignment; other blocks above.
constexpr std::uint32_t kWindow = 0x410;
constexpr int kRankShift = 24;
constexpr std::uint32_t kOffsetMask = (1u << kRankShift) - 1;

struct Copy {
  CUtensorMap map;
  std::uint32_t to, barrier;  // offsets, the same in every block
  int x, y;
  std::uint32_t blocks;  // a bit each
};

struct Product {
  std::function<void()> run;
  int group;
};

// What a thread has asked of the tensor cores.
struct Products {
  std::vector<Product> queue;
  int group = 0;  // that the next product belongs to
  std::size_t issued = 0;
  bool fenced = false;
};

struct Barrier {
  std::int32_t bytes;    // expected and not there yet
  std::int16_t arrivals;  // missing in this phase
  std::int16_t count : 15;
  std::uint16_t phase : 1;
};
static_assert(sizeof(Barrier) == 8);

struct Cluster {
  int size = 1;
  std::size_t shared_bytes = 0;
  std::vector<Copy> copies;
  // By the index of a block in the grid, of a thread or a warpgroup in its block, of a product among those of its thread.
  std::map<std::int64_t, simt::Block*> blocks;
  std::map<std::int64_t, int> threads_left;
  std::map<std::pair<std::int64_t, int>, Products> products;
  std::map<std::tuple<std::int64_t, int, std::size_t>, std::pair<std::uint64_t, std::uint64_t>> descriptors;
  std::mt19937_64 random;
  long idle = 0;  // failed looks at barriers since anything happened
};

inline Cluster cluster;

inline int cluster_rank() { return static_cast<int>(simt::block_index() % cluster.size); }

inline Products& my_products() { return cluster.products[{simt::block_index(), simt::thread_index()}]; }

inline std::uint32_t shared_address(const void* pointer) {
  simt::Block* block = machine.now->block;
  cluster.blocks[block->index] = block;
  const auto offset = static_cast<std::uint32_t>(static_cast<const unsigned char*>(pointer) - block->shared.get());
  return static_cast<std::uint32_t>(cluster_rank()) << kRankShift | (kWindow + offset);
}

// Where the shared memory of a block has `bytes` bytes at an offset of the window; null, and an error, where it has not.
inline unsigned char* shared_pointer(int rank, std::uint32_t offset, std::size_t bytes) {
  offset &= kOffsetMask;
  const auto found = cluster.blocks.find(simt::block_index() - cluster_rank() + rank);
  if (found == cluster.blocks.end()) {
    machine.fail("shared memory of block " + std::to_string(rank) + " before it is known to exist");
  } else if (cluster.threads_left[found->first] == machine.threads) {
    machine.fail("shared memory of block " + std::to_string(rank) + ", which has left");
  } else if (offset < kWindow || offset + bytes > kWindow + cluster.shared_bytes) {
    machine.fail("shared memory at " + std::to_string(offset) + ", of " + std::to_string(cluster.shared_bytes) + " bytes");
  } else {
    return found->second->shared.get() + (offset - kWindow);
  }
  return nullptr;
}

inline std::uint32_t swizzled(std::uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// ---- Threads

inline void yield() {
  simt::Meeting alone;
  alone.members = 1;
  machine.meet(alone);
}

// Lets others go far ahead, one time in `rarity`.
inline void dawdle(std::uint64_t rarity) {
  if (cluster.random() % rarity != 0) return;
  for (int turns = 0; turns < 200; ++turns) {
    cluster.idle = 0;
    yield();
  }
}

inline void warp_barrier() {
  machine.meet(machine.now->block->warps[static_cast<std::size_t>(simt::thread_index() / simt::kLanes)]);
}

inline void cluster_sync() { machine.meet(machine.grid_meeting()); }

// ---- Barriers

inline Barrier* barrier_at(int rank, std::uint32_t address) {
  auto* barrier = reinterpret_cast<Barrier*>(shared_pointer(rank, address, sizeof(Barrier)));
  if (barrier && (address % 8 != 0 || barrier->count <= 0)) machine.fail("no barrier was initialised there");
  return machine.error.empty() ? barrier : nullptr;
}

inline void change(Barrier& barrier, int arrivals, std::int32_t bytes) {
  cluster.idle = 0;
  barrier.arrivals = static_cast<std::int16_t>(barrier.arrivals - arrivals);
  barrier.bytes += bytes;
  if (barrier.arrivals < 0) machine.fail("more arrivals at a barrier than it was initialised for");
  if (barrier.arrivals != 0 || barrier.bytes != 0) return;
  barrier.phase ^= 1;
  barrier.arrivals = barrier.count;
}

inline void barrier_init(std::uint32_t barrier, std::uint32_t count) {
  dawdle(4);
  auto* p = reinterpret_cast<Barrier*>(shared_pointer(cluster_rank(), barrier, sizeof(Barrier)));
  if (p) *p = {0, static_cast<std::int16_t>(count), static_cast<std::int16_t>(count), 0};
}

inline void barrier_init_fence() {}

inline void barrier_expect(std::uint32_t barrier, std::uint32_t bytes) {
  if (Barrier* p = barrier_at(cluster_rank(), barrier)) change(*p, 1, static_cast<std::int32_t>(bytes));
}

inline void barrier_arrive(std::uint32_t barrier, int rank) {
  dawdle(64);
  if (Barrier* p = barrier_at(rank, barrier)) change(*p, 1, 0);
}

// ---- The copy engine

inline void tma_prefetch(const CUtensorMap*) {}

inline void tma_load_multicast(std::uint32_t to, const CUtensorMap* map, std::uint32_t barrier, int x, int y, std::uint32_t blocks) {
  cluster.copies.push_back({*map, to & kOffsetMask, barrier & kOffsetMask, x, y, blocks});
}

inline void tma_load(std::uint32_t to, const CUtensorMap* map, std::uint32_t barrier, int x, int y) {
  tma_load_multicast(to, map, barrier, x, y, 1u << cluster_rank());
}

inline std::uint16_t element_of(const Copy& copy, int row, int column) {
  const std::int64_t y = std::int64_t{copy.y} + row, x = std::int64_t{copy.x} + column;
  if (y < 0 || y >= copy.map.rows || x < 0 || x >= copy.map.columns) return 0;
  return simt::load(reinterpret_cast<const std::uint16_t*>(copy.map.data + y * copy.map.row_bytes) + x);
}

inline void perform(const Copy& copy) {
  if (copy.to % 1024 != 0) machine.fail("a swizzled copy to an address that is no multiple of 1024");
  for (int rank = 0; rank < cluster.size; ++rank) {
    if ((copy.blocks >> rank & 1) == 0) continue;
    for (int row = 0; row < copy.map.box_rows; ++row) {
      for (int column = 0; column < copy.map.box_columns; ++column) {
        const std::uint16_t element = element_of(copy, row, column);
        const std::uint32_t at = copy.to + static_cast<std::uint32_t>(row * copy.map.box_columns + column) * 2;
        unsigned char* p = shared_pointer(rank, swizzled(at), 2);
        if (!p) return;
        std::memcpy(p, &element, 2);
      }
    }
    if (Barrier* p = barrier_at(rank, copy.barrier)) change(*p, 0, -copy.map.box_columns * copy.map.box_rows * 2);
  }
}

inline void perform_any_copy() {
  const std::size_t pick = cluster.random() % cluster.copies.size();
  const Copy copy = cluster.copies[pick];
  cluster.copies[pick] = cluster.copies.back();
  cluster.copies.pop_back();
  perform(copy);
}

inline void barrier_wait(std::uint32_t barrier, std::uint32_t parity) {
  constexpr long kPatience = 300000;
  while (machine.error.empty()) {
    const Barrier* p = barrier_at(cluster_rank(), barrier);
    if (!p || p->phase != parity) return;
    if (!cluster.copies.empty() && cluster.random() % 256 == 0) perform_any_copy();
    if (++cluster.idle > kPatience && cluster.copies.empty()) machine.fail("threads wait at barriers, and nothing is under way");
    yield();
  }
}

// ---- wgmma

// Numbers of a swizzled matrix of 128-byte rows, by its descriptor.
template <class T>
void read_matrix_row(std::uint64_t descriptor, int row, float (&x)[16]) {
  const auto address = static_cast<std::uint32_t>(descriptor & 0x3FFF) << 4;
  const auto group_stride = static_cast<std::uint32_t>(descriptor >> 32 & 0x3FFF) << 4;
  constexpr std::uint64_t kKnownBits = std::uint64_t{3} << 62 | std::uint64_t{0x3FFF} << 32 | std::uint64_t{0x3FFF} << 16 | 0x3FFF;
  if (descriptor >> 62 != 1 || (descriptor & ~kKnownBits) != 0) machine.fail("a descriptor that is not of the 128-byte swizzle");
  for (int k = 0; k < 16; ++k) {
    const std::uint32_t at = address + static_cast<std::uint32_t>(row / 8) * group_stride + static_cast<std::uint32_t>(row % 8 * 128 + k * 2);
    std::uint16_t bits = 0;
    if (const unsigned char* p = shared_pointer(cluster_rank(), swizzled(at), 2)) std::memcpy(&bits, p, 2);
    x[k] = std::is_same_v<T, bf16> ? simt::float_of_bits(static_cast<std::uint32_t>(bits) << 16) : simt::f16_to_float(bits);
  }
}

// The accumulators of one thread of the warpgroup.
template <class T>
void multiply_now(float* d, int thread, std::uint64_t a, std::uint64_t b, bool accumulate) {
  float left[2][16], right[16];
  for (int h = 0; h < 2; ++h) read_matrix_row<T>(a, thread / 32 * 16 + thread % 32 / 4 + 8 * h, left[h]);
  for (int i = 0; i < 64; ++i) {
    read_matrix_row<T>(b, i / 2 * 8 + thread % 4 * 2 + i % 2, right);
    for (int h = 0; h < 2; ++h) {
      float& sum = d[i / 2 * 4 + 2 * h + i % 2];
      float product = accumulate ? sum : 0.0f;
      for (int k = 0; k < 16; ++k) product += left[h][k] * right[k];
      sum = product;
    }
  }
}

// All threads of a warpgroup name the same matrices.
inline void check_descriptors(const Products& products, std::uint64_t a, std::uint64_t b) {
  const std::pair<std::uint64_t, std::uint64_t> matrices(a, b);
  const auto place = cluster.descriptors.emplace(std::make_tuple(simt::block_index(), simt::thread_index() / 128, products.issued), matrices);
  if (place.first->second != matrices) machine.fail("threads of a warpgroup give wgmma different descriptors");
}

template <class T>
void wgmma(float (&d)[128], std::uint64_t a, std::uint64_t b, bool accumulate) {
  Products& products = my_products();
  if (!products.fenced) machine.fail("wgmma without a fence before it");
  check_descriptors(products, a, b);
  ++products.issued;
  float* const accumulators = d;
  const int thread = simt::thread_index() % 128;
  products.queue.push_back({[=] { multiply_now<T>(accumulators, thread, a, b, accumulate); }, products.group});
}

inline void wgmma_fence() {
  my_products().fenced = true;
  warp_barrier();
}

inline void wgmma_commit() { ++my_products().group; }

template <int kPending>
void wgmma_wait() {
  Products& products = my_products();
  while (!products.queue.empty() && products.queue.front().group < products.group - kPending) {
    products.queue.front().run();
    products.queue.erase(products.queue.begin());
  }
  if (kPending == 0) products.fenced = false;
  warp_barrier();
}

inline void keep_in_order(float (&)[128]) {}

template <int>
void give_registers() {}
template <int>
void take_registers() {}

// ---- Launches

template <class... Parameters, class... Arguments>
void launch_clusters(const simt::Grid& grid, int size, const char*, void (*kernel)(Parameters...), const Arguments&... arguments) {
  cluster = Cluster();
  cluster.size = size;
  cluster.shared_bytes = grid.shared_bytes;
  cluster.random.seed(machine.seed);
  machine.run(grid.blocks, grid.threads, grid.shared_bytes, size, [&] {
    kernel(Parameters(arguments)...);
    ++cluster.threads_left[simt::block_index()];
  });
  if (!cluster.copies.empty()) machine.fail("a block left while copies were under way");
  for (const auto& entry : cluster.products) {
    if (!entry.second.queue.empty()) machine.fail("a thread left while wgmma was under way");
  }
}

}  // namespace cpo::hopper
