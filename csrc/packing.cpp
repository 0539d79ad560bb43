// F1. What one step of a model consists of: who has pending tokens, whether to step at all, and the packed arrays.
//
// Rows take pages in arrival order, but tokens in order of urgency: a row of few tokens (a decode, a block that is
// read, a short catch-up) is never crowded out by a long one, and long ones (prompts, long catch-ups) share what is
// left of the budget, at least a quarter of it.
#include "scheduler.hpp"

#include <algorithm>

namespace splitdecode {

namespace {
constexpr int32_t short_row = 16; // tokens up to which a row is urgent
constexpr size_t ahead = 6;       // sequences prefetched: what the loops touch does not stay in a core's cache
} // namespace

// What the host knows shapes the next draw: never run ahead.
bool Scheduler::exact(const Sequence& sequence) const {
    return sequence.limits.exact || static_cast<int32_t>(sequence.content.size()) < sequence.limits.min_tokens;
}

int32_t Scheduler::launchable(const Sequence& sequence, const Lane& lane) const {
    if (lane.inflight >= (exact(sequence) ? 1 : depth_)) return 0;
    if (lane.launched < lane.size()) return lane.size() - std::max(lane.launched, lane.shelved);
    if (lane.want != Want::WRITE || lane.launched == 0) return 0;
    const int32_t outstanding = lane.launched - lane.size() + 1; // samples whose ids the host has not heard yet
    const int32_t max_len = specs_[static_cast<size_t>(sequence.active)].max_len;
    return outstanding < sequence.allowance() && lane.launched + 1 < max_len ? 1 : 0;
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

// Rows of the lane that could run now, in arrival order, with what they owe.
Demand Scheduler::survey(int32_t lane_id) {
    Demand demand;
    candidates_.clear();
    fills_.clear();
    only_decodes_ = true;
    urgent_ = 0;
    for (size_t i = 0; i < order_.size(); ++i) {
        if (i + ahead < order_.size()) order_[i + ahead]->prefetch(lane_index(lane_id));
        Sequence& sequence = *order_[i];
        if (sequence.active != lane_id) {
            const int32_t owed = sequence.mirror == lane_id ? ahead_of_need(sequence, lane_id) : 0;
            if (owed > 0) fills_.push_back({&sequence, owed});
            continue;
        }
        if (!sequence.resident || sequence.phase == Phase::FROZEN) continue;
        Lane& lane = sequence.lanes[lane_index(lane_id)];
        if (lane.want == Want::IDLE) continue;
        only_decodes_ =
            only_decodes_ && lane.want == Want::WRITE && lane.launched > 0 && lane.launched + 1 >= lane.size();
        if (lane.pages.empty() && lane.inflight == 0 && lane.shelved == 0) adopt_prefix(sequence, lane_id);
        const int32_t count = launchable(sequence, lane);
        if (count <= 0) continue;
        candidates_.push_back({&sequence, count});
        if (count <= short_row) urgent_ += count;
        const double waited = now_ - lane.ready;
        demand.waited += waited;
        demand.oldest = std::max(demand.oldest, waited);
    }
    demand.rows = static_cast<int32_t>(candidates_.size());
    return demand;
}

PlanCounts Scheduler::plan(int32_t lane_id, const PlanBuffers& out, int32_t steps, double now) {
    PlanCounts counts;
    const auto index = lane_index(lane_id);
    now_ = std::max(now_, now);
    admit();
    const Demand demand = survey(lane_id);
    if (demand.rows > 0 && pacer_.holds(index, demand)) {
        pacer_.launched(index, 0);
        return counts;
    }
    if (!only_decodes_) steps = 1;
    starved_[index] = false;
    Flight flight{launched_flights_[index] + 1, 0, {}};
    flight.rows.reserve(candidates_.size());
    out.cu_q[0] = out.page_indptr[0] = 0;
    int32_t urgent = std::min(urgent_, out.max_tokens - out.max_tokens / 4);
    for (size_t i = 0; i < candidates_.size() && counts.rows < out.max_rows; ++i) {
        const Candidate& candidate = candidates_[i];
        Sequence& sequence = *candidate.sequence;
        Lane& lane = sequence.lanes[index];
        const bool is_urgent = candidate.count <= short_row;
        const int32_t left = out.max_tokens - counts.tokens;
        int32_t count = std::min(candidate.count, is_urgent ? left : left - urgent);
        if (is_urgent) urgent = std::max(0, urgent - candidate.count);
        if (lane.want == Want::READ) {
            count = std::min(count, out.max_logits - counts.logits);
            // What penalties count differs from row to row, and a device keeps one count per sequence.
            if (sequence.limits.exact) count = std::min(count, std::max(1, lane.read_from + 1 - lane.launched));
        }
        if (count <= 0 || counts.logits >= out.max_logits || !sequence.resident) continue;
        if (lane.shelved > 0 && !take_from_shelf(sequence, lane_id)) continue;
        const int32_t own_steps = steps > 1 ? decode_steps(sequence, lane_id, steps) : 1;
        const int32_t end = lane.launched + count + own_steps - 1;
        const int32_t pages = page_of(end - 1, pool(lane_id).page_size(), lane.pages) + 1;
        if (!reserve(sequence, lane_id, pages)) continue;
        if (counts.pages + pages > out.max_pages) break;
        pack(sequence, lane_id, count, own_steps, out, counts, flight);
    }
    if (steps == 1 && !starving()) pack_fills(lane_id, out, counts, flight);
    pacer_.launched(index, counts.rows);
    if (counts.rows > 0) {
        ++launched_flights_[index];
        flights_[index].push_back(std::move(flight));
    }
    return counts;
}

// Lanes that will owe: in the room that costs nothing, or in steps of their own when enough has gathered. Nobody loses
// a page for it.
void Scheduler::pack_fills(int32_t lane_id, const PlanBuffers& out, PlanCounts& counts, Flight& flight) {
    const auto index = lane_index(lane_id);
    const int32_t room = counts.rows > 0 ? free_tokens_[index] : 0;
    for (const Candidate& fill : fills_) {
        Sequence& sequence = *fill.sequence;
        Lane& lane = sequence.lanes[index];
        const bool worth = lane.launched < sequence.hurry || fill.count >= fill_chunk_[index];
        const int32_t limit = std::min(worth ? out.max_tokens : room, out.max_tokens) - counts.tokens;
        if (limit <= 0 || counts.rows >= out.max_rows || !sequence.resident) continue;
        if (lane.shelved > 0) continue; // since the survey: rows of this very step needed its pages
        if (lane.pages.empty()) adopt_prefix(sequence, lane_id);
        const int32_t count = std::min(limit, ahead_of_need(sequence, lane_id));
        const int32_t end = lane.launched + count, pages = pages_for(end, pool(lane_id).page_size());
        const int32_t fresh = pages - static_cast<int32_t>(lane.pages.size());
        if (count <= 0 || fresh > pool(lane_id).available() || counts.pages + pages > out.max_pages) continue;
        if (!reserve(sequence, lane_id, pages)) continue;
        project(sequence, lane_id, count);
        pack(sequence, lane_id, count, 1, out, counts, flight);
    }
}

void Scheduler::pack(Sequence& sequence, int32_t lane_id, int32_t count, int32_t steps, const PlanBuffers& out,
                     PlanCounts& counts, Flight& flight) {
    Lane& lane = sequence.lanes[lane_index(lane_id)];
    const int32_t size = pool(lane_id).page_size();
    const int32_t start = lane.launched, end = start + count;
    const int32_t first_token = counts.tokens, first_logits = counts.logits;
    int32_t t = counts.tokens;
    const int32_t first_page = page_of(start, size, lane.pages);
    for (int32_t p = start, page = first_page, offset = start - page * size; p < end; ++p, ++t) {
        out.tokens[t] = p + 1 < lane.size()    ? lane.ids[static_cast<size_t>(p)]
                        : p + 1 == lane.size() ? lane.last
                                               : -1 - sequence.handle;
        out.positions[t] = p;
        out.slots[t] = lane.pages[static_cast<size_t>(page)] * size + offset;
        if (++offset == size) ++page, offset = 0;
    }
    counts.tokens = t;
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
    const int32_t pages = page_of(lane.launched - 1, size, lane.pages) + 1;
    std::copy_n(lane.pages.data(), pages, out.pages + counts.pages);
    counts.pages += pages;
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
