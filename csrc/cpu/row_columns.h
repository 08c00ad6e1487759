// Columns of a gradient: how large each is, and some of them taken out of some rows.
#pragma once

namespace {

// Which of kPair consecutive columns each lane of load2 holds.
template <class T>
struct LaneColumns {
  float of[kPair];

  LaneColumns() {
    float places[kPair];
    for (int i = 0; i < kPair; ++i) places[i] = static_cast<float>(i);
    Vec a, b;
    match2(places, a, b, T{});
    store2(of, a, b);
  }
};

// Columns [begin, end) with end - begin <= cpo::kColumnsAtOnce, rows in ascending order.
template <class T>
void column_stats(const cpo::ColumnArgs& args, int64_t begin, int64_t end) {
  float largest[cpo::kColumnsAtOnce] = {}, total[cpo::kColumnsAtOnce] = {};  // in the order of the lanes
  const int64_t width = end - begin, whole = width - width % kPair;
  const auto add = [&](const T* x, int64_t j) {
    Vec a, b, c, d;
    load2(x, a, b);
    a = abs(a);
    b = abs(b);
    load2(largest + j, c, d);
    store2(largest + j, max(c, a), max(d, b));
    load2(total + j, c, d);
    store2(total + j, c + a, d + b);
  };
  for (int64_t row = 0; row < args.rows; ++row) {
    const T* x = static_cast<const T*>(args.grad) + row * args.row_stride + begin;
    for (int64_t j = 0; j < whole; j += kPair) add(x + j, j);
    if (whole < width) {
      T tail[kPair] = {};
      __builtin_memcpy(tail, x + whole, static_cast<size_t>(width - whole) * sizeof(T));
      add(tail, whole);
    }
  }
  const LaneColumns<T> lanes;
  for (int64_t j = 0; j < width; j += kPair) {
    for (int i = 0; i < kPair; ++i) {
      const int64_t column = j + static_cast<int64_t>(lanes.of[i]);
      if (column >= width) continue;
      args.largest[begin + column] = largest[j + i];
      args.total[begin + column] = total[j + i];
    }
  }
}

template <class T>
inline float sum_of(const T* x, int64_t count) {
  Vec a = set1(0.0f), b = a, c, d;
  int64_t j = 0;
  for (; j + kPair <= count; j += kPair) {
    load2(x + j, c, d);
    a = a + c;
    b = b + d;
  }
  if (j < count) {
    T tail[kPair] = {};
    __builtin_memcpy(tail, x + j, static_cast<size_t>(count - j) * sizeof(T));
    load2(tail, c, d);
    a = a + c;
    b = b + d;
  }
  float parts[kPair], sum = 0.0f;
  store2(parts, a, b);
  for (const float part : parts) sum += part;
  return sum;
}

// Rows [begin, end) of the result: the chosen columns, then the sum of all others.
template <class T>
void take_columns(const cpo::TakeArgs& args, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const T* x = static_cast<const T*>(args.grad) + args.row_indices[i] * args.row_stride;
    T* out = static_cast<T*>(args.out) + i * (args.count + 1);
    const float whole = sum_of(x, args.vocab);
    for (int64_t j = 0; j < args.count; ++j) out[j] = x[args.columns[j]];
    store_column(out + args.count, whole - sum_of(out, args.count));
  }
}

}  // namespace
