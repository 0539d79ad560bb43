// F1. Who steps next on each model, on which pages: plan() packs flat int32 arrays, commit() returns only events.
//
//     add -> WAITING --admit--> RESIDENT --finish--> gone
//               ^                  |
//               +---- preempt -----+   all pages of all lanes dropped, everything owed again
//
// A flight is one launched step of one model; flights land in the order they were launched. A row of a flight counts
// only while its lane still has the epoch it was launched under; every change of course takes a new epoch.
// Pages that a flight may still touch wait in limbo until it has landed.
//
// First come, first served; a lane takes pages in arrival order, and when there are none the youngest resident gives up
// all of its pages in every pool. So nobody holds pages of one pool while waiting for another's.
#pragma once

#include "arena.hpp"
#include "pacer.hpp"
#include "sequence.hpp"

#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace splitdecode {

// Caller-owned output of one plan(); sizes are capacities. Layout: triton_kernels/README.md.
struct PlanBuffers {
    int32_t *tokens, *positions, *slots;          // [T] token -1 - seq: the id last sampled for that sequence
    int32_t *cu_q, *kv_len, *page_indptr, *pages; // [R + 1], [R], [R + 1], [P]
    int32_t* row_seq;                             // [R]
    int32_t* row_steps;                           // [R] decode steps the row takes, at most PlanCounts::steps
    int32_t* logits;                              // [N, 6]: token index, seq, position, stream, attempt, flags
    int32_t max_tokens, max_rows, max_pages, max_logits;
};

struct PlanCounts {
    int32_t tokens = 0, rows = 0, pages = 0, logits = 0, steps = 1;
};

enum RowFlag : int32_t { SUPPRESS_END = 1, FEEDS_DEVICE = 2 };

struct LaneSpec {
    PagePool* pool;
    const Vocabulary* vocabulary;
    int32_t max_len;
    std::vector<int32_t> eos_ids;
    PagePool* shelf = nullptr; // where the caches of idle lanes may be kept; its pages hold as many positions
};

// A page to be copied before the step that was just planned; in the order given.
struct Transfer {
    int32_t page, shelf_page;
    bool out; // to the shelf, or back
};

struct WriteMode {
    Phase phase = Phase::DIRECT;
    uint32_t stream = 0;
    int32_t interval = 0;
    int32_t mark = -1;
    int32_t scan_from = -1;
    bool open_is_event = true;
};

class Scheduler {
  public:
    // tags: {opening, closing, others that are events}. depth: steps a lane may have in flight.
    Scheduler(std::vector<LaneSpec> specs, std::vector<std::string> tags, int32_t max_seqs, int32_t depth);
    Scheduler(const Scheduler&) = delete;
    Scheduler& operator=(const Scheduler&) = delete;

    int32_t add(const std::vector<std::vector<int32_t>>& prompts, Limits limits, const std::string& salt,
                int32_t leader);
    void finish(int32_t seq);
    // steps: where every row is one decode, a flight may take that many steps in a row. The arrays then describe the
    // first; pages cover all of them. now: milliseconds that never run backwards. No rows: nothing is pending, or the
    // lane is held back (pacer.hpp).
    PlanCounts plan(int32_t lane, const PlanBuffers& out, int32_t steps = 1, double now = 0.0);
    // Lands the oldest flight of a lane. ids/logprobs: one per logits row of that flight, a row's steps side by side
    // (-1: NaN); ms: its duration.
    std::vector<Event> commit(int32_t lane, const int32_t* ids, const float* logprobs, int32_t count, double ms,
                              double now = 0.0);
    // Lands the newest flight without looking at it: the step failed.
    void discard_flight(int32_t lane);
    int32_t in_flight(int32_t lane) const { return static_cast<int32_t>(flights_.at(lane_index(lane)).size()); }
    int32_t unfinished() const { return static_cast<int32_t>(order_.size()); }

    // What Python decided (each cancels what the lane has in flight):
    void retarget(int32_t seq, int32_t lane, int32_t keep, const std::vector<int32_t>& ids, bool in_tag);
    std::vector<Event> write(int32_t seq, int32_t lane, const WriteMode& mode);
    void read(int32_t seq, int32_t lane, int32_t from, uint32_t stream);
    std::vector<Event> confirm(int32_t seq, int32_t lane, int32_t keep, int32_t draw, int32_t steps, uint32_t stream);
    std::vector<Event> accept(int32_t seq, int32_t k, bool ends);
    std::vector<Event> emit(int32_t seq, int32_t author, const std::vector<int32_t>& ids);
    void drop_provisional(int32_t seq);
    void refuse(int32_t seq, int32_t lane);
    void log_tag(int32_t seq, int32_t pattern);

    Sequence& at(int32_t seq);
    const LaneSpec& spec(int32_t lane) const { return specs_.at(lane_index(lane)); }
    int32_t room(int32_t seq, int32_t lane) { return spec(lane).max_len - at(seq).lanes.at(lane_index(lane)).size(); }
    bool enters(int32_t lane, int32_t pattern, int32_t id) const;
    int32_t preemptions() const { return preemptions_; }
    // Hand-off batching; off until it is set.
    void pace(double patience, double max_wait_ms) { pacer_.set(patience, max_wait_ms); }
    const Pacer& pacer() const { return pacer_; }
    // One memory for all pools; it outlives the scheduler.
    void share(Arena* arena) { arena_ = arena; }
    // A step of the lane costs as much for `free_tokens` as for one. With a mirror (see below) what a lane will owe
    // rides along in that room; `chunk` of it or more is worth a step of its own.
    void fill(int32_t lane, int32_t free_tokens, int32_t chunk);
    // The lane runs the content ahead of need, while another lane writes; -1: no lane does. Ids must mean the same to
    // both.
    void mirror(int32_t seq, int32_t lane) { at(seq).mirror = static_cast<int8_t>(lane); }
    // The mirrored lane is likely to be asked soon: what there is now is worth a step of its own, what comes is not.
    void hurry(int32_t seq);
    // Copies the caller owes, oldest first; none remain.
    std::vector<Transfer> take_transfers(int32_t lane) { return std::exchange(transfers_.at(lane_index(lane)), {}); }
    int64_t idle_evictions() const { return idle_evictions_; }
    int64_t evicted_tokens() const { return evicted_tokens_; }
    void check_invariants();

