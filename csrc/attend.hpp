// F1. Attention of short rows over one layer of a paged cache, on the host: most of what a crowd of decodes costs a
// CPU.
//
//     row r     queries cu_q[r] .. cu_q[r + 1]: the LAST of its kv_len[r] positions, causal among themselves
//     runs      its pages, neighbours joined: | slots 48 .. 112 | 16 .. 23 |
//     cache     [slots, 2, heads, dim]: k of all heads of a token, then v of all heads
//
// Everything is read where it lies: nothing is gathered, padded or masked. A row's result does not depend on the rows
// beside it. Sums are taken in the type of the arrays, float or double.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace splitdecode {

// One layer's arrays: query head g * heads + h reads kv head h.
template <class T> struct AttendArrays {
    const T* q; // [tokens, groups, heads, dim], one token every q_stride elements
    const T* cache;
    T* out; // [tokens, groups * heads * dim]
    int64_t q_stride, groups, heads, dim;
};

class PagedRows {
  public:
    struct Run {
        int32_t slot, length;
    };
    struct Row {
        int32_t begin, end, kv_len; // queries [begin, end)
        const Run* runs;
    };

    // The rows of a step that are named in `rows`; pages: of all rows, row r's from page_indptr[r] on.
    PagedRows(const int32_t* rows, std::size_t count, const int32_t* cu_q, const int32_t* kv_len,
              const int32_t* page_indptr, const int32_t* pages, int32_t page_size);
    PagedRows(const PagedRows&) = delete;
    PagedRows& operator=(const PagedRows&) = delete;

    void attend(const AttendArrays<float>& arrays);
    void attend(const AttendArrays<double>& arrays);

    // Tokens and slots that the arrays must have.
    int32_t tokens() const { return tokens_; }
    int32_t slots() const { return slots_; }

  private:
    std::vector<Row> rows_;
    std::vector<Run> runs_;
    std::vector<float> scores_;
    std::vector<double> double_scores_;
    int32_t tokens_ = 0, slots_ = 0, longest_ = 0;
};

} // namespace splitdecode
