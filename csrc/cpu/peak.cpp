// Every kernel adds products of registers to independent sums, as many as keep the units busy, and touches no memory. No two
// sums begin with the same value, or a compiler would make one of them. The instruction set is that of the function, not of
// the file, so that all of them are here together.
#include "cpu/peak.h"

#include <algorithm>
#include <chrono>
#include <cstdint>

#include "cpu/gemm.h"
#include "cpu/parallel.h"

#if defined(__x86_64__)
#include "cpu/x86_intrinsics.h"
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) || __GNUC__ >= 11)
#define CPO_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace cpo {
namespace {

constexpr int kSteps = 1 << 14;  // of a run, each one multiply-add for every sum

struct Kernel {
  float (*run)(float seed);  // the result only keeps the compiler from leaving the sums out
  double multiply_adds;
};

#if defined(__x86_64__)
constexpr int kSums512 = 24, kSums256 = 12;  // what registers hold beside the two factors

[[gnu::target("avx2,fma")]] float run_avx2(float seed) {
  const __m256 a = _mm256_set1_ps(seed), b = _mm256_set1_ps(1e-3f);
  __m256 sum[kSums256];
#pragma GCC unroll 12
  for (int i = 0; i < kSums256; ++i) sum[i] = _mm256_set1_ps(seed + i);
  for (int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < kSums256; ++i) sum[i] = _mm256_fmadd_ps(a, b, sum[i]);
  }
#pragma GCC unroll 12
  for (const auto& s : sum) sum[0] = _mm256_add_ps(sum[0], s);
  return _mm256_cvtss_f32(sum[0]);
}

[[gnu::target("avx512f")]] float run_avx512(float seed) {
  const __m512 a = _mm512_set1_ps(seed), b = _mm512_set1_ps(1e-3f);
  __m512 sum[kSums512];
#pragma GCC unroll 24
  for (int i = 0; i < kSums512; ++i) sum[i] = _mm512_set1_ps(seed + i);
  for (int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 24
    for (int i = 0; i < kSums512; ++i) sum[i] = _mm512_fmadd_ps(a, b, sum[i]);
  }
#pragma GCC unroll 24
  for (const auto& s : sum) sum[0] = _mm512_add_ps(sum[0], s);
  return _mm512_cvtss_f32(sum[0]);
}

[[gnu::target("avx512f,avx512bf16")]] float run_avx512bf16(float seed) {
  const __m512 a = _mm512_set1_ps(seed), b = _mm512_set1_ps(1e-3f);
  __m512 sum[kSums512];
#pragma GCC unroll 24
  for (int i = 0; i < kSums512; ++i) sum[i] = _mm512_set1_ps(seed + i);
  for (int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 24
    for (int i = 0; i < kSums512; ++i) sum[i] = _mm512_dpbf16_ps(sum[i], (__m512bh)a, (__m512bh)b);
  }
#pragma GCC unroll 24
  for (const auto& s : sum) sum[0] = _mm512_add_ps(sum[0], s);
  return _mm512_cvtss_f32(sum[0]);
}
#endif

#if defined(CPO_AMX)
constexpr int kTileRows = 16, kTileBytes = 64, kTileSums = 4;

// Sums in tiles 0 to 3, factors in 4 to 7.
[[gnu::target("amx-tile,amx-bf16")]] float run_amx(float seed) {
  struct alignas(64) {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t bytes[16] = {};
    std::uint8_t rows[16] = {};
  } config;
  alignas(64) float values[kTileRows][kTileBytes / 4];
  for (auto& row : values)
    for (float& value : row) value = seed;
  for (int tile = 0; tile < 8; ++tile) config.bytes[tile] = kTileBytes, config.rows[tile] = kTileRows;
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, values, kTileBytes);
  _tile_loadd(5, values, kTileBytes);
  _tile_loadd(6, values, kTileBytes);
  _tile_loadd(7, values, kTileBytes);
  for (int step = 0; step < kSteps; ++step) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, values, kTileBytes);
  _tile_release();
  return values[0][0];
}

// Linux gives the tile registers to those who ask.
bool may_use_amx() {
  constexpr int kAskForState = 0x1023, kTileData = 18;
  return machine_has_amx_bf16() && syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
}
#endif

#if defined(__aarch64__)
constexpr int kSumsNeon = 24;

float run_neon(float seed) {
  const float32x4_t a = vdupq_n_f32(seed), b = vdupq_n_f32(1e-3f);
  float32x4_t sum[kSumsNeon];
#pragma GCC unroll 24
  for (int i = 0; i < kSumsNeon; ++i) sum[i] = vdupq_n_f32(seed + i);
  for (int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 24
    for (int i = 0; i < kSumsNeon; ++i) sum[i] = vfmaq_f32(sum[i], a, b);
  }
#pragma GCC unroll 24
  for (const auto& s : sum) sum[0] = vaddq_f32(sum[0], s);
  return vgetq_lane_f32(sum[0], 0);
}
#endif

Kernel kernel_for(DType dtype) {
#if defined(__x86_64__)
  __builtin_cpu_init();
#if defined(CPO_AMX)
  if (dtype == DType::kBF16 && may_use_amx()) return {run_amx, 1.0 * kTileSums * kTileRows * kTileRows * (kTileBytes / 2)};
#endif
  if (dtype == DType::kBF16 && __builtin_cpu_supports("avx512bf16")) return {run_avx512bf16, 32.0 * kSums512};
  if (__builtin_cpu_supports("avx512f")) return {run_avx512, 16.0 * kSums512};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {run_avx2, 8.0 * kSums256};
  return {nullptr, 0.0};
#elif defined(__aarch64__)
  (void)dtype;  // half precision is widened
  return {run_neon, 4.0 * kSumsNeon};
#else
  (void)dtype;
  return {nullptr, 0.0};
#endif
}

struct Runs {
  Kernel kernel;
  int repeats;

  static void of_thread(const void* runs, std::int64_t index) {
    const Runs& own = *static_cast<const Runs*>(runs);
    volatile float sink = 1.0f + static_cast<float>(index);
    for (int i = 0; i < own.repeats; ++i) sink = own.kernel.run(sink < 1e3f ? sink : 1.0f);
  }
};

}  // namespace

double peak_multiply_adds(DType dtype, int threads, double seconds) {
  using Clock = std::chrono::steady_clock;
  constexpr double kOfRun = 5e-3;  // seconds, beside which waking the threads is nothing
  const auto since = [](Clock::time_point begun) { return std::chrono::duration<double>(Clock::now() - begun).count(); };
  Runs runs{kernel_for(dtype), 1};
  if (runs.kernel.run == nullptr) return 0.0;
  double one = kOfRun, best = 0.0;
  for (int i = 0; i < 8; ++i) {
    const auto begun = Clock::now();
    Runs::of_thread(&runs, 0);
    one = std::min(one, since(begun));
  }
  runs.repeats = static_cast<int>(std::max(1.0, kOfRun / one));
  for (const auto started = Clock::now(); since(started) < seconds;) {
    const auto begun = Clock::now();
    parallel_for(threads, threads, Runs::of_thread, &runs);
    best = std::max(best, threads * runs.repeats * runs.kernel.multiply_adds * kSteps / since(begun));
  }
  return best;
}

}  // namespace cpo
