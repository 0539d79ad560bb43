// F1. Vectors of floats for loops that a CPU spends its time in: one source for every instruction set.
//
// Lanes<Wide> is the compiler's own vector type of `Wide` bytes. A loop is written once over it and inlined into one
// function per instruction set; the one with the widest vectors the machine has is picked when it first runs. No vector
// ever crosses a call.
#pragma once

#include <cstdint>

#define SPLITDECODE_INLINE inline __attribute__((always_inline))

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SPLITDECODE_VECTORS 1
#endif
#endif

namespace splitdecode {

#ifdef SPLITDECODE_VECTORS

template <int64_t Wide> struct Lanes {
    static constexpr int64_t count = Wide / 4;
    typedef float Vector __attribute__((vector_size(Wide)));
    typedef int32_t Words __attribute__((vector_size(Wide)));
    // Rows of a cache are aligned to an element, no more.
    typedef float Loose __attribute__((vector_size(Wide), aligned(4), may_alias));
};
typedef float Four __attribute__((vector_size(16)));
typedef float LooseFour __attribute__((vector_size(16), aligned(4), may_alias));

SPLITDECODE_INLINE float sum_of(const Lanes<16>::Vector& v) {
    const Four half = v + __builtin_shufflevector(v, v, 2, 3, 0, 1);
    return half[0] + half[1];
}
SPLITDECODE_INLINE float sum_of(const Lanes<32>::Vector& v) {
    const Four half = __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
    return sum_of(half);
}
SPLITDECODE_INLINE float sum_of(const Lanes<64>::Vector& v) {
    const Lanes<32>::Vector half = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                                   __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
    return sum_of(half);
}

SPLITDECODE_INLINE float most_of(const Lanes<16>::Vector& v) {
    const Four other = __builtin_shufflevector(v, v, 2, 3, 0, 1);
    const Four half = v < other ? other : v;
    return half[0] < half[1] ? half[1] : half[0];
}
SPLITDECODE_INLINE float most_of(const Lanes<32>::Vector& v) {
    const Four low = __builtin_shufflevector(v, v, 0, 1, 2, 3), high = __builtin_shufflevector(v, v, 4, 5, 6, 7);
    return most_of(low < high ? high : low);
}
SPLITDECODE_INLINE float most_of(const Lanes<64>::Vector& v) {
    const Lanes<32>::Vector low = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7),
                            high = __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
    return most_of(low < high ? high : low);
}

// The sums of four vectors, side by side: three times cheaper than one after another.
SPLITDECODE_INLINE void sums_of(const Lanes<64>::Vector* v, float* out) {
    using V = Lanes<64>::Vector;
    const auto pair = [](const V& a, const V& b) __attribute__((always_inline)) -> V {
        return __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
               __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    };
    const V low = pair(v[0], v[1]), high = pair(v[2], v[3]);
    const V all = __builtin_shufflevector(low, high, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
                  __builtin_shufflevector(low, high, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    const Lanes<32>::Vector half = __builtin_shufflevector(all, all, 0, 1, 2, 3, 4, 5, 6, 7) +
                                   __builtin_shufflevector(all, all, 8, 9, 10, 11, 12, 13, 14, 15);
    *reinterpret_cast<LooseFour*>(out) =
        __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
}

// e^x of x <= 0 within 2 ulp (Cephes' polynomial); 0 below -87 and of -inf, NaN of NaN.
template <int64_t Wide> SPLITDECODE_INLINE void exponentials(typename Lanes<Wide>::Vector& x) {
    using V = typename Lanes<Wide>::Vector;
    using W = typename Lanes<Wide>::Words;
    const W alive = ~(x < V{} - 87.0F); // a NaN is alive
    const V near = x < V{} - 87.0F ? V{} - 87.0F : x;
    const V shifted = near * 1.44269504F + 12582912.0F; // 1.5 * 2^23: the sum is rounded to a whole number
    const V whole = shifted - 12582912.0F;
    const V rest = (near - whole * 0.693359375F) + whole * 2.12194440e-4F;
    V p = rest * 1.9875691500e-4F + 1.3981999507e-3F;
    p = p * rest + 8.3334519073e-3F;
    p = p * rest + 4.1665795894e-2F;
    p = p * rest + 1.6666665459e-1F;
    p = p * rest + 5.0000001201e-1F;
    p = p * rest * rest + rest + 1.0F;
    const W power = (reinterpret_cast<W>(shifted) - (0x4B400000 - 127)) << 23;
    x = reinterpret_cast<V>(reinterpret_cast<W>(p * reinterpret_cast<V>(power)) & alive);
}

#endif

#ifdef __x86_64__
#define SPLITDECODE_EIGHTS __attribute__((target("avx2,fma")))
#define SPLITDECODE_SIXTEENS __attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")))
#else
#define SPLITDECODE_EIGHTS
#define SPLITDECODE_SIXTEENS
#endif

// Three functions, name_fours, name_eights and name_sixteens, of which each runs `call` with its own `Wide`.
#define SPLITDECODE_SETS(name, parameters, call)                                                                       \
    void name##_fours parameters {                                                                                     \
        [[maybe_unused]] constexpr int64_t Wide = 16;                                                                  \
        call;                                                                                                          \
    }                                                                                                                  \
    SPLITDECODE_EIGHTS void name##_eights parameters {                                                                 \
        [[maybe_unused]] constexpr int64_t Wide = 32;                                                                  \
        call;                                                                                                          \
    }                                                                                                                  \
    SPLITDECODE_SIXTEENS void name##_sixteens parameters {                                                             \
        [[maybe_unused]] constexpr int64_t Wide = 64;                                                                  \
        call;                                                                                                          \
    }

// The function for the widest vectors this machine has: 4, 8 or 16 floats.
template <class Function> Function* pick(Function* fours, Function* eights, Function* sixteens) {
#if defined(SPLITDECODE_VECTORS) && defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw"))
        return sixteens;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return eights;
#endif
    static_cast<void>(eights), static_cast<void>(sixteens);
    return fours;
}

} // namespace splitdecode
