// F1. The loops of attend.cpp: scores of a query against every key, softmax, the weighted sum of values.
//
// Two kinds: vectors (lanes.hpp) for float heads of whole vectors, plain loops for any other type and size.
#pragma once

#include "attend.hpp"
#include "lanes.hpp"

#include <cmath>
#include <cstdint>
#include <limits>

namespace splitdecode {

constexpr int64_t padded(int64_t count) {
    return (count + 15) / 16 * 16; // scores come in whole vectors, the widest have 16
}

#ifdef SPLITDECODE_VECTORS

// Scores, padded with -inf, become weights in place; returns one over their sum.
template <int64_t Wide> SPLITDECODE_INLINE float soften(float* scores, int64_t count) {
    using V = typename Lanes<Wide>::Vector;
    using L = typename Lanes<Wide>::Loose;
    constexpr int64_t lanes = Lanes<Wide>::count;
    const int64_t end = (count + lanes - 1) / lanes * lanes;
    for (int64_t i = count; i < end; ++i) scores[i] = -std::numeric_limits<float>::infinity();
    V most = *reinterpret_cast<const L*>(scores);
    for (int64_t i = lanes; i < end; i += lanes) {
        const V next = *reinterpret_cast<const L*>(scores + i);
        most = most < next ? next : most;
    }
    const float top = most_of(most);
    V total{};
    for (int64_t i = 0; i < end; i += lanes) {
        V x = *reinterpret_cast<const L*>(scores + i) - top;
        exponentials<Wide>(x);
        *reinterpret_cast<L*>(scores + i) = x;
        total += x;
    }
    return 1.0F / sum_of(total);
}

// Fetches the part of a token that lies `ahead` elements from `at` (0: nothing), while work is done on what is there
// already. Passes that find everything in the cache would leave the memory idle otherwise.
template <int64_t Dim> SPLITDECODE_INLINE void fetch(const float* at, int64_t ahead) {
    if (ahead != 0)
        for (int64_t d = 0; d < Dim; d += 16) __builtin_prefetch(at + ahead + d, 0, 3);
}

// One query head against the first `seen` keys of a kv head. k: the head of slot 0; step: elements from slot to slot.
template <int64_t Wide, int64_t Dim>
SPLITDECODE_INLINE void score(const float* q, const float* k, int64_t step, const PagedRows::Run* run, int64_t seen,
                              float* scores, int64_t ahead) {
    using V = typename Lanes<Wide>::Vector;
    using L = typename Lanes<Wide>::Loose;
    constexpr int64_t lanes = Lanes<Wide>::count, parts = Dim / lanes;
    const float scale = 1.0F / std::sqrt(static_cast<float>(Dim));
    V own[parts];
    for (int64_t p = 0; p < parts; ++p) own[p] = *reinterpret_cast<const L*>(q + p * lanes) * scale;
    const auto product = [&](const float* key) __attribute__((always_inline)) -> V {
        V sum = own[0] * *reinterpret_cast<const L*>(key);
        for (int64_t p = 1; p < parts; ++p) sum += own[p] * *reinterpret_cast<const L*>(key + p * lanes);
        return sum;
    };
    for (; seen > 0; seen -= run->length, ++run) {
        const float* key = k + run->slot * step;
        int64_t left = run->length < seen ? run->length : seen;
        if constexpr (Wide == 64)
            for (; left >= 4; left -= 4, key += 4 * step, scores += 4) {
                for (int64_t u = 0; u < 4; ++u) fetch<Dim>(key + u * step, ahead);
                const V four[4] = {product(key), product(key + step), product(key + 2 * step), product(key + 3 * step)};
                sums_of(four, scores);
            }
        for (; left > 0; --left, key += step) *scores++ = sum_of(product(key));
    }
}

// out += the weighted sum of a head's first `seen` values, several of them at a time: sums that wait for themselves
// would not keep the units busy.
template <int64_t Wide, int64_t Dim>
SPLITDECODE_INLINE void weigh(const float* v, int64_t step, const PagedRows::Run* run, int64_t seen,
                              const float* weights, float* out, int64_t ahead) {
    using V = typename Lanes<Wide>::Vector;
    using L = typename Lanes<Wide>::Loose;
    constexpr int64_t lanes = Lanes<Wide>::count, parts = Dim / lanes, keys = parts >= 8 ? 1 : 8 / parts;
    V sums[keys][parts] = {};
    for (; seen > 0; seen -= run->length, ++run) {
        const float* value = v + run->slot * step;
        int64_t left = run->length < seen ? run->length : seen;
        for (; left >= keys; left -= keys, value += keys * step, weights += keys)
            for (int64_t u = 0; u < keys; ++u) {
                fetch<Dim>(value + u * step, ahead);
                for (int64_t p = 0; p < parts; ++p)
                    sums[u][p] += *reinterpret_cast<const L*>(value + u * step + p * lanes) * weights[u];
            }
        for (; left > 0; --left, value += step, ++weights)
            for (int64_t p = 0; p < parts; ++p)
                sums[0][p] += *reinterpret_cast<const L*>(value + p * lanes) * weights[0];
    }
    for (int64_t p = 0; p < parts; ++p) {
        for (int64_t u = 1; u < keys; ++u) sums[0][p] += sums[u][p];
        L* place = reinterpret_cast<L*>(out + p * lanes);
        *place = *place + sums[0][p];
    }
}

// One query, one kv head and the query heads that share it. From the second of them on keys and values are in the
// cache: meanwhile the values are fetched, then the next head's keys.
template <int64_t Wide, int64_t Dim>
SPLITDECODE_INLINE void attend_head(const AttendArrays<float>& a, const PagedRows::Run* runs, int64_t seen,
                                    const float* q, float* out, float* scores, int64_t h) {
    const int64_t step = 2 * a.heads * Dim, to_values = a.heads * Dim, to_keys = h + 1 < a.heads ? Dim - to_values : 0;
    const float* k = a.cache + h * Dim;
    for (int64_t g = 0; g < a.groups; ++g)
        score<Wide, Dim>(q + (g * a.heads + h) * Dim, k, step, runs, seen, scores + g * padded(seen),
                         g > 0 ? to_values : 0);
    for (int64_t g = 0; g < a.groups; ++g) {
        float *weights = scores + g * padded(seen), *sums = out + (g * a.heads + h) * Dim;
        const float share = soften<Wide>(weights, seen);
        for (int64_t d = 0; d < Dim; ++d) sums[d] = 0;
        weigh<Wide, Dim>(k + to_values, step, runs, seen, weights, sums, g > 0 ? to_keys : 0);
        for (int64_t d = 0; d < Dim; ++d) sums[d] *= share;
    }
}

// The same by blocks of keys, all heads of a block one after another: a token of many heads spans several lines of
// memory, and they are fetched best side by side.
template <int64_t Wide, int64_t Dim>
SPLITDECODE_INLINE void attend_blocks(const AttendArrays<float>& a, const PagedRows::Run* runs, int64_t seen,
                                      const float* q, float* out, float* scores) {
    constexpr int32_t block = 32;
    const int64_t step = 2 * a.heads * Dim, heads = a.groups * a.heads, room = padded(seen);
    const auto each_block = [&](auto work) __attribute__((always_inline)) {
        int64_t at = 0;
        for (const PagedRows::Run* run = runs; at < seen; ++run)
            for (int32_t i = 0; i < run->length && at < seen; i += block) {
                const int64_t left = seen - at < run->length - i ? seen - at : run->length - i;
                const int64_t count = left < block ? left : block;
                const PagedRows::Run part{run->slot + i, block};
                for (int64_t head = 0; head < heads; ++head) work(head, &part, count, at);
                at += count;
            }
    };
    each_block([&](int64_t head, const PagedRows::Run* part, int64_t count, int64_t at) __attribute__((always_inline)) {
        score<Wide, Dim>(q + head * Dim, a.cache + head % a.heads * Dim, step, part, count, scores + head * room + at,
                         0);
    });
    for (int64_t head = 0; head < heads; ++head) {
        const float share = soften<Wide>(scores + head * room, seen);
        for (int64_t i = 0; i < seen; ++i) scores[head * room + i] *= share;
        for (int64_t d = 0; d < Dim; ++d) out[head * Dim + d] = 0;
    }
    each_block([&](int64_t head, const PagedRows::Run* part, int64_t count, int64_t at) __attribute__((always_inline)) {
        weigh<Wide, Dim>(a.cache + (a.heads + head % a.heads) * Dim, step, part, count, scores + head * room + at,
                         out + head * Dim, 0);
    });
}

template <int64_t Wide, int64_t Dim>
SPLITDECODE_INLINE void attend_query(const AttendArrays<float>& a, const PagedRows::Run* runs, int64_t seen,
                                     const float* q, float* out, float* scores) {
    if (a.heads * Dim >= 256) return attend_blocks<Wide, Dim>(a, runs, seen, q, out, scores);
    for (int64_t h = 0; h < a.heads; ++h) attend_head<Wide, Dim>(a, runs, seen, q, out, scores, h);
}

#endif

// The same for any type and size.
template <class T>
SPLITDECODE_INLINE void attend_plainly(const AttendArrays<T>& a, const PagedRows::Run* runs, int64_t seen, const T* q,
                                       T* out, T* scores) {
    const int64_t step = 2 * a.heads * a.dim;
    const T scale = 1 / std::sqrt(static_cast<T>(a.dim));
    for (int64_t head = 0; head < a.groups * a.heads; ++head) {
        const T *own = q + head * a.dim, *keys = a.cache + head % a.heads * a.dim, *values = keys + a.heads * a.dim;
        T* sums = out + head * a.dim;
        T most = -std::numeric_limits<T>::infinity(), total = 0;
        int64_t at = 0;
        for (const PagedRows::Run* run = runs; at < seen; ++run)
            for (int64_t i = 0; i < run->length && at < seen; ++i, ++at) {
                const T* k = keys + (run->slot + i) * step;
                T sum = 0;
                for (int64_t d = 0; d < a.dim; ++d) sum += own[d] * k[d];
                scores[at] = sum * scale;
                most = most < scores[at] ? scores[at] : most;
            }
        for (int64_t d = 0; d < a.dim; ++d) sums[d] = 0;
        at = 0;
        for (const PagedRows::Run* run = runs; at < seen; ++run)
            for (int64_t i = 0; i < run->length && at < seen; ++i, ++at) {
                const T* v = values + (run->slot + i) * step;
                const T weight = std::exp(scores[at] - most);
                total += weight;
                for (int64_t d = 0; d < a.dim; ++d) sums[d] += weight * v[d];
            }
        for (int64_t d = 0; d < a.dim; ++d) sums[d] /= total;
    }
}

} // namespace splitdecode
