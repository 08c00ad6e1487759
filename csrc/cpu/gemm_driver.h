// Cache blocking, and the split of C over threads. For inclusion by the files compiled per instruction set only.
//
// Kernel supplies the inner parts: register tiles of kRows x kCols of C, out of kRows rows of A, a panel or where
// they lie, and panels of kCols columns of B. A panel holds units of 32 bits: one fp32 number, or two bf16 numbers that are neighbours in k.
#pragma once

#include <cstdint>

#include "cpu/gemm_args.h"
#include "cpu/gemm_panel.h"
#include "cpu/parallel.h"

namespace {

using cpo::GemmArgs;
using cpo::GemmOperand;

inline Size smaller(Size x, Size y) { return x < y ? x : y; }
inline Size at_least_one(Size x) { return x < 1 ? 1 : x; }
inline Size ceil_div(Size x, Size y) { return (x + y - 1) / y; }
inline Size round_up(Size x, Size y) { return ceil_div(x, y) * y; }

// The multiple of `step` that splits `size` most evenly into blocks of at most `limit`.
inline Size even_block(Size size, Size limit, Size step) {
  const Size most = at_least_one(limit / step) * step;
  return at_least_one(ceil_div(ceil_div(size, at_least_one(ceil_div(size, most))), step)) * step;
}

struct Range {
  Size begin, end;
  Size size() const { return end - begin; }
  Range block(Size start, Size limit) const { return {start, smaller(start + limit, end)}; }
};

inline Size largest_part(Size size, Size parts, Size step) { return ceil_div(ceil_div(size, step), parts) * step; }

inline Range part(Size size, Size parts, Size index, Size step) {
  const Size steps = ceil_div(size, step);
  return {smaller(size, steps * index / parts * step), smaller(size, steps * (index + 1) / parts * step)};
}

// Each thread owns a rectangle of C, one of rows x cols.
struct Grid {
  Size rows, cols;
  Size size() const { return rows * cols; }
};

// Columns of C that stay together: sums over them are added up by one thread, in one order.
template <class Kernel>
Size column_step(const GemmArgs& args) {
  static_assert(cpo::kSumColumns % Kernel::kCols == 0);
  return args.softmax ? cpo::kSumColumns : Kernel::kColStep;
}

template <class Kernel>
Grid choose_grid(const GemmArgs& args) {
  constexpr Size kPackCost = 32;          // of packing an element, in multiply-adds
  constexpr Size kSerialWork = 1 << 19;   // multiply-adds that are done before a second thread has woken up
  Grid best{1, 1};
  if (args.m * args.n <= kSerialWork / at_least_one(args.k)) return best;
  Size best_cost = INT64_MAX;
  for (Size rows = 1; rows <= args.threads; ++rows) {
    const Size cols = args.threads / rows;
    const Size m = largest_part(args.m, rows, Kernel::kRows), n = largest_part(args.n, cols, column_step<Kernel>(args));
    const Size cost = m * n + kPackCost * (m + n);
    if (cost < best_cost) best = {rows, cols}, best_cost = cost;
  }
  return best;
}

// Sizes of the blocks that are packed: A's for the shared cache, B's for a core's own. Measured on Zen 5 (1 MiB of L2).
template <class Kernel>
struct Blocking {
  static constexpr Size kUnits = 768, kFloatsOfA = 768 * 1024, kFloatsOfB = 96 * 1024, kSpan = 1024;

  Size total_units;     // of k
  Size units;           // of k in a block
  Size rows;            // of A in a block
  Size cols;            // of B in a block
  Size span;            // columns of C finished before the next are begun
  bool staged;          // sums wait in fp32 until the last block of k
  Size a_floats, b_floats, c_floats, stripe_floats;

  Blocking(const GemmArgs& args, const Grid& grid) {
    const Size m = largest_part(args.m, grid.rows, Kernel::kRows), n = largest_part(args.n, grid.cols, column_step<Kernel>(args));
    total_units = ceil_div(args.k, Kernel::kUnit);
    units = even_block(total_units, kUnits, 16);
    const bool one_pass = total_units <= units;
    staged = !one_pass && (args.out_dtype != cpo::DType::kF32 || args.softmax);
    rows = even_block(m, staged ? smaller(kSpan, kFloatsOfA / units) : kFloatsOfA / units, 2 * Kernel::kRows);
    cols = even_block(n, kFloatsOfB / units, args.softmax ? cpo::kSumColumns : Kernel::kCols);
    span = one_pass ? round_up(n, cols) : even_block(n, kSpan, cols);
    a_floats = rows / Kernel::kRows * panel_floats<Kernel::kRows>(units);
    b_floats = cols / Kernel::kCols * panel_floats<Kernel::kCols>(units);
    c_floats = staged ? round_up(rows * span, 16) : 0;
    stripe_floats = args.softmax ? Kernel::kRows * cols : 0;
  }

