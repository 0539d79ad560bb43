// F1. What a CPU does to every token between two products: norm and gate, one pass each.
//
//     norm      out = x / sqrt(mean(x^2) + eps) * weight        per row; weight absent: ones
//     swiglu    out = gate / (1 + exp(-gate)) * up              rows of gate and up may be strided, alike
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

} // namespace splitdecode
