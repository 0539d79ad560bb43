// F1. Admission, pages, packing and landing. See the header for the picture.
#include "scheduler.hpp"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace splitdecode {

namespace {
int32_t pages_for(int32_t tokens, int32_t page_size) {
    return (tokens + page_size - 1) / page_size;
}
} // namespace

Scheduler::Scheduler(std::vector<LaneSpec> specs, std::vector<std::string> tags, int32_t max_seqs, int32_t depth)
    : specs_(std::move(specs)), tags_(tags), closer_(std::vector<std::string>{tags.at(1)}), max_seqs_(max_seqs),
      depth_(depth), flights_(specs_.size()), limbo_(specs_.size()), launched_flights_(specs_.size(), 0) {
    if (tags.size() != 2) throw std::invalid_argument("tags: expected the opening and the closing tag");
    if (max_seqs < 1 || depth < 1) throw std::invalid_argument("max_seqs and depth must be at least 1");
    for (const LaneSpec& lane : specs_) {
        std::vector<std::vector<uint8_t>> tables;
        for (const std::string& tag : tags) {
            const ByteMatcher matcher({tag});
            std::vector<uint8_t> table(static_cast<size_t>(lane.vocabulary->size()));
            for (int32_t id = 0; id < lane.vocabulary->size(); ++id)
                table[static_cast<size_t>(id)] = matcher.enters(lane.vocabulary->bytes(id)) ? 1 : 0;
            tables.push_back(std::move(table));
        }
        enters_.push_back(std::move(tables));
    }
}

bool Scheduler::enters(int32_t lane, int32_t pattern, int32_t id) const {
    const auto& table = enters_.at(lane_index(lane)).at(static_cast<size_t>(pattern));
    return id >= 0 && static_cast<size_t>(id) < table.size() && table[static_cast<size_t>(id)] != 0;
}

Sequence& Scheduler::at(int32_t seq) {
    if (seq < 0 || static_cast<size_t>(seq) >= sequences_.size() || !sequences_[static_cast<size_t>(seq)])
        throw std::out_of_range("no sequence " + std::to_string(seq));
    return *sequences_[static_cast<size_t>(seq)];
}

int32_t Scheduler::add(std::vector<std::vector<int32_t>> prompts, Limits limits, const std::string& salt,
                       int32_t leader) {
    if (prompts.size() != specs_.size()) throw std::invalid_argument("one prompt per lane expected");
    for (size_t i = 0; i < prompts.size(); ++i)
        for (int32_t id : prompts[i])
            if (id < 0 || id >= specs_[i].vocabulary->size())
                throw std::out_of_range("prompt id " + std::to_string(id) + " is not in lane " + std::to_string(i) +
                                        "'s vocabulary of " + std::to_string(specs_[i].vocabulary->size()));
    std::vector<const Vocabulary*> vocabularies;
    for (const LaneSpec& lane : specs_) vocabularies.push_back(lane.vocabulary);
    auto sequence =
        std::make_unique<Sequence>(std::move(prompts), std::move(vocabularies), &tags_, &closer_, std::move(limits));
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
    sequences_[static_cast<size_t>(handle)] = std::move(sequence);
    order_.push_back(handle);
    return handle;
}

void Scheduler::finish(int32_t seq) {
    Sequence& sequence = at(seq);
    for (size_t i = 0; i < sequence.lanes.size(); ++i) {
        cancel(sequence.lanes[i], static_cast<int32_t>(i));
        drop_pages(sequence.lanes[i], static_cast<int32_t>(i), 0);
    }
    if (sequence.resident) --residents_;
    order_.erase(std::find(order_.begin(), order_.end(), seq));
    for (int32_t other : order_)
        if (at(other).leader == seq) at(other).leader = -1;
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
    for (size_t i = 0; i < sequence.lanes.size(); ++i) cancel(sequence.lanes[i], static_cast<int32_t>(i));
}

