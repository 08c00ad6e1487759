// What the driver and an instruction set's packing and tiles have in common.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace {

using Size = std::int64_t;

constexpr Size kLineBytes = 64;

// Distance between panels. The extra line keeps panels that are written together out of each other's cache sets.
template <int W>
constexpr Size panel_floats(Size units) {
  return units * W + kLineBytes / 4;
}

inline Size bytes_of(cpo::DType dtype) { return dtype == cpo::DType::kF32 ? 4 : 2; }

// A matrix seen as (panel index, k), as the pack functions read it.
struct PackSource {
  const char* data;
  Size panel_stride, k_stride;  // elements
  Size size, k;
};

// Memory to bring closer while tiles are multiplied, a line every few units: runs of lines at equal distances.
struct Prefetch {
  const char* line;
  Size run_lines, left_in_run;
  Size skip;  // bytes from the end of a run to the next
  Size left;  // lines in all

  // For reading, or for writing.
  template <int kWrite>
  [[gnu::always_inline]] void fetch() {
    if (left <= 0) return;
    __builtin_prefetch(line, kWrite, 2 + kWrite);
    line += kLineBytes;
    if (--left_in_run == 0) line += skip, left_in_run = run_lines;
    --left;
  }
};

// A product of rows and a panel, and where it goes: `in` is read where sums over earlier blocks of k, or C itself, are added.
struct Tile {
  const char* a;       // a panel, or rows where they lie
  Size a_row, a_unit;  // bytes from one row of A to the next, and from one unit
  const float* b;      // a panel
  Size units;
  int rows, cols;      // the part of the tile that is inside C
  bool read;           // add `in` to the product
  const float* in;
  Size in_stride;
  void* out;
  cpo::DType out_dtype;
  Size out_stride;
  std::uint16_t* low;  // what rounding to a bf16 `out` leaves over; null where nothing keeps it
  bool add_pair;       // add out + low to the product
  Prefetch* next;
  Prefetch written;  // where the tile, or what is made of it, goes
};

}  // namespace
