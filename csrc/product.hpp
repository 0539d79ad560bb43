// F1. Products of a step's tokens with a matrix that are too small to share among threads.
//
//     out[t, :] = x[t, :] @ w + bias        or, to add, out[t, :] += x[t, :] @ w
//
// w lies [in, out] and is read where it lies: a block of 8 tokens and two vectors of columns at a time, sums in
// registers. For sizes that fit a core's caches; beyond them a library that packs w is faster.
#pragma once

#include <cstdint>

namespace splitdecode {

struct ProductShape {
    int64_t rows, depth, width;
};

// bias: null for none. add: `out` is added to, instead of the bias.
void multiply(const float* x, const float* w, const float* bias, float* out, ProductShape shape, bool add);

// Width of the vectors it uses on this machine: 16, 32 or 64.
int64_t vector_bytes();

} // namespace splitdecode
