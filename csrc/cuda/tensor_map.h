// Tensor maps: what the copy engine knows of a matrix.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/hopper.h"

namespace cpo::hopper {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

#if defined(__CUDACC__)
// The driver's function, found through the runtime, so that nothing links to the driver.
inline EncodeTiled find_encode_tiled() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  constexpr unsigned kSince = 12000;  // CUDA 12.0
  simt::check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, kSince, cudaEnableDefault, &found),
              "cuTensorMapEncodeTiled");
  if (found != cudaDriverEntryPointSuccess) throw std::runtime_error("the driver is too old for tensor maps; CUDA 12.0 is needed");
  return reinterpret_cast<EncodeTiled>(function);
}
#else
inline EncodeTiled find_encode_tiled() { return &cuTensorMapEncodeTiled; }
#endif

// A matrix of 16-bit numbers, copied in swizzled boxes of `box_rows` rows x 128 bytes; outside of it are zeros.
struct Matrix {
  const void* data;
  std::int64_t rows, columns;
  std::int64_t row_stride;  // elements
};

inline CUtensorMap make_tensor_map(const char* name, DType dtype, const Matrix& matrix, int box_rows) {
  static const EncodeTiled encode = find_encode_tiled();
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(matrix.columns), static_cast<cuuint64_t>(matrix.rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(matrix.row_stride) * 2};
  const cuuint32_t box[] = {kSwizzleRow / 2, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[] = {1, 1};
  CUtensorMap map{};
  const CUresult status =
      encode(&map, dtype == DType::kBF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
             const_cast<void*>(matrix.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status == CUDA_SUCCESS) return map;
  throw std::invalid_argument(std::string(name) + " (" + std::to_string(matrix.rows) + ", " + std::to_string(matrix.columns) +
                              ") with a row stride of " + std::to_string(matrix.row_stride) +
                              " cannot be copied by the copy engine: it needs 16-byte boundaries (CUresult " +
                              std::to_string(static_cast<int>(status)) + ")");
}

}  // namespace cpo::hopper
