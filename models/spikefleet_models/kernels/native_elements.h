// Elements, threads and memory of the native spiking unit; native_unit.cpp says what it computes.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t TILE = 512;
constexpr int64_t BLOCKS = 64;
constexpr int64_t LANES = 16;
constexpr int64_t GRAIN = 1 << 15;  // elements below which a second thread costs more than it gains
constexpr int64_t LINE = 64;        // bytes

enum Gate : int32_t { NONE, BSG, ADD, AND, IAND, POST_ADD };
enum Leak : int32_t { NO_LEAK, DIVISION, PRODUCT, INTEGERS };  // INTEGERS: I-LIF, whose leak is `tau`
enum Surrogate : int32_t {
  ATAN,
  RECT,
  PIECEWISE_QUADRATIC,
  SOFT_SIGN,
  SUPER_SPIKE,
  SIGMOID,
  PIECEWISE_EXP,
  ERF,
  DSPIKE
};

struct Spec {
  int64_t T, B, C, plane;
  int32_t channels_last, bf16, repeat, gate, exact, leak, decay_input, soft, detached, surrogate, threads, learned;
  float threshold, rest, tau, alpha;
  float bound, scale;  // of I-LIF
};

struct Bf16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(Bf16 x) {
  const uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}
inline void put(float& place, float x) { place = x; }
inline void put(Bf16& place, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  place.bits = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}

// The rest of x that a place does not hold; a float holds all of it.
inline void put_rest(float*, int64_t, float, float) {}
inline void put_rest(Bf16* places, int64_t i, float x, Bf16 held) { put(places[i], x - to_float(held)); }
inline float with_rest(float held, const float*, int64_t) { return held; }
inline float with_rest(Bf16 held, const Bf16* places, int64_t i) { return to_float(held) + to_float(places[i]); }

// n elements as floats: the memory itself, or a copy in `buffer`.
inline const float* view(const float* from, int64_t, float*) { return from; }
inline const float* view(const Bf16* __restrict from, int64_t n, float* __restrict buffer) {
  for (int64_t i = 0; i < n; ++i) buffer[i] = to_float(from[i]);
  return buffer;
}

// Where to write n floats that `store` then brings to `to`.
inline float* target(float* to, float*) { return to; }
inline float* target(Bf16*, float* buffer) { return buffer; }
inline void store(const float*, float*, int64_t) {}
inline void store(const float* __restrict from, Bf16* __restrict to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) put(to[i], from[i]);
}

// Fetches into the second-level cache what the next tile needs while this one is computed: a tile's runs are too short
// for the processor to guess, and the first-level cache is full of this one.
template <int WRITE, typename E>
inline void fetch(const E* from, int64_t n) {
  for (int64_t i = 0; i < n; i += LINE / static_cast<int64_t>(sizeof(E))) __builtin_prefetch(from + i, WRITE, 2);
}

inline float fused(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;  // the check at load decides whether this machine's torch does the same
#endif
}

using Range = void (*)(int64_t, int64_t, void*);
int32_t (*torch_parallel_for)(int64_t, int64_t, int64_t, Range, void*) = nullptr;

template <typename Body>
bool parallel(int64_t count, int64_t grain, const Body& body) {
  const Range range = [](int64_t begin, int64_t end, void* context) {
    (*static_cast<const Body*>(context))(begin, end);
  };
  return torch_parallel_for(0, count, std::max<int64_t>(grain, 1), range, const_cast<Body*>(&body)) == 0;
}

// Memory of a thread that is kept from call to call: fresh pages cost more than the loops that fill them.
float* scratch(int which, int64_t count) {
  static thread_local std::vector<float> kept[2];
  if (static_cast<int64_t>(kept[which].size()) < count) kept[which].resize(count);
  return kept[which].data();
}

// round(clip(u, 0, bound)), halves to the even integer; NaN stays NaN.
inline float emitted_by(float u, float bound) {
  const float low = u < 0.0f ? 0.0f : u, clipped = low > bound ? bound : low;
  constexpr float SHIFT = 12582912.0f;  // 1.5 * 2^23: sums near it are integers
  return (clipped + SHIFT) - SHIFT;
}

// Positions of one step that follow one another in memory.
struct Tile {
  int64_t offset, size;
};

// How tensors are cut. A group is what one thread computes at a time: in NCHW all of a few channels, whose pictures are
// the tiles, or parts of pictures where planes are large; in NHWC everything, cut into rows of C numbers.
struct Geometry {
  int64_t slab, positions, frames, elements, channels, groups, rows, tile, tiles;
  explicit Geometry(const Spec& spec)
      : slab(spec.B * spec.C * spec.plane),
        positions(spec.B * spec.plane),
        frames(spec.repeat ? spec.B : spec.T * spec.B),
        elements(frames * spec.plane),
        channels(spec.channels_last ? spec.C : std::max<int64_t>(1, std::min(spec.C, TILE / spec.plane))),
        groups((spec.C + channels - 1) / channels) {
    if (spec.channels_last) {
      rows = std::max<int64_t>(1, TILE / spec.C);
      tile = rows * spec.C;
      tiles = (positions + rows - 1) / rows;
    } else {
      rows = channels == 1 ? (spec.plane + TILE - 1) / TILE : 1;  // tiles of a picture
      tile = channels == 1 ? std::min(TILE, spec.plane) : channels * spec.plane;
      tiles = rows * spec.B;
    }
  }
  int64_t channels_of(const Spec& spec, int64_t group) const {
    return std::min(channels, spec.C - group * channels);
  }
  Tile at(const Spec& spec, int64_t group, int64_t index) const {
    if (spec.channels_last) {
      const int64_t first = index * rows;
      return {first * spec.C, std::min(rows, positions - first) * spec.C};
    }
    const int64_t picture = index / rows * spec.C * spec.plane + group * channels * spec.plane;
    if (channels > 1) return {picture, channels_of(spec, group) * spec.plane};
    const int64_t start = index % rows * TILE;
    return {picture + start, std::min(TILE, spec.plane - start)};
  }
  Tile after(const Spec& spec, int64_t group, int64_t index) const {
    return index + 1 < tiles ? at(spec, group, index + 1) : Tile{0, 0};
  }
};

// In the first `count` numbers: one of each channel, which become those of each position of a tile.
void spread(const Spec& spec, const Geometry& shape, int64_t count, float* values) {
  if (spec.channels_last)
    for (int64_t row = 1; row < shape.rows; ++row) std::memcpy(values + row * spec.C, values, spec.C * sizeof(float));
  else if (shape.channels > 1)
    for (int64_t c = count - 1; c >= 0; --c) std::fill_n(values + c * spec.plane, spec.plane, values[c]);
}

}  // namespace