void Scheduler::preempt(Sequence& sequence) {
    for (size_t i = 0; i < sequence.lanes.size(); ++i) {
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
    const int32_t size = pool(lane_id).page_size();
    const int32_t full = std::min(lane.stable, lane.cached) / size;
    if (!pool(lane_id).prefix_caching()) return;
    while (static_cast<int32_t>(lane.digests.size()) < full) {
        const size_t page = lane.digests.size();
        const Digest& parent = page == 0 ? lane.root : lane.digests.back();
        lane.digests.push_back(
            chain_digest(parent, lane.ids.data() + page * static_cast<size_t>(size), static_cast<size_t>(size)));
        pool(lane_id).publish(lane.pages[page], lane.digests.back());
    }
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
    std::vector<int32_t> free_pages;
    for (int32_t handle : order_) {
        Sequence& sequence = at(handle);
        if (sequence.resident) continue;
        if (residents_ >= max_seqs_) return;
        if (sequence.phase == Phase::FROZEN) continue;
        if (sequence.leader >= 0) {
            const Sequence& ahead = at(sequence.leader);
            const Lane& first = ahead.lanes[lane_index(sequence.active)];
            if (ahead.active == sequence.active && first.cached < first.prompt_len - 1) continue;
            sequence.leader = -1;
        }
        if (free_pages.empty()) {
            for (const LaneSpec& spec : specs_) free_pages.push_back(spec.pool->available());
            for (int32_t other : order_)
                if (at(other).resident) free_pages[static_cast<size_t>(at(other).active)] -= pages_owed(at(other));
        }
        int32_t& available = free_pages[static_cast<size_t>(sequence.active)];
        if (residents_ > 0 && pages_owed(sequence) > available) return;
        available -= pages_owed(sequence);
        sequence.resident = true;
        ++residents_;
    }
}

// Pages for the positions below `upto`; takes them from younger residents, or gives its own up. False: not this time.
bool Scheduler::reserve(size_t order_index, int32_t lane_id, int32_t upto) {
    Sequence& sequence = at(order_[order_index]);
    Lane& lane = sequence.lanes[lane_index(lane_id)];
    const int32_t need = pages_for(upto, pool(lane_id).page_size());
    while (static_cast<int32_t>(lane.pages.size()) < need) {
        const int32_t page = pool(lane_id).allocate(lane.pages.empty() ? -1 : lane.pages.back());
        if (page >= 0) {
            lane.pages.push_back(page);
            continue;
        }
        if (!limbo_[lane_index(lane_id)].empty()) return false; // flights in the air hold the pages that are missing
        size_t victim = order_.size() - 1;
        while (victim > order_index && !at(order_[victim]).resident) --victim;
        if (victim == order_index) {
            if (residents_ == 1) throw std::logic_error("a sequence outgrew the pool it was admitted to");
            preempt(sequence);
            return false;
        }
        preempt(at(order_[victim]));
    }
    return true;
}

// ---- planning ------------------------------------------------------------------------------------------------------

// What the host knows shapes the next draw: never run ahead.
bool Scheduler::exact(const Sequence& sequence) const {
    return sequence.limits.exact || static_cast<int32_t>(sequence.content.size()) < sequence.limits.min_tokens;
}

int32_t Scheduler::launchable(const Sequence& sequence, const Lane& lane) const {
    if (lane.inflight >= (exact(sequence) ? 1 : depth_)) return 0;
    if (lane.launched < lane.size()) return lane.size() - lane.launched;
    if (lane.want != Want::WRITE || lane.launched == 0) return 0;
    const int32_t outstanding = lane.launched - lane.size() + 1; // samples whose ids the host has not heard yet
    const int32_t max_len = specs_[static_cast<size_t>(sequence.active)].max_len;
    return outstanding < sequence.allowance() && lane.launched + 1 < max_len ? 1 : 0;
}

// Whether all that is pending on a model is the next token of sequences that write.
bool Scheduler::only_decodes(int32_t lane_id) {
    return std::all_of(order_.begin(), order_.end(), [&](int32_t handle) {
        const Sequence& sequence = at(handle);
        const Lane& lane = sequence.lanes[lane_index(lane_id)];
        if (!sequence.resident || sequence.phase == Phase::FROZEN || lane.want == Want::IDLE) return true;
        return lane.want == Want::WRITE && lane.launched > 0 && lane.launched + 1 >= lane.size();
    });
}

// How many steps a row that decodes may take in one flight. Draws keyed by more than their position take one.
int32_t Scheduler::decode_steps(const Sequence& sequence, int32_t lane_id, int32_t most) {
    const Lane& lane = sequence.lanes[lane_index(lane_id)];
    if (exact(sequence) || sequence.phase == Phase::CONFIRM) return 1;
    if (lane.attempt_at == lane.launched + 1 && lane.attempt > 0) return 1;
    const int32_t outstanding = lane.launched - lane.size() + 1;
    const int32_t room = std::min(sequence.allowance() - outstanding, spec(lane_id).max_len - 1 - lane.launched);
    const int32_t count = std::clamp(room, 1, most);
    const int32_t size = pool(lane_id).page_size();
    const int32_t fresh = pages_for(lane.launched + count, size) - static_cast<int32_t>(lane.pages.size());
    return fresh > pool(lane_id).available() ? 1 : count; // nobody is preempted for a guess
}

PlanCounts Scheduler::plan(int32_t lane_id, const PlanBuffers& out, int32_t steps) {
    PlanCounts counts;
    admit();
    if (steps > 1 && !only_decodes(lane_id)) steps = 1;
    Flight flight{launched_flights_.at(lane_index(lane_id)) + 1, 0, {}};
    out.cu_q[0] = out.page_indptr[0] = 0;
    // By index: reserve() may preempt, which leaves order_ as it is.
    for (size_t i = 0; i < order_.size() && counts.rows < out.max_rows; ++i) {
        Sequence& sequence = at(order_[i]);
        Lane& lane = sequence.lanes[lane_index(lane_id)];
        if (!sequence.resident || sequence.phase == Phase::FROZEN || lane.want == Want::IDLE) continue;
        if (lane.pages.empty() && lane.inflight == 0) adopt_prefix(sequence, lane_id);
        int32_t count = std::min(launchable(sequence, lane), out.max_tokens - counts.tokens);
        if (lane.want == Want::READ) {
            count = std::min(count, out.max_logits - counts.logits);
            // What penalties count differs from row to row, and a device keeps one count per sequence.
            if (sequence.limits.exact) count = std::min(count, std::max(1, lane.read_from + 1 - lane.launched));
        }
        if (count <= 0 || counts.logits >= out.max_logits) continue;
        const int32_t own_steps = steps > 1 ? decode_steps(sequence, lane_id, steps) : 1;
        const int32_t end = lane.launched + count + own_steps - 1;
        if (!reserve(i, lane_id, end)) continue;
        const int32_t pages = pages_for(end, pool(lane_id).page_size());
        if (counts.pages + pages > out.max_pages) break;
        pack(sequence, lane_id, count, own_steps, out, counts, flight);
    }
    if (counts.rows > 0) {
        ++launched_flights_[lane_index(lane_id)];
        flights_[lane_index(lane_id)].push_back(std::move(flight));
    }
    return counts;
}

void Scheduler::pack(Sequence& sequence, int32_t lane_id, int32_t count, int32_t steps, const PlanBuffers& out,
                     PlanCounts& counts, Flight& flight) {
    Lane& lane = sequence.lanes[lane_index(lane_id)];
    const int32_t size = pool(lane_id).page_size();
    const int32_t start = lane.launched, end = start + count;
    const int32_t first_token = counts.tokens, first_logits = counts.logits;
    for (int32_t p = start; p < end; ++p) {
        const int32_t t = counts.tokens++;
        out.tokens[t] = p < lane.size() ? lane.ids[static_cast<size_t>(p)] : -1 - sequence.handle;
        out.positions[t] = p;
        out.slots[t] = lane.pages[static_cast<size_t>(p / size)] * size + p % size;
    }
    const bool samples = lane.want == Want::WRITE && end >= lane.size();
    const bool own_words = sequence.phase != Phase::READ && sequence.phase != Phase::CONFIRM;
    const bool suppress = own_words && static_cast<int32_t>(sequence.content.size() + sequence.provisional.size()) <
                                           sequence.limits.min_tokens;
    const int32_t from = lane.want == Want::READ ? std::max(start, lane.read_from) : (samples ? end - 1 : end);
    for (int32_t p = from; p < end; ++p) {
        int32_t* row = out.logits + 6 * counts.logits++;
        const int32_t sampled = p + 1; // the position the sampled token will take
        const bool trying = sequence.phase == Phase::CONFIRM;
        row[0] = first_token + p - start;
        row[1] = sequence.handle;
        row[2] = trying ? sequence.confirm_base : sampled;
        row[3] = static_cast<int32_t>(sequence.stream |
                                      (trying ? static_cast<uint32_t>(sampled - sequence.confirm_base) << 8 : 0U));
        row[4] = sampled == lane.attempt_at && sequence.phase == Phase::SCAN ? lane.attempt : 0;
        row[5] = (suppress ? SUPPRESS_END : 0) | (samples ? FEEDS_DEVICE : 0);
    }
    lane.launched = end + steps - 1;
    for (int32_t page = 0; page < pages_for(lane.launched, size); ++page)
        out.pages[counts.pages++] = lane.pages[static_cast<size_t>(page)];
    out.kv_len[counts.rows] = end;
    out.row_seq[counts.rows] = sequence.handle;
    out.row_steps[counts.rows] = steps;
    counts.steps = std::max(counts.steps, steps);
    ++counts.rows;
    out.cu_q[counts.rows] = counts.tokens;
    out.page_indptr[counts.rows] = counts.pages;
    const int32_t all = count + steps - 1, logits = steps > 1 ? steps : counts.logits - first_logits;
    flight.rows.push_back({sequence.handle, start, all, logits, steps > 1, lane.epoch});
    flight.tokens += all;
    ++lane.inflight;
    count_row(sequence, lane, count, steps);
}

void Scheduler::count_row(const Sequence& sequence, Lane& lane, int32_t count, int32_t steps) {
    LaneStats& stats = lane.stats;
    const int32_t prompt = std::clamp(lane.prompt_len - (lane.launched - count - steps + 1), 0, count);
    stats.forwards += steps;
    stats.tokens += count + steps - 1;
    stats.prompt_tokens += prompt;
    if (sequence.phase == Phase::READ) {
        stats.read_tokens += count - prompt;
    } else if (count - prompt > 1) {
        stats.catchup_tokens += count - prompt;
        ++stats.catchup_forwards;
    }
}

} // namespace splitdecode
