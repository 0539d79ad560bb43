// F1. The pages of one KV-cache; the states and the picture are in page_pool.hpp.
#include "page_pool.hpp"

#include <iterator>
#include <stdexcept>
#include <string>

namespace splitdecode {
namespace {

std::string name_of(int32_t page) {
    return "page " + std::to_string(page);
}

void require(bool held, const std::string& breach) {
    if (!held) throw std::logic_error("PagePool: " + breach);
}

} // namespace

PagePool::PagePool(int32_t num_pages, int32_t page_size, bool prefix_caching, int32_t extent, int32_t stride)
    : num_pages_(num_pages), page_size_(page_size), prefix_caching_(prefix_caching), extent_(extent), stride_(stride) {
    if (num_pages < 1) throw std::invalid_argument("PagePool: num_pages must be >= 1, is " + std::to_string(num_pages));
    if (page_size < 1) throw std::invalid_argument("PagePool: page_size must be >= 1, is " + std::to_string(page_size));
    if (extent < 0 || stride < extent || (extent == 0 && stride != 0) || (extent > 0 && num_pages % extent != 0))
        throw std::invalid_argument("PagePool: extents of " + std::to_string(extent) + " pages, stride " +
                                    std::to_string(stride) + ", do not make " + std::to_string(num_pages) + " pages");
    pages_.resize(static_cast<size_t>(num_pages));
    if (extent == 0) {
        add_gap(0, num_pages);
        free_count_ = num_pages;
        return;
    }
    owned_.resize(static_cast<size_t>(num_pages / extent));
    absent_count_ = num_pages;
    for (Page& page : pages_) page.state = State::ABSENT;
}

int32_t PagePool::checked(int32_t page) const {
    const int32_t index = page < 0 ? -1 : index_of(page);
    if (index < 0 || index >= num_pages_ || page_of(index) != page)
        throw std::logic_error("PagePool: no " + name_of(page) + " in a pool of " + std::to_string(num_pages_));
    return index;
}

void PagePool::count_owned(int32_t page, int32_t change) {
    if (extent_ > 0) owned_[static_cast<size_t>(page / extent_)] += change;
}

void PagePool::give_extent(int32_t extent) {
    const int32_t first = extent * extent_;
    if (at(first).state != State::ABSENT) throw std::logic_error("PagePool: an extent that is given was present");
    for (int32_t page = first; page < first + extent_; ++page) give_free(page);
    absent_count_ -= extent_;
}

void PagePool::take_extent(int32_t extent) {
    if (owned_in(extent) > 0) throw std::logic_error("PagePool: an extent that is taken has owners");
    for (int32_t page = extent * extent_; page < (extent + 1) * extent_; ++page) {
        Page& p = at(page);
        if (p.state == State::ABSENT) throw std::logic_error("PagePool: an extent that is taken was absent");
        if (p.state == State::CACHED) {
            lru_remove(page);
            unpublish(page);
            give_free(page);
        }
        take_free(page);
        p.state = State::ABSENT;
    }
    absent_count_ += extent_;
}

const PagePool::Page& PagePool::at(int32_t page) const {
    return pages_[static_cast<size_t>(page)];
}

PagePool::Page& PagePool::at(int32_t page) {
    return const_cast<Page&>(static_cast<const PagePool&>(*this).at(page));
}

int32_t PagePool::allocate(int32_t after) {
    const int32_t next = after == -1 ? -1 : checked(after) + 1;
    int32_t page = -1;
    if (after != -1 && next < num_pages_ && pages_[static_cast<size_t>(next)].state == State::FREE) {
        page = next;
    } else if (free_count_ > 0) {
        page = pick_free();
    } else if (oldest_ != -1) {
        page = oldest_;
        lru_remove(page);
        unpublish(page);
        give_free(page);
        ++evictions_;
    }
    if (page == -1) return -1;
    take_free(page);
    pages_[static_cast<size_t>(page)].state = State::OWNED;
    pages_[static_cast<size_t>(page)].owners = 1;
    count_owned(page, 1);
    return page_of(page);
}

void PagePool::retain(int32_t page) {
    Page& p = at(checked(page));
    if (p.owners < 1) throw std::logic_error("PagePool: retain of " + name_of(page) + ", which nobody owns");
    ++p.owners;
}

void PagePool::release(int32_t page) {
    const int32_t index = checked(page);
    Page& p = at(index);
    if (p.owners < 1) throw std::logic_error("PagePool: release of " + name_of(page) + ", which nobody owns");
    if (--p.owners > 0) return;
    count_owned(index, -1);
    if (p.published) {
        lru_push(index);
    } else {
        give_free(index);
    }
}

bool PagePool::immutable(int32_t page) const {
    const Page& p = at(checked(page));
    return p.published || p.owners > 1;
}

int32_t PagePool::owners(int32_t page) const {
    return at(checked(page)).owners;
}

void PagePool::publish(int32_t page, const Digest& hash) {
    const int32_t index = checked(page);
    Page& p = at(index);
    if (p.owners < 1) throw std::logic_error("PagePool: publish of " + name_of(page) + ", which nobody owns");
    if (!prefix_caching_) return;
    if (p.published) {
        if (p.digest != hash) {
            throw std::logic_error("PagePool: " + name_of(page) + " is already published under another hash");
        }
        return;
    }
    if (!published_.emplace(hash, index).second) return;
    p.published = true;
    p.digest = hash;
}

int32_t PagePool::lookup(const Digest& hash) {
    if (!prefix_caching_) return -1;
    ++queries_;
    const auto found = published_.find(hash);
    if (found == published_.end()) return -1;
    ++hits_;
    Page& p = at(found->second);
    if (p.state == State::CACHED) {
        lru_remove(found->second);
        p.state = State::OWNED;
        count_owned(found->second, 1);
    }
    ++p.owners;
    return page_of(found->second);
}

void PagePool::clear_cache() {
    while (oldest_ != -1) {
        const int32_t page = oldest_;
        lru_remove(page);
        unpublish(page);
        give_free(page);
    }
    while (!published_.empty()) unpublish(published_.begin()->second);
}

void PagePool::unpublish(int32_t page) {
    Page& p = at(page);
    published_.erase(p.digest);
    p.published = false;
}

// ---- gaps: maximal runs of free pages

void PagePool::add_gap(int32_t start, int32_t length) {
    if (length == 0) return;
    gaps_.emplace(start, length);
    gap_widths_.emplace(length, -start);
}

void PagePool::drop_gap(std::map<int32_t, int32_t>::iterator gap) {
    gap_widths_.erase({gap->second, -gap->first});
    gaps_.erase(gap);
}

int32_t PagePool::pick_free() const {
    const auto& [length, negative_start] = *gap_widths_.rbegin();
    const int32_t start = -negative_start;
    if (extent_ > 0) return gaps_.begin()->first; // few extents in use leave many that can change hands
    // Nobody's run ends below page 0, so a gap that starts there need not be shared.
    return start == 0 ? 0 : start + length / 2;
}

void PagePool::take_free(int32_t page) {
    const auto gap = std::prev(gaps_.upper_bound(page));
    const int32_t start = gap->first;
    const int32_t length = gap->second;
    drop_gap(gap);
    add_gap(start, page - start);
    add_gap(page + 1, start + length - page - 1);
    --free_count_;
}

void PagePool::give_free(int32_t page) {
    int32_t start = page;
    int32_t length = 1;
    auto above = gaps_.upper_bound(page);
    if (above != gaps_.begin()) {
        const auto below = std::prev(above);
        if (below->first + below->second == page) {
            start = below->first;
            length += below->second;
            drop_gap(below);
        }
    }
    if (above != gaps_.end() && above->first == page + 1) {
        length += above->second;
        drop_gap(above);
    }
    add_gap(start, length);
    pages_[static_cast<size_t>(page)].state = State::FREE;
    ++free_count_;
}

// ---- LRU: a doubly linked list through the pages

void PagePool::lru_push(int32_t page) {
    Page& p = at(page);
    p.state = State::CACHED;
    p.older = newest_;
    p.newer = -1;
    if (newest_ != -1) {
        at(newest_).newer = page;
    } else {
        oldest_ = page;
    }
    newest_ = page;
    ++cached_count_;
}

void PagePool::lru_remove(int32_t page) {
    Page& p = at(page);
    if (p.older != -1) {
        at(p.older).newer = p.newer;
    } else {
        oldest_ = p.newer;
    }
    if (p.newer != -1) {
        at(p.newer).older = p.older;
    } else {
        newest_ = p.older;
    }
    p.older = p.newer = -1;
    --cached_count_;
}

// ---- invariants

void PagePool::check_invariants() const {
    check_pages();
    check_gaps();
    check_lru();
}

void PagePool::check_pages() const {
    int32_t free_pages = 0;
    int32_t cached_pages = 0;
    size_t published_pages = 0;
    int32_t absent_pages = 0;
    std::vector<int32_t> owned(owned_.size());
    for (int32_t i = 0; i < num_pages_; ++i) {
        const Page& p = at(i);
        require((p.owners > 0) == (p.state == State::OWNED), name_of(i) + " has owners exactly when OWNED");
        require(p.owners >= 0, name_of(i) + " has a negative number of owners");
        require((p.state != State::FREE && p.state != State::ABSENT) || !p.published, name_of(i) + " is published");
        absent_pages += p.state == State::ABSENT;
        if (extent_ > 0 && p.owners > 0) ++owned[static_cast<size_t>(i / extent_)];
        require(p.state != State::CACHED || p.published, name_of(i) + " is cached but not published");
        free_pages += p.state == State::FREE;
        cached_pages += p.state == State::CACHED;
        published_pages += p.published;
        if (p.published) {
            const auto found = published_.find(p.digest);
            require(found != published_.end() && found->second == i, name_of(i) + " is not under its own hash");
        }
    }
    require(absent_pages == absent_count_, "the absent count is wrong");
    require(owned == owned_, "the owned count of an extent is wrong");
    require(free_pages == free_count_, "the free count is wrong");
    require(cached_pages == cached_count_, "the cached count is wrong");
    require(published_pages == published_.size(), "a hash names a page that is not published");
    require(prefix_caching_ || published_.empty(), "a page is published without prefix caching");
}

void PagePool::check_gaps() const {
    int32_t covered = 0;
    int32_t last_end = -1;
    for (const auto& [start, length] : gaps_) {
        require(length > 0 && start > last_end && start + length <= num_pages_,
                "the gaps are not maximal and disjoint");
        require(gap_widths_.count({length, -start}) == 1, "a gap is missing from the widths");
        for (int32_t i = start; i < start + length; ++i) {
            require(at(i).state == State::FREE, name_of(i) + " lies in a gap but is not free");
        }
        covered += length;
        last_end = start + length;
    }
    require(covered == free_count_, "a free page lies in no gap");
    require(gap_widths_.size() == gaps_.size(), "the widths name a gap that is gone");
}

void PagePool::check_lru() const {
    int32_t length = 0;
    int32_t older = -1;
    for (int32_t i = oldest_; i != -1; i = at(i).newer) {
        require(at(i).state == State::CACHED, name_of(i) + " is in the LRU list but not cached");
        require(at(i).older == older, name_of(i) + " has a wrong LRU neighbour");
        require(++length <= cached_count_, "the LRU list is longer than the cached pages");
        older = i;
    }
    require(newest_ == older && length == cached_count_, "the LRU list misses a cached page");
}

} // namespace splitdecode
