// F1. splitdecode._C: with bind_scheduler.cpp and bind_host.cpp the only files of csrc/ that know Python. A class is
// bound by one function below, in the order of the floors they stand on; what a method does is said in its header.
//
// Types are the contract: arrays are C-contiguous int32 on the CPU, and noconvert() turns a silent copy of any other
// array (an out-array would lose its writes) into a TypeError.
#include "bindings.hpp"
#include "arena.hpp"
#include "page_pool.hpp"
#include "sha256.hpp"

#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace {

using splitdecode::Arena;
using splitdecode::Digest;
using splitdecode::PagePool;

using splitdecode::Event;
using splitdecode::EventKind;
using splitdecode::Phase;
using splitdecode::Vocabulary;

nb::bytes to_bytes(const Digest& digest) {
    return nb::bytes(digest.data(), digest.size());
}

Digest to_digest(const nb::bytes& bytes) {
    Digest digest;
    if (bytes.size() != digest.size()) {
        throw std::invalid_argument("a digest has 32 bytes, not " + std::to_string(bytes.size()));
    }
    std::memcpy(digest.data(), bytes.data(), digest.size());
    return digest;
}

} // namespace

static void bind_digests(nb::module_& m) {
    m.def(
        "root_digest",
        [](const nb::bytes& salt) {
            return to_bytes(splitdecode::root_digest({static_cast<const char*>(salt.data()), salt.size()}));
        },
        "salt"_a, "sha256(salt): the parent of a first page, 32 bytes.");
    m.def(
        "chain_digest",
        [](const nb::bytes& parent, const Ids& tokens) {
            return to_bytes(splitdecode::chain_digest(to_digest(parent), tokens.data(), tokens.size()));
        },
        "parent"_a, "tokens"_a.noconvert(),
        "sha256(parent || tokens as little-endian int32): the name of a page, 32 bytes. ValueError unless parent has "
        "32 bytes.");
}

static void bind_page_pool(nb::module_& m) {
    nb::class_<PagePool>(m, "PagePool",
                         "The pages of one KV-cache: free list, reference counts, prefix hashes, LRU eviction. Misuse "
                         "(a double release, a page out of range) raises RuntimeError.")
        .def(
            nb::init<int32_t, int32_t, bool, int32_t, int32_t>(), "num_pages"_a, "page_size"_a, "prefix_caching"_a,
            "extent"_a = 0, "stride"_a = 0,
            "num_pages >= 1 pages of page_size >= 1 tokens, in extents of `extent` pages numbered `stride` apart if it "
            "shares its memory (Arena); else ValueError.")
        .def_prop_ro("num_pages", &PagePool::num_pages)
        .def_prop_ro("page_size", &PagePool::page_size, "Tokens per page.")
        .def_prop_ro("prefix_caching", &PagePool::prefix_caching)
        .def_prop_ro("available", &PagePool::available, "Pages allocate() can still hand out: free or cached.")
        .def_prop_ro("in_use", &PagePool::in_use, "Pages with at least one owner.")
        .def_prop_ro("present", &PagePool::present, "Pages it has: all, or those of the extents lent to it.")
        .def_prop_ro("queries", &PagePool::queries, "Lookups since construction.")
        .def_prop_ro("hits", &PagePool::hits, "Lookups that found their page.")
        .def_prop_ro("evictions", &PagePool::evictions, "Cached pages given to another owner.")
        .def("allocate", &PagePool::allocate, "after"_a = -1,
             "A page with one owner, page after + 1 when it is free; -1 when none is left.")
        .def("retain", &PagePool::retain, "page"_a, "One more owner of an owned page.")
        .def("release", &PagePool::release, "page"_a, "One owner fewer; a published page stays cached.")
        .def("immutable", &PagePool::immutable, "page"_a, "Published, or more than one owner.")
        .def("owners", &PagePool::owners, "page"_a)
        .def(
            "publish", [](PagePool& pool, int32_t page, const nb::bytes& hash) { pool.publish(page, to_digest(hash)); },
            "page"_a, "hash"_a, "Name a full, committed page; a no-op when the hash is already known.")
        .def(
            "lookup", [](PagePool& pool, const nb::bytes& hash) { return pool.lookup(to_digest(hash)); }, "hash"_a,
            "The page with that content, retained for the caller; -1 when unknown.")
        .def("clear_cache", &PagePool::clear_cache, "Forget every published hash; free the pages nobody owns.")
        .def("check_invariants", &PagePool::check_invariants, "RuntimeError naming the breach.");
    nb::class_<Arena>(m, "Arena",
                      "One memory, several page pools: extents of equal size, each lent to one pool at a time.")
        .def(
            "__init__",
            [](Arena* self, const nb::tuple& pools, const std::vector<int32_t>& shares) {
                std::vector<PagePool*> given;
                for (nb::handle pool : pools) given.push_back(nb::cast<PagePool*>(pool));
                new (self) Arena(std::move(given), shares);
            },
            "pools"_a, "shares"_a, nb::keep_alive<1, 2>(),
            "shares: extents each pool has at first. ValueError: too many.")
        .def("claim", &Arena::claim, "pool"_a, "spare"_a, "One extent more for a pool, if any can be had.")
        .def("reachable", &Arena::reachable, "pool"_a, "Pages a pool could claim.")
        .def_prop_ro("owners", &Arena::owners, "Extents by pool, -1: idle.")
        .def_prop_ro("moved", &Arena::moved, "Extents claimed since construction.")
        .def("check_invariants", &Arena::check_invariants, "RuntimeError naming the breach.");
}

