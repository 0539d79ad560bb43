// F1. Aho-Corasick over bytes; see the header for what a state means.
#include "tag_automaton.hpp"

#include <queue>
#include <stdexcept>
#include <utility>

namespace splitdecode {

ByteMatcher::ByteMatcher(const std::vector<std::string>& patterns) {
    auto add_node = [this](int32_t depth) {
        next_.emplace_back();
        next_.back().fill(-1);
        match_.push_back(-1);
        depth_.push_back(depth);
        return static_cast<int32_t>(next_.size()) - 1;
    };
    add_node(0);
    for (size_t p = 0; p < patterns.size(); ++p) {
        if (patterns[p].empty()) throw std::invalid_argument("a tag or stop string must not be empty");
        int32_t node = start;
        for (unsigned char byte : patterns[p]) {
            if (next_[static_cast<size_t>(node)][byte] < 0) {
                const int32_t fresh = add_node(depth_[static_cast<size_t>(node)] + 1);
                next_[static_cast<size_t>(node)][byte] = fresh;
            }
            node = next_[static_cast<size_t>(node)][byte];
        }
        if (match_[static_cast<size_t>(node)] < 0) match_[static_cast<size_t>(node)] = static_cast<int32_t>(p);
        lengths_.push_back(static_cast<int32_t>(patterns[p].size()));
    }
    // Breadth first: a node's fallback is finished before the node is, so missing edges can be copied from it.
    std::vector<int32_t> fallback(next_.size(), start);
    std::queue<int32_t> order;
    for (auto& edge : next_[0]) {
        if (edge < 0)
            edge = start;
        else
            order.push(edge);
    }
    while (!order.empty()) {
        const auto node = static_cast<size_t>(order.front());
        order.pop();
        const auto back = static_cast<size_t>(fallback[node]);
        if (match_[node] < 0) match_[node] = match_[back];
        for (size_t byte = 0; byte < 256; ++byte) {
            const int32_t child = next_[node][byte];
            if (child < 0) {
                next_[node][byte] = next_[back][byte];
            } else {
                fallback[static_cast<size_t>(child)] = next_[back][byte];
                order.push(child);
            }
        }
    }
}

ByteMatcher::Found ByteMatcher::feed(int32_t& state, std::string_view bytes) const {
    for (size_t i = 0; i < bytes.size(); ++i) {
        state = step(state, static_cast<uint8_t>(bytes[i]));
        if (match(state) >= 0) return {match(state), static_cast<int32_t>(i) + 1};
    }
    return {-1, static_cast<int32_t>(bytes.size())};
}

bool ByteMatcher::enters(std::string_view bytes) const {
    int32_t state = start;
    return feed(state, bytes).pattern >= 0 || depth(state) > 0;
}

Vocabulary::Vocabulary(std::vector<std::string> token_bytes, std::vector<uint8_t> special, Encoder encode)
    : bytes_(std::move(token_bytes)), special_(std::move(special)), encode_(std::move(encode)) {
    if (special_.size() != bytes_.size())
        throw std::invalid_argument("special flags: " + std::to_string(special_.size()) + " for " +
                                    std::to_string(bytes_.size()) + " tokens");
}

} // namespace splitdecode
