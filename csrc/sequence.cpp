// F1. The bytes of one request: two automata in series (tags, then stop strings), held tokens, provisional tokens.
#include "sequence.hpp"

#include <algorithm>
#include <utility>

namespace splitdecode {

namespace {
constexpr int32_t open_pattern = 0, close_pattern = 1; // those behind them belong to the caller

// Where the byte `offset` (counted from token `position`, of which `skip` bytes are already gone) lies.
struct Place {
    int32_t position, offset;
};
Place locate(const Lane& lane, const Vocabulary& vocabulary, int32_t position, int32_t skip, int32_t offset) {
    offset += skip;
    while (true) {
        const auto length = static_cast<int32_t>(vocabulary.bytes(lane.ids[static_cast<size_t>(position)]).size());
        if (offset < length) return {position, offset};
        offset -= length;
        ++position;
    }
}
} // namespace

Sequence::Sequence(const std::vector<std::vector<int32_t>>& prompts, const Words* words, const ByteMatcher* tags,
                   const ByteMatcher* closer, Limits sequence_limits)
    : words_(words), limits(std::move(sequence_limits)), tags_(tags), closer_(closer) {
    if (!limits.stops.empty()) stops_ = std::make_unique<ByteMatcher>(limits.stops);
    for (size_t i = 0; i < prompts.size(); ++i) {
        lanes[i].ids = prompts[i];
        lanes[i].last = prompts[i].empty() ? -1 : prompts[i].back();
        lanes[i].prompt_len = lanes[i].stable = lanes[i].size();
    }
}

namespace {
void prefetch_lines(const void* start, size_t bytes) {
    const auto* line = static_cast<const char*>(start);
    for (size_t at = 0; at < bytes; at += 64) __builtin_prefetch(line + at, 1);
}
} // namespace

void Sequence::prefetch(size_t lane) const {
    prefetch_lines(&lanes[lane], 128);
    prefetch_lines(&phase, 192);
}

void Sequence::prefetch_ends(size_t lane) const {
    const Lane& view = lanes[lane];
    for (const void* end : {static_cast<const void*>(view.ids.data() + view.ids.size() - 1),
                            static_cast<const void*>(content.data() + content.size()),
                            static_cast<const void*>(bytes.data() + bytes.size())})
        __builtin_prefetch(end, 1);
}

void Sequence::raise(std::vector<Event>& events, Event event) {
    event.seq = handle;
    phase = Phase::FROZEN;
    events.push_back(event);
}

int32_t Sequence::settled_bytes() const {
    if (text_end >= 0) return text_end;
    return static_cast<int32_t>(bytes.size()) - (stops_ ? stops_->depth(stop_state_) : 0);
}

int32_t Sequence::allowance() const {
    const auto done = static_cast<int32_t>(content.size() + provisional.size());
    int32_t left = limits.max_tokens - done;
    if (phase == Phase::SCAN) left = std::max(left, 1); // held tokens need not become content
    if (mark >= 0 && phase != Phase::CONFIRM) left = std::min(left, mark - done);
    if (phase == Phase::PROVISIONAL) left = std::min(left, interval - static_cast<int32_t>(provisional.size()));
    if (phase == Phase::CONFIRM) left = std::numeric_limits<int32_t>::max();
    return left;
}

bool Sequence::emit(int32_t author, int32_t id, float logprob, int32_t origin, std::vector<Event>& events) {
    static const std::string nothing;
    const Vocabulary& words = vocabulary(author);
    const std::string& text = limits.skip_special && words.special(id) ? nothing : words.bytes(id);
    const auto before = static_cast<int32_t>(bytes.size());
    bytes += text;
    content.push_back({id, author, origin, logprob, static_cast<int32_t>(bytes.size())});
    const auto count = static_cast<int32_t>(content.size());
    std::string_view rest = text;
    while (stops_ && !rest.empty()) {
        const ByteMatcher::Found found = stops_->feed(stop_state_, rest);
        if (found.pattern < 0) break;
        rest.remove_prefix(static_cast<size_t>(found.end));
        if (count < limits.min_tokens) continue;
        text_end = before + static_cast<int32_t>(text.size() - rest.size());
        if (!limits.include_stop) text_end -= stops_->length(found.pattern);
        raise(events, {EventKind::STOP, handle, found.pattern});
        return true;
    }
    if (count >= limits.max_tokens) {
        raise(events, {EventKind::LENGTH, handle});
        return true;
    }
    if (mark >= 0 && count >= mark) {
        raise(events, {EventKind::MARK, handle});
        return true;
    }
    return false;
}

bool Sequence::emit_residue(int32_t author, const std::string& residue, std::vector<Event>& events) {
    if (residue.empty()) return false;
    for (int32_t id : vocabulary(author).encode(residue))
        if (emit(author, id, no_logprob, -1, events)) return true;
    return false;
}

// Held tokens before `position` become content.
bool Sequence::release_until(int32_t position, std::vector<Event>& events) {
    Lane& lane = active_lane();
    while (held_from_ < position) {
        const auto at = static_cast<size_t>(held_from_);
        const int32_t skip = held_skip_;
        ++held_from_;
        held_skip_ = 0;
        lane.stable = held_from_;
        if (skip > 0) {
            const std::string rest = vocabulary(active).bytes(lane.ids[at]).substr(static_cast<size_t>(skip));
            if (emit_residue(active, rest, events)) return true;
        } else if (emit(active, lane.ids[at], lane.logprobs.at(held_from_ - 1), held_from_ - 1, events)) {
            return true;
        }
    }
    return false;
}

bool Sequence::found_tag(int32_t pattern, int32_t position, int32_t end, std::vector<Event>& events) {
    Lane& lane = active_lane();
    const Vocabulary& words = vocabulary(active);
    int32_t total = end - held_skip_;
    for (int32_t p = held_from_; p < position; ++p)
        total += static_cast<int32_t>(words.bytes(lane.ids[static_cast<size_t>(p)]).size());
    const Place start = locate(lane, words, held_from_, held_skip_, total - tags_->length(pattern));
    if (release_until(start.position, events)) return true;
    const std::string& first = words.bytes(lane.ids[static_cast<size_t>(start.position)]);
    const auto from = static_cast<size_t>(held_skip_);
    // The caller heals the lane first, so it looks for a mark reached here by itself.
    const int32_t mark_after = std::exchange(mark, -1);
    const bool raised = emit_residue(active, first.substr(from, static_cast<size_t>(start.offset) - from), events);
    mark = mark_after;
    if (raised) return true;
    tag_log.emplace_back(static_cast<int32_t>(bytes.size()), pattern);
    for (int32_t p = start.position; p <= position; ++p) lane.tag.set(p, 1);
    tag_state_ = ByteMatcher::start;
    held_from_ = position;
    held_skip_ = end;
    if ((pattern == open_pattern && open_is_event) || pattern > close_pattern) {
        raise(events, {EventKind::TAG, handle, pattern, start.position, position, end});
        return true;
    }
    return false;
}

bool Sequence::scan_token(int32_t position, int32_t skip, std::vector<Event>& events) {
    Lane& lane = active_lane();
    const Vocabulary& words = vocabulary(active);
    const int32_t id = lane.ids[static_cast<size_t>(position)];
    if (tag_state_ == ByteMatcher::start && skip == 0 && held_from_ == position && held_skip_ == 0 &&
        words_[active].enters[id] == 0) {
        held_from_ = lane.stable = position + 1;
        return emit(active, id, lane.logprobs.at(position), position, events);
    }
    const std::string& text = words.bytes(id);
    const auto length = static_cast<int32_t>(text.size());
    while (skip < length) {
        const auto found = tags_->feed(tag_state_, std::string_view(text).substr(static_cast<size_t>(skip)));
        skip += found.end;
        if (found.pattern >= 0 && found_tag(found.pattern, position, skip, events)) return true;
    }
    // A token that ends with the last byte of a tag has nothing left to release.
    if (held_from_ == position && held_skip_ == length && length > 0) {
        held_from_ = position + 1;
        held_skip_ = 0;
        return false;
    }
    int32_t unsafe = tags_->depth(tag_state_);
    int32_t keep = position + 1;
    while (unsafe > 0) {
        --keep;
        unsafe -= static_cast<int32_t>(words.bytes(lane.ids[static_cast<size_t>(keep)]).size());
    }
    return release_until(keep, events);
}

bool Sequence::scan_from(int32_t position, int32_t skip, std::vector<Event>& events) {
    held_from_ = position;
    held_skip_ = skip;
    tag_state_ = ByteMatcher::start;
    for (int32_t p = position; p < active_lane().size(); ++p)
        if (scan_token(p, p == position ? skip : 0, events)) return true;
    return false;
}

void Sequence::flush_held(std::vector<Event>& events) {
    if (holding) release_until(active_lane().size(), events);
    holding = false;
}

void Sequence::end_content(const ContentToken& token, std::vector<Event>& events) {
    content.push_back(token);
    content.back().end = static_cast<int32_t>(bytes.size());
    raise(events, {EventKind::END, handle, token.id});
}

void Sequence::begin_confirm(int32_t base, int32_t steps) {
    phase = Phase::CONFIRM;
    confirm_base = base;
    confirm_steps = steps;
    confirm_bytes_ = 0;
    confirm_first_ = 0;
    tag_state_ = ByteMatcher::start;
}

bool Sequence::confirm_token(int32_t position, bool is_end, std::vector<Event>& events) {
    const Lane& lane = active_lane();
    const std::string& text = vocabulary(active).bytes(lane.ids[static_cast<size_t>(position)]);
    const auto found = is_end ? ByteMatcher::Found{} : closer_->feed(tag_state_, text);
    if (position == confirm_base) confirm_first_ = static_cast<int32_t>(text.size());
    if (found.pattern >= 0) {
        const int32_t start = confirm_bytes_ + found.end - closer_->length(found.pattern);
        if (confirm_steps > 0 || start < confirm_first_) {
            const Place place = locate(lane, vocabulary(active), confirm_base, 0, start);
            raise(events, {EventKind::COMPLETED, handle, start, place.position, position, found.end});
            return true;
        }
    }
    confirm_bytes_ += static_cast<int32_t>(text.size());
    // Without a step bound a candidate lives as long as the tag that began in its first token can still complete.
    const bool alive = confirm_steps > 0 ? position + 1 - confirm_base < confirm_steps
                                         : closer_->depth(tag_state_) > confirm_bytes_ - confirm_first_;
    if (alive && !is_end && found.pattern < 0) return false;
    raise(events, {EventKind::DIED, handle});
    return true;
}

bool Sequence::written(int32_t lane_max, bool is_end, std::vector<Event>& events) {
    Lane& lane = active_lane();
    const int32_t position = lane.size() - 1;
    const int32_t id = lane.ids.back();
    if (phase == Phase::CONFIRM) {
        if (confirm_token(position, is_end, events)) return true;
    } else if (phase == Phase::PROVISIONAL) {
        const ContentToken token{id, active, position, lane.logprobs.at(position), 0};
        if (is_end)
            ending = token;
        else
            provisional.push_back(token);
        if (is_end || allowance() <= 0 || lane.size() >= lane_max) {
            raise(events, {EventKind::DUE, handle, static_cast<int32_t>(provisional.size())});
            return true;
        }
        return false;
    } else if (is_end) {
        if (phase == Phase::SCAN && release_until(position, events)) return true;
        end_content({id, active, position, lane.logprobs.at(position), 0}, events);
        return true;
    } else if (phase == Phase::SCAN) {
        if (scan_token(position, 0, events)) return true;
    } else {
        lane.stable = lane.size();
        if (emit(active, id, lane.logprobs.at(position), position, events)) return true;
    }
    if (lane.size() < lane_max) return false;
    raise(events, {EventKind::FULL, handle, active});
    return true;
}

bool Sequence::accept(int32_t k, bool ends, std::vector<Event>& events) {
    for (; k > 0; --k) {
        const ContentToken token = provisional.front();
        provisional.erase(provisional.begin());
        lanes[static_cast<size_t>(token.author)].stable = token.origin + 1;
        if (emit(token.author, token.id, token.logprob, token.origin, events)) return true;
    }
    if (!ends || !provisional.empty() || ending.id < 0) return false;
    end_content(ending, events);
    return true;
}

} // namespace splitdecode
