// Statistics of a batch: mean and sum of squared distances of each channel, rounded as torch's kernels round them.

#pragma once

#include "native_elements.h"

namespace {

// Sums of a channel in NCHW: 16 lanes of fp64.
struct Lanes {
  double values[LANES] = {};
  double total() const {
    double sum = 0;
    for (double value : values) sum += value;
    return sum;
  }
};

template <typename E, typename Term>
inline void add_terms(Lanes& lanes, const E* __restrict from, const E* next, int64_t count, const Term& term) {
  double* __restrict sums = lanes.values;
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    __builtin_prefetch(next + i, 0, 3);
    for (int64_t lane = 0; lane < LANES; ++lane) sums[lane] += static_cast<double>(term(to_float(from[i + lane])));
  }
  for (int64_t lane = 0; i < count; ++i, ++lane) sums[lane] += static_cast<double>(term(to_float(from[i])));
}

// Mean and the sum of squared distances from it of a group of channels, rounded as torch's kernels round them.
template <typename E>
void statistics_nchw(const Spec& spec, const Geometry& shape, const E* z, int64_t group, float* mean, float* squares) {
  const int64_t picture = spec.C * spec.plane, channels = shape.channels_of(spec, group);
  const E* from = z + group * shape.channels * spec.plane;
  std::vector<Lanes> sums(channels), distances(channels);
  const auto pass = [&](std::vector<Lanes>& lanes, const auto& term_of) {
    for (int64_t frame = 0; frame < shape.frames; ++frame) {
      const E* here = from + frame * picture;
      const E* next = frame + 1 < shape.frames ? here + picture : here;
      for (int64_t c = 0; c < channels; ++c)
        add_terms(lanes[c], here + c * spec.plane, next + c * spec.plane, spec.plane, term_of(c));
    }
  };
  pass(sums, [](int64_t) { return [](float x) { return x; }; });
  for (int64_t c = 0; c < channels; ++c)
    mean[c] = static_cast<float>(sums[c].total() / static_cast<double>(shape.elements));
  pass(distances, [mean](int64_t c) {
    return [centre = mean[c]](float x) { return (x - centre) * (x - centre); };
  });
  for (int64_t c = 0; c < channels; ++c) squares[c] = static_cast<float>(distances[c].total());
}

template <typename E, typename Add>
void add_rows(const Spec& spec, const E* z, int64_t begin, int64_t end, float* sums, const Add& add) {
  constexpr int64_t WIDTH = 64, ROWS = 256;
  for (int64_t start = begin; start < end; start += ROWS) {
    const int64_t stop = std::min(end, start + ROWS);
    int64_t channel = 0;
    for (; channel + WIDTH <= spec.C; channel += WIDTH) {
      float kept[WIDTH];
      std::memcpy(kept, sums + channel, sizeof kept);
      for (int64_t row = start; row < stop; ++row) {
        const E* __restrict from = z + row * spec.C + channel;
        for (int64_t i = 0; i < WIDTH; ++i) kept[i] = add(kept[i], to_float(from[i]), channel + i);
      }
      std::memcpy(sums + channel, kept, sizeof kept);
    }
    if (channel == spec.C) continue;
    for (int64_t row = start; row < stop; ++row) {
      const E* __restrict from = z + row * spec.C;
      for (int64_t i = channel; i < spec.C; ++i) sums[i] = add(sums[i], to_float(from[i]), i);
    }
  }
}

template <typename E>
bool statistics_nhwc(const Spec& spec, const Geometry& shape, const E* z, float* mean, float* squares) {
  // torch's split: a thread takes a chunk of rows.
  const int64_t chunk = (shape.elements + spec.threads - 1) / spec.threads;
  std::vector<float> partial(spec.threads * spec.C);
  bool sound = true;
  for (const bool second : {false, true}) {
    std::fill(partial.begin(), partial.end(), 0.0f);
    const int64_t grain = GRAIN / std::max<int64_t>(1, chunk * spec.C);
    sound = sound && parallel(spec.threads, grain, [&](int64_t first, int64_t last) {
      for (int64_t thread = first; thread < last; ++thread) {
        const int64_t begin = std::min(shape.elements, thread * chunk), end = std::min(shape.elements, begin + chunk);
        float* sums = partial.data() + thread * spec.C;
        if (second)
          add_rows(spec, z, begin, end, sums, [mean](float sum, float x, int64_t channel) {
            const float distance = x - mean[channel];
            return fused(distance, distance, sum);
          });
        else
          add_rows(spec, z, begin, end, sums, [](float sum, float x, int64_t) { return sum + x; });
      }
    });
    for (int64_t channel = 0; channel < spec.C; ++channel) {
      double sum = 0;
      for (int64_t thread = 0; thread < spec.threads; ++thread) sum += partial[thread * spec.C + channel];
      if (second)
        squares[channel] = static_cast<float>(sum);
      else
        mean[channel] = static_cast<float>(sum / static_cast<double>(shape.elements));
    }
  }
  return sound;
}

}  // namespace
