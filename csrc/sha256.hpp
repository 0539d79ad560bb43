// F1. SHA-256 and the chain of page hashes: a page's digest names its tokens and everything before them.
//
//     root = sha256(salt)      page 0 = sha256(root || tokens 0..P-1)      page 1 = sha256(page 0 || tokens P..2P-1)
//     ...
//
// A cryptographic hash, because a collision would silently answer one request with another one's keys and values.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace splitdecode {

using Digest = std::array<uint8_t, 32>;

// SHA-256 of `size` bytes.
Digest sha256(const void* data, size_t size);

// The parent of a lane's first page. The salt names whatever else decides the cached values: model, role, adapter.
Digest root_digest(std::string_view salt);

// sha256(parent || n tokens as little-endian int32).
Digest chain_digest(const Digest& parent, const int32_t* tokens, size_t n);

} // namespace splitdecode
