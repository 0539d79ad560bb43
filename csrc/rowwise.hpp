// F1. What a CPU does to every token between two products: norm, gate, and the copy into the cache; one pass each.
//
//     norm      out = x / sqrt(mean(x^2) + eps) * weight        per row; weight absent: ones
//     swiglu    out = gate / (1 + exp(-gate)) * up              rows of gate and up may be strided, alike
//     rope      pairs of neighbours (x, y) = (x cos - y sin, x sin + y cos), in place, by one angle per token and pair
//     scatter   cache[slots[t]] = kv[t]
//     best      the id of each row's largest value, the lowest among equals; -1 where it is no number or infinite
//
// T is float or double; sums are taken in it.
#pragma once

#include <cstdint>

namespace splitdecode {

struct RowShape {
    int64_t rows, size, stride; // stride: elements from row to row of what is read; what is written lies side by side
};

template <class T> void norm_rows(const T* x, const T* weight, double eps, T* out, RowShape shape);
template <class T> void swiglu_rows(const T* gate, const T* up, T* out, RowShape shape);
// x: rows of `shape.size` elements, heads side by side; cis: cos and sin of `pairs` angles per row, for each of its
// heads.
template <class T> void rope_rows(T* x, const T* cis, int64_t pairs, RowShape shape);
template <class T> void best_rows(const T* values, int32_t* ids, RowShape shape);
// slots: all of them in range.
template <class T> void scatter_rows(const T* kv, const int64_t* slots, T* cache, RowShape shape);

} // namespace splitdecode
