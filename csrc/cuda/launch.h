// What crosses the border between the bindings, which know nothing of CUDA, and the kernels: plain structs. Addresses are the device's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/dtype.h"
#include "common/preference.h"

namespace cpo {

constexpr std::int64_t kNoToken = -100;

// Where to launch: a device, a stream of it (cudaStream_t), and the threads of a block, 0 for the kernel's own choice.
struct Queue {
  int device;
  void* stream;
  int threads;
};

// A caller's number of threads: whole warps.
inline int checked_threads(int threads, int most) {
  if (threads >= 32 && threads <= most && threads % 32 == 0) return threads;
  throw std::invalid_argument("threads is " + std::to_string(threads) + "; expected a multiple of 32 up to " + std::to_string(most));
}

// R rows of V logits and the N tokens they predict; the tokens of row r are row_starts[r]:row_starts[r + 1].
struct RowBatch {
  const void* logits;              // (R, V), unit column stride
  std::int64_t rows;               // R
  int vocab;                       // V
  std::int64_t row_stride;         // elements
  const std::int64_t* targets;     // (N,)
  const std::int64_t* row_starts;  // (R + 1,), or null: token r belongs to row r
  const float* bias;               // (V,), or null
  // y = cap * tanh((x + bias) * mult), or y = (x + bias) * mult where cap is 0;  dy/dx at y = 0 is slope
  float mult;
  float cap;
  float slope;
};

struct RowStats {
  float* max;      // (R,)
  float* log_sum;  // (R,): log sum_j exp(y_j - max)
};

struct ForwardArgs {
  RowBatch batch;
  RowStats stats;
  float* logps;  // (N,)
};

struct BackwardArgs {
  RowBatch batch;
  RowStats stats;
  const float* coef;        // (N,)
  float* token_grad;        // (N,), to work in; null for one token a row
  void* out;                // (R, V) of the logits' dtype, or of a narrower one; may be the logits themselves
  std::int64_t out_stride;  // elements
  // (R,) to write what each row of out is to be multiplied by, where unit_forward left the unit gradients; or null
  float* scale;
};

// Forward, and the unit gradient of the rows whose tokens have one target.
struct UnitArgs {
  ForwardArgs forward;
  void* out;                 // over the logits, of their dtype or of a narrower one
  std::int64_t out_stride;   // elements
  std::int64_t slice_bytes;  // of a row, in the shared memory of a block at most; 0: the kernel's choice
};

constexpr int kMaxCandidates = 1024;  // of a group: what its block holds in shared memory

// Whole groups of segments. The starts may be slices of longer prefix counts: their first element is what they count from.
struct ContrastArgs {
  const float* logps;                 // (n,) token log-probabilities in segment order; 0 in slots without a token
  const std::int64_t* token_starts;   // (S + 1,) prefix count of the slots of each segment
  const std::int64_t* segment_starts; // (G + 1,) prefix count of the segments of each group, or null: max_candidates each
  const std::int64_t* lengths;        // (S,) tokens of each segment; 0 makes the candidate absent
  const float* ref_logps;             // (S,) sums, or null
  const std::int64_t* ranks;          // (S,), or null for (0, 1, ..., 1) in each group
  const double* num_target_tokens;    // (), or null where mle_scale is already divided by it
  float* sums;                        // (S,)
  float* coef;                        // (n,)
  std::int64_t groups;                // G
  int max_candidates;
  bool length_normalized;
  Preference preference;
  double margin;
  double contrast_scale;
  double mle_scale;
};

// Row r of the logits has the slot r of the segments. grad: (R, V) of the logits' dtype, or the logits themselves, or null.
struct LossArgs {
  ForwardArgs forward;
  ContrastArgs contrast;  // of the logps that forward writes
  void* grad;
  std::int64_t grad_stride;  // elements
};

struct TargetArgs {
  const std::int64_t* targets;
  std::int64_t count;
  std::int64_t vocab;
};

struct ScaleArgs {
  void* numbers;        // at a boundary of 16 bytes
  std::int64_t count;
  const float* factor;  // one
};

inline std::size_t contrast_shared_bytes(int max_candidates) { return static_cast<std::size_t>(max_candidates) * 5 * sizeof(double); }

void row_forward(const Queue& queue, DType dtype, const ForwardArgs& args);
void row_backward(const Queue& queue, DType dtype, DType out_dtype, const BackwardArgs& args);
void unit_forward(const Queue& queue, DType dtype, DType out_dtype, const UnitArgs& args);
// Bytes of the longest row that unit_forward takes.
std::int64_t unit_forward_bytes(int device);
void contrast(const Queue& queue, const ContrastArgs& args);
void check_targets(const Queue& queue, const TargetArgs& args);
void scale(const Queue& queue, DType dtype, const ScaleArgs& args);
void cpo_loss(const Queue& queue, DType dtype, const LossArgs& args);

}  // namespace cpo
