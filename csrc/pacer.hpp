// F1. Whether a slow model should step now: hand-offs of many sequences are batched, and nobody waits for ever.
//
// On one device a step of the slow model holds up every row of the fast ones, and costs the same for one row as for
// many:
//
//     fast   x x x x x x x x x x x x | held up ............. | x x x      so it waits until its rows have waited as
//     slow   . . . waiting . . . . . | one step for them all | . . .      long, summed up, as others will for it
//
//     launch when   sum of waits >= patience x rows held up x time of a step,   or   oldest wait >= max_wait
//
// With f fast rows and w slow ones this is a slow step every r = f t_slow / (w t_fast) fast steps. A stream that writes
// g tokens by the fast model and s by the slow one spends g / r and s cycles of r t_fast + t_slow, so its time (g / r +
// s)(r t_fast + t_slow) is least at r = sqrt(g t_slow / (s t_fast)); and as f / w = g / (r s), that is the same r. Step
// times are running means of measured ones. patience 0 steps at once: least latency at a seam.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace splitdecode {

// What waits on one model: rows, the sum of their waits and the longest, in milliseconds.
struct Demand {
    int32_t rows = 0;
    double waited = 0.0, oldest = 0.0;
};

class Pacer {
  public:
    explicit Pacer(size_t lanes) : step_ms_(lanes, 0.0), rows_(lanes, 0) {}

    // std::invalid_argument unless both are >= 0.
    void set(double patience, double max_wait_ms);
    // A step of the lane took so long.
    void landed(size_t lane, double ms);
    // The lane has launched a step of so many rows; 0: it had nothing to do, or is held.
    void launched(size_t lane, int32_t rows) { rows_.at(lane) = rows; }
    bool holds(size_t lane, const Demand& demand) const;
    double step_ms(size_t lane) const { return step_ms_.at(lane); }
    bool active() const { return patience_ > 0.0; }

  private:
    double patience_ = 0.0, max_wait_ms_ = 0.0;
    std::vector<double> step_ms_; // running mean; 0: none measured yet
    std::vector<int32_t> rows_;   // of the lane's newest step
};

} // namespace splitdecode
