// F1. One request as the per-token path sees it: a lane per model, the content written so far, what is held back.
//
//   lane ids   | prompt ........ | written or read ....................... |
//              0            prompt_len        cached      launched        ids.size()
//              |<------ in the cache ------------>|<- in flight ->|<- pending ->|
//
//   content    tokens both models wrote, tags left out: (id, author, origin, log-prob), and their bytes
//   held       the tail of the writing lane whose bytes may still become a tag: not content yet
//   provisional what one model wrote ahead of its reader: not content yet either
//
// Nothing here decides who writes: the caller sets a Phase and gets Events.
#pragma once

#include "page_pool.hpp"
#include "tag_automaton.hpp"

#include <array>
#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <vector>

namespace splitdecode {

enum class EventKind : int32_t {
    TAG,       // tag a completed (0 opens): b = its first token, c = its last, d = bytes of the last that belong to it
    COMPLETED, // a tried closing completed: same fields
    DIED,      // a tried closing can no longer complete
    DUE,       // a = provisional tokens waiting for their reader
    READ,      // the reader is through: a = index of the first draw that enters the closing tag, or -1
    END,       // a = the EOS or stop token
    STOP,      // a = which stop string
    LENGTH,    // max_tokens reached
    FULL,      // the context of lane a is full
    MARK,      // the content reached the caller's mark
    BROKEN,    // a = the lane whose logits were NaN
};

struct Event {
    EventKind kind;
    int32_t seq;
    int32_t a = -1, b = -1, c = -1, d = -1;
};

// What is asked of a lane. FILL: nothing yet; it runs what it will owe, where that is cheap.
enum class Want : int32_t { IDLE, WRITE, READ, FILL };
// What becomes of the tokens the active lane samples.
enum class Phase : int32_t { FROZEN, DIRECT, SCAN, PROVISIONAL, READ, CONFIRM };

constexpr size_t max_lanes = 2;
constexpr float no_logprob = std::numeric_limits<float>::quiet_NaN();

struct LaneStats {
    double ms = 0.0, write_ms = 0.0; // all of it, and what went into steps that drew one token of an answer
    int32_t writes = 0;              // such steps
    int32_t forwards = 0, tokens = 0, sampled = 0;
    int32_t discarded = 0, prompt_tokens = 0, catchup_tokens = 0, catchup_forwards = 0, read_tokens = 0,
            cached_tokens = 0;
};

// Values beside the ids of a lane, kept up to the last that differs from `nothing`: mostly none at all.
template <typename T> class Column {
  public:
    explicit Column(T nothing) : nothing_(nothing) {}
    T at(int32_t i) const {
        return static_cast<size_t>(i) < values_.size() ? values_[static_cast<size_t>(i)] : nothing_;
    }
    void set(int32_t i, T value) {
        if (static_cast<size_t>(i) >= values_.size()) values_.resize(static_cast<size_t>(i) + 1, nothing_);
        values_[static_cast<size_t>(i)] = value;
    }
    void truncate(int32_t keep) {
        if (static_cast<size_t>(keep) < values_.size()) values_.resize(static_cast<size_t>(keep));
    }
    size_t size() const { return values_.size(); }

  private:
    T nothing_;
    std::vector<T> values_;
};

// With thousands of sequences what a token costs is cache lines: what every token touches stands first.
struct alignas(64) Lane {
    std::vector<int32_t> ids;
    std::vector<int32_t> pages; // cover [0, launched)
    double ready = 0.0;         // milliseconds: since when it could run
    int32_t last = -1;          // ids.back()
    int32_t prompt_len = 0;
    int32_t cached = 0;    // positions whose K/V is in the pages, as far as the host has heard
    int32_t launched = 0;  // positions sent to the model; beyond ids.size() their tokens live on the device only
    int32_t inflight = 0;  // flights not yet landed
    int32_t stable = 0;    // ids that will not change: only these may be published
    int32_t read_from = 0; // READ: first position whose logits are wanted
    uint32_t epoch = 0;
    Want want = Want::IDLE;
    int32_t next_page = 0; // positions at which the next page is full and may be published
    int32_t projected = 0; // content tokens its ids hold
    int32_t shelved = 0;   // positions whose K/V is on the shelf instead; 0: none
    LaneStats stats;
    int32_t attempt = 0, attempt_at = -1; // how often an opening was refused at that position

    std::vector<Digest> digests;        // of the leading full pages that are published or adopted
    Digest root{};                      // where their chain begins: the request's salt
    std::vector<int32_t> shelf;         // the shelf's pages, covering [0, shelved)
    Column<float> logprobs{no_logprob}; // NaN where this model did not sample the token
    Column<uint8_t> tag{0};             // 1 inside a control tag

