// The steps of the walk of fuzz_scheduler.cpp: a fake model reads and writes the caches through the pages a plan names,
// as in tests/oracles/lanes.py, and after every step ids, caches and shelves are held against ids alone.
//
//     launch   cache[slot] = mix(cache[slot of the position before], token)
//     draw     mix(cache[slot], stream) % words
#pragma once

#include "fuzz.hpp"
#include "scheduler.hpp"
#include "walk_memory.hpp"

#include <algorithm>
#include <deque>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

namespace splitdecode {

inline const std::vector<std::string> kWords = {"",   "a",  "b",  "(",  "<",   "/",    "x",   ">",   ".",      "<x",
                                                "x>", "(<", ">a", "</", ".</", "</x>", "<x>", ">.<", "a</x>b", ""};
constexpr int32_t kMaxLen = 22;
constexpr uint64_t kRoot = 1;

inline uint64_t mix(uint64_t state, uint64_t part) {
    state = (state ^ part) * 0xBF58476D1CE4E5B9ULL;
    return state ^ (state >> 29);
}

inline int32_t draw(uint64_t seen, uint32_t stream) {
    return static_cast<int32_t>(mix(seen, stream) % kWords.size());
}

inline std::vector<int32_t> encode(const std::string& residue) {
    std::vector<int32_t> ids;
    for (char byte : residue)
        ids.push_back(
            static_cast<int32_t>(std::find(kWords.begin(), kWords.end(), std::string(1, byte)) - kWords.begin()));
    return ids;
}

struct Buffers {
    explicit Buffers(int32_t tokens, int32_t rows, int32_t logits)
        : t(size(tokens)), p(t), s(t), cu(size(rows + 1)), kv(size(rows)), indptr(cu), pages(1024), seq(kv), steps(kv),
          out(size(6 * logits)),
          plan{t.data(),   p.data(),     s.data(),   cu.data(), kv.data(), indptr.data(), pages.data(),
               seq.data(), steps.data(), out.data(), tokens,    rows,      1024,          logits} {}
    static size_t size(int32_t n) { return static_cast<size_t>(n); }
    std::vector<int32_t> t, p, s, cu, kv, indptr, pages, seq, steps, out;
    PlanBuffers plan;
};

// What the walk remembers of a sequence: whose turn, under which stream, and the ids it was given itself.
struct Asked {
    int32_t lane = 0;
    uint32_t stream = 0;
    bool confirming = false;
    std::vector<std::vector<int32_t>> base;
    int32_t read_lane = -1, read_from = 0;
};

// How often the walks met what they are here for.
struct Met {
    int64_t extents = 0, put = 0, taken = 0, held = 0, ahead = 0;
};

class Steps {
  public:
    explicit Steps(uint64_t seed)
        : random_(seed), page_size_(1 << below(3)), vocabulary_(kWords, std::vector<uint8_t>(kWords.size()), encode),
          ends_(at(below(2))), memory_(random_, page_size_, kMaxLen),
          scheduler_({{&memory_.pool(0), &vocabulary_, kMaxLen, ends_, memory_.shelf(0)},
                      {&memory_.pool(1), &vocabulary_, kMaxLen, ends_, memory_.shelf(1)}},
                     {"<x>", "</x>"}, 1 + below(6), 1 + below(3)),
          buffers_(1 + below(16), 1 + below(6), 1 + below(6)), slow_(below(2)), last_(2), flights_(2) {
        if (memory_.arena() != nullptr) scheduler_.share(memory_.arena());
        scheduler_.pace(below(2) * below(5), 20.0);
        for (int32_t lane : {0, 1})
            if (below(3) != 0) scheduler_.fill(lane, below(3) * 4, between(1, 6));
    }

  protected:
    static size_t at(int32_t n) { return static_cast<size_t>(n); }
    int32_t below(int32_t n) { return static_cast<int32_t>(random_() % static_cast<uint64_t>(n)); }
    int32_t between(int32_t low, int32_t high) { return low + below(high - low + 1); }
    Lane& lane_of(int32_t seq, int32_t lane) { return scheduler_.at(seq).lanes[at(lane)]; }

