// The sanitizers' door to csrc/ (F1), without Python: drives each structure at random against a twin of std::map and
// checks its invariants after every step.    csrc_fuzz [first seed [number of seeds]]    Exit 0: nothing was found.
//
// One fuzz_x(seed) per structure; kFuzzers names them.
#include "fuzz.hpp"
#include "page_pool.hpp"
#include "sha256.hpp"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

using namespace splitdecode;

namespace {

template <class F> bool misused(F&& act) {
    try {
        act();
    } catch (const std::logic_error&) {
        return true;
    }
    return false;
}

struct PagePoolTwin {
    int32_t num_pages;
    std::map<int32_t, int32_t> owners{};
    std::map<int32_t, Digest> names{};
    std::vector<int32_t> cached{}; // oldest first

    bool is_cached(int32_t page) const { return std::find(cached.begin(), cached.end(), page) != cached.end(); }
    bool is_free(int32_t page) const {
        return page >= 0 && page < num_pages && owners.count(page) == 0 && !is_cached(page);
    }
    size_t free_pages() const { return static_cast<size_t>(num_pages) - owners.size() - cached.size(); }
    int32_t page_of(const Digest& name) const {
        for (const auto& [page, known] : names) {
            if (known == name) return page;
        }
        return -1;
    }
};

void allocate(PagePool& pool, PagePoolTwin& twin, int32_t after) {
    const int32_t page = pool.allocate(after);
    if (after >= 0 && twin.is_free(after + 1)) {
        EXPECT(page == after + 1);
    } else if (twin.free_pages() > 0) {
        EXPECT(twin.is_free(page));
    } else if (!twin.cached.empty()) {
        EXPECT(page == twin.cached.front());
        twin.cached.erase(twin.cached.begin());
        twin.names.erase(page);
    } else {
        EXPECT(page == -1);
    }
    if (page != -1) twin.owners[page] = 1;
}

void release(PagePool& pool, PagePoolTwin& twin, int32_t page) {
    if (twin.owners.count(page) == 0) {
        EXPECT(misused([&] { pool.release(page); }));
        return;
    }
    pool.release(page);
    if (--twin.owners[page] > 0) return;
    twin.owners.erase(page);
    if (twin.names.count(page) != 0) twin.cached.push_back(page);
}

void lookup(PagePool& pool, PagePoolTwin& twin, const Digest& name) {
    const int32_t page = pool.lookup(name);
    EXPECT(page == twin.page_of(name));
    if (page == -1) return;
    twin.cached.erase(std::remove(twin.cached.begin(), twin.cached.end(), page), twin.cached.end());
    ++twin.owners[page];
}

void publish(PagePool& pool, PagePoolTwin& twin, int32_t page, const Digest& name) {
    if (twin.owners.count(page) == 0 || (twin.names.count(page) != 0 && twin.names[page] != name)) {
        EXPECT(misused([&] { pool.publish(page, name); }));
        return;
    }
    pool.publish(page, name);
    if (pool.prefix_caching() && twin.page_of(name) == -1) twin.names[page] = name;
}

void agree(const PagePool& pool, const PagePoolTwin& twin) {
    pool.check_invariants();
    EXPECT(pool.in_use() == static_cast<int32_t>(twin.owners.size()));
    EXPECT(pool.available() == twin.num_pages - pool.in_use());
    for (int32_t page = 0; page < twin.num_pages; ++page) {
        const auto owned = twin.owners.find(page);
        EXPECT(pool.owners(page) == (owned == twin.owners.end() ? 0 : owned->second));
        EXPECT(pool.immutable(page) == (twin.names.count(page) != 0 || pool.owners(page) > 1));
    }
}

void fuzz_page_pool(uint64_t seed) {
    std::mt19937_64 random(seed);
    const auto below = [&](int32_t n) { return static_cast<int32_t>(random() % static_cast<uint64_t>(n)); };
    PagePoolTwin twin{1 + below(24)};
    PagePool pool(twin.num_pages, 16, below(4) != 0);
    const Digest root = root_digest("fuzz");
    for (int step = 0; step < 600; ++step) {
        const int32_t page = below(twin.num_pages);
        const int32_t content = below(2 * twin.num_pages);
        const Digest name = chain_digest(root, &content, 1);
        const int32_t choice = below(100);
        if (choice < 35) {
            allocate(pool, twin, below(twin.num_pages + 1) - 1);
        } else if (choice < 65) {
            release(pool, twin, page);
        } else if (choice < 80) {
            publish(pool, twin, page, name);
        } else if (choice < 90) {
            lookup(pool, twin, name);
        } else if (choice < 99) {
            const bool owned = twin.owners.count(page) != 0;
            EXPECT(misused([&] { pool.retain(page); }) != owned);
            if (owned) ++twin.owners[page];
        } else {
            pool.clear_cache();
            twin.names.clear();
            twin.cached.clear();
        }
        agree(pool, twin);
    }
}

struct Fuzzer {
    const char* name;
    void (*run)(uint64_t seed);
    std::string (*met)();
};

constexpr Fuzzer kFuzzers[] = {{"page_pool", fuzz_page_pool, nullptr}, {"scheduler", fuzz_scheduler, met_by_scheduler}};

} // namespace

int main(int argc, char** argv) {
    const uint64_t first = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 0;
    const uint64_t count = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 50;
    for (const Fuzzer& fuzzer : kFuzzers) {
        for (uint64_t seed = first; seed < first + count; ++seed) {
            try {
                fuzzer.run(seed);
            } catch (const std::exception& error) {
                std::fprintf(stderr, "%s, seed %llu: %s\n", fuzzer.name, static_cast<unsigned long long>(seed),
                             error.what());
                return 1;
            }
        }
        std::printf("%s: %llu seeds from %llu\n", fuzzer.name, static_cast<unsigned long long>(count),
                    static_cast<unsigned long long>(first));
        if (fuzzer.met != nullptr) std::printf("%s met: %s\n", fuzzer.name, fuzzer.met().c_str());
    }
    return 0;
}
