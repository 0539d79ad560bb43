// F1. The pages of ONE KV-cache: free list, reference counts, prefix hashes, eviction. Torch-free, knows no tokens.
//
//            allocate                       release, unpublished
//     FREE ------------> OWNED (n owners) ------------------------> FREE
//       ^                  |      ^
//       | evict (LRU)      | release, published
//       |                  v      | lookup
//       +--------------- CACHED --+         publish marks an OWNED page; CACHED pages are always published
//
//     page   0 1 2 3 4 5 6 7 8 9        Free pages are kept as gaps [start, length), so that a lane's pages become
//            A A . . . B B . . c        contiguous runs: page after+1 when it is free, else the middle of the widest
//                |_gap_|   |gap|        gap, which leaves room both to the new run and to the one below the gap.
//
// A pool may share one memory with others (arena.hpp). Then its pages come in extents, of which it has some and lacks
// the others: pages of an extent it lacks are ABSENT. With `stride` > extent the numbers it hands out leave gaps:
//
//     page   0 1 2 | . . . . . | 8 9 10 | . .         extent 3, stride 8: layer l of page p lies 3 l pages further on
//
// Owners release a lane from its last page to its first: eviction then takes the tail of a prefix before its head.
// Not thread-safe: the scheduler's thread owns it.
#pragma once

#include "sha256.hpp"

#include <cstdint>
#include <cstring>
#include <map>
#include <set>
#include <unordered_map>
#include <utility>
#include <vector>

namespace splitdecode {

class PagePool {
  public:
    // num_pages >= 1, page_size >= 1 (tokens per page); else std::invalid_argument. Without prefix caching publish()
    // and lookup() do nothing, and no page is ever cached.
    // extent: pages per extent, of which num_pages is a multiple; 0: no extents, every page is present. With extents
    // all are absent at first. stride >= extent.
    PagePool(int32_t num_pages, int32_t page_size, bool prefix_caching, int32_t extent = 0, int32_t stride = 0);

    int32_t num_pages() const { return num_pages_; }
    int32_t page_size() const { return page_size_; }
    bool prefix_caching() const { return prefix_caching_; }

    // Pages allocate() can still hand out: free ones and cached ones nobody owns.
    int32_t available() const { return free_count_ + cached_count_; }
    // Pages with at least one owner.
    int32_t in_use() const { return num_pages_ - absent_count_ - available(); }
    // Pages it has; the others are absent.
    int32_t present() const { return num_pages_ - absent_count_; }
    int32_t extent() const { return extent_; }
    int32_t extents() const { return extent_ == 0 ? 0 : num_pages_ / extent_; }
    // Pages of an extent that somebody owns.
    int32_t owned_in(int32_t extent) const { return owned_.at(static_cast<size_t>(extent)); }
    // An absent extent's pages become free. std::logic_error when it is present.
    void give_extent(int32_t extent);
    // An extent without owners becomes absent; what was cached in it is forgotten. std::logic_error when a page is
    // owned.
    void take_extent(int32_t extent);
    // A page's place among num_pages, without the gaps of the stride.
    int32_t index_of(int32_t page) const {
        return extent_ == stride_ ? page : page / stride_ * extent_ + page % stride_;
    }
    int32_t page_of(int32_t index) const {
        return extent_ == stride_ ? index : index / extent_ * stride_ + index % extent_;
    }

    // A page with one owner, or -1 when none is left. Prefers after + 1 when free, else a free page where a run can
    // grow, else evicts the cached page released longest ago. A fresh pool hands out page 0 first.
    // std::logic_error when `after` is neither -1 nor a page.
    int32_t allocate(int32_t after = -1);

    // One more owner of a page that has one; std::logic_error when it has none (lookup() revives cached pages).
    void retain(int32_t page);

    // One fewer. The last owner leaves a published page cached, any other free. std::logic_error on a double release.
    void release(int32_t page);

    // Published, or more than one owner: nobody may write to it.
    bool immutable(int32_t page) const;

    // The page is full and committed. When the hash is already known the page stays unpublished. std::logic_error when
    // nobody owns the page, or when it is already published under another hash.
    void publish(int32_t page, const Digest& hash);

    // The page with that content, with one more owner: the caller. -1 when unknown.
    int32_t lookup(const Digest& hash);

    // Frees every cached page nobody owns and unpublishes the owned ones.
    void clear_cache();

    int32_t owners(int32_t page) const;

    // Since construction: lookups, lookups answered, cached pages given to somebody else.
    uint64_t queries() const { return queries_; }
    uint64_t hits() const { return hits_; }
    uint64_t evictions() const { return evictions_; }

    // O(num_pages); std::logic_error naming the breach.
    void check_invariants() const;

  private:
    // A digest is uniform already: its first bytes are its hash.
    struct DigestHash {
        size_t operator()(const Digest& digest) const {
            size_t value;
            std::memcpy(&value, digest.data(), sizeof value);
            return value;
        }
    };

    enum class State : uint8_t { FREE, OWNED, CACHED, ABSENT };

    struct Page {
        State state = State::FREE;
        bool published = false;
        int32_t owners = 0;
        int32_t older = -1; // neighbours in the LRU list, only while CACHED
        int32_t newer = -1;
        Digest digest{}; // only while published
    };

    // In here pages are indices, without the gaps of the stride.
    int32_t checked(int32_t page) const;
    Page& at(int32_t page);
    const Page& at(int32_t page) const;
    void count_owned(int32_t page, int32_t change);
    void take_free(int32_t page);
    void give_free(int32_t page);
    void add_gap(int32_t start, int32_t length);
    void drop_gap(std::map<int32_t, int32_t>::iterator gap);
    int32_t pick_free() const;
    void lru_push(int32_t page);
    void lru_remove(int32_t page);
    void unpublish(int32_t page);
    void check_pages() const;
    void check_gaps() const;
    void check_lru() const;

    int32_t num_pages_;
    int32_t page_size_;
    bool prefix_caching_;
    int32_t extent_, stride_;
    std::vector<int32_t> owned_; // by extent
    int32_t absent_count_ = 0;
    std::vector<Page> pages_;
    std::map<int32_t, int32_t> gaps_;                  // start -> length, of maximal runs of free pages
    std::set<std::pair<int32_t, int32_t>> gap_widths_; // (length, -start): the last one is the widest, lowest gap
    std::unordered_map<Digest, int32_t, DigestHash> published_;
    int32_t oldest_ = -1;
    int32_t newest_ = -1;
    int32_t free_count_ = 0;
    int32_t cached_count_ = 0;
    uint64_t queries_ = 0;
    uint64_t hits_ = 0;
    uint64_t evictions_ = 0;
};

} // namespace splitdecode
