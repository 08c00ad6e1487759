#pragma once

#include <pybind11/pybind11.h>

namespace cpo {

// Adds linear_forward, linear_workspace, linear_tiles and linear_backward to the module.
void bind_linear(pybind11::module_& m);

}  // namespace cpo
