// F1. Sequences come and go: what is known of them, who may hold pages. See the header for the picture.
#include "scheduler.hpp"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace splitdecode {

Scheduler::Scheduler(std::vector<LaneSpec> specs, std::vector<std::string> tags, int32_t max_seqs, int32_t depth)
    : specs_(std::move(specs)), tags_(tags), closer_(std::vector<std::string>{tags.at(1)}), max_seqs_(max_seqs),
      depth_(depth), pacer_(specs_.size()), free_tokens_(specs_.size(), 0),
      fill_chunk_(specs_.size(), std::numeric_limits<int32_t>::max()), transfers_(specs_.size()),
      starved_(specs_.size(), false), flights_(specs_.size()), limbo_(specs_.size()),
      launched_flights_(specs_.size(), 0) {
    if (specs_.empty() || specs_.size() > max_lanes) throw std::invalid_argument("one or two lanes expected");
    if (tags.size() < 2 || tags.size() > 8)
        throw std::invalid_argument("tags: expected the opening and the closing tag, and six others at most");
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

void Scheduler::fill(int32_t lane, int32_t free_tokens, int32_t chunk) {
    if (free_tokens < 0 || chunk < 1) throw std::invalid_argument("fill: expected a room from 0 and a chunk from 1 up");
    free_tokens_.at(lane_index(lane)) = free_tokens;
    fill_chunk_.at(lane_index(lane)) = chunk;
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
        trim_shelf(sequence.lanes[i], static_cast<int32_t>(i), 0);
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

// ---- admission -----------------------------------------------------------------------------------------------------

int32_t Scheduler::pages_owed(const Sequence& sequence) const {
    const Lane& lane = sequence.lanes[static_cast<size_t>(sequence.active)];
    const LaneSpec& spec = specs_[static_cast<size_t>(sequence.active)];
    const int32_t total = pages_for(std::min(lane.size() + 1, spec.max_len), spec.pool->page_size());
    return std::max(0, total - static_cast<int32_t>(lane.pages.size()));
}

void Scheduler::admit() {
    if (residents_ == unfinished() || residents_ >= max_seqs_) return;
    if (residents_ > 0 && starving()) return;
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
            for (size_t i = 0; i < specs_.size(); ++i)
                free_pages.push_back(specs_[i].pool->available() + (arena_ ? arena_->reachable(i) : 0));
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

} // namespace splitdecode
