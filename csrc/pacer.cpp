// F1. When a slow model steps; the rule and its reason are in pacer.hpp.
#include "pacer.hpp"

#include <stdexcept>

namespace splitdecode {

namespace {
constexpr double weight = 0.1; // of the newest step in the running mean
}

void Pacer::set(double patience, double max_wait_ms) {
    if (!(patience >= 0.0 && max_wait_ms >= 0.0)) throw std::invalid_argument("pace: expected numbers from 0 up");
    patience_ = patience;
    max_wait_ms_ = max_wait_ms;
}

void Pacer::landed(size_t lane, double ms) {
    double& mean = step_ms_.at(lane);
    mean = mean == 0.0 ? ms : mean + weight * (ms - mean);
}

bool Pacer::holds(size_t lane, const Demand& demand) const {
    if (!active() || demand.oldest >= max_wait_ms_) return false;
    int32_t held_up = 0;
    for (size_t other = 0; other < rows_.size(); ++other)
        if (other != lane && step_ms_[other] < step_ms_[lane]) held_up += rows_[other];
    return demand.waited < patience_ * held_up * step_ms_[lane];
}

} // namespace splitdecode
