// What the fuzzers of csrc/ (F1) share: a check that names its file and line, and one fuzz_x(seed) per structure.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#define EXPECT(held)                                                                                                   \
    do {                                                                                                               \
        if (!(held)) throw std::runtime_error(std::string(__FILE__) + ":" + std::to_string(__LINE__) + ": " #held);    \
    } while (false)

// fuzz_scheduler.cpp
void fuzz_scheduler(uint64_t seed);
std::string met_by_scheduler(); // "what 12, ...": of all seeds so far
