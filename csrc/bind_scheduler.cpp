// F1. splitdecode._C.Scheduler: plan and commit on caller-owned arrays, views of a sequence, decisions about it.
#include "bindings.hpp"

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

using splitdecode::Lane;
using splitdecode::LaneStats;
using splitdecode::Phase;
using splitdecode::Scheduler;
using splitdecode::Sequence;
using splitdecode::Vocabulary;

namespace {

// An array of its own for Python, shape [n].
template <typename T, typename Get> nb::object array_of(size_t n, Get get) {
    auto data = std::make_unique<T[]>(n);
    for (size_t i = 0; i < n; ++i) data[i] = get(i);
    T* raw = data.release();
    nb::capsule owner(raw, [](void* p) noexcept { delete[] static_cast<T*>(p); });
    return nb::cast(nb::ndarray<nb::numpy, T, nb::ndim<1>>(raw, {n}, owner));
}

} // namespace

static splitdecode::PlanCounts plan_into(Scheduler& self, int32_t lane, const Out& tokens, const Out& positions,
                                         const Out& slots, const Out& cu_q, const Out& kv_len, const Out& page_indptr,
                                         const Out& pages, const Out& row_seq, const Out& row_steps, const Out& logits,
                                         int32_t steps, double now) {
    const auto least = [](size_t a, size_t b) { return static_cast<int32_t>(a < b ? a : b); };
    if (cu_q.size() == 0 || page_indptr.size() == 0) throw std::invalid_argument("plan: no room for an offset");
    if (steps < 1) throw std::invalid_argument("plan: steps must be at least 1");
    const int32_t rows = least(row_steps.size(),
                               least(least(kv_len.size(), row_seq.size()), least(cu_q.size(), page_indptr.size()) - 1));
    return self.plan(lane,
                     {tokens.data(), positions.data(), slots.data(), cu_q.data(), kv_len.data(), page_indptr.data(),
                      pages.data(), row_seq.data(), row_steps.data(), logits.data(),
                      least(tokens.size(), least(positions.size(), slots.size())), rows,
                      static_cast<int32_t>(pages.size()), static_cast<int32_t>(logits.size() / 6)},
                     steps, now);
}

static nb::dict lane_stats(const LaneStats& stats) {
    nb::dict out;
    out["forwards"] = stats.forwards;
    out["tokens"] = stats.tokens;
    out["sampled"] = stats.sampled;
    out["discarded"] = stats.discarded;
    out["prompt_tokens"] = stats.prompt_tokens;
    out["catchup_tokens"] = stats.catchup_tokens;
    out["catchup_forwards"] = stats.catchup_forwards;
    out["read_tokens"] = stats.read_tokens;
    out["cached_tokens"] = stats.cached_tokens;
    out["ms"] = stats.ms;
    out["write_ms"] = stats.write_ms;
    out["writes"] = stats.writes;
    return out;
}

static nb::dict lane_state(const Lane& lane) {
    nb::dict out;
    out["size"] = lane.size();
    out["prompt_len"] = lane.prompt_len;
    out["cached"] = lane.cached;
    out["shelved"] = lane.shelved;
    out["launched"] = lane.launched;
    out["inflight"] = lane.inflight;
    out["epoch"] = lane.epoch;
    out["stable"] = lane.stable;
    out["pages"] = array_of<int32_t>(lane.pages.size(), [&](size_t i) { return lane.pages[i]; });
    return out;
}

static nb::object content_of(Sequence& sequence, int32_t from) {
    if (from < 0 || static_cast<size_t>(from) > sequence.content.size())
        throw std::out_of_range("content: no token " + std::to_string(from));
    const auto* first = sequence.content.data() + from;
    const size_t n = sequence.content.size() - static_cast<size_t>(from);
    return nb::make_tuple(array_of<int32_t>(n, [&](size_t i) { return first[i].id; }),
                          array_of<int32_t>(n, [&](size_t i) { return first[i].author; }),
                          array_of<int32_t>(n, [&](size_t i) { return first[i].origin; }),
                          array_of<float>(n, [&](size_t i) { return first[i].logprob; }),
                          array_of<int32_t>(n, [&](size_t i) { return first[i].end; }));
}

