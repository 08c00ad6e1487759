#pragma once

#include <pybind11/pybind11.h>

namespace cpo {

// Adds gemm, gemm_workspace_bytes, gemm_available and has_amx_bf16 to the module.
void bind_gemm(pybind11::module_& m);

}  // namespace cpo
