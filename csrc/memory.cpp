// F1. The pages of lanes: lent, published, taken back. Who must give way when there are none left:
//
//     a free page, a cached one -> an extent another pool can spare -> the cache of an idle lane, by cost-aware LRU
//     -> an extent another pool keeps only for reuse -> the youngest resident, from all pools
//
// An idle lane is one whose model is not writing: its cache is only a cache. What it loses is run again when it is its
// turn (a catch-up), found again in the prefix cache as long as nobody took the page, or brought back from the shelf.
#include "scheduler.hpp"

#include <algorithm>
#include <stdexcept>

namespace splitdecode {

void Scheduler::drop_pages(Lane& lane, int32_t lane_id, int32_t keep_pages) {
    const auto index = lane_index(lane_id);
    while (static_cast<int32_t>(lane.pages.size()) > keep_pages) {
        if (flights_[index].empty())
            pool(lane_id).release(lane.pages.back());
        else
            limbo_[index].push_back({launched_flights_[index], lane.pages.back()});
        lane.pages.pop_back();
    }
    if (lane.digests.size() > lane.pages.size()) lane.digests.resize(lane.pages.size());
    lane.next_page = 0;
}

// Lowers what the cache holds. A page that others may read is never written again: it is given back instead.
void Scheduler::set_cached(Lane& lane, int32_t lane_id, int32_t cached) {
    const int32_t size = pool(lane_id).page_size();
    if (cached % size != 0 && pool(lane_id).immutable(lane.pages[static_cast<size_t>(cached / size)]))
        cached -= cached % size;
    lane.cached = lane.launched = cached;
    drop_pages(lane, lane_id, pages_for(cached, size));
    lane.digests.resize(std::min(lane.digests.size(), static_cast<size_t>(cached / size)));
}

void Scheduler::cancel(Lane& lane, int32_t lane_id) {
    if (lane.want != Want::IDLE) lane.ready = now_; // idle since
    lane.want = Want::IDLE;
    if (lane.inflight == 0 && lane.launched == lane.cached) return;
    lane.epoch = ++epochs_;
    lane.inflight = 0;
    set_cached(lane, lane_id, lane.cached);
}

void Scheduler::cancel_all(Sequence& sequence) {
    for (size_t i = 0; i < specs_.size(); ++i)
        if (sequence.lanes[i].want != Want::FILL) cancel(sequence.lanes[i], static_cast<int32_t>(i)); // draws nothing
}

void Scheduler::preempt(Sequence& sequence) {
    for (size_t i = 0; i < specs_.size(); ++i) {
        Lane& lane = sequence.lanes[i];
        lane.epoch = ++epochs_;
        lane.inflight = 0;
        lane.cached = lane.launched = 0;
        drop_pages(lane, static_cast<int32_t>(i), 0);
        trim_shelf(lane, static_cast<int32_t>(i), 0);
    }
    sequence.resident = false;
    ++sequence.preemptions;
    ++preemptions_;
    --residents_;
}

void Scheduler::land_limbo(int32_t lane) {
    const auto index = lane_index(lane);
    const int64_t landed = launched_flights_[index] - static_cast<int64_t>(flights_[index].size());
    while (!limbo_[index].empty() && limbo_[index].front().until <= landed) {
        pool(lane).release(limbo_[index].front().page);
        limbo_[index].pop_front();
    }
}

void Scheduler::publish(Lane& lane, int32_t lane_id) {
    const int32_t settled = std::min(lane.stable, lane.cached);
    if (settled < lane.next_page || !pool(lane_id).prefix_caching()) return;
    const int32_t size = pool(lane_id).page_size();
    while (static_cast<int32_t>(lane.digests.size()) < settled / size) {
        const size_t page = lane.digests.size();
        const Digest& parent = page == 0 ? lane.root : lane.digests.back();
        lane.digests.push_back(
            chain_digest(parent, lane.ids.data() + page * static_cast<size_t>(size), static_cast<size_t>(size)));
        pool(lane_id).publish(lane.pages[page], lane.digests.back());
    }
    lane.next_page = (static_cast<int32_t>(lane.digests.size()) + 1) * size;
}

void Scheduler::adopt_prefix(Sequence& sequence, int32_t lane_id) {
    Lane& lane = sequence.lanes[lane_index(lane_id)];
    const int32_t size = pool(lane_id).page_size();
    int32_t last = lane.size() - 1; // something must be left to run
    if (lane.want == Want::READ) last = std::min(last, lane.read_from);
    if (!pool(lane_id).prefix_caching()) return;
    while ((static_cast<int32_t>(lane.pages.size()) + 1) * size <= last) {
        const size_t page = lane.pages.size();
        const Digest& parent = page == 0 ? lane.root : lane.digests.back();
        const Digest digest =
            chain_digest(parent, lane.ids.data() + page * static_cast<size_t>(size), static_cast<size_t>(size));
        const int32_t found = pool(lane_id).lookup(digest);
        if (found < 0) break;
        lane.pages.push_back(found);
        lane.digests.push_back(digest);
    }
    lane.cached = lane.launched = static_cast<int32_t>(lane.pages.size()) * size;
    lane.stats.cached_tokens += lane.cached;
}

// ---- idle lanes ----------------------------------------------------------------------------------------------------

// Forgets what the shelf holds beyond the first `keep` positions.
void Scheduler::trim_shelf(Lane& lane, int32_t lane_id, int32_t keep) {
    if (lane.shelved == 0) return;
    PagePool& shelf = *spec(lane_id).shelf;
    lane.shelved = std::min(lane.shelved, keep);
    while (static_cast<int32_t>(lane.shelf.size()) > pages_for(lane.shelved, shelf.page_size())) {
        shelf.release(lane.shelf.back());
        lane.shelf.pop_back();
    }
}

// Orders a lane's cache to be copied to the shelf, if that has room and running it again would cost anything.
void Scheduler::put_on_shelf(Lane& lane, int32_t lane_id) {
    PagePool* shelf = spec(lane_id).shelf;
    const int32_t pages = pages_for(lane.cached, pool(lane_id).page_size());
    if (shelf == nullptr || lane.cached <= free_tokens_[lane_index(lane_id)] || shelf->available() < pages) return;
    for (int32_t k = 0; k < pages; ++k) {
        lane.shelf.push_back(shelf->allocate(lane.shelf.empty() ? -1 : lane.shelf.back()));
        transfers_[lane_index(lane_id)].push_back({lane.pages[static_cast<size_t>(k)], lane.shelf.back(), true});
    }
    lane.shelved = lane.cached;
}

// Pages for what the shelf holds, and the order to copy it back. False: not this time.
bool Scheduler::take_from_shelf(Sequence& sequence, int32_t lane_id) {
    Lane& lane = sequence.lanes[lane_index(lane_id)];
    const int32_t pages = static_cast<int32_t>(lane.shelf.size());
    if (!reserve(sequence, lane_id, pages)) return false;
    for (size_t k = 0; k < lane.shelf.size(); ++k)
        transfers_[lane_index(lane_id)].push_back({lane.pages[k], lane.shelf[k], false});
    lane.cached = lane.launched = lane.shelved;
    trim_shelf(lane, lane_id, 0);
    return true;
}

// Takes the cache of the idle lane that is worth least: long idle, many pages, little to run again. False: none is
// idle.
bool Scheduler::evict_idle(int32_t lane_id, const Sequence& keep, int32_t keep_lane) {
    const auto index = lane_index(lane_id);
    Lane* victim = nullptr;
    double best = 0.0;
    for (Sequence* sequence : order_) {
        if (!sequence->resident || sequence->active == lane_id || (sequence == &keep && lane_id == keep_lane)) continue;
        Lane& lane = sequence->lanes[index];
        if (lane.pages.empty() || lane.inflight > 0) continue;
        const double again = 1.0 + std::max(0, lane.cached - free_tokens_[index]);
        const double score = (1.0 + now_ - lane.ready) * static_cast<double>(lane.pages.size()) / again;
        if (score > best) {
            best = score;
            victim = &lane;
        }
    }
    if (victim == nullptr) return false;
    ++idle_evictions_;
    evicted_tokens_ += victim->cached;
    put_on_shelf(*victim, lane_id);
    victim->cached = victim->launched = 0;
    victim->want = Want::IDLE;
    drop_pages(*victim, lane_id, 0);
    return true;
}

// A page more for a lane: from the pool, another pool, an idle lane. -1: none to be had without preempting.
int32_t Scheduler::find_page(Sequence& sequence, int32_t lane_id) {
    const Lane& lane = sequence.lanes[lane_index(lane_id)];
    const int32_t after = lane.pages.empty() ? -1 : lane.pages.back();
    while (true) {
        const int32_t page = pool(lane_id).allocate(after);
        if (page >= 0) return page;
        if (arena_ != nullptr && arena_->claim(lane_index(lane_id), pool(lane_id).extent())) continue;
        if (!limbo_[lane_index(lane_id)].empty()) return -1; // flights in the air hold the pages that are missing
        if (evict_idle(lane_id, sequence, lane_id)) continue;
        if (arena_ == nullptr || waits_for_flights(lane_id)) return -1;
        if (arena_->claim(lane_index(lane_id), 0)) continue;
        bool evicted = false;
        for (int32_t other = 0; other < static_cast<int32_t>(specs_.size()) && !evicted; ++other)
            evicted = evict_idle(other, sequence, lane_id);
        if (!evicted) return -1;
    }
}

// `need` pages in all; takes them from younger residents, or gives its own up. False: not this time.
bool Scheduler::reserve(Sequence& sequence, int32_t lane_id, int32_t need) {
    Lane& lane = sequence.lanes[lane_index(lane_id)];
    while (static_cast<int32_t>(lane.pages.size()) < need) {
        const int32_t page = find_page(sequence, lane_id);
        if (page >= 0) {
            lane.pages.push_back(page);
            continue;
        }
        starved_[lane_index(lane_id)] = true;
        if (waits_for_flights(lane_id) || runs_ahead(lane_id)) return false;
        const auto youngest = std::find_if(order_.rbegin(), order_.rend(), [&](const Sequence* other) {
            return other == &sequence || other->resident;
        });
        if (*youngest == &sequence && residents_ == 1)
            throw std::logic_error("a sequence outgrew the pool it was admitted to");
        preempt(**youngest);
        if (*youngest == &sequence) return false;
    }
    return true;
}

// Whether somebody waits for pages. What others leave is his: nobody is let in, and nothing runs ahead of need.
bool Scheduler::starving() const {
    return std::find(starved_.begin(), starved_.end(), true) != starved_.end();
}

// Whether pages are missing only because steps in the air may still touch them. Any pool's, where memory is shared.
bool Scheduler::waits_for_flights(int32_t lane_id) const {
    if (arena_ == nullptr) return !limbo_[lane_index(lane_id)].empty();
    return std::any_of(limbo_.begin(), limbo_.end(), [](const auto& waiting) { return !waiting.empty(); });
}

// Whether an idle lane runs ahead of need in a step in the air: its cache can be taken as soon as that has landed.
bool Scheduler::runs_ahead(int32_t lane_id) const {
    return std::any_of(order_.begin(), order_.end(), [&](const Sequence* sequence) {
        for (int32_t lane = 0; lane < static_cast<int32_t>(specs_.size()); ++lane)
            if ((lane == lane_id || arena_ != nullptr) && sequence->active != lane &&
                sequence->lanes[lane_index(lane)].inflight > 0)
                return true;
        return false;
    });
}

// ---- content ahead of need -----------------------------------------------------------------------------------------

// What a mirrored lane may run now: its pending ids and content it does not hold yet, but for the last token. Behind
// that one a draw will be wanted, so it waits for its turn.
int32_t Scheduler::ahead_of_need(const Sequence& sequence, int32_t lane_id) const {
    const Lane& lane = sequence.lanes[lane_index(lane_id)];
    if (sequence.mirror != lane_id || !sequence.resident || lane.shelved > 0 || lane.inflight > 0) return 0;
    if (sequence.phase != Phase::SCAN && sequence.phase != Phase::DIRECT) return 0;
    if (lane.size() >= spec(lane_id).max_len) return 0; // a prompt beyond the context: this model never writes
    const int32_t room = spec(lane_id).max_len - 1 - lane.size();
    return lane.size() - lane.launched - 1 +
           std::clamp(static_cast<int32_t>(sequence.content.size()) - lane.projected, 0, std::max(0, room));
}

void Scheduler::hurry(int32_t seq) {
    Sequence& sequence = at(seq);
    if (sequence.mirror < 0) return;
    const Lane& lane = sequence.lanes[static_cast<size_t>(sequence.mirror)];
    sequence.hurry = lane.size() + static_cast<int32_t>(sequence.content.size()) - lane.projected - 1;
}

// The lane's ids grow by the content it lacks; `most` pending ids in all.
void Scheduler::project(Sequence& sequence, int32_t lane_id, int32_t most) {
    Lane& lane = sequence.lanes[lane_index(lane_id)];
    while (lane.size() - lane.launched < most)
        lane.push(sequence.content[static_cast<size_t>(lane.projected++)].id, no_logprob);
    lane.want = Want::FILL;
}

} // namespace splitdecode
