// F1. splitdecode._C's other half: attention and what is done row by row, for models that run on a CPU. Arrays are
// all float32 or all float64; types and sizes are checked here and nowhere else (ValueError, IndexError).
#include "attend.hpp"
#include "bindings.hpp"
#include "product.hpp"
#include "rowwise.hpp"

#include <nanobind/stl/optional.h>

#include <optional>
#include <stdexcept>
#include <string>

namespace {

using splitdecode::AttendArrays;
using splitdecode::PagedRows;
using splitdecode::RowShape;

template <int N> using Read = nb::ndarray<nb::ro, nb::ndim<N>, nb::device::cpu>;
template <int N> using Whole = nb::ndarray<nb::ro, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
template <int N> using Written = nb::ndarray<nb::ndim<N>, nb::c_contig, nb::device::cpu>;

template <class Array> int64_t size(const Array& array, size_t axis) {
    return static_cast<int64_t>(array.shape(axis));
}

// Whether all axes behind the first lie side by side; where an axis has but one entry, its stride means nothing.
template <class Array> bool rows_are_whole(const Array& array) {
    int64_t step = 1;
    for (size_t axis = array.ndim() - 1; axis > 0; --axis) {
        if (size(array, axis) > 1 && array.stride(axis) != step) return false;
        step *= size(array, axis);
    }
    return true;
}

void expect(bool good, const char* what) {
    if (!good) throw std::invalid_argument(what);
}

// Calls work(a zero of the type) where all arrays have that one type.
template <class Work, class First, class... Rest> void by_type(Work work, const First& first, const Rest&... rest) {
    expect(((rest.dtype() == first.dtype()) && ...), "arrays of one type expected, found several");
    if (first.dtype() == nb::dtype<float>())
        work(float{});
    else if (first.dtype() == nb::dtype<double>())
        work(double{});
    else
        throw std::invalid_argument("arrays of float32 or float64 expected");
}

template <class T, class Array> T* data_of(const Array& array) {
    return static_cast<T*>(const_cast<void*>(static_cast<const void*>(array.data())));
}

PagedRows* make_rows(void* place, const Ids& rows, const Ids& cu_q, const Ids& kv_len, const Ids& page_indptr,
                     const Ids& pages, int32_t page_size) {
    const size_t count = kv_len.size();
    expect(cu_q.size() == count + 1 && page_indptr.size() == count + 1,
           "PagedRows: cu_q and page_indptr have one entry more than kv_len");
    expect(page_size >= 1, "PagedRows: a page holds at least one position");
    for (size_t i = 0; i < rows.size(); ++i) {
        const int32_t r = rows(i);
        if (r < 0 || static_cast<size_t>(r) >= count) throw std::out_of_range("PagedRows: no row " + std::to_string(r));
        const int32_t first = page_indptr(r), last = page_indptr(r + 1);
        if (first < 0 || last < first || static_cast<size_t>(last) > pages.size() ||
            kv_len(r) > int64_t{page_size} * (last - first))
            throw std::out_of_range("PagedRows: row " + std::to_string(r) + " has more keys than pages");
        for (int32_t p = first; p < last; ++p)
            if (pages(p) < 0) throw std::out_of_range("PagedRows: a page below 0");
        if (cu_q(r) < 0) throw std::out_of_range("PagedRows: a token below 0");
    }
    return new (place)
        PagedRows(rows.data(), rows.size(), cu_q.data(), kv_len.data(), page_indptr.data(), pages.data(), page_size);
}

void attend(PagedRows& self, const Read<4>& q, const Whole<4>& cache, const Written<2>& out) {
    const int64_t groups = size(q, 1), heads = size(q, 2), dim = size(q, 3);
    expect(rows_are_whole(q), "attend: the heads of a query must lie side by side");
    expect(size(cache, 1) == 2 && size(cache, 2) == heads && size(cache, 3) == dim &&
               size(out, 1) == groups * heads * dim,
           "attend: heads or dimensions of q, cache and out differ");
    if (size(q, 0) < self.tokens() || size(out, 0) < self.tokens() || size(cache, 0) < self.slots())
        throw std::out_of_range("attend: the rows name tokens or slots that are not there");
    by_type(
        [&](auto zero) {
            using T = decltype(zero);
            self.attend(AttendArrays<T>{data_of<const T>(q), data_of<const T>(cache), data_of<T>(out), q.stride(0),
                                        groups, heads, dim});
        },
        out, q, cache);
}

void norm(const Whole<2>& x, const std::optional<Whole<1>>& weight, double eps, const Written<2>& out) {
    expect(size(out, 0) == size(x, 0) && size(out, 1) == size(x, 1), "norm_rows: x and out differ in shape");
    expect(!weight || size(*weight, 0) == size(x, 1), "norm_rows: weight has another size than a row");
    expect(!weight || weight->dtype() == x.dtype(), "norm_rows: x and weight differ in type");
    by_type(
        [&](auto zero) {
            using T = decltype(zero);
            splitdecode::norm_rows(data_of<const T>(x), weight ? data_of<const T>(*weight) : nullptr, eps,
                                   data_of<T>(out), RowShape{size(x, 0), size(x, 1), size(x, 1)});
        },
        out, x);
}

void swiglu(const Read<2>& gate, const Read<2>& up, const Written<2>& out) {
    const int64_t rows = size(out, 0), wide = size(out, 1);
    expect(size(gate, 0) == rows && size(up, 0) == rows && size(gate, 1) == wide && size(up, 1) == wide,
           "swiglu_rows: gate, up and out differ in shape");
    expect(rows_are_whole(gate) && rows_are_whole(up) && (rows < 2 || gate.stride(0) == up.stride(0)),
           "swiglu_rows: gate and up must be strided alike, each row side by side");
    by_type(
        [&](auto zero) {
            using T = decltype(zero);
            splitdecode::swiglu_rows(data_of<const T>(gate), data_of<const T>(up), data_of<T>(out),
                                     RowShape{rows, wide, gate.stride(0)});
        },
        out, gate, up);
}

void multiply(const Whole<2>& x, const Whole<2>& matrix, const std::optional<Whole<1>>& bias, const Written<2>& out,
              bool add) {
    const splitdecode::ProductShape shape{size(x, 0), size(x, 1), size(matrix, 1)};
    expect(size(matrix, 0) == shape.depth && size(out, 0) == shape.rows && size(out, 1) == shape.width,
           "multiply: x, matrix and out differ in shape");
    expect(!bias || size(*bias, 0) == shape.width, "multiply: bias has another size than a row of out");
    expect(!bias || !add, "multiply: what is added to has its bias already");
    for (const nb::dlpack::dtype type : {x.dtype(), matrix.dtype(), out.dtype(), bias ? bias->dtype() : x.dtype()})
        expect(type == nb::dtype<float>(), "multiply: arrays of float32 expected");
    splitdecode::multiply(data_of<const float>(x), data_of<const float>(matrix),
                          bias ? data_of<const float>(*bias) : nullptr, data_of<float>(out), shape, add);
}

bool mkl_is_narrow() {
#ifdef __x86_64__
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && !__builtin_cpu_is("intel");
#else
    return false;
#endif
}

} // namespace