static void bind_vocabulary(nb::module_& m) {
    nb::class_<Vocabulary>(m, "Vocabulary", "The bytes of every token of one tokenizer.")
        .def(
            "__init__",
            [](Vocabulary* self, const nb::list& token_bytes, const nb::bytes& special, nb::callable encode) {
                std::vector<std::string> words;
                for (nb::handle word : token_bytes) {
                    const auto bytes = nb::cast<nb::bytes>(word);
                    words.emplace_back(static_cast<const char*>(bytes.data()), bytes.size());
                }
                const auto* flags = static_cast<const uint8_t*>(special.data());
                auto back = [encode = nb::object(encode)](const std::string& residue) {
                    return nb::cast<std::vector<int32_t>>(encode(nb::bytes(residue.data(), residue.size())));
                };
                new (self) Vocabulary(std::move(words), {flags, flags + special.size()}, std::move(back));
            },
            "token_bytes"_a, "special"_a, "encode"_a,
            "token_bytes: one bytes object per id; special: one byte per id, nonzero for tokens without text; encode: "
            "bytes -> ids, for what a seam leaves over.")
        .def("__len__", &Vocabulary::size);
    nb::class_<splitdecode::ByteMatcher>(m, "ByteMatcher",
                                         "Aho-Corasick over bytes; a state is an integer, 0 at first.")
        .def(nb::init<const std::vector<std::string>&>(), "patterns"_a, "ValueError on an empty pattern.")
        .def(
            "feed",
            [](const splitdecode::ByteMatcher& self, int32_t state, const nb::bytes& bytes) {
                const auto found = self.feed(state, {static_cast<const char*>(bytes.data()), bytes.size()});
                return nb::make_tuple(state, found.pattern, found.end);
            },
            "state"_a, "bytes"_a, "(state, pattern or -1, bytes consumed): stops behind the first match.")
        .def("depth", &splitdecode::ByteMatcher::depth, "state"_a, "Bytes at the end that may still become a pattern.")
        .def(
            "enters",
            [](const splitdecode::ByteMatcher& self, const nb::bytes& bytes) {
                return self.enters({static_cast<const char*>(bytes.data()), bytes.size()});
            },
            "bytes"_a, "Whether bytes hold a whole pattern or end in a part of one.");
}

static void bind_events(nb::module_& m) {
    nb::enum_<EventKind>(m, "EventKind")
        .value("TAG", EventKind::TAG)
        .value("COMPLETED", EventKind::COMPLETED)
        .value("DIED", EventKind::DIED)
        .value("DUE", EventKind::DUE)
        .value("READ", EventKind::READ)
        .value("END", EventKind::END)
        .value("STOP", EventKind::STOP)
        .value("LENGTH", EventKind::LENGTH)
        .value("FULL", EventKind::FULL)
        .value("MARK", EventKind::MARK)
        .value("BROKEN", EventKind::BROKEN);
    nb::class_<Event>(m, "Event", "What the scheduler cannot decide; fields a..d as in csrc/sequence.hpp.")
        .def_ro("kind", &Event::kind)
        .def_ro("seq", &Event::seq)
        .def_ro("a", &Event::a)
        .def_ro("b", &Event::b)
        .def_ro("c", &Event::c)
        .def_ro("d", &Event::d)
        .def("__repr__", [](const Event& e) {
            return "Event(kind=" + std::to_string(static_cast<int32_t>(e.kind)) + ", seq=" + std::to_string(e.seq) +
                   ", a=" + std::to_string(e.a) + ", b=" + std::to_string(e.b) + ", c=" + std::to_string(e.c) +
                   ", d=" + std::to_string(e.d) + ")";
        });
    nb::enum_<Phase>(m, "Phase", "What becomes of the tokens the active lane samples.")
        .value("FROZEN", Phase::FROZEN)
        .value("DIRECT", Phase::DIRECT)
        .value("SCAN", Phase::SCAN)
        .value("PROVISIONAL", Phase::PROVISIONAL)
        .value("READ", Phase::READ)
        .value("CONFIRM", Phase::CONFIRM);
}

void bind_scheduler(nb::module_& m); // bind_scheduler.cpp
void bind_host(nb::module_& m);      // bind_host.cpp

NB_MODULE(_C, m) {
    m.doc() = "splitdecode's per-token path in C++.";
    bind_digests(m);
    bind_page_pool(m);
    bind_vocabulary(m);
    bind_events(m);
    bind_scheduler(m);
    bind_host(m);
}
