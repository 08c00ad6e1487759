// setup.py compiles this file for the instruction set in its name.
#include "cpu/row_args.h"
#include "cpu/simd_neon.h"

// Written in terms of the Vec above, so the order matters.
#include "cpu/vec_math.h"

#include "cpu/row_transform.h"

#include "cpu/row_backward.h"
#include "cpu/row_columns.h"
#include "cpu/row_forward.h"

namespace cpo {

extern const RowKernels kRowKernelsNeon = {
    {forward<float>, forward<bf16>, forward<f16>},
    {{backward<float, float>, backward<float, bf16>, backward<float, f16>},
     {nullptr, backward<bf16, bf16>, nullptr},
     {nullptr, nullptr, backward<f16, f16>}},
    {column_stats<float>, column_stats<bf16>, column_stats<f16>},
    {take_columns<float>, take_columns<bf16>, take_columns<f16>},
};

}  // namespace cpo