static void bind_views(nb::class_<Scheduler>& scheduler) {
    scheduler
        .def(
            "lane_ids",
            [](Scheduler& self, int32_t seq, int32_t lane, int32_t from, int32_t to) {
                const auto& ids = self.at(seq).lanes.at(static_cast<size_t>(lane)).ids;
                const size_t end = to < 0 ? ids.size() : std::min(ids.size(), static_cast<size_t>(to));
                const auto begin = static_cast<size_t>(from);
                return array_of<int32_t>(end > begin ? end - begin : 0, [&](size_t i) { return ids[begin + i]; });
            },
            "seq"_a, "lane"_a, "start"_a = 0, "stop"_a = -1, "Ids of a lane, int32 [stop - start].")
        .def(
            "lane_logprobs",
            [](Scheduler& self, int32_t seq, int32_t lane, int32_t from, int32_t to) {
                const Lane& view = self.at(seq).lanes.at(static_cast<size_t>(lane));
                const int32_t end = std::min(view.size(), to);
                return array_of<float>(end > from ? static_cast<size_t>(end - from) : 0,
                                       [&](size_t i) { return view.logprobs.at(from + static_cast<int32_t>(i)); });
            },
            "seq"_a, "lane"_a, "start"_a, "stop"_a, "Log-probs beside lane_ids, NaN where the lane did not sample.")
        .def(
            "lane_tags",
            [](Scheduler& self, int32_t seq, int32_t lane) {
                const Lane& view = self.at(seq).lanes.at(static_cast<size_t>(lane));
                return array_of<int32_t>(static_cast<size_t>(view.size()),
                                         [&](size_t i) { return view.tag.at(static_cast<int32_t>(i)); });
            },
            "seq"_a, "lane"_a, "Beside lane_ids: 1 for ids of a control tag, else 0.")
        .def(
            "counted_ids",
            [](Scheduler& self, int32_t seq, int32_t lane, int32_t to) {
                const Lane& view = self.at(seq).lanes.at(static_cast<size_t>(lane));
                std::vector<int32_t> ids;
                for (int32_t p = view.prompt_len; p < std::min(to, view.size()); ++p)
                    if (view.tag.at(p) == 0) ids.push_back(view.ids[static_cast<size_t>(p)]);
                return array_of<int32_t>(ids.size(), [&](size_t i) { return ids[i]; });
            },
            "seq"_a, "lane"_a, "stop"_a, "What penalties count: ids behind the prompt, tags left out.")
        .def(
            "lane_state",
            [](Scheduler& self, int32_t seq, int32_t lane) {
                return lane_state(self.at(seq).lanes.at(static_cast<size_t>(lane)));
            },
            "seq"_a, "lane"_a)
        .def(
            "stats",
            [](Scheduler& self, int32_t seq, int32_t lane) {
                return lane_stats(self.at(seq).lanes.at(static_cast<size_t>(lane)).stats);
            },
            "seq"_a, "lane"_a, "Counters of one lane; ms is its share of the steps it took part in.")
        .def(
            "content", [](Scheduler& self, int32_t seq, int32_t from) { return content_of(self.at(seq), from); },
            "seq"_a, "start"_a = 0, "(ids, authors, origins, logprobs, byte ends) of the content tokens from `start`.")
        .def(
            "content_size", [](Scheduler& self, int32_t seq) { return self.at(seq).content.size(); }, "seq"_a)
        .def(
            "content_bytes",
            [](Scheduler& self, int32_t seq, int32_t from, int32_t to) {
                const std::string& bytes = self.at(seq).bytes;
                const std::string part = bytes.substr(static_cast<size_t>(from), static_cast<size_t>(to - from));
                return nb::bytes(part.data(), part.size());
            },
            "seq"_a, "start"_a, "stop"_a)
        .def(
            "settled_bytes", [](Scheduler& self, int32_t seq) { return self.at(seq).settled_bytes(); }, "seq"_a,
            "Bytes of the text that can no longer change.")
        .def(
            "text_end", [](Scheduler& self, int32_t seq) { return self.at(seq).text_end; }, "seq"_a,
            "Where a stop string cut the text, or -1.")
        .def(
            "tags",
            [](Scheduler& self, int32_t seq) {
                nb::list out;
                for (const auto& [at, pattern] : self.at(seq).tag_log) out.append(nb::make_tuple(at, pattern));
                return out;
            },
            "seq"_a, "[(content bytes before it, 0 opening | 1 closing)]")
        .def(
            "provisional",
            [](Scheduler& self, int32_t seq) {
                const auto& tokens = self.at(seq).provisional;
                return array_of<int32_t>(tokens.size(), [&](size_t i) { return tokens[i].id; });
            },
            "seq"_a)
        .def(
            "has_ending", [](Scheduler& self, int32_t seq) { return self.at(seq).ending.id >= 0; }, "seq"_a)
        .def(
            "at_limit",
            [](Scheduler& self, int32_t seq, int32_t lane) {
                return self.at(seq).allowance() <= 0 || self.room(seq, lane) <= 0;
            },
            "seq"_a, "lane"_a, "Whether max_tokens, the mark or the lane's context keeps it from writing on.")
        .def(
            "draws", [](Scheduler& self, int32_t seq) { return self.at(seq).draws; }, "seq"_a)
        .def(
            "active", [](Scheduler& self, int32_t seq) { return self.at(seq).active; }, "seq"_a)
        .def(
            "phase", [](Scheduler& self, int32_t seq) { return self.at(seq).phase; }, "seq"_a)
        .def(
            "preempted", [](Scheduler& self, int32_t seq) { return self.at(seq).preemptions; }, "seq"_a)
        .def(
            "flush",
            [](Scheduler& self, int32_t seq) {
                std::vector<splitdecode::Event> events;
                self.at(seq).flush_held(events);
                return events;
            },
            "seq"_a, "Nothing more will be written: bytes of an unfinished tag were text after all.");
}