    void launch(int32_t lane) {
        now_ += below(4);
        const PlanCounts counts = scheduler_.plan(lane, buffers_.plan, 1 + below(2) * below(4), now_);
        for (int32_t other : {1 - lane, lane}) transfer(other); // this lane's pages may have been the other one's
        const Buffers& b = buffers_;
        if (counts.rows == 0) {
            met_.held += scheduler_.pacer().active() && could_run(lane);
            return;
        }
        EXPECT(b.cu[at(counts.rows)] == counts.tokens && b.indptr[at(counts.rows)] == counts.pages);
        Flight flight;
        for (size_t r = 0; r < at(counts.rows); ++r) run_row(lane, r, flight);
        for (size_t n = 0; n < at(counts.logits); ++n) {
            const int32_t* row = b.out.data() + 6 * n;
            EXPECT(asked_.at(row[1]).lane == lane); // what runs ahead of need draws nothing
            EXPECT(static_cast<uint32_t>(row[3]) == stream_at(row[1], b.p[at(row[0])] + 1));
            flight.drawn.push_back(draw(memory_.read(lane, b.s[at(row[0])]), static_cast<uint32_t>(row[3])));
            if ((row[5] & FEEDS_DEVICE) != 0) last_[at(lane)][row[1]] = flight.drawn.back();
            for (int32_t k = 1; counts.steps > 1 && k < b.steps[n]; ++k) run_on(lane, n, k, flight.drawn);
        }
        flights_[at(lane)].push_back(std::move(flight));
    }

    std::vector<Event> commit(int32_t lane) {
        const std::vector<int32_t> drawn = flights_[at(lane)].front().drawn;
        flights_[at(lane)].pop_front();
        const std::vector<float> logprobs(drawn.size(), -1.0F);
        now_ += below(4);
        return scheduler_.commit(lane, drawn.data(), logprobs.data(), static_cast<int32_t>(drawn.size()),
                                 lane == slow_ ? 10.0 : 1.0, now_);
    }

    // The newest step failed; whoever was in it is gone already.
    void discard(int32_t lane) {
        flights_[at(lane)].pop_back();
        scheduler_.discard_flight(lane);
    }

    void check() {
        scheduler_.check_invariants();
        for (int32_t lane : {0, 1})
            for (const Flight& flight : flights_[at(lane)])
                for (const auto& [whose, page] : flight.pages) EXPECT(memory_.pool(lane).owners(page) > 0);
        for (const auto& [seq, asked] : asked_)
            for (int32_t lane : {0, 1}) check_lane(scheduler_.at(seq), asked, lane);
    }

  private:
    // A step in the air: what it drew, and the pages it may touch until it has landed, by whose they were.
    struct Flight {
        std::vector<int32_t> drawn;
        std::vector<std::pair<int64_t, int32_t>> pages; // Sequence::arrival, page
    };

    uint32_t stream_at(int32_t seq, int32_t sampled) {
        const Asked& asked = asked_.at(seq);
        if (!asked.confirming) return asked.stream;
        return asked.stream | static_cast<uint32_t>(sampled - scheduler_.at(seq).confirm_base) << 8;
    }
    int32_t slot(int32_t page, int32_t position) const { return page * page_size_ + position % page_size_; }

    void transfer(int32_t lane) {
        const std::vector<Transfer> moves = scheduler_.take_transfers(lane);
        for (const Transfer& move : moves) {
            EXPECT(move.out || !in_the_air(lane, move.page, -1));
            ++(move.out ? met_.put : met_.taken);
        }
        memory_.transfer(lane, moves);
    }

    // Whether a flight of anybody but that one may touch the page.
    bool in_the_air(int32_t lane, int32_t page, int64_t arrival) {
        for (const Flight& flight : flights_[at(lane)])
            for (const auto& [whose, touched] : flight.pages)
                if (touched == page && whose != arrival) return true;
        return false;
    }

    bool could_run(int32_t lane) {
        if (memory_.pool(lane).available() == 0) return false;
        return std::any_of(asked_.begin(), asked_.end(), [&](const auto& item) {
            const Sequence& sequence = scheduler_.at(item.first);
            const Lane& own = sequence.lanes[at(lane)];
            return sequence.resident && sequence.active == lane && sequence.phase != Phase::FROZEN &&
                   own.inflight == 0 && own.launched < own.size();
        });
    }

    void write(int32_t lane, int32_t page, int32_t position, const Sequence& sequence, uint64_t value) {
        EXPECT(!memory_.pool(lane).immutable(page));
        EXPECT(!in_the_air(lane, page, sequence.arrival));
        memory_.write(lane, slot(page, position), value);
    }

    // Step k of a row that decodes: its last sample goes in.
    void run_on(int32_t lane, size_t r, int32_t k, std::vector<int32_t>& drawn) {
        const Buffers& b = buffers_;
        const int32_t seq = b.seq[r], p = b.p[at(b.cu[r])] + k;
        const int32_t* pages = b.pages.data() + b.indptr[r];
        const uint64_t before = memory_.read(lane, slot(pages[(p - 1) / page_size_], p - 1));
        const uint64_t seen = mix(before, static_cast<uint64_t>(drawn.back()));
        write(lane, pages[p / page_size_], p, scheduler_.at(seq), seen);
        drawn.push_back(draw(seen, stream_at(seq, p + 1)));
        last_[at(lane)][seq] = drawn.back();
    }

