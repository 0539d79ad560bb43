// F1. SHA-256 (FIPS 180-4), and the chain of page hashes built on it.
#include "sha256.hpp"

#include <cstring>

namespace splitdecode {
namespace {

constexpr uint32_t kRound[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

uint32_t rotr(uint32_t x, int n) {
    return (x >> n) | (x << (32 - n));
}

class Sha256 {
  public:
    void update(const void* data, size_t size) {
        const auto* bytes = static_cast<const uint8_t*>(data);
        total_ += size;
        while (size > 0) {
            const size_t taken = size < sizeof block_ - used_ ? size : sizeof block_ - used_;
            std::memcpy(block_ + used_, bytes, taken);
            used_ += taken;
            bytes += taken;
            size -= taken;
            if (used_ == sizeof block_) {
                compress();
                used_ = 0;
            }
        }
    }

    Digest finish() {
        const uint64_t bits = total_ * 8;
        const uint8_t one = 0x80;
        const uint8_t zero = 0;
        update(&one, 1);
        while (used_ != sizeof block_ - 8) update(&zero, 1);
        uint8_t length[8];
        for (int i = 0; i < 8; ++i) length[i] = static_cast<uint8_t>(bits >> (56 - 8 * i));
        update(length, sizeof length);
        Digest digest;
        for (size_t i = 0; i < digest.size(); ++i) {
            digest[i] = static_cast<uint8_t>(state_[i / 4] >> (24 - 8 * (i % 4)));
        }
        return digest;
    }

  private:
    void compress() {
        uint32_t w[64];
        for (int i = 0; i < 16; ++i) {
            const uint8_t* p = block_ + 4 * i;
            w[i] = uint32_t{p[0]} << 24 | uint32_t{p[1]} << 16 | uint32_t{p[2]} << 8 | uint32_t{p[3]};
        }
        for (int i = 16; i < 64; ++i) {
            const uint32_t s0 = rotr(w[i - 15], 7) ^ rotr(w[i - 15], 18) ^ (w[i - 15] >> 3);
            const uint32_t s1 = rotr(w[i - 2], 17) ^ rotr(w[i - 2], 19) ^ (w[i - 2] >> 10);
            w[i] = w[i - 16] + s0 + w[i - 7] + s1;
        }
        uint32_t s[8];
        std::memcpy(s, state_, sizeof s);
        for (int i = 0; i < 64; ++i) {
            const uint32_t e1 = rotr(s[4], 6) ^ rotr(s[4], 11) ^ rotr(s[4], 25);
            const uint32_t choice = (s[4] & s[5]) ^ (~s[4] & s[6]);
            const uint32_t t1 = s[7] + e1 + choice + kRound[i] + w[i];
            const uint32_t e0 = rotr(s[0], 2) ^ rotr(s[0], 13) ^ rotr(s[0], 22);
            const uint32_t majority = (s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]);
            for (int j = 7; j > 0; --j) s[j] = s[j - 1];
            s[4] += t1;
            s[0] = t1 + e0 + majority;
        }
        for (int i = 0; i < 8; ++i) state_[i] += s[i];
    }

    uint32_t state_[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                          0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    uint8_t block_[64] = {};
    size_t used_ = 0;
    uint64_t total_ = 0;
};

} // namespace

Digest sha256(const void* data, size_t size) {
    Sha256 hasher;
    hasher.update(data, size);
    return hasher.finish();
}

Digest root_digest(std::string_view salt) {
    return sha256(salt.data(), salt.size());
}

Digest chain_digest(const Digest& parent, const int32_t* tokens, size_t n) {
    Sha256 hasher;
    hasher.update(parent.data(), parent.size());
    for (size_t i = 0; i < n; ++i) {
        const auto id = static_cast<uint32_t>(tokens[i]);
        const uint8_t bytes[4] = {static_cast<uint8_t>(id), static_cast<uint8_t>(id >> 8),
                                  static_cast<uint8_t>(id >> 16), static_cast<uint8_t>(id >> 24)};
        hasher.update(bytes, sizeof bytes);
    }
    return hasher.finish();
}

} // namespace splitdecode