  private:
    struct Row {
        int32_t seq, start, count, logits;
        bool steps; // `count` decode steps of one token each, not one step of `count` tokens
        uint32_t epoch;
    };
    struct Flight {
        int64_t number;
        int32_t tokens;
        std::vector<Row> rows;
    };
    struct Limbo {
        int64_t until;
        int32_t page;
    };
    struct Candidate {
        Sequence* sequence;
        int32_t count; // pending tokens it could run
    };

    static int32_t pages_for(int32_t tokens, int32_t page_size) { return (tokens + page_size - 1) / page_size; }
    // The page of a position; mostly the last one of `pages`, which spares a division.
    static int32_t page_of(int32_t position, int32_t page_size, const std::vector<int32_t>& pages) {
        const int32_t last = static_cast<int32_t>(pages.size()) - 1, within = position - last * page_size;
        return within >= 0 && within < page_size ? last : position / page_size;
    }
    static size_t lane_index(int32_t lane) { return static_cast<size_t>(lane); }
    Lane& lane_of(int32_t seq, int32_t lane) { return at(seq).lanes.at(lane_index(lane)); }
    PagePool& pool(int32_t lane) { return *specs_[lane_index(lane)].pool; }
    void admit();
    int32_t pages_owed(const Sequence& sequence) const;
    void adopt_prefix(Sequence& sequence, int32_t lane);
    void trim_shelf(Lane& lane, int32_t lane_id, int32_t keep);
    void put_on_shelf(Lane& lane, int32_t lane_id);
    bool take_from_shelf(Sequence& sequence, int32_t lane);
    bool evict_idle(int32_t lane, const Sequence& keep, int32_t keep_lane);
    int32_t find_page(Sequence& sequence, int32_t lane);
    bool reserve(Sequence& sequence, int32_t lane, int32_t need);
    bool starving() const;
    bool waits_for_flights(int32_t lane) const;
    bool runs_ahead(int32_t lane) const;
    int32_t ahead_of_need(const Sequence& sequence, int32_t lane) const;
    void project(Sequence& sequence, int32_t lane, int32_t most);
    void pack_fills(int32_t lane, const PlanBuffers& out, PlanCounts& counts, Flight& flight);
    void preempt(Sequence& sequence);
    void drop_pages(Lane& lane, int32_t lane_id, int32_t keep_pages);
    void set_cached(Lane& lane, int32_t lane_id, int32_t cached);
    void cancel(Lane& lane, int32_t lane_id);
    void cancel_all(Sequence& sequence);
    void wake(Sequence& sequence, int32_t lane, Want want, int32_t at_most);
    void publish(Lane& lane, int32_t lane_id);
    void land_limbo(int32_t lane);
    bool exact(const Sequence& sequence) const;
    int32_t launchable(const Sequence& sequence, const Lane& lane) const;
    Demand survey(int32_t lane);
    int32_t decode_steps(const Sequence& sequence, int32_t lane, int32_t most);
    void pack(Sequence& sequence, int32_t lane, int32_t count, int32_t steps, const PlanBuffers& out,
              PlanCounts& counts, Flight& flight);
    void count_row(const Sequence& sequence, Lane& lane, int32_t count, int32_t steps);
    bool commit_row(const Row& row, Sequence& sequence, int32_t lane, const int32_t* ids, const float* logprobs,
                    std::vector<Event>& events);
    bool commit_steps(const Row& row, Sequence& sequence, int32_t lane, const int32_t* ids, const float* logprobs,
                      std::vector<Event>& events);
    bool is_end(const Sequence& sequence, int32_t lane, int32_t id) const;
    void check_lane(const Sequence& sequence, int32_t lane, std::vector<int32_t>& owners);

    std::vector<LaneSpec> specs_;
    ByteMatcher tags_, closer_;
    std::vector<std::vector<uint8_t>> enters_; // [lane][id]: Words::enters
    std::vector<Words> words_;                 // by lane
    int32_t max_seqs_, depth_;
    std::vector<std::unique_ptr<Sequence>> sequences_; // by handle; null: free
    std::vector<int32_t> free_handles_;
    std::vector<Sequence*> order_;      // by arrival
    std::vector<Candidate> candidates_; // of the plan being made
    bool only_decodes_ = true;          // all that is pending on its lane is the next token of lanes that write
    int32_t urgent_ = 0;                // tokens its short rows owe
    std::vector<Candidate> fills_;      // lanes that could run ahead of need
    Pacer pacer_;
    Arena* arena_ = nullptr;
    std::vector<int32_t> free_tokens_, fill_chunk_; // by lane
    std::vector<std::vector<Transfer>> transfers_;
    std::vector<bool> starved_; // by lane: somebody lacked pages in its last plan
    int64_t idle_evictions_ = 0, evicted_tokens_ = 0;
    double now_ = 0.0;
    std::vector<std::deque<Flight>> flights_;
    std::vector<std::deque<Limbo>> limbo_;
    std::vector<int64_t> launched_flights_;
    int64_t arrivals_ = 0;
    uint32_t epochs_ = 0;
    int32_t residents_ = 0, preemptions_ = 0;
};

} // namespace splitdecode
