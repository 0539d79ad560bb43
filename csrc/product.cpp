// F1. See the header.
#include "product.hpp"

#include "lanes.hpp"

namespace splitdecode {

namespace {

struct Operands {
    const float *x, *w, *bias;
    float* out;
    ProductShape shape;
    bool add;
};

#ifdef SPLITDECODE_VECTORS

// `Rows` tokens from `row` on by `Vectors` vectors of `Wide` bytes from `column` on.
template <int64_t Wide, int64_t Rows, int64_t Vectors>
SPLITDECODE_INLINE void block(const Operands& o, int64_t row, int64_t column) {
    using V = typename Lanes<Wide>::Vector;
    using L = typename Lanes<Wide>::Loose;
    constexpr int64_t lanes = Lanes<Wide>::count;
    const int64_t depth = o.shape.depth, width = o.shape.width;
    const float *x = o.x + row * depth, *w = o.w + column;
    float* out = o.out + row * width + column;
    V sums[Rows][Vectors];
    for (int64_t r = 0; r < Rows; ++r)
        for (int64_t v = 0; v < Vectors; ++v) {
            if (o.add)
                sums[r][v] = *reinterpret_cast<const L*>(out + r * width + v * lanes);
            else
                sums[r][v] = o.bias == nullptr ? V{} : *reinterpret_cast<const L*>(o.bias + column + v * lanes);
        }
    for (int64_t k = 0; k < depth; ++k, w += width) {
        V part[Vectors];
        for (int64_t v = 0; v < Vectors; ++v) part[v] = *reinterpret_cast<const L*>(w + v * lanes);
        for (int64_t r = 0; r < Rows; ++r)
            for (int64_t v = 0; v < Vectors; ++v) sums[r][v] += x[r * depth + k] * part[v];
    }
    for (int64_t r = 0; r < Rows; ++r)
        for (int64_t v = 0; v < Vectors; ++v) *reinterpret_cast<L*>(out + r * width + v * lanes) = sums[r][v];
}

// All tokens by some columns.
template <int64_t Wide, int64_t Vectors> SPLITDECODE_INLINE void columns(const Operands& o, int64_t column) {
    constexpr int64_t most = Wide == 64 ? 8 : 4; // by the number of registers
    int64_t row = 0;
    for (; row + most <= o.shape.rows; row += most) block<Wide, most, Vectors>(o, row, column);
    if (most > 4 && row + 4 <= o.shape.rows) block<Wide, 4, Vectors>(o, row, column), row += 4;
    if (row + 2 <= o.shape.rows) block<Wide, 2, Vectors>(o, row, column), row += 2;
    if (row < o.shape.rows) block<Wide, 1, Vectors>(o, row, column);
}

#endif

void plainly(const Operands& o, int64_t column) {
    for (int64_t row = 0; row < o.shape.rows; ++row) {
        const float* x = o.x + row * o.shape.depth;
        float* out = o.out + row * o.shape.width;
        for (int64_t c = column; c < o.shape.width; ++c) {
            float sum = o.add ? out[c] : o.bias == nullptr ? 0.0F : o.bias[c];
            for (int64_t k = 0; k < o.shape.depth; ++k) sum += x[k] * o.w[k * o.shape.width + c];
            out[c] = sum;
        }
    }
}

template <int64_t Wide> SPLITDECODE_INLINE void multiply_by(const Operands& o) {
    int64_t column = 0;
#ifdef SPLITDECODE_VECTORS
    constexpr int64_t lanes = Lanes<Wide>::count;
    const int64_t width = o.shape.width;
    for (; column + 2 * lanes <= width; column += 2 * lanes) columns<Wide, 2>(o, column);
    if (column + lanes <= width) columns<Wide, 1>(o, column), column += lanes;
    if (Wide > 32 && column + 8 <= width) columns<32, 1>(o, column), column += 8;
    if (Wide > 16 && column + 4 <= width) columns<16, 1>(o, column), column += 4;
#endif
    plainly(o, column);
}

SPLITDECODE_SETS(multiply, (const Operands& o), multiply_by<Wide>(o))

template <int64_t Wide> int64_t width() {
    return Wide;
}

} // namespace

int64_t vector_bytes() {
    return pick(width<16>, width<32>, width<64>)();
}

void multiply(const float* x, const float* w, const float* bias, float* out, ProductShape shape, bool add) {
    static const auto kernel = pick(multiply_fours, multiply_eights, multiply_sixteens);
    kernel({x, w, bias, out, shape, add});
}

} // namespace splitdecode
