// F1. Extents of one memory among page pools; the picture is in arena.hpp.
#include "arena.hpp"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace splitdecode {

Arena::Arena(std::vector<PagePool*> pools, const std::vector<int32_t>& shares) : pools_(std::move(pools)) {
    if (pools_.empty() || shares.size() != pools_.size())
        throw std::invalid_argument("Arena: a share per pool expected");
    for (const PagePool* pool : pools_)
        if (pool->extents() < 1 || pool->extents() != pools_.front()->extents() || pool->present() != 0)
            throw std::invalid_argument("Arena: pools of equally many extents expected, all absent");
    if (std::any_of(shares.begin(), shares.end(), [](int32_t share) { return share < 0; }))
        throw std::invalid_argument("Arena: a share below 0");
    for (size_t pool = 0; pool < pools_.size(); ++pool)
        for (int32_t k = 0; k < shares[pool]; ++k) {
            if (static_cast<int32_t>(owners_.size()) == pools_[pool]->extents())
                throw std::invalid_argument("Arena: the shares are more than there is");
            pools_[pool]->give_extent(static_cast<int32_t>(owners_.size()));
            owners_.push_back(static_cast<int32_t>(pool));
        }
    owners_.resize(static_cast<size_t>(pools_.front()->extents()), -1);
}

bool Arena::claim(size_t pool, int32_t spare) {
    if (pool >= pools_.size()) throw std::out_of_range("Arena: no such pool");
    int32_t found = -1;
    for (size_t i = 0; i < owners_.size(); ++i) {
        const int32_t owner = owners_[i], extent = static_cast<int32_t>(i);
        if (owner == static_cast<int32_t>(pool)) continue;
        if (owner < 0) {
            found = extent;
            break;
        }
        const PagePool& donor = *pools_[static_cast<size_t>(owner)];
        if (donor.owned_in(extent) == 0 && donor.available() - donor.extent() >= spare) found = extent;
    }
    if (found < 0) return false;
    int32_t& owner = owners_[static_cast<size_t>(found)];
    if (owner >= 0) pools_[static_cast<size_t>(owner)]->take_extent(found);
    pools_[pool]->give_extent(found);
    owner = static_cast<int32_t>(pool);
    ++moved_;
    return true;
}

int32_t Arena::reachable(size_t pool) const {
    if (pool >= pools_.size()) throw std::out_of_range("Arena: no such pool");
    int32_t extents = 0;
    for (size_t i = 0; i < owners_.size(); ++i) {
        const int32_t owner = owners_[i];
        if (owner == static_cast<int32_t>(pool)) continue;
        if (owner < 0 || pools_[static_cast<size_t>(owner)]->owned_in(static_cast<int32_t>(i)) == 0) ++extents;
    }
    return extents * pools_[pool]->extent();
}

void Arena::check_invariants() const {
    std::vector<int32_t> extents(pools_.size());
    for (const int32_t owner : owners_)
        if (owner >= 0) ++extents[static_cast<size_t>(owner)];
    for (size_t pool = 0; pool < pools_.size(); ++pool)
        if (pools_[pool]->present() != extents[pool] * pools_[pool]->extent())
            throw std::logic_error("Arena: pool " + std::to_string(pool) + " has pages of extents it was not given");
}

} // namespace splitdecode