    void run_row(int32_t lane, size_t r, Flight& flight) {
        const Buffers& b = buffers_;
        const int32_t* pages = b.pages.data() + b.indptr[r];
        const int32_t seq = b.seq[r], start = b.p[at(b.cu[r])];
        const Sequence& sequence = scheduler_.at(seq);
        if (asked_.at(seq).lane != lane) run_ahead(sequence, lane, b.kv[r]);
        uint64_t seen = kRoot;
        for (int32_t p = 0; p < start; ++p) { // what the host does not know yet was drawn from the slot before
            const auto& ids = lane_of(seq, lane).ids;
            seen = mix(seen, static_cast<uint64_t>(at(p) < ids.size() ? ids[at(p)] : draw(seen, stream_at(seq, p))));
            EXPECT(memory_.read(lane, slot(pages[p / page_size_], p)) == seen);
        }
        for (int32_t t = b.cu[r]; t < b.cu[r + 1]; ++t) {
            const int32_t p = b.p[at(t)], token = b.t[at(t)];
            EXPECT(p == start + t - b.cu[r] && b.s[at(t)] == slot(pages[p / page_size_], p));
            EXPECT(token >= 0 || token == -1 - seq);
            seen = mix(seen, static_cast<uint64_t>(token >= 0 ? token : last_[at(lane)].at(seq)));
            write(lane, pages[p / page_size_], p, sequence, seen);
        }
        EXPECT(b.kv[r] == start + b.cu[r + 1] - b.cu[r]);
        for (int32_t n = b.indptr[r]; n < b.indptr[r + 1]; ++n)
            flight.pages.emplace_back(sequence.arrival, b.pages[at(n)]);
    }

    // Behind the last token a draw would be wanted, and what is proposed or read is no content yet.
    void run_ahead(const Sequence& sequence, int32_t lane, int32_t end) {
        const Lane& own = sequence.lanes[at(lane)];
        EXPECT(sequence.mirror == lane);
        EXPECT(end < own.size() || at(own.projected) < sequence.content.size());
        EXPECT(sequence.phase == Phase::SCAN || sequence.phase == Phase::DIRECT);
        ++met_.ahead;
    }

    // Ids are those it was given, then those it drew or, running ahead, the newest of the content it holds.
    void check_lane(const Sequence& sequence, const Asked& asked, int32_t lane_id) {
        const Lane& lane = sequence.lanes[at(lane_id)];
        const auto& base = asked.base[at(lane_id)];
        const auto size = static_cast<int32_t>(lane.ids.size()), known = static_cast<int32_t>(base.size());
        EXPECT(size >= known && std::equal(base.begin(), base.end(), lane.ids.begin()));
        EXPECT(size == known || asked.lane == lane_id || sequence.mirror == lane_id);
        EXPECT(sequence.resident || lane.shelf.empty());
        if (sequence.active == lane_id && sequence.phase != Phase::FROZEN && lane.inflight == 0)
            EXPECT(std::max(lane.launched, lane.shelved) < size); // else it would wait for ever
        uint64_t seen = kRoot;
        for (int32_t p = 0; p < size; ++p) {
            const int32_t id = lane.ids[at(p)];
            if (p >= known && asked.lane == lane_id) EXPECT(id == draw(seen, stream_at(sequence.handle, p)));
            if (p >= known && asked.lane != lane_id)
                EXPECT(id == sequence.content.at(at(lane.projected - size + p)).id);
            seen = mix(seen, static_cast<uint64_t>(id));
            const size_t page = at(p / page_size_);
            if (p < lane.cached) EXPECT(memory_.read(lane_id, slot(lane.pages.at(page), p)) == seen);
            if (p < lane.shelved) EXPECT(memory_.read_shelf(lane_id, slot(lane.shelf.at(page), p)) == seen);
        }
    }

    std::mt19937_64 random_;
    int32_t page_size_;
    Vocabulary vocabulary_;
    std::vector<int32_t> ends_; // 0 ends a text, or nothing does

  protected:
    WalkMemory memory_;
    Scheduler scheduler_;

  private:
    Buffers buffers_;
    int32_t slow_; // the lane whose steps take longer
    double now_ = 0.0;
    std::vector<std::map<int32_t, int32_t>> last_;

  protected:
    std::vector<std::deque<Flight>> flights_;
    std::map<int32_t, Asked> asked_;
    inline static Met met_;
};

} // namespace splitdecode