  Size bytes() const { return sizeof(float) * (a_floats + b_floats + c_floats + stripe_floats); }
};

inline const char* address(const GemmOperand& x, Size row, Size col) {
  return static_cast<const char*>(x.data) + (row * x.row_stride + col * x.col_stride) * bytes_of(x.dtype);
}

// The blocks of one thread's rectangle.
template <class Kernel>
class Worker {
 public:
  Worker(const GemmArgs& args, const Blocking<Kernel>& blocking, float* workspace)
      : args_(args), blocking_(blocking), a_(workspace), b_(a_ + blocking.a_floats), c_(b_ + blocking.b_floats), stripe_(c_ + blocking.c_floats) {}

  void run(Range rows, Range cols) {
    for (Size j = cols.begin; j < cols.end; j += blocking_.span)
      for (Size i = rows.begin; i < rows.end; i += blocking_.rows)
        run_span(rows.block(i, blocking_.rows), cols.block(j, blocking_.span));
  }

 private:
  void run_span(Range rows, Range span) {
    const Range all{0, blocking_.total_units};
    Size start = 0;
    do {  // once where k is 0, too: it writes zeros
      const Range units = all.block(start, blocking_.units);
      if (!in_place(units)) pack_a(rows, units);
      for (Size j = span.begin; j < span.end; j += blocking_.cols) {
        const Range cols = span.block(j, blocking_.cols);
        pack_b(cols, units);
        if (cols.end < span.end)
          prefetch_b(span.block(cols.end, blocking_.cols), units);
        else
          prefetch_b(span.block(span.begin, blocking_.cols), all.block(units.end, blocking_.units));
        multiply(rows, cols, span.begin, units);
      }
      start = units.end;
    } while (start < all.end);
  }

  Size length(Range units) const { return smaller(units.end * Kernel::kUnit, args_.k) - units.begin * Kernel::kUnit; }

  // Whether tiles read A where it lies: units are together, and no row ends within one. The workspace has room for
  // packing it even so, as its size is asked for without strides.
  bool in_place(Range units) const {
    return args_.a.col_stride == 1 && Kernel::is_unit(args_.a.dtype) && length(units) % Kernel::kUnit == 0;
  }

  void pack_a(Range rows, Range units) {
    const GemmOperand& a = args_.a;
    const PackSource source{address(a, rows.begin, units.begin * Kernel::kUnit), a.row_stride, a.col_stride, rows.size(), length(units)};
    Kernel::template pack<Kernel::kRows>(a.dtype, source, blocking_.units, a_);
  }

  void pack_b(Range cols, Range units) {
    const GemmOperand& b = args_.b;
    const PackSource source{address(b, units.begin * Kernel::kUnit, cols.begin), b.col_stride, b.row_stride, cols.size(), length(units)};
    Kernel::template pack<Kernel::kCols>(b.dtype, source, blocking_.units, b_);
  }

  // What pack_b reads next is fetched while the tiles before it are multiplied.
  void prefetch_b(Range cols, Range units) {
    const GemmOperand& b = args_.b;
    next_ = {};
    const bool by_column = b.row_stride == 1;
    if (units.size() <= 0 || !(by_column || b.col_stride == 1)) return;
    const Size k = length(units), run = by_column ? k : cols.size(), runs = by_column ? cols.size() : k;
    next_.line = address(b, units.begin * Kernel::kUnit, cols.begin);
    next_.run_lines = next_.left_in_run = run * bytes_of(b.dtype) / kLineBytes + 1;
    next_.skip = (by_column ? b.col_stride : b.row_stride) * bytes_of(b.dtype) - next_.run_lines * kLineBytes;
    next_.left = runs * next_.run_lines;
  }

  // Packed A times packed B onto these columns of C, in a span that starts at column `origin`.
  void multiply(Range rows, Range cols, Size origin, Range units) {
    const bool first = units.begin == 0, last = units.end == blocking_.total_units;
    const bool to_stage = blocking_.staged && !last, to_stripe = args_.softmax && last;
    const bool in_place = this->in_place(units);
    Tile t;
    t.units = units.size();
    t.a_row = in_place ? args_.a.row_stride * bytes_of(args_.a.dtype) : sizeof(float);
    t.a_unit = in_place ? sizeof(float) : Kernel::kRows * sizeof(float);
    t.next = &next_;
    t.read = !first || (args_.accumulate && args_.low == nullptr);
    t.add_pair = args_.accumulate;
    t.out_dtype = to_stage || to_stripe ? cpo::DType::kF32 : args_.out_dtype;
    t.in_stride = blocking_.staged ? blocking_.span : args_.out_stride;
    t.out_stride = to_stage ? blocking_.span : to_stripe ? blocking_.cols : args_.out_stride;
    for (Size i = rows.begin; i < rows.end; i += Kernel::kRows) {
      t.rows = static_cast<int>(smaller(Kernel::kRows, rows.end - i));
      t.a = in_place ? address(args_.a, i, units.begin * Kernel::kUnit)
                      : reinterpret_cast<const char*>(a_ + (i - rows.begin) / Kernel::kRows * panel_floats<Kernel::kRows>(blocking_.units));
      for (Size j = cols.begin; j < cols.end; j += Kernel::kCols) {
        t.cols = static_cast<int>(smaller(Kernel::kCols, cols.end - j));
        t.b = b_ + (j - cols.begin) / Kernel::kCols * panel_floats<Kernel::kCols>(blocking_.units);
        char* const out = static_cast<char*>(args_.out) + (i * args_.out_stride + j) * bytes_of(args_.out_dtype);
        float* const stage = c_ + (i - rows.begin) * blocking_.span + (j - origin);
        t.in = blocking_.staged ? stage : reinterpret_cast<const float*>(out);
        t.out = to_stage ? reinterpret_cast<void*>(stage) : to_stripe ? reinterpret_cast<void*>(stripe_ + (j - cols.begin)) : out;
        t.written = to_stage ? lines(stage, blocking_.span * sizeof(float), t.rows, t.cols * sizeof(float))
                             : lines(args_.out ? out : nullptr, args_.out_stride * bytes_of(args_.out_dtype), t.rows, t.cols * bytes_of(args_.out_dtype));
        t.low = to_stage || args_.low == nullptr ? nullptr : args_.low + i * args_.out_stride + j;
        Kernel::multiply(t);
      }
      if (to_stripe) softmax(i, t.rows, cols);
    }
  }