void bind_host(nb::module_& m) {
    nb::class_<PagedRows>(m, "PagedRows", "Rows of one step over a paged cache, ready for every layer's attention.")
        .def(
            "__init__",
            [](PagedRows* self, const Ids& rows, const Ids& cu_q, const Ids& kv_len, const Ids& page_indptr,
               const Ids& pages,
               int32_t page_size) { make_rows(self, rows, cu_q, kv_len, page_indptr, pages, page_size); },
            "rows"_a.noconvert(), "cu_q"_a.noconvert(), "kv_len"_a.noconvert(), "page_indptr"_a.noconvert(),
            "pages"_a.noconvert(), "page_size"_a,
            "The rows named in `rows` of a batch laid out as PagedBatch. IndexError when one has more keys than pages.")
        .def(
            "attend", &attend, "q"_a.noconvert(), "cache"_a.noconvert(), "out"_a.noconvert(),
            "q [T, G, heads, D], cache [slots, 2, heads, D] -> out [T, G * heads * D], tokens of the named rows only.");
    m.def("norm_rows", &norm, "x"_a.noconvert(), "weight"_a.noconvert().none(), "eps"_a, "out"_a.noconvert(),
          "out [T, d] = x / sqrt(mean(x^2) + eps) * weight, row by row.");
    m.def("multiply", &multiply, "x"_a.noconvert(), "matrix"_a.noconvert(), "bias"_a.noconvert().none(),
          "out"_a.noconvert(), "add"_a = false,
          "out [T, n] = x [T, d] @ matrix [d, n] + bias, or, with add, out += x @ matrix; float32, in one thread.");
    m.def("vector_bytes", &splitdecode::vector_bytes, "Width of the vectors that loops over floats use here.");
    m.def("mkl_is_narrow", &mkl_is_narrow,
          "Whether MKL multiplies floats by narrower vectors than this processor has: it keeps AVX-512 to Intel's.");
    m.def("swiglu_rows", &swiglu, "gate"_a.noconvert(), "up"_a.noconvert(), "out"_a.noconvert(),
          "out [T, I] = silu(gate) * up; gate and up may be halves of one product.");
}