static void bind_decisions(nb::class_<Scheduler>& scheduler) {
    scheduler
        .def(
            "retarget",
            [](Scheduler& self, int32_t seq, int32_t lane, int32_t keep, const std::vector<int32_t>& ids, bool in_tag) {
                self.retarget(seq, lane, keep, ids, in_tag);
            },
            "seq"_a, "lane"_a, "keep"_a, "ids"_a, "in_tag"_a = false,
            "The lane's ids become ids[:keep] + ids; what its cache holds of them stays. IndexError when keep cuts the "
            "prompt or an id is unknown.")
        .def(
            "write",
            [](Scheduler& self, int32_t seq, int32_t lane, Phase phase, uint32_t stream, int32_t interval, int32_t mark,
               int32_t scan_from, bool open_is_event) {
                return self.write(seq, lane, {phase, stream, interval, mark, scan_from, open_is_event});
            },
            "seq"_a, "lane"_a, "phase"_a, "stream"_a, "interval"_a = 0, "mark"_a = -1, "scan_from"_a = -1,
            "open_is_event"_a = true, "The lane writes on from its end.")
        .def("read", &Scheduler::read, "seq"_a, "lane"_a, "start"_a, "stream"_a,
             "The lane runs what it owes; a token is drawn behind every position from `start`.")
        .def(
            "confirm", &Scheduler::confirm, "seq"_a, "lane"_a, "keep"_a, "draw"_a, "steps"_a, "stream"_a,
            "The lane is cut to `keep`, takes the given draw (or -1) and writes until a closing tag completes or dies.")
        .def("accept", &Scheduler::accept, "seq"_a, "count"_a, "ends"_a,
             "The first provisional tokens become content; `ends`: the EOS behind them too.")
        .def(
            "emit",
            [](Scheduler& self, int32_t seq, int32_t author, const std::vector<int32_t>& ids) {
                return self.emit(seq, author, ids);
            },
            "seq"_a, "author"_a, "ids"_a, "Residue ids become content.")
        .def("drop_provisional", &Scheduler::drop_provisional, "seq"_a)
        .def(
            "drop_ending", [](Scheduler& self, int32_t seq) { self.at(seq).ending.id = -1; }, "seq"_a,
            "The EOS behind the provisional tokens is not reached.")
        .def("refuse", &Scheduler::refuse, "seq"_a, "lane"_a)
        .def(
            "set_mark", [](Scheduler& self, int32_t seq, int32_t mark) { self.at(seq).mark = mark; }, "seq"_a, "mark"_a)
        .def(
            "projected",
            [](Scheduler& self, int32_t seq, int32_t lane) {
                return self.at(seq).lanes.at(static_cast<size_t>(lane)).projected;
            },
            "seq"_a, "lane"_a, "Content tokens the lane's ids hold.")
        .def(
            "set_projected",
            [](Scheduler& self, int32_t seq, int32_t lane, int32_t count) {
                self.at(seq).lanes.at(static_cast<size_t>(lane)).projected = count;
            },
            "seq"_a, "lane"_a, "count"_a)
        .def("log_tag", &Scheduler::log_tag, "seq"_a, "pattern"_a)
        .def(
            "size",
            [](Scheduler& self, int32_t seq, int32_t lane) {
                return self.at(seq).lanes.at(static_cast<size_t>(lane)).size();
            },
            "seq"_a, "lane"_a, "Ids of a lane, prompt included.")
        .def("room", &Scheduler::room, "seq"_a, "lane"_a, "Ids the lane can still take.");
}