  // The lines of some rows, `stride` bytes apart; none at null.
  static Prefetch lines(const void* first, Size stride, Size rows, Size row_bytes) {
    const Size per_row = (row_bytes + kLineBytes - 1) / kLineBytes;
    return {static_cast<const char*>(first), per_row, per_row, stride - per_row * kLineBytes, first ? rows * per_row : 0};
  }

  // The logits in the stripe are turned into what is kept of them.
  void softmax(Size row, Size rows, Range cols) {
    char* const out = static_cast<char*>(args_.out) + (row * args_.out_stride + cols.begin) * bytes_of(args_.out_dtype);
    softmax_of(*args_.softmax, {stripe_, blocking_.cols, row, rows, cols.begin, cols.size(), args_.out ? out : nullptr, args_.out_stride},
               args_.out_dtype);
  }

  const GemmArgs& args_;
  const Blocking<Kernel>& blocking_;
  float *a_, *b_, *c_, *stripe_;
  Prefetch next_ = {};
};

constexpr Size kWorkspaceAlignment = 4096;

template <class Kernel>
Size workspace_bytes(const GemmArgs& args) {
  const Grid grid = choose_grid<Kernel>(args);
  return grid.size() * round_up(Blocking<Kernel>(args, grid).bytes(), kWorkspaceAlignment) + kWorkspaceAlignment;
}

template <class Kernel>
Range rows_of(const GemmArgs& args, const Grid& grid, Size index) {
  return part(args.m, grid.rows, index / grid.cols, Kernel::kRows);
}

template <class Kernel>
Range cols_of(const GemmArgs& args, const Grid& grid, Size index) {
  return part(args.n, grid.cols, index % grid.cols, column_step<Kernel>(args));
}

// The rectangles of C, each with a workspace of its own.
template <class Kernel>
struct Rectangles {
  const GemmArgs& args;
  const Grid& grid;
  const Blocking<Kernel>& blocking;
  char* workspace;
  Size bytes;  // of each workspace

  static void compute(const void* rectangles, Size index) {
    const auto& [args, grid, blocking, workspace, bytes] = *static_cast<const Rectangles*>(rectangles);
    Worker<Kernel> worker(args, blocking, reinterpret_cast<float*>(workspace + index * bytes));
    worker.run(rows_of<Kernel>(args, grid, index), cols_of<Kernel>(args, grid, index));
  }
};

template <class Kernel>
Size shares(const GemmArgs& args, Size* out) {
  const Grid grid = choose_grid<Kernel>(args);
  for (Size index = 0; index < grid.size(); ++index) {
    const Range rows = rows_of<Kernel>(args, grid, index), cols = cols_of<Kernel>(args, grid, index);
    *out++ = rows.begin;
    *out++ = rows.end;
    *out++ = cols.begin;
    *out++ = cols.end;
  }
  return grid.size();
}

template <class Kernel>
void run(const GemmArgs& args, void* workspace) {
  if (args.m == 0 || args.n == 0 || (args.k == 0 && args.accumulate)) return;
  const Grid grid = choose_grid<Kernel>(args);
  const Blocking<Kernel> blocking(args, grid);
  const Size bytes = round_up(blocking.bytes(), kWorkspaceAlignment);
  char* const base = static_cast<char*>(workspace) + (-reinterpret_cast<std::uintptr_t>(workspace)) % kWorkspaceAlignment;
  const Rectangles<Kernel> rectangles{args, grid, blocking, base, bytes};
  cpo::parallel_for(grid.size(), static_cast<int>(grid.size()), Rectangles<Kernel>::compute, &rectangles);
}

}  // namespace
