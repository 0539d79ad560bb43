// F1. See the header. Floats go by vectors (lanes.hpp), what is left of a row and doubles by plain loops.
#include "rowwise.hpp"

#include "lanes.hpp"

#include <cmath>

namespace splitdecode {

namespace {

template <class T> T gated(T gate, T up) {
    return gate / (1 + std::exp(-gate)) * up;
}

template <class T> void norm_plainly(const T* x, const T* weight, double eps, T* out, RowShape s) {
    for (int64_t r = 0; r < s.rows; ++r, x += s.stride, out += s.size) {
        T sum = 0;
        for (int64_t i = 0; i < s.size; ++i) sum += x[i] * x[i];
        const T scale = 1 / std::sqrt(sum / static_cast<T>(s.size) + static_cast<T>(eps));
        for (int64_t i = 0; i < s.size; ++i) out[i] = weight == nullptr ? x[i] * scale : x[i] * scale * weight[i];
    }
}

template <class T> void swiglu_plainly(const T* gate, const T* up, T* out, RowShape s) {
    for (int64_t r = 0; r < s.rows; ++r, gate += s.stride, up += s.stride, out += s.size)
        for (int64_t i = 0; i < s.size; ++i) out[i] = gated(gate[i], up[i]);
}

#ifdef SPLITDECODE_VECTORS
template <int64_t Wide>
SPLITDECODE_INLINE void norm_by(const float* x, const float* weight, double eps, float* out, RowShape s) {
    using V = typename Lanes<Wide>::Vector;
    using L = typename Lanes<Wide>::Loose;
    constexpr int64_t lanes = Lanes<Wide>::count;
    const int64_t whole = s.size / lanes * lanes;
    for (int64_t r = 0; r < s.rows; ++r, x += s.stride, out += s.size) {
        V squares{};
        for (int64_t i = 0; i < whole; i += lanes) {
            const V part = *reinterpret_cast<const L*>(x + i);
            squares += part * part;
        }
        float sum = sum_of(squares);
        for (int64_t i = whole; i < s.size; ++i) sum += x[i] * x[i];
        const float scale = 1.0F / std::sqrt(sum / static_cast<float>(s.size) + static_cast<float>(eps));
        for (int64_t i = 0; i < whole; i += lanes) {
            const V part = *reinterpret_cast<const L*>(x + i) * scale;
            *reinterpret_cast<L*>(out + i) = weight == nullptr ? part : part * *reinterpret_cast<const L*>(weight + i);
        }
        for (int64_t i = whole; i < s.size; ++i) out[i] = weight == nullptr ? x[i] * scale : x[i] * scale * weight[i];
    }
}

template <int64_t Wide> SPLITDECODE_INLINE void swiglu_by(const float* gate, const float* up, float* out, RowShape s) {
    using V = typename Lanes<Wide>::Vector;
    using W = typename Lanes<Wide>::Words;
    using L = typename Lanes<Wide>::Loose;
    constexpr int64_t lanes = Lanes<Wide>::count;
    const int64_t whole = s.size / lanes * lanes;
    for (int64_t r = 0; r < s.rows; ++r, gate += s.stride, up += s.stride, out += s.size) {
        for (int64_t i = 0; i < whole; i += lanes) {
            const V g = *reinterpret_cast<const L*>(gate + i);
            V e = reinterpret_cast<V>(reinterpret_cast<W>(g) | INT32_MIN); // -|g|
            exponentials<Wide>(e);
            const V share = g < V{} ? e : V{} + 1.0F; // exp(g) / (1 + exp(g)), or 1 / (1 + exp(-g))
            *reinterpret_cast<L*>(out + i) = g * (share / (1.0F + e)) * *reinterpret_cast<const L*>(up + i);
        }
        for (int64_t i = whole; i < s.size; ++i) out[i] = gated(gate[i], up[i]);
    }
}

#else
template <int64_t Wide> void norm_by(const float* x, const float* weight, double eps, float* out, RowShape s) {
    norm_plainly(x, weight, eps, out, s);
}
template <int64_t Wide> void swiglu_by(const float* gate, const float* up, float* out, RowShape s) {
    swiglu_plainly(gate, up, out, s);
}
#endif

SPLITDECODE_SETS(norm, (const float* x, const float* weight, double eps, float* out, RowShape s),
                 norm_by<Wide>(x, weight, eps, out, s))
SPLITDECODE_SETS(swiglu, (const float* gate, const float* up, float* out, RowShape s),
                 swiglu_by<Wide>(gate, up, out, s))
} // namespace

template <> void norm_rows(const float* x, const float* weight, double eps, float* out, RowShape shape) {
    static const auto kernel = pick(norm_fours, norm_eights, norm_sixteens);
    kernel(x, weight, eps, out, shape);
}
template <> void norm_rows(const double* x, const double* weight, double eps, double* out, RowShape shape) {
    norm_plainly(x, weight, eps, out, shape);
}

template <> void swiglu_rows(const float* gate, const float* up, float* out, RowShape shape) {
    static const auto kernel = pick(swiglu_fours, swiglu_eights, swiglu_sixteens);
    kernel(gate, up, out, shape);
}
template <> void swiglu_rows(const double* gate, const double* up, double* out, RowShape shape) {
    swiglu_plainly(gate, up, out, shape);
}

} // namespace splitdecode