    int32_t size() const { return static_cast<int32_t>(ids.size()); }
    void push(int32_t id, float logprob, bool in_tag = false) {
        if (logprob == logprob) logprobs.set(size(), logprob);
        if (in_tag) tag.set(size(), 1);
        ids.push_back(id);
        last = id;
    }
    void truncate(int32_t keep) {
        ids.resize(static_cast<size_t>(keep));
        logprobs.truncate(keep);
        tag.truncate(keep);
        last = ids.empty() ? -1 : ids.back();
    }
};

// The tokens of one lane: their bytes, and by id whether they enter a tag (bit 0 the opening one, bit 1 the closing
// one).
struct Words {
    const Vocabulary* vocabulary = nullptr;
    const uint8_t* enters = nullptr;
};

struct ContentToken {
    int32_t id;
    int32_t author; // lane whose vocabulary `id` belongs to
    int32_t origin; // position in that lane at which it was sampled; -1: a residue re-encoded at a seam
    float logprob;
    int32_t end; // content bytes up to and including this token
};

struct Limits {
    int32_t max_tokens = std::numeric_limits<int32_t>::max();
    int32_t min_tokens = 0;
    bool ignore_eos = false, skip_special = true, include_stop = false;
    bool exact = false; // host-side state (penalties) shapes the next draw: never run ahead
    std::vector<int32_t> stop_ids;
    std::vector<std::string> stops;
};

class Sequence {
  public:
    // At most max_lanes prompts; words: one for each, and they outlive the sequence.
    Sequence(const std::vector<std::vector<int32_t>>& prompts, const Words* words, const ByteMatcher* tags,
             const ByteMatcher* closer, Limits limits);

    std::array<Lane, max_lanes> lanes;

    // One cache line each for: who writes and what is held; the text; the limits.
    Phase phase = Phase::FROZEN;
    int32_t active = 0;   // the lane that writes or reads
    int32_t mark = -1;    // content count that raises MARK
    int32_t interval = 0; // provisional tokens that raise DUE
    uint32_t stream = 0;  // random stream of the active lane
    int32_t handle = -1;
    uint32_t born = 0;     // no flight of an older epoch was this sequence's
    int32_t text_end = -1; // set by a stop string: where the text is cut
    bool open_is_event = true;
    bool resident = false;
    int8_t mirror = -1;   // lane that runs the content ahead of need while another writes; -1: none
    bool holding = false; // the active lane is scanned for tags, so its tail may be held
    int32_t hurry = 0;    // position up to which it should do so without waiting for more
  private:
    int32_t tag_state_ = ByteMatcher::start;
    int32_t stop_state_ = ByteMatcher::start;
    int32_t held_from_ = 0, held_skip_ = 0;
    std::unique_ptr<ByteMatcher> stops_; // null: no stop strings

  public:
    std::vector<ContentToken> content;
    std::string bytes; // of the content
  private:
    const Words* words_; // by lane
  public:
    std::vector<ContentToken> provisional;
    Limits limits;

    int32_t leader = -1; // a sibling with the same prompt that goes first
    int32_t followers = 0;
    int64_t arrival = 0;
    int32_t preemptions = 0;
    std::vector<std::pair<int32_t, int32_t>> tag_log; // (content bytes before it, pattern)
    ContentToken ending{-1, 0, 0, no_logprob, 0};     // an EOS or stop token behind the provisional ones; id -1: none
    std::vector<int32_t> draws;
    std::vector<float> draw_logprobs;
    int32_t confirm_base = 0, confirm_steps = 0;

    // Bytes of the text that can no longer change: what streaming may show.
    int32_t settled_bytes() const;
    // How many more tokens the active lane may sample before the caller must be asked; at least 1 while it writes.
    int32_t allowance() const;

    // A token sampled by the active lane, already appended to it. True: an event was raised.
    bool written(int32_t lane_max, bool is_end, std::vector<Event>& events);
    // Scans the active lane from (position, byte offset) to its end.
    bool scan_from(int32_t position, int32_t skip, std::vector<Event>& events);
    bool emit(int32_t author, int32_t id, float logprob, int32_t origin, std::vector<Event>& events);
    // Moves the first k provisional tokens into the content; `ends`: with all of them moved, an ending is raised too.
    bool accept(int32_t k, bool ends, std::vector<Event>& events);
    // Nothing more will be written: bytes of an unfinished tag were text after all.
    void flush_held(std::vector<Event>& events);
    void begin_confirm(int32_t base, int32_t steps);
    void raise(std::vector<Event>& events, Event event);

    // Hints for loops over many sequences: first the objects themselves, some turns later where their columns end.
    void prefetch(size_t lane) const;
    void prefetch_ends(size_t lane) const;

  private:
    const Vocabulary& vocabulary(int32_t lane) const { return *words_[lane].vocabulary; }
    Lane& active_lane() { return lanes[static_cast<size_t>(active)]; }
    bool emit_residue(int32_t author, const std::string& residue, std::vector<Event>& events);
    bool release_until(int32_t position, std::vector<Event>& events);
    bool scan_token(int32_t position, int32_t skip, std::vector<Event>& events);
    bool found_tag(int32_t pattern, int32_t position, int32_t end, std::vector<Event>& events);
    bool confirm_token(int32_t position, bool is_end, std::vector<Event>& events);
    void end_content(const ContentToken& token, std::vector<Event>& events);

    const ByteMatcher* tags_;   // pattern 0 opens, pattern 1 closes, others are events
    const ByteMatcher* closer_; // pattern 0 closes
    int32_t confirm_bytes_ = 0, confirm_first_ = 0;
};

} // namespace splitdecode
