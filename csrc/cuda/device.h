// What the bindings ask about the machine; plain C++, as in launch.h.
#pragma once

namespace cpo {

int runtime_version();  // that the kernels were compiled with, as 13000
int driver_version();   // the newest that the driver supports; 0 without a driver

}  // namespace cpo
