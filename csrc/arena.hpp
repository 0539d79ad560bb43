// F1. One memory, several page pools: extents of equal size, each lent to one pool at a time.
//
//     memory   | A | A | A | . | B | B |        a pool that runs dry claims an extent: an idle one, or one of another
//              extent 0 ..          5           pool in which nobody owns a page (what is cached there is forgotten)
//
// Knows no bytes: what an extent is in memory, and how many pages of which pool fit, is the caller's business.
#pragma once

#include "page_pool.hpp"

#include <cstdint>
#include <vector>

namespace splitdecode {

class Arena {
  public:
    // Every pool has `extents` extents, all absent. shares: how many of them each pool has at first; the rest is idle.
    // std::invalid_argument when they do not fit.
    Arena(std::vector<PagePool*> pools, const std::vector<int32_t>& shares);

    // One extent more for a pool. A donor keeps at least `spare` pages that it can still hand out. False: none to be
    // had.
    bool claim(size_t pool, int32_t spare);
    // Pages a pool could get by claims, if nobody else claimed.
    int32_t reachable(size_t pool) const;
    // Extents by owner, -1: idle.
    const std::vector<int32_t>& owners() const { return owners_; }
    int64_t moved() const { return moved_; }
    // std::logic_error naming the breach.
    void check_invariants() const;

  private:
    std::vector<PagePool*> pools_;
    std::vector<int32_t> owners_;
    int64_t moved_ = 0;
};

} // namespace splitdecode
