// F1. See the header. Floats go by vectors (lanes.hpp), what is left of a row and doubles by plain loops.
#include "rowwise.hpp"

#include "lanes.hpp"

#include <cmath>
#include <cstddef>
#include <cstring>

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

template <class T> SPLITDECODE_INLINE void rope_plainly(T* x, const T* cis, int64_t pairs, RowShape s) {
    for (int64_t r = 0; r < s.rows; ++r, x += s.stride, cis += 2 * pairs)
        for (int64_t head = 0; head < s.size; head += 2 * pairs)
            for (int64_t i = 0; i < 2 * pairs; i += 2) {
                const T a = x[head + i], b = x[head + i + 1];
                x[head + i] = a * cis[i] - b * cis[i + 1];
                x[head + i + 1] = a * cis[i + 1] + b * cis[i];
            }
}

// The largest value comes first, so that a vector at a time is compared; where it stands is looked up behind it.
template <class T> SPLITDECODE_INLINE void best_plainly(const T* values, int32_t* ids, RowShape s) {
    constexpr int64_t lanes = 16;
    for (int64_t r = 0; r < s.rows; ++r, values += s.stride) {
        T most[lanes];
        bool sound[lanes];
        for (int64_t l = 0; l < lanes; ++l) most[l] = values[0], sound[l] = true;
        const int64_t whole = s.size / lanes * lanes;
        for (int64_t i = 0; i < whole; i += lanes)
            for (int64_t l = 0; l < lanes; ++l) {
                most[l] = most[l] < values[i + l] ? values[i + l] : most[l];
                sound[l] &= values[i + l] == values[i + l];
            }
        for (int64_t i = whole; i < s.size; ++i) {
            most[0] = most[0] < values[i] ? values[i] : most[0];
            sound[0] &= values[i] == values[i];
        }
        T top = most[0];
        bool good = true;
        for (int64_t l = 0; l < lanes; ++l) top = top < most[l] ? most[l] : top, good &= sound[l];
        int64_t at = 0;
        while (good && values[at] != top) ++at;
        ids[r] = good && std::isfinite(top) ? static_cast<int32_t>(at) : -1;
    }
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
// Plain loops over floats that the compiler turns into vectors by itself.
SPLITDECODE_SETS(rope, (float* x, const float* cis, int64_t pairs, RowShape s), rope_plainly(x, cis, pairs, s))
SPLITDECODE_SETS(best, (const float* values, int32_t* ids, RowShape s), best_plainly(values, ids, s))

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

template <> void rope_rows(float* x, const float* cis, int64_t pairs, RowShape shape) {
    static const auto kernel = pick(rope_fours, rope_eights, rope_sixteens);
    kernel(x, cis, pairs, shape);
}
template <> void rope_rows(double* x, const double* cis, int64_t pairs, RowShape shape) {
    rope_plainly(x, cis, pairs, shape);
}

template <> void best_rows(const float* values, int32_t* ids, RowShape shape) {
    static const auto kernel = pick(best_fours, best_eights, best_sixteens);
    kernel(values, ids, shape);
}
template <> void best_rows(const double* values, int32_t* ids, RowShape shape) {
    best_plainly(values, ids, shape);
}

template <class T> void scatter_rows(const T* kv, const int64_t* slots, T* cache, RowShape s) {
    for (int64_t r = 0; r < s.rows; ++r, kv += s.stride)
        std::memcpy(cache + slots[r] * s.size, kv, static_cast<std::size_t>(s.size) * sizeof(T));
}

template void scatter_rows(const float*, const int64_t*, float*, RowShape);
template void scatter_rows(const double*, const int64_t*, double*, RowShape);

} // namespace splitdecode
