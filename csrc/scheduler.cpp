// F1. Admission and pages. See the header for the picture.
#include "scheduler.hpp"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace splitdecode {

Scheduler::Scheduler(std::vector<LaneSpec> specs, std::vector<std::string> tags, int32_t max_seqs, int32_t depth)
    : specs_(std::move(specs)), tags_(tags), closer_(std::vector<std::string>{tags.at(1)}), max_seqs_(max_seqs),
      depth_(depth), pacer_(specs_.size()), flights_(specs_.size()), limbo_(specs_.size()),
      launched_flights_(specs_.size(), 0) {
    if (specs_.empty() || specs_.size() > max_lanes) throw std::invalid_argument("one or two lanes expected");
    if (tags.size() != 2) throw std::invalid_argument("tags: expected the opening and the closing tag");
    if (max_seqs < 1 || depth < 1) throw std::invalid_argument("max_seqs and depth must be at least 1");
    for (const LaneSpec& lane : specs_) {
        std::vector<uint8_t> table(static_cast<size_t>(lane.vocabulary->size()));
        for (size_t pattern = 0; pattern < tags.size(); ++pattern) {
            const ByteMatcher matcher({tags[pattern]});
            for (int32_t id = 0; id < lane.vocabulary->size(); ++id)
                if (matcher.enters(lane.vocabulary->bytes(id)))
                    table[static_cast<size_t>(id)] =
                        static_cast<uint8_t>(table[static_cast<size_t>(id)] | 1U << pattern);
        }
        enters_.push_back(std::move(table));
    }
    for (size_t i = 0; i < specs_.size(); ++i) words_.push_back({specs_[i].vocabulary, enters_[i].data()});
}

bool Scheduler::enters(int32_t lane, int32_t pattern, int32_t id) const {
    const auto& table = enters_.at(lane_index(lane));
    return id >= 0 && static_cast<size_t>(id) < table.size() && (table[static_cast<size_t>(id)] >> pattern & 1) != 0;
}

Sequence& Scheduler::at(int32_t seq) {
    if (seq < 0 || static_cast<size_t>(seq) >= sequences_.size() || !sequences_[static_cast<size_t>(seq)])
        throw std::out_of_range("no sequence " + std::to_string(seq));
    return *sequences_[static_cast<size_t>(seq)];
}

int32_t Scheduler::add(const std::vector<std::vector<int32_t>>& prompts, Limits limits, const std::string& salt,
                       int32_t leader) {
    if (prompts.size() != specs_.size()) throw std::invalid_argument("one prompt per lane expected");
    for (size_t i = 0; i < prompts.size(); ++i)
        for (int32_t id : prompts[i])
            if (id < 0 || id >= specs_[i].vocabulary->size())
                throw std::out_of_range("prompt id " + std::to_string(id) + " is not in lane " + std::to_string(i) +
                                        "'s vocabulary of " + std::to_string(specs_[i].vocabulary->size()));
    auto sequence = std::make_unique<Sequence>(prompts, words_.data(), &tags_, &closer_, std::move(limits));
    for (Lane& lane : sequence->lanes) {
        lane.epoch = ++epochs_;
        lane.root = root_digest(salt);
    }
    sequence->born = sequence->lanes.front().epoch;
    sequence->arrival = arrivals_++;
    sequence->leader = leader;
    int32_t handle = static_cast<int32_t>(sequences_.size());
    if (free_handles_.empty()) {
        sequences_.emplace_back();
    } else {
        handle = free_handles_.back();
        free_handles_.pop_back();
    }
    sequence->handle = handle;
    if (leader >= 0) ++at(leader).followers;
    order_.push_back(sequence.get());
    sequences_[static_cast<size_t>(handle)] = std::move(sequence);
    return handle;
}

void Scheduler::finish(int32_t seq) {
    Sequence& sequence = at(seq);
    for (size_t i = 0; i < specs_.size(); ++i) {
        cancel(sequence.lanes[i], static_cast<int32_t>(i));
        drop_pages(sequence.lanes[i], static_cast<int32_t>(i), 0);
    }
    if (sequence.resident) --residents_;
    if (sequence.leader >= 0) --at(sequence.leader).followers;
    order_.erase(std::find(order_.begin(), order_.end(), &sequence));
    if (sequence.followers > 0)
        for (Sequence* other : order_)
            if (other->leader == seq) other->leader = -1;
    sequences_[static_cast<size_t>(seq)].reset();
    free_handles_.push_back(seq);
}

// ---- pages ---------------------------------------------------------------------------------------------------------

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
    lane.want = Want::IDLE;
    if (lane.inflight == 0 && lane.launched == lane.cached) return;
    lane.epoch = ++epochs_;
    lane.inflight = 0;
    set_cached(lane, lane_id, lane.cached);
}

void Scheduler::cancel_all(Sequence& sequence) {
    for (size_t i = 0; i < specs_.size(); ++i) cancel(sequence.lanes[i], static_cast<int32_t>(i));
}

void Scheduler::preempt(Sequence& sequence) {
    for (size_t i = 0; i < specs_.size(); ++i) {
        Lane& lane = sequence.lanes[i];
        lane.epoch = ++epochs_;
        lane.inflight = 0;
        lane.cached = lane.launched = 0;
        drop_pages(lane, static_cast<int32_t>(i), 0);
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

// ---- admission -----------------------------------------------------------------------------------------------------

int32_t Scheduler::pages_owed(const Sequence& sequence) const {
    const Lane& lane = sequence.lanes[static_cast<size_t>(sequence.active)];
    const LaneSpec& spec = specs_[static_cast<size_t>(sequence.active)];
    const int32_t total = pages_for(std::min(lane.size() + 1, spec.max_len), spec.pool->page_size());
    return std::max(0, total - static_cast<int32_t>(lane.pages.size()));
}

void Scheduler::admit() {
    if (residents_ == unfinished() || residents_ >= max_seqs_) return;
    std::vector<int32_t> free_pages;
    for (Sequence* waiting : order_) {
        Sequence& sequence = *waiting;
        if (sequence.resident) continue;
        if (residents_ >= max_seqs_) return;
        if (sequence.phase == Phase::FROZEN) continue;
        if (sequence.leader >= 0) {
            Sequence& ahead = at(sequence.leader);
            const Lane& first = ahead.lanes[lane_index(sequence.active)];
            if (ahead.active == sequence.active && first.cached < first.prompt_len - 1) continue;
            --ahead.followers;
            sequence.leader = -1;
        }
        if (free_pages.empty()) {
            for (const LaneSpec& spec : specs_) free_pages.push_back(spec.pool->available());
            for (const Sequence* other : order_)
                if (other->resident) free_pages[static_cast<size_t>(other->active)] -= pages_owed(*other);
        }
        int32_t& available = free_pages[static_cast<size_t>(sequence.active)];
        if (residents_ > 0 && pages_owed(sequence) > available) return;
        available -= pages_owed(sequence);
        sequence.resident = true;
        ++residents_;
    }
}

// `need` pages in all; takes them from younger residents, or gives its own up. False: not this time.
bool Scheduler::reserve(Sequence& sequence, int32_t lane_id, int32_t need) {
    Lane& lane = sequence.lanes[lane_index(lane_id)];
    while (static_cast<int32_t>(lane.pages.size()) < need) {
        const int32_t page = pool(lane_id).allocate(lane.pages.empty() ? -1 : lane.pages.back());
        if (page >= 0) {
            lane.pages.push_back(page);
            continue;
        }
        if (!limbo_[lane_index(lane_id)].empty()) return false; // flights in the air hold the pages that are missing
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

} // namespace splitdecode