void bind_scheduler(nb::module_& m) {
    nb::class_<Scheduler> scheduler(m, "Scheduler", "Who steps next on each model, on which pages.");
    scheduler
        .def(
            "__init__",
            [](Scheduler* self, const nb::tuple& lanes, const std::vector<std::string>& tags, int32_t max_seqs,
               int32_t depth) {
                std::vector<splitdecode::LaneSpec> specs;
                for (nb::handle item : lanes) {
                    const auto spec = nb::cast<nb::tuple>(item);
                    specs.push_back(
                        {nb::cast<splitdecode::PagePool*>(spec[0]), nb::cast<Vocabulary*>(spec[1]),
                         nb::cast<int32_t>(spec[2]), nb::cast<std::vector<int32_t>>(spec[3]),
                         spec.size() > 4 && !spec[4].is_none() ? nb::cast<splitdecode::PagePool*>(spec[4]) : nullptr});
                }
                new (self) Scheduler(std::move(specs), tags, max_seqs, depth);
            },
            "lanes"_a, "tags"_a, "max_seqs"_a, "depth"_a, nb::keep_alive<1, 2>(),
            "lanes: ((PagePool, Vocabulary, max_len, eos_ids[, shelf PagePool or None]), ...); tags: [opening, "
            "closing, others that are events].")
        .def(
            "add",
            [](Scheduler& self, const std::vector<std::vector<int32_t>>& prompts, int32_t max_tokens,
               int32_t min_tokens, bool ignore_eos, bool skip_special, bool include_stop, bool exact,
               std::vector<int32_t> stop_ids, const std::vector<nb::bytes>& stops, const nb::bytes& salt,
               int32_t leader) {
                splitdecode::Limits limits{max_tokens,   min_tokens, ignore_eos,          skip_special,
                                           include_stop, exact,      std::move(stop_ids), {}};
                for (const nb::bytes& stop : stops)
                    limits.stops.emplace_back(static_cast<const char*>(stop.data()), stop.size());
                return self.add(prompts, std::move(limits), {static_cast<const char*>(salt.data()), salt.size()},
                                leader);
            },
            "prompts"_a, "max_tokens"_a, "min_tokens"_a, "ignore_eos"_a, "skip_special"_a, "include_stop"_a, "exact"_a,
            "stop_ids"_a, "stops"_a, "salt"_a, "leader"_a, "A handle; the sequence rests until write().")
        .def("finish", &Scheduler::finish, "seq"_a, "Frees its pages and its handle.")
        .def(
            "plan",
            [](Scheduler& self, int32_t lane, const Out& tokens, const Out& positions, const Out& slots,
               const Out& cu_q, const Out& kv_len, const Out& page_indptr, const Out& pages, const Out& row_seq,
               const Out& row_steps, const Out& logits, int32_t steps, double now) {
                const auto n = plan_into(self, lane, tokens, positions, slots, cu_q, kv_len, page_indptr, pages,
                                         row_seq, row_steps, logits, steps, now);
                return nb::make_tuple(n.tokens, n.rows, n.pages, n.logits, n.steps);
            },
            "lane"_a, "tokens"_a.noconvert(), "positions"_a.noconvert(), "slots"_a.noconvert(), "cu_q"_a.noconvert(),
            "kv_len"_a.noconvert(), "page_indptr"_a.noconvert(), "pages"_a.noconvert(), "row_seq"_a.noconvert(),
            "row_steps"_a.noconvert(), "logits"_a.noconvert(), nb::kw_only(), "steps"_a = 1, "now"_a = 0.0,
            "Packs the next step of a lane, or up to `steps` when all it does is decode: (tokens, rows, pages, logits "
            "rows, steps). now: milliseconds that never run backwards.")
        .def(
            "commit",
            [](Scheduler& self, int32_t lane, const Ids& ids, const Floats& logprobs, double ms, double now) {
                if (ids.size() != logprobs.size())
                    throw std::invalid_argument("commit: ids and logprobs differ in length");
                return self.commit(lane, ids.data(), logprobs.data(), static_cast<int32_t>(ids.size()), ms, now);
            },
            "lane"_a, "ids"_a.noconvert(), "logprobs"_a.noconvert(), "ms"_a, "now"_a = 0.0,
            "Lands the lane's oldest flight.")
        .def("pace", &Scheduler::pace, "patience"_a, "max_wait_ms"_a,
             "Hand-off batching: how long a slow lane waits for a batch (csrc/pacer.hpp). ValueError below 0.")
        .def(
            "step_ms", [](Scheduler& self, int32_t lane) { return self.pacer().step_ms(static_cast<size_t>(lane)); },
            "lane"_a, "Running mean of the lane's step times; 0 before the first.")
        .def("share", &Scheduler::share, "arena"_a, nb::keep_alive<1, 2>(), "One memory for all pools.")
        .def("fill", &Scheduler::fill, "lane"_a, "free_tokens"_a, "chunk"_a,
             "Tokens a step takes for the price of one; what is worth a step of its own. ValueError below 0 and 1.")
        .def("mirror", &Scheduler::mirror, "seq"_a, "lane"_a, "The lane runs the content ahead of need; -1: none does.")
        .def("hurry", &Scheduler::hurry, "seq"_a, "The mirrored lane is likely to be asked soon.")
        .def(
            "take_transfers",
            [](Scheduler& self, int32_t lane) {
                const auto moves = self.take_transfers(lane);
                return array_of<int32_t>(3 * moves.size(), [&](size_t i) {
                    const splitdecode::Transfer& move = moves[i / 3];
                    return i % 3 == 0 ? move.page : i % 3 == 1 ? move.shelf_page : static_cast<int32_t>(move.out);
                });
            },
            "lane"_a, "Copies the caller owes before the planned step, in order: int32 [3 n] of page, shelf page, out.")
        .def("discard_flight", &Scheduler::discard_flight, "lane"_a, "Lands the newest flight unseen: its step failed.")
        .def("in_flight", &Scheduler::in_flight, "lane"_a)
        .def("enters", &Scheduler::enters, "lane"_a, "pattern"_a, "token_id"_a)
        .def_prop_ro("unfinished", &Scheduler::unfinished)
        .def_prop_ro("preemptions", &Scheduler::preemptions)
        .def_prop_ro("idle_evictions", &Scheduler::idle_evictions)
        .def_prop_ro("evicted_tokens", &Scheduler::evicted_tokens)
        .def("check_invariants", &Scheduler::check_invariants);
    bind_views(scheduler);
    bind_decisions(scheduler);
}
