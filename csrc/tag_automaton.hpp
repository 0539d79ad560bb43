// F1. Finds control tags and stop strings in a stream of token bytes, and says where in which token they end.
//
//   bytes      . . . o n e   (  <  b  i  g  m  o  d  e  l  >  T h e
//   tokens     [ one ] [ (< ] [   big   ] [    model   ] [  >The  ]
//                         ^ the tag starts inside a token     ^ and ends inside one: the seam is a byte, not an id
//
// A state is one integer (the node of an Aho-Corasick automaton), so a snapshot per token costs four bytes and a
// rewind is an assignment. `depth(state)` bytes at the end of the stream may still become a pattern: they are held
// back.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace splitdecode {

class ByteMatcher {
  public:
    ByteMatcher() : ByteMatcher(std::vector<std::string>{}) {}
    // Throws std::invalid_argument on an empty pattern.
    explicit ByteMatcher(const std::vector<std::string>& patterns);

    static constexpr int32_t start = 0;
    bool empty() const { return lengths_.empty(); }
    int32_t step(int32_t state, uint8_t byte) const { return next_[static_cast<size_t>(state)][byte]; }
    // Longest pattern that ends here, or -1.
    int32_t match(int32_t state) const { return match_[static_cast<size_t>(state)]; }
    int32_t depth(int32_t state) const { return depth_[static_cast<size_t>(state)]; }
    int32_t length(int32_t pattern) const { return lengths_[static_cast<size_t>(pattern)]; }

    struct Found {
        int32_t pattern = -1; // -1: none
        int32_t end = 0;      // bytes consumed; after a match the rest is unread
    };
    // Feeds bytes until the first match ends; `state` is left behind the last byte consumed.
    Found feed(int32_t& state, std::string_view bytes) const;
    // True when `bytes`, read from the start state, hold a whole pattern or end in a part of one.
    bool enters(std::string_view bytes) const;

  private:
    std::vector<std::array<int32_t, 256>> next_;
    std::vector<int32_t> match_, depth_, lengths_;
};

// The bytes of every token of one tokenizer, and the way back for what a seam leaves over.
class Vocabulary {
  public:
    using Encoder = std::function<std::vector<int32_t>(const std::string&)>;
    // special[i] != 0: token i shows no text when special tokens are skipped.
    Vocabulary(std::vector<std::string> token_bytes, std::vector<uint8_t> special, Encoder encode);

    int32_t size() const { return static_cast<int32_t>(bytes_.size()); }
    // Throws std::out_of_range when the id is none of this vocabulary's.
    const std::string& bytes(int32_t id) const { return bytes_.at(static_cast<size_t>(id)); }
    bool special(int32_t id) const { return special_.at(static_cast<size_t>(id)) != 0; }
    std::vector<int32_t> encode(const std::string& residue) const { return encode_(residue); }

  private:
    std::vector<std::string> bytes_;
    std::vector<uint8_t> special_;
    Encoder encode_;
};

} // namespace splitdecode
