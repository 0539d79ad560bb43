// The memory under the walk of fuzz_scheduler.cpp: pools, perhaps one memory for both, perhaps shelves, and what lies
// in every cell.
//
//     apart     | lane 0 .................. | lane 1 .................. |
//     shared    | extent 0                  | extent 1                  | ..      laid out as in runtime/kvcache.py
//     lane 0    | l0 p0 p1 p2 | l1 p0 p1 p2 | absent                    |
//     lane 1    | absent                    | l0 p0 | l1 p0 | l2 p0     |
//
// A slot has several cells there, and what one lane writes the other one loses: a copy to the shelf that comes too late
// finds something else, as it would on a device.
#pragma once

#include "arena.hpp"
#include "fuzz.hpp"
#include "scheduler.hpp"

#include <algorithm>
#include <memory>
#include <random>
#include <utility>
#include <vector>

namespace splitdecode {

class WalkMemory {
  public:
    // Sizes at random; one sequence of max_len positions in both lanes has room.
    WalkMemory(std::mt19937_64& random, int32_t page_size, int32_t max_len) : page_size_(page_size), kept_(2) {
        const auto below = [&](int32_t n) { return static_cast<int32_t>(random() % static_cast<uint64_t>(n)); };
        pools_.reserve(2);
        shelves_.reserve(2);
        std::vector<int32_t> pages(2);
        const bool tight = below(2) == 0;
        for (int32_t& count : pages) {
            count = (max_len + page_size - 1) / page_size;
            count += below(tight ? 5 : 2 * count);
        }
        if (below(2) == 0)
            set_apart(pages, below);
        else
            share(pages, below);
        for (size_t lane = 0; lane < 2; ++lane) {
            const int32_t size = std::vector<int32_t>{0, 6, 40, 40}[static_cast<size_t>(below(4))];
            shelves_.emplace_back(std::max(size, 1), page_size, false);
            has_shelf_.push_back(size > 0);
            kept_[lane].resize(static_cast<size_t>(size * page_size), std::vector<Cell>(cells(lane)));
        }
    }

    PagePool& pool(int32_t lane) { return pools_.at(static_cast<size_t>(lane)); }
    PagePool* shelf(int32_t lane) {
        return has_shelf_.at(static_cast<size_t>(lane)) ? &shelves_[static_cast<size_t>(lane)] : nullptr;
    }
    Arena* arena() { return arena_.get(); } // null: none is shared

    // What a slot holds for a lane; 0: nothing, or parts of different things.
    uint64_t read(int32_t lane, int32_t slot) const {
        return whole(lane, cells(static_cast<size_t>(lane)),
                     [&](size_t k) -> const Cell& { return memory_.at(cell(lane, slot, k)); });
    }
    uint64_t read_shelf(int32_t lane, int32_t slot) const {
        const auto& kept = kept_.at(static_cast<size_t>(lane)).at(static_cast<size_t>(slot));
        return whole(lane, kept.size(), [&](size_t k) -> const Cell& { return kept[k]; });
    }
    void write(int32_t lane, int32_t slot, uint64_t value) {
        for (size_t k = 0; k < cells(static_cast<size_t>(lane)); ++k) memory_.at(cell(lane, slot, k)) = {lane, value};
    }

    // Cells as they are, in order: the last page of a lane is rarely full.
    void transfer(int32_t lane, const std::vector<Transfer>& moves) {
        for (const Transfer& move : moves) {
            EXPECT(move.out || !pool(lane).immutable(move.page));
            for (int32_t n = 0; n < page_size_; ++n) {
                const auto place = static_cast<size_t>(move.shelf_page * page_size_ + n);
                std::vector<Cell>& kept = kept_.at(static_cast<size_t>(lane)).at(place);
                for (size_t k = 0; k < kept.size(); ++k) {
                    Cell& here = memory_.at(cell(lane, move.page * page_size_ + n, k));
                    if (move.out)
                        kept[k] = here;
                    else
                        here = kept[k];
                }
            }
        }
    }

  private:
    struct Cell {
        int32_t lane = -1; // the same numbers mean something else to another model
        uint64_t value = 0;
    };
    struct Layout {
        int32_t base, width, layers, extent; // width: cells of a slot in one layer
    };

    template <class Below> void set_apart(const std::vector<int32_t>& pages, Below&& below) {
        int32_t size = 0;
        for (const int32_t count : pages) {
            pools_.emplace_back(count, page_size_, below(3) != 0);
            layouts_.push_back({size, 1, 1, 0});
            size += count * page_size_;
        }
        memory_.resize(static_cast<size_t>(size));
    }

    // Both lanes' layer pages fill an extent: six cells, or twice that, for each slot of a page.
    template <class Below> void share(const std::vector<int32_t>& pages, Below&& below) {
        const int32_t scale = 1 + below(2), idle = below(3);
        std::vector<int32_t> strides, shares;
        for (int32_t lane = 0; lane < 2; ++lane) {
            const int32_t width = 2 + lane, stride = 6 * scale / width, layers = 1 + below(std::min(3, stride));
            layouts_.push_back({0, width, layers, stride / layers});
            strides.push_back(stride);
            shares.push_back((pages[static_cast<size_t>(lane)] - 1) / layouts_.back().extent + 1);
        }
        const int32_t extents = shares[0] + shares[1] + idle;
        for (size_t lane = 0; lane < 2; ++lane)
            pools_.emplace_back(extents * layouts_[lane].extent, page_size_, below(3) != 0, layouts_[lane].extent,
                                strides[lane]);
        if (below(4) == 0) shares = {0, 0};
        arena_ = std::make_unique<Arena>(std::vector{&pools_[0], &pools_[1]}, shares);
        memory_.resize(static_cast<size_t>(extents * 6 * scale * page_size_));
    }

    size_t cells(size_t lane) const { return static_cast<size_t>(layouts_[lane].width * layouts_[lane].layers); }
    size_t cell(int32_t lane, int32_t slot, size_t k) const {
        const Layout& own = layouts_[static_cast<size_t>(lane)];
        const int32_t n = static_cast<int32_t>(k), layer = n / own.width;
        return static_cast<size_t>(own.base + (slot + layer * own.extent * page_size_) * own.width + n % own.width);
    }
    template <class Get> static uint64_t whole(int32_t lane, size_t count, Get&& get) {
        for (size_t k = 0; k < count; ++k)
            if (get(k).lane != lane || get(k).value != get(0).value) return 0;
        return get(0).value;
    }

    int32_t page_size_;
    std::vector<PagePool> pools_, shelves_;
    std::vector<bool> has_shelf_;
    std::unique_ptr<Arena> arena_;
    std::vector<Layout> layouts_;
    std::vector<Cell> memory_;
    std::vector<std::vector<std::vector<Cell>>> kept_; // by lane and shelf slot
};

} // namespace splitdecode
