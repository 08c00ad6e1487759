// Comes before everything where kernels are compiled with faults: the number of the one that they have, or -1 for none.
#pragma once

extern "C" {
inline int fault_in_effect = -1;
}

#define FAULT(number) (fault_in_effect == (number))
