// The fused linear forward for Hopper (sm_90a): what the bindings pass. Addresses are the device's.
#pragma once

#include "cuda/launch.h"

namespace cpo {

struct LinearArgs {
  const void* hidden;              // (R, H) of the dtype, unit column stride, rows at multiples of 16 bytes
  std::int64_t hidden_stride;      // elements from row to row
  const void* weight;              // (V, H) likewise
  std::int64_t weight_stride;      // elements
  std::int64_t rows;               // R
  std::int64_t vocab;              // V
  std::int64_t depth;              // H
  const std::int64_t* targets;     // (N,)
  const std::int64_t* row_starts;  // (R + 1,), or null: token r belongs to row r
  std::int64_t tokens;             // N
  const float* bias;               // (V,), or null
  float mult;                      // as in RowBatch
  float cap;
  float* workspace;
  std::int64_t workspace_floats;  // linear_workspace() at least
  RowStats stats;
  float* logps;  // (N,)
  // What linear_backward needs, or null for none of it:
  void* exponentials;               // (R, V) of the dtype, rows at boundaries of 16 bytes and rounded up to them
  std::int64_t exponentials_stride;  // elements
  float* tile_tops;                 // (linear_tiles(V), R)
  float* slopes;                    // (N,)
};

struct LinearBackwardArgs {
  RowBatch batch;  // its logits are the exponentials, over which the gradient is written
  RowStats stats;
  const float* tile_tops;
  const float* slopes;
  const float* logps;
  const float* coef;  // (N,)
};

// Floats that linear_forward_sm90 needs to work in.
std::int64_t linear_workspace(int device, std::int64_t rows, std::int64_t vocab, std::int64_t depth);

// Log-probabilities of the tokens and statistics of the rows, as row_forward gives them of hidden @ weight.T; no logits in memory.
// bfloat16 or float16. Throws std::invalid_argument for what the hardware does not take, std::runtime_error on another GPU.
void linear_forward_sm90(const Queue& queue, DType dtype, const LinearArgs& args);

// Vocabulary tiles, each with a maximum of its own per row.
std::int64_t linear_tiles(std::int64_t vocab);

// The softmax gradient of the raw logits, as row_backward gives it, over what linear_forward_sm90 kept of them. On any GPU.
void linear_backward(const Queue& queue, DType dtype, const LinearBackwardArgs& args);

}  // namespace cpo
