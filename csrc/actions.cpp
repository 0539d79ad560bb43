// F1. The scheduler's other half: what landed flights mean, and what the caller decides about a sequence.
#include "scheduler.hpp"

#include <algorithm>
#include <stdexcept>

namespace splitdecode {

// ---- landing -------------------------------------------------------------------------------------------------------

bool Scheduler::is_end(const Sequence& sequence, int32_t lane, int32_t id) const {
    const auto& stops = sequence.limits.stop_ids;
    if (std::find(stops.begin(), stops.end(), id) != stops.end()) return true;
    const auto& eos = spec(lane).eos_ids;
    return !sequence.limits.ignore_eos && std::find(eos.begin(), eos.end(), id) != eos.end();
}

std::vector<Event> Scheduler::commit(int32_t lane_id, const int32_t* ids, const float* logprobs, int32_t count,
                                     double ms, double now) {
    auto& flights = flights_.at(lane_index(lane_id));
    if (flights.empty()) throw std::logic_error("commit without a flight in the air");
    int32_t expected = 0;
    for (const Row& row : flights.front().rows) expected += row.logits;
    if (expected != count)
        throw std::invalid_argument("commit: " + std::to_string(count) + " ids for a flight of " +
                                    std::to_string(expected) + " logits rows");
    const Flight flight = std::move(flights.front());
    flights.pop_front();
    now_ = std::max(now_, now);
    pacer_.landed(lane_index(lane_id), ms);
    std::vector<Event> events;
    int32_t offset = 0;
    const double share = ms / flight.tokens;
    const auto ahead_of = [&](size_t row) -> const Sequence* {
        return row < flight.rows.size() ? sequences_[static_cast<size_t>(flight.rows[row].seq)].get() : nullptr;
    };
    for (size_t i = 0; i < flight.rows.size(); ++i) {
        const Row& row = flight.rows[i];
        if (const Sequence* next = ahead_of(i + 16)) next->prefetch(lane_index(lane_id));
        if (const Sequence* next = ahead_of(i + 6)) next->prefetch_ends(lane_index(lane_id));
        Sequence* sequence = sequences_[static_cast<size_t>(row.seq)].get();
        if (sequence != nullptr && row.epoch >= sequence->born) { // else its handle has a new owner
            Lane& lane = sequence->lanes[lane_index(lane_id)];
            lane.stats.ms += share * row.count;
            if (lane.want == Want::WRITE && row.count == row.logits) {
                lane.stats.write_ms += share * row.count;
                lane.stats.writes += row.count;
            }
            if (lane.epoch == row.epoch) {
                --lane.inflight;
                lane.ready = now_;
                if (!row.steps) lane.cached = row.start + row.count;
                // A step without draws tells nothing of its numbers: its pages wait for the first draw behind them.
                if (commit_row(row, *sequence, lane_id, ids + offset, logprobs + offset, events) && row.logits > 0)
                    publish(lane, lane_id);
                if (sequence->phase == Phase::FROZEN) cancel_all(*sequence); // nothing lands before the answer
            } else {
                lane.stats.discarded += row.logits;
            }
        }
        offset += row.logits;
    }
    land_limbo(lane_id);
    return events;
}

void Scheduler::discard_flight(int32_t lane_id) {
    auto& flights = flights_.at(lane_index(lane_id));
    if (flights.empty()) throw std::logic_error("discard_flight without a flight in the air");
    for (const Row& row : flights.back().rows) {
        Sequence* sequence = sequences_[static_cast<size_t>(row.seq)].get();
        if (sequence != nullptr && sequence->lanes[lane_index(lane_id)].epoch == row.epoch)
            throw std::logic_error("discard_flight: finish or preempt its sequences first");
    }
    flights.pop_back();
    const int64_t newest = --launched_flights_[lane_index(lane_id)];
    for (Limbo& waiting : limbo_[lane_index(lane_id)]) waiting.until = std::min(waiting.until, newest);
    land_limbo(lane_id);
}

// False: NaN logits. What such a step wrote is never published, nor what steps without draws wrote before it.
bool Scheduler::commit_row(const Row& row, Sequence& sequence, int32_t lane_id, const int32_t* ids,
                           const float* logprobs, std::vector<Event>& events) {
    Lane& lane = sequence.lanes[lane_index(lane_id)];
    if (row.steps) return commit_steps(row, sequence, lane_id, ids, logprobs, events);
    if (std::any_of(ids, ids + row.logits, [](int32_t id) { return id < 0; })) {
        sequence.raise(events, {EventKind::BROKEN, row.seq, lane_id});
        return false;
    }
    lane.stats.sampled += row.logits;
    if (lane.want == Want::WRITE && row.logits > 0) {
        lane.push(ids[0], logprobs[0]);
        sequence.written(spec(lane_id).max_len, is_end(sequence, lane_id, ids[0]), events);
    } else if (lane.want == Want::READ) {
        const int32_t first = std::max(row.start, lane.read_from) - lane.read_from;
        for (int32_t k = 0; k < row.logits; ++k) {
            sequence.draws[static_cast<size_t>(first + k)] = ids[k];
            sequence.draw_logprobs[static_cast<size_t>(first + k)] = logprobs[k];
        }
        if (lane.cached < lane.size()) return true;
        int32_t entering = 0;
        const auto total = static_cast<int32_t>(sequence.draws.size());
        while (entering < total && !enters(lane_id, 1, sequence.draws[static_cast<size_t>(entering)])) ++entering;
        sequence.raise(events, {EventKind::READ, row.seq, entering < total ? entering : -1});
    }
    return true;
}

// Steps count up to the first that raises an event; what was run beyond it is forgotten with the epoch.
bool Scheduler::commit_steps(const Row& row, Sequence& sequence, int32_t lane_id, const int32_t* ids,
                             const float* logprobs, std::vector<Event>& events) {
    Lane& lane = sequence.lanes[lane_index(lane_id)];
    for (int32_t k = 0; k < row.logits; ++k) {
        if (ids[k] < 0) {
            sequence.raise(events, {EventKind::BROKEN, row.seq, lane_id});
            return false;
        }
        ++lane.stats.sampled;
        lane.cached = row.start + k + 1;
        lane.push(ids[k], logprobs[k]);
        if (sequence.written(spec(lane_id).max_len, is_end(sequence, lane_id, ids[k]), events)) {
            lane.stats.discarded += row.logits - k - 1;
            return true;
        }
    }
    return true;
}

// ---- decisions -----------------------------------------------------------------------------------------------------

void Scheduler::wake(Sequence& sequence, int32_t lane_id, Want want, int32_t at_most) {
    Lane& lane = sequence.lanes[lane_index(lane_id)];
    if (lane.ids.empty()) throw std::invalid_argument("a lane without ids has nothing to run");
    cancel_all(sequence);
    if (lane.launched > at_most) cancel(lane, lane_id);
    sequence.active = lane_id;
    lane.want = want;
    lane.ready = now_;
    if (lane.cached > at_most) set_cached(lane, lane_id, at_most);
    trim_shelf(lane, lane_id, at_most);
    sequence.hurry = 0;
}

void Scheduler::retarget(int32_t seq, int32_t lane_id, int32_t keep, const std::vector<int32_t>& ids, bool in_tag) {
    Lane& lane = lane_of(seq, lane_id);
    if (keep < lane.prompt_len || keep > lane.size())
        throw std::out_of_range("retarget: keep " + std::to_string(keep) + " of " + std::to_string(lane.size()) +
                                " ids, the prompt has " + std::to_string(lane.prompt_len));
    for (int32_t id : ids)
        if (id < 0 || id >= spec(lane_id).vocabulary->size())
            throw std::out_of_range("retarget: id " + std::to_string(id) + " is not in the vocabulary");
    if (lane.want != Want::FILL || keep < lane.size()) cancel(lane, lane_id);
    const auto added = static_cast<int32_t>(ids.size());
    int32_t same = 0;
    while (same < added && keep + same < lane.size() &&
           lane.ids[static_cast<size_t>(keep + same)] == ids[static_cast<size_t>(same)])
        ++same;
    lane.truncate(keep + same);
    for (int32_t p = keep; p < keep + same; ++p)
        if (in_tag || lane.tag.at(p) != 0) lane.tag.set(p, in_tag ? 1 : 0);
    for (int32_t k = same; k < added; ++k) lane.push(ids[static_cast<size_t>(k)], no_logprob, in_tag);
    if (lane.cached > keep + same) set_cached(lane, lane_id, keep + same);
    trim_shelf(lane, lane_id, keep + same);
    lane.stable = std::min(lane.stable, keep + same);
}

std::vector<Event> Scheduler::write(int32_t seq, int32_t lane_id, const WriteMode& mode) {
    Sequence& sequence = at(seq);
    Lane& lane = lane_of(seq, lane_id);
    std::vector<Event> events;
    sequence.active = lane_id;
    sequence.phase = mode.phase;
    sequence.stream = mode.stream;
    sequence.interval = mode.interval;
    sequence.mark = mode.mark;
    sequence.open_is_event = mode.open_is_event;
    sequence.holding = mode.phase == Phase::SCAN;
    if (mode.phase == Phase::DIRECT) lane.stable = lane.size();
    if (sequence.holding && sequence.scan_from(mode.scan_from < 0 ? lane.size() : mode.scan_from, 0, events)) {
        cancel_all(sequence);
    } else if (lane.size() >= spec(lane_id).max_len) {
        cancel_all(sequence);
        sequence.raise(events, {EventKind::FULL, seq, lane_id});
    } else {
        wake(sequence, lane_id, Want::WRITE, lane.size() - 1);
    }
    return events;
}

void Scheduler::read(int32_t seq, int32_t lane_id, int32_t from, uint32_t stream) {
    Sequence& sequence = at(seq);
    Lane& lane = lane_of(seq, lane_id);
    if (from < lane.prompt_len || from >= lane.size())
        throw std::out_of_range("read: nothing to read from position " + std::to_string(from));
    sequence.phase = Phase::READ;
    sequence.stream = stream;
    sequence.holding = false;
    lane.read_from = from;
    sequence.draws.assign(static_cast<size_t>(lane.size() - from), -1);
    sequence.draw_logprobs.assign(sequence.draws.size(), no_logprob);
    wake(sequence, lane_id, Want::READ, from);
}

std::vector<Event> Scheduler::confirm(int32_t seq, int32_t lane_id, int32_t keep, int32_t draw, int32_t steps,
                                      uint32_t stream) {
    Sequence& sequence = at(seq);
    Lane& lane = lane_of(seq, lane_id);
    std::vector<Event> events;
    retarget(seq, lane_id, keep, {}, false);
    sequence.active = lane_id;
    sequence.stream = stream;
    sequence.holding = false;
    sequence.begin_confirm(keep, steps);
    if (draw >= 0) {
        lane.push(sequence.draws.at(static_cast<size_t>(draw)), sequence.draw_logprobs[static_cast<size_t>(draw)]);
        if (sequence.written(spec(lane_id).max_len, is_end(sequence, lane_id, lane.ids.back()), events)) {
            cancel_all(sequence);
            return events;
        }
    }
    wake(sequence, lane_id, Want::WRITE, lane.size() - 1);
    return events;
}

std::vector<Event> Scheduler::accept(int32_t seq, int32_t k, bool ends) {
    std::vector<Event> events;
    if (k < 0 || k > static_cast<int32_t>(at(seq).provisional.size()))
        throw std::out_of_range("accept: " + std::to_string(k) + " of " + std::to_string(at(seq).provisional.size()));
    at(seq).accept(k, ends, events);
    return events;
}

// The caller is about to hand the pen on, so a mark does not count here.
std::vector<Event> Scheduler::emit(int32_t seq, int32_t author, const std::vector<int32_t>& ids) {
    std::vector<Event> events;
    at(seq).mark = -1;
    for (int32_t id : ids)
        if (at(seq).emit(author, id, no_logprob, -1, events)) break;
    return events;
}

void Scheduler::drop_provisional(int32_t seq) {
    Sequence& sequence = at(seq);
    for (const ContentToken& token : sequence.provisional)
        ++sequence.lanes[static_cast<size_t>(token.author)].stats.discarded;
    sequence.provisional.clear();
    sequence.ending.id = -1;
}

// The next draw at the lane's end is made without the tokens that would open a tag, under a key of its own.
void Scheduler::refuse(int32_t seq, int32_t lane_id) {
    Lane& lane = lane_of(seq, lane_id);
    at(seq).tag_log.pop_back(); // the opening that write() or commit() reported
    lane.attempt = lane.attempt_at == lane.size() ? lane.attempt + 1 : 1;
    lane.attempt_at = lane.size();
}

void Scheduler::log_tag(int32_t seq, int32_t pattern) {
    at(seq).tag_log.emplace_back(static_cast<int32_t>(at(seq).bytes.size()), pattern);
}

// ---- invariants ----------------------------------------------------------------------------------------------------

void Scheduler::check_lane(const Sequence& sequence, int32_t lane_id, std::vector<int32_t>& owners) {
    const Lane& lane = sequence.lanes[lane_index(lane_id)];
    const int32_t size = pool(lane_id).page_size();
    const auto fail = [&](const char* what) {
        throw std::logic_error("sequence " + std::to_string(sequence.handle) + ", lane " + std::to_string(lane_id) +
                               ": " + what);
    };
    const auto have = static_cast<int32_t>(lane.pages.size());
    if (lane.cached > lane.launched) fail("cached beyond launched");
    if (lane.cached > lane.size()) fail("cached beyond its ids");
    if (lane.inflight == 0 && lane.cached != lane.launched) fail("launched without a flight");
    if (lane.launched > have * size) fail("launched positions without pages");
    if (lane.digests.size() > lane.pages.size()) fail("more digests than pages");
    if (lane.logprobs.size() > lane.ids.size() || lane.tag.size() > lane.ids.size()) fail("columns beyond its ids");
    if (lane.stable > lane.size()) fail("stable beyond its ids");
    if (!sequence.resident && have != 0) fail("pages of a sequence that is not resident");
    if (lane.shelved > lane.size()) fail("shelved beyond its ids");
    if (lane.shelved > 0 && lane.cached > 0) fail("in pages and on the shelf");
    if (static_cast<int32_t>(lane.shelf.size()) != pages_for(lane.shelved, size))
        fail("shelf pages for other positions");
    for (int32_t p = lane.cached / size; p < have; ++p)
        if (p * size < lane.launched && lane.cached < lane.launched && p > lane.cached / size &&
            pool(lane_id).immutable(lane.pages[static_cast<size_t>(p)]))
            fail("a page that is written is immutable");
    for (int32_t page : lane.pages) ++owners[static_cast<size_t>(pool(lane_id).index_of(page))];
}

void Scheduler::check_invariants() {
    int32_t residents = 0;
    for (const Sequence* sequence : order_) residents += sequence->resident ? 1 : 0;
    if (residents != residents_) throw std::logic_error("resident count is off");
    for (size_t i = 0; i < specs_.size(); ++i) {
        const auto lane_id = static_cast<int32_t>(i);
        std::vector<int32_t> owners(static_cast<size_t>(pool(lane_id).num_pages()), 0);
        for (const Sequence* sequence : order_) check_lane(*sequence, lane_id, owners);
        for (const Limbo& waiting : limbo_[i]) ++owners[static_cast<size_t>(pool(lane_id).index_of(waiting.page))];
        for (int32_t k = 0; k < pool(lane_id).num_pages(); ++k) {
            const int32_t page = pool(lane_id).page_of(k), lanes = owners[static_cast<size_t>(k)];
            if (lanes != pool(lane_id).owners(page))
                throw std::logic_error("pool " + std::to_string(i) + ", page " + std::to_string(page) + ": " +
                                       std::to_string(pool(lane_id).owners(page)) + " owners, " +
                                       std::to_string(lanes) + " lanes hold it");
        }
        if (flights_[i].empty() && !limbo_[i].empty()) throw std::logic_error("limbo outlived its flights");
        pool(lane_id).check_invariants();
    }
    if (arena_ != nullptr) arena_->check_invariants();
}

} // namespace splitdecode
