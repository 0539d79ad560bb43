// A random walk over Scheduler (F1) without Python: writes, reads, tries, retargets, aborts and late landings over two
// lanes. The model is fake and its KV-cache a shadow, as in tests/oracles/lanes.py:
//
//     launch   cache[slot] = mix(cache[slot of the position before], token)
//     draw     mix(cache[slot], stream) % words       after every step: ids and cached slots against ids alone
#include "fuzz.hpp"
#include "scheduler.hpp"

#include <algorithm>
#include <deque>
#include <map>
#include <random>
#include <string>
#include <vector>

using namespace splitdecode;

namespace {

const std::vector<std::string> kWords = {"",   "a",  "b",  "(",  "<",   "/",    "x",   ">",   ".",      "<x",
                                         "x>", "(<", ">a", "</", ".</", "</x>", "<x>", ">.<", "a</x>b", ""};
constexpr int32_t kMaxLen = 22;
constexpr uint64_t kRoot = 1;

uint64_t mix(uint64_t state, uint64_t part) {
    state = (state ^ part) * 0xBF58476D1CE4E5B9ULL;
    return state ^ (state >> 29);
}

std::vector<int32_t> encode(const std::string& residue) {
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

class Walk {
  public:
    explicit Walk(uint64_t seed)
        : random_(seed), page_size_(1 << below(3)), depth_(1 + below(3)), vocabulary_(kWords, flags(), encode),
          pools_{make_pool(), make_pool()},
          scheduler_({{&pools_[0], &vocabulary_, kMaxLen, {0}}, {&pools_[1], &vocabulary_, kMaxLen, {0}}},
                     {"<x>", "</x>"}, 1 + below(4), depth_),
          buffers_(1 + below(12), 1 + below(4), 1 + below(6)), cache_(2), last_(2), flights_(2) {}

    void run(int32_t steps) {
        for (int32_t step = 0; step < steps; ++step) {
            const int32_t choice = below(100), lane = below(2);
            if (choice < 10 && asked_.size() < 5) {
                add();
            } else if (choice < 45) {
                launch(lane);
            } else if (choice < 85) {
                if (!flights_[at(lane)].empty()) land(lane);
            } else if (!asked_.empty()) {
                decide(pick());
            }
            check();
        }
        while (!asked_.empty()) finish(asked_.begin()->first);
        for (int32_t lane : {0, 1}) {
            while (!flights_[at(lane)].empty()) land(lane);
            EXPECT(pools_[at(lane)].in_use() == 0);
        }
        scheduler_.check_invariants();
    }

  private:
    static size_t at(int32_t n) { return static_cast<size_t>(n); }
    int32_t below(int32_t n) { return static_cast<int32_t>(random_() % static_cast<uint64_t>(n)); }
    int32_t between(int32_t low, int32_t high) { return low + below(high - low + 1); }
    static std::vector<uint8_t> flags() { return std::vector<uint8_t>(kWords.size(), 0); }
    PagePool make_pool() { return {(kMaxLen + page_size_ - 1) / page_size_ + below(5), page_size_, below(3) != 0}; }
    int32_t pick() { return std::next(asked_.begin(), below(static_cast<int32_t>(asked_.size())))->first; }
    Lane& lane_of(int32_t seq, int32_t lane) { return scheduler_.at(seq).lanes[at(lane)]; }
    std::vector<int32_t> some_ids(int32_t least, int32_t most) {
        std::vector<int32_t> ids(at(between(least, std::max(least, most))));
        for (int32_t& id : ids) id = below(static_cast<int32_t>(kWords.size()));
        return ids;
    }

    static int32_t draw(uint64_t seen, uint32_t stream) {
        return static_cast<int32_t>(mix(seen, stream) % kWords.size());
    }
    uint32_t stream_at(int32_t seq, int32_t sampled) {
        const Asked& asked = asked_.at(seq);
        if (!asked.confirming) return asked.stream;
        return asked.stream | static_cast<uint32_t>(sampled - scheduler_.at(seq).confirm_base) << 8;
    }

    // ---- decisions

    void add() {
        static const std::vector<int32_t> text = {1, 2, 3, 4, 5, 1, 2, 8, 8};
        std::vector<std::vector<int32_t>> prompts;
        for (int32_t lane = 0; lane < 2; ++lane) prompts.emplace_back(text.begin(), text.begin() + between(1, 9));
        Limits limits;
        limits.max_tokens = below(3) == 0 ? between(1, 9) : limits.max_tokens;
        limits.min_tokens = below(4) == 0 ? 3 : 0;
        limits.exact = below(5) == 0;
        if (below(3) == 0) limits.stops = {"ab", "((("};
        const int32_t leader = asked_.empty() || below(2) == 0 ? -1 : pick();
        const int32_t seq = scheduler_.add(prompts, limits, "fuzz", leader);
        asked_[seq].base = prompts;
        write(seq);
    }

    void finish(int32_t seq) {
        std::vector<Event> ignored;
        if (below(2) == 0) scheduler_.at(seq).flush_held(ignored);
        scheduler_.finish(seq);
        asked_.erase(seq);
    }

    void note(int32_t seq, int32_t lane, uint32_t stream, bool confirming) {
        Asked& asked = asked_.at(seq);
        asked.lane = lane;
        asked.stream = stream;
        asked.confirming = confirming;
        for (int32_t i = 0; i < 2; ++i) asked.base[at(i)] = lane_of(seq, i).ids;
    }

    void write(int32_t seq) {
        static constexpr Phase phases[] = {Phase::DIRECT, Phase::SCAN, Phase::SCAN, Phase::PROVISIONAL};
        WriteMode mode;
        mode.phase = phases[below(4)];
        mode.interval = between(1, 4);
        mode.open_is_event = below(4) != 0;
        const int32_t lane = below(2);
        mode.stream = static_cast<uint32_t>(lane);
        if (below(3) == 0) mode.mark = static_cast<int32_t>(scheduler_.at(seq).content.size()) + 2;
        if (below(4) == 0) mode.scan_from = between(lane_of(seq, lane).prompt_len, lane_of(seq, lane).size());
        scheduler_.drop_provisional(seq);
        note(seq, lane, mode.stream, false);
        apply(scheduler_.write(seq, lane, mode));
    }

    void cut(int32_t seq) {
        const int32_t lane = below(2);
        const std::vector<int32_t> old = lane_of(seq, lane).ids;
        const int32_t keep = between(lane_of(seq, lane).prompt_len, static_cast<int32_t>(old.size()));
        std::vector<int32_t> ids = below(2) == 0 ? std::vector<int32_t>(old.begin() + keep, old.end()) : some_ids(0, 5);
        ids.resize(std::min(ids.size(), at(kMaxLen - keep)));
        scheduler_.drop_provisional(seq);
        scheduler_.retarget(seq, lane, keep, ids, below(2) == 0);
        write(seq);
    }

    void read(int32_t seq) {
        Asked& asked = asked_.at(seq);
        const int32_t lane = 1 - asked.lane, size = lane_of(seq, lane).size();
        if (size >= kMaxLen) return write(seq);
        const std::vector<int32_t> ids = some_ids(1, std::min(5, kMaxLen - size));
        scheduler_.retarget(seq, lane, size, ids, false);
        const int32_t end = lane_of(seq, lane).size();
        const int32_t from = std::max(lane_of(seq, lane).prompt_len, between(size - 1, end - 1));
        note(seq, lane, 2, false);
        scheduler_.read(seq, lane, from, 2);
        asked.read_lane = lane;
        asked.read_from = from;
    }

    void confirm(int32_t seq) {
        Asked& asked = asked_.at(seq);
        const std::vector<int32_t> draws = scheduler_.at(seq).draws;
        const int32_t lane = asked.read_lane;
        if (lane < 0 || std::count(draws.begin(), draws.end(), -1) > 0) return write(seq);
        int32_t k = below(static_cast<int32_t>(draws.size()) + 1) - 1;
        for (size_t i = 0; i < draws.size() && below(3) != 0; ++i)
            if (scheduler_.enters(lane, 1, draws[i])) k = static_cast<int32_t>(i);
        const int32_t keep = asked.read_from + 1 + std::max(k, 0);
        if (keep > lane_of(seq, lane).size() || keep >= kMaxLen) return write(seq);
        scheduler_.drop_provisional(seq);
        const std::vector<Event> events = scheduler_.confirm(seq, lane, keep, k, below(2) == 0 ? 0 : between(1, 4), 3);
        note(seq, lane, 3, true);
        apply(events);
    }

    void decide(int32_t seq) {
        switch (below(9)) {
        case 0:
            return finish(seq);
        case 1:
        case 2:
            return cut(seq);
        case 3:
        case 4:
            return read(seq);
        case 5:
        case 6:
            return confirm(seq);
        default:
            return write(seq);
        }
    }

    void apply(const std::vector<Event>& events) {
        for (const Event& event : events) {
            EXPECT(scheduler_.at(event.seq).phase == Phase::FROZEN);
            switch (event.kind) {
            case EventKind::END:
            case EventKind::STOP:
            case EventKind::LENGTH:
            case EventKind::FULL:
            case EventKind::BROKEN:
                finish(event.seq);
                break;
            case EventKind::DUE:
                due(event);
                break;
            case EventKind::READ:
                for (int32_t id : scheduler_.at(event.seq).draws) EXPECT(id >= 0);
                if (event.a >= 0) {
                    confirm(event.seq);
                    break;
                }
                [[fallthrough]];
            default:
                decide(event.seq);
            }
        }
    }

    void due(const Event& event) {
        Sequence& sequence = scheduler_.at(event.seq);
        const int32_t count = between(0, event.a);
        const auto before = sequence.content.size();
        const std::vector<Event> more = scheduler_.accept(event.seq, count, below(2) == 0);
        if (more.empty()) EXPECT(sequence.content.size() == before + at(count));
        if (more.empty()) return decide(event.seq);
        if (more[0].kind == EventKind::MARK) return write(event.seq);
        finish(event.seq);
    }

    // ---- steps

    void launch(int32_t lane) {
        const PlanCounts counts = scheduler_.plan(lane, buffers_.plan, 1 + below(2) * below(4));
        const Buffers& b = buffers_;
        if (counts.rows == 0) return;
        EXPECT(b.cu[at(counts.rows)] == counts.tokens && b.indptr[at(counts.rows)] == counts.pages);
        for (size_t r = 0; r < at(counts.rows); ++r) run_row(lane, r);
        std::vector<int32_t> drawn;
        for (size_t n = 0; n < at(counts.logits); ++n) {
            const int32_t* row = b.out.data() + 6 * n;
            EXPECT(static_cast<uint32_t>(row[3]) == stream_at(row[1], b.p[at(row[0])] + 1));
            drawn.push_back(draw(cache_[at(lane)].at(b.s[at(row[0])]), static_cast<uint32_t>(row[3])));
            if ((row[5] & FEEDS_DEVICE) != 0) last_[at(lane)][row[1]] = drawn.back();
            for (int32_t k = 1; counts.steps > 1 && k < b.steps[n]; ++k) run_on(lane, n, k, drawn);
        }
        flights_[at(lane)].push_back(std::move(drawn));
    }

    // Step k of a row that decodes: its last sample goes in.
    void run_on(int32_t lane, size_t r, int32_t k, std::vector<int32_t>& drawn) {
        const Buffers& b = buffers_;
        const int32_t* pages = b.pages.data() + b.indptr[r];
        const auto slot = [&](int32_t p) { return pages[p / page_size_] * page_size_ + p % page_size_; };
        const int32_t seq = b.seq[r], p = b.p[at(b.cu[r])] + k;
        EXPECT(!pools_[at(lane)].immutable(pages[p / page_size_]));
        auto& cache = cache_[at(lane)];
        cache[slot(p)] = mix(cache.at(slot(p - 1)), static_cast<uint64_t>(drawn.back()));
        drawn.push_back(draw(cache[slot(p)], stream_at(seq, p + 1)));
        last_[at(lane)][seq] = drawn.back();
    }

    void run_row(int32_t lane, size_t r) {
        const Buffers& b = buffers_;
        auto& cache = cache_[at(lane)];
        const int32_t* pages = b.pages.data() + b.indptr[r];
        const auto slot = [&](int32_t p) { return pages[p / page_size_] * page_size_ + p % page_size_; };
        const int32_t seq = b.seq[r], start = b.p[at(b.cu[r])];
        uint64_t seen = kRoot;
        for (int32_t p = 0; p < start; ++p) { // what the host does not know yet was drawn from the slot before
            const auto& ids = lane_of(seq, lane).ids;
            seen = mix(seen, static_cast<uint64_t>(at(p) < ids.size() ? ids[at(p)] : draw(seen, stream_at(seq, p))));
            EXPECT(cache.at(slot(p)) == seen);
        }
        for (int32_t t = b.cu[r]; t < b.cu[r + 1]; ++t) {
            const int32_t p = b.p[at(t)];
            EXPECT(p == start + t - b.cu[r] && b.s[at(t)] == slot(p));
            EXPECT(!pools_[at(lane)].immutable(pages[p / page_size_]));
            const int32_t token = b.t[at(t)];
            EXPECT(token >= 0 || token == -1 - seq);
            seen = mix(seen, static_cast<uint64_t>(token >= 0 ? token : last_[at(lane)].at(seq)));
            cache[slot(p)] = seen;
        }
        EXPECT(b.kv[r] == start + b.cu[r + 1] - b.cu[r]);
    }

    void land(int32_t lane) {
        const std::vector<int32_t> drawn = flights_[at(lane)].front();
        flights_[at(lane)].pop_front();
        const std::vector<float> logprobs(drawn.size(), -1.0F);
        apply(scheduler_.commit(lane, drawn.data(), logprobs.data(), static_cast<int32_t>(drawn.size()), 1.0));
    }

    void check() {
        scheduler_.check_invariants();
        for (const auto& [seq, asked] : asked_) {
            for (int32_t i = 0; i < 2; ++i) {
                const Lane& lane = lane_of(seq, i);
                const auto& base = asked.base[at(i)];
                EXPECT(lane.ids.size() >= base.size() && std::equal(base.begin(), base.end(), lane.ids.begin()));
                EXPECT(lane.ids.size() == base.size() || asked.lane == i);
                uint64_t seen = kRoot;
                for (size_t p = 0; p < lane.ids.size(); ++p) {
                    const auto position = static_cast<int32_t>(p);
                    if (p >= base.size()) EXPECT(lane.ids[p] == draw(seen, stream_at(seq, position)));
                    seen = mix(seen, static_cast<uint64_t>(lane.ids[p]));
                    if (position >= lane.cached) continue;
                    const int32_t page = lane.pages[at(position / page_size_)];
                    EXPECT(cache_[at(i)].at(page * page_size_ + position % page_size_) == seen);
                }
            }
        }
    }

    std::mt19937_64 random_;
    int32_t page_size_, depth_;
    Vocabulary vocabulary_;
    PagePool pools_[2];
    Scheduler scheduler_;
    Buffers buffers_;
    std::vector<std::map<int32_t, uint64_t>> cache_;
    std::vector<std::map<int32_t, int32_t>> last_;
    std::vector<std::deque<std::vector<int32_t>>> flights_;
    std::map<int32_t, Asked> asked_;
};

} // namespace

void fuzz_scheduler(uint64_t seed) {
    Walk(seed).run(600);
}
