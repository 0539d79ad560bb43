// F1. Rows and runs of a step, and which of the loops (attend_loops.hpp) serves them. See the header.
#include "attend.hpp"

#include "attend_loops.hpp"

#include <algorithm>
#include <stdexcept>

namespace splitdecode {

PagedRows::PagedRows(const int32_t* rows, size_t count, const int32_t* cu_q, const int32_t* kv_len,
                     const int32_t* page_indptr, const int32_t* pages, int32_t page_size) {
    std::vector<size_t> first;
    for (size_t i = 0; i < count; ++i) {
        const int32_t r = rows[i];
        if (cu_q[r] > cu_q[r + 1] || kv_len[r] < cu_q[r + 1] - cu_q[r])
            throw std::invalid_argument("a row has more queries than keys");
        first.push_back(runs_.size());
        for (int32_t at = 0, page = page_indptr[r]; at < kv_len[r]; at += page_size, ++page) {
            const int32_t slot = pages[page] * page_size, length = std::min(page_size, kv_len[r] - at);
            if (runs_.size() > first.back() && runs_.back().slot + runs_.back().length == slot)
                runs_.back().length += length;
            else
                runs_.push_back({slot, length});
            slots_ = std::max(slots_, slot + length);
        }
        rows_.push_back({cu_q[r], cu_q[r + 1], kv_len[r], nullptr});
        tokens_ = std::max(tokens_, cu_q[r + 1]);
        longest_ = std::max(longest_, kv_len[r]);
    }
    for (size_t i = 0; i < count; ++i) rows_[i].runs = runs_.data() + first[i];
}

namespace {

using Rows = std::vector<PagedRows::Row>;

template <class T, class Query>
SPLITDECODE_INLINE void each_query(const AttendArrays<T>& a, const Rows& rows, Query query) {
    for (const PagedRows::Row& row : rows)
        for (int64_t t = row.begin; t < row.end; ++t)
            query(row.runs, row.kv_len - (row.end - t) + 1, a.q + t * a.q_stride,
                  a.out + t * a.groups * a.heads * a.dim);
}

template <class T> void plainly(const AttendArrays<T>& a, const Rows& rows, T* scores) {
    each_query(a, rows,
               [&](const PagedRows::Run* runs, int64_t seen, const T* q, T* out)
                   __attribute__((always_inline)) { attend_plainly<T>(a, runs, seen, q, out, scores); });
}

#ifdef SPLITDECODE_VECTORS
template <int64_t Wide, int64_t Dim>
SPLITDECODE_INLINE void by_vectors(const AttendArrays<float>& a, const Rows& rows, float* scores) {
    each_query(a, rows,
               [&](const PagedRows::Run* runs, int64_t seen, const float* q, float* out)
                   __attribute__((always_inline)) { attend_query<Wide, Dim>(a, runs, seen, q, out, scores); });
}

template <int64_t Wide> SPLITDECODE_INLINE void by_size(const AttendArrays<float>& a, const Rows& rows, float* scores) {
    switch (a.dim) {
    case 16:
        return by_vectors<Wide, 16>(a, rows, scores);
    case 32:
        return by_vectors<Wide, 32>(a, rows, scores);
    case 64:
        return by_vectors<Wide, 64>(a, rows, scores);
    case 128:
        return by_vectors<Wide, 128>(a, rows, scores);
    default:
        return plainly<float>(a, rows, scores);
    }
}

#else
template <int64_t Wide> SPLITDECODE_INLINE void by_size(const AttendArrays<float>& a, const Rows& rows, float* scores) {
    plainly<float>(a, rows, scores);
}
#endif

SPLITDECODE_SETS(attend, (const AttendArrays<float>& a, const Rows& rows, float* scores),
                 by_size<Wide>(a, rows, scores))

} // namespace

void PagedRows::attend(const AttendArrays<float>& a) {
    static const auto kernel = pick(attend_fours, attend_eights, attend_sixteens);
    scores_.resize(static_cast<size_t>(a.groups * a.heads * padded(longest_)));
    kernel(a, rows_, scores_.data());
}

void PagedRows::attend(const AttendArrays<double>& a) {
    double_scores_.resize(static_cast<size_t>(longest_));
    plainly<double>(a, rows_, double_scores_.data());
}

} // namespace splitdecode
