// A random walk over Scheduler (F1) without Python: writes, reads, tries, retargets, aborts and late landings over two
// lanes. They may share a memory, keep idle caches on shelves, wait for company and run content ahead of need. What a
// step does and what must hold after it is in walk_steps.hpp.
#include "fuzz.hpp"
#include "walk_steps.hpp"

#include <algorithm>
#include <iterator>
#include <string>
#include <vector>

using namespace splitdecode;

namespace {

class Walk : public Steps {
  public:
    using Steps::Steps;

    void run(int32_t steps) {
        for (int32_t step = 0; step < steps; ++step) {
            const int32_t choice = below(100), lane = below(2);
            if (choice < 10 && asked_.size() < 6) {
                add();
            } else if (choice < 45) {
                launch(lane);
            } else if (choice < 85) {
                if (!flights_[at(lane)].empty()) land(lane);
            } else if (asked_.empty()) {
                continue;
            } else if (choice < 87) {
                scheduler_.hurry(pick());
            } else {
                decide(pick());
            }
            check();
        }
        if (below(2) == 0) run_dry();
        while (!asked_.empty()) finish(asked_.begin()->first);
        for (int32_t lane : {0, 1}) {
            while (!flights_[at(lane)].empty()) {
                below(3) == 0 ? discard(lane) : land(lane);
                check();
            }
            EXPECT(memory_.pool(lane).in_use() == 0);
            EXPECT(memory_.shelf(lane) == nullptr || memory_.shelf(lane)->in_use() == 0);
        }
        scheduler_.check_invariants();
        if (memory_.arena() != nullptr) met_.extents += memory_.arena()->moved();
    }

    static std::string met() {
        const auto part = [](const char* what, int64_t count) { return what + std::to_string(count); };
        return part("extents moved ", met_.extents) + part(", pages put ", met_.put) +
               part(", pages taken ", met_.taken) + part(", plans held ", met_.held) +
               part(", rows ahead ", met_.ahead);
    }

  private:
    // Both lanes in turn, as an engine does it: nobody comes any more, and every sequence ends.
    void run_dry() {
        for (int32_t tick = 0; tick < 5000 && !asked_.empty(); ++tick) {
            for (int32_t lane : {0, 1}) launch(lane);
            for (int32_t lane : {0, 1})
                if (!flights_[at(lane)].empty() && below(4) != 0) land(lane);
            check();
        }
        EXPECT(asked_.empty());
    }

    int32_t pick() { return std::next(asked_.begin(), below(static_cast<int32_t>(asked_.size())))->first; }
    std::vector<int32_t> some_ids(int32_t least, int32_t most) {
        std::vector<int32_t> ids(at(between(least, std::max(least, most))));
        for (int32_t& id : ids) id = below(static_cast<int32_t>(kWords.size()));
        return ids;
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
        scheduler_.mirror(seq, below(3) - 1);
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

    // What the other lane wrote is owed at once, as it is when the pen changes hands.
    void catch_up(int32_t seq, int32_t lane_id) {
        Sequence& sequence = scheduler_.at(seq);
        Lane& lane = lane_of(seq, lane_id);
        std::vector<int32_t> ids;
        for (size_t n = at(lane.projected); n < sequence.content.size(); ++n) ids.push_back(sequence.content[n].id);
        if (lane.ids.size() + ids.size() > kMaxLen) return;
        scheduler_.retarget(seq, lane_id, lane.size(), ids, false);
        lane.projected = static_cast<int32_t>(sequence.content.size());
    }

    void write(int32_t seq) {
        static constexpr Phase phases[] = {Phase::DIRECT, Phase::SCAN, Phase::SCAN, Phase::PROVISIONAL};
        WriteMode mode;
        mode.phase = phases[below(4)];
        mode.interval = between(1, 4);
        mode.open_is_event = below(4) != 0;
        const int32_t lane = below(2);
        mode.stream = static_cast<uint32_t>(lane);
        if (scheduler_.at(seq).mirror == lane && below(2) == 0) catch_up(seq, lane);
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
            return below(3) == 0 ? finish(seq) : write(seq);
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

    void land(int32_t lane) { apply(commit(lane)); }
};

} // namespace

void fuzz_scheduler(uint64_t seed) {
    Walk(seed).run(600);
}

std::string met_by_scheduler() {
    return Walk::met();
}
