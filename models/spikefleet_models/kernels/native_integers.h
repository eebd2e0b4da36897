// I-LIF alone, without a batch norm before it: T steps over [T, n] numbers that follow one another in memory.
//
// Kept for backward is one bit of each number: whether u[t] was in [0, D].

#pragma once

#include "native_elements.h"

namespace {

struct Integers {
  int64_t T, n;
  int32_t bf16;
  float bound, leak, scale;
  const void* x;        // forward: x[t]; backward: dL/ds[t], or null: 0
  void* out;            // forward: s[t]; backward: dL/dx[t]
  uint8_t* bits;        // [T, ceil(n / 8)]; null where nothing is kept
  const float* v_from;  // forward: v[0]; backward: dL/dv[T]; or null: 0
  float* v_to;          // forward: v[T]; backward: dL/dv[0]; or null
};

// Eight bytes of 0 or 1 as the bits of one, and back: bit i is the i-th byte of the word, counted from the lowest.
inline uint8_t pack(const uint8_t* bytes) {
  uint64_t word;
  std::memcpy(&word, bytes, sizeof word);
  return static_cast<uint8_t>((word * 0x0102040810204080u) >> 56);
}
inline void unpack(uint8_t bits, uint8_t* bytes) {
  const uint64_t places = (bits * uint64_t{0x0101010101010101u}) & 0x8040201008040201u;
  const uint64_t word = ((places + 0x7f7f7f7f7f7f7f7fu) >> 7) & 0x0101010101010101u;
  std::memcpy(bytes, &word, sizeof word);
}

template <typename E>
void integers_forward_tile(const Integers& call, int64_t start, int64_t n) {
  const int64_t row = (call.n + 7) / 8;
  const float bound = call.bound, leak = call.leak, scale = call.scale;
  float v[TILE], buffer[TILE], written[TILE];
  uint8_t inside[TILE] = {};
  if (call.v_from == nullptr)
    std::fill(v, v + n, 0.0f);
  else
    std::memcpy(v, call.v_from + start, n * sizeof(float));
  for (int64_t t = 0; t < call.T; ++t) {
    const float* __restrict x = view(static_cast<const E*>(call.x) + t * call.n + start, n, buffer);
    E* out = static_cast<E*>(call.out) + t * call.n + start;
    float* __restrict s = target(out, written);
    for (int64_t i = 0; i < n; ++i) {
      const float u = v[i] * leak + x[i] * scale;
      s[i] = emitted_by(u, bound);
      v[i] = u;
    }
    if (call.bits != nullptr) {
      for (int64_t i = 0; i < n; ++i) inside[i] = v[i] >= 0.0f && v[i] <= bound;
      uint8_t* bits = call.bits + t * row + start / 8;
      for (int64_t i = 0; i < n; i += 8) bits[i / 8] = pack(inside + i);
    }
    for (int64_t i = 0; i < n; ++i) v[i] = v[i] - s[i];
    store(s, out, n);
  }
  if (call.v_to != nullptr) std::memcpy(call.v_to + start, v, n * sizeof(float));
}

template <typename E>
void integers_backward_tile(const Integers& call, int64_t start, int64_t n) {
  const int64_t row = (call.n + 7) / 8;
  const float leak = call.leak, scale = call.scale;
  float carry[TILE], buffer[TILE], written[TILE];
  uint8_t inside[TILE] = {};
  if (call.v_from == nullptr)
    std::fill(carry, carry + n, 0.0f);
  else
    std::memcpy(carry, call.v_from + start, n * sizeof(float));
  for (int64_t t = call.T - 1; t >= 0; --t) {
    E* out = static_cast<E*>(call.out) + t * call.n + start;
    float* __restrict to_x = target(out, written);
    if (call.x != nullptr) {
      const float* __restrict grad = view(static_cast<const E*>(call.x) + t * call.n + start, n, buffer);
      const uint8_t* bits = call.bits + t * row + start / 8;
      for (int64_t i = 0; i < n; i += 8) unpack(bits[i / 8], inside + i);
      for (int64_t i = 0; i < n; ++i) carry[i] = carry[i] + grad[i] * static_cast<float>(inside[i]);
    }
    for (int64_t i = 0; i < n; ++i) {
      to_x[i] = carry[i] * scale;
      carry[i] = carry[i] * leak;
    }
    store(to_x, out, n);
  }
  if (call.v_to != nullptr) std::memcpy(call.v_to + start, carry, n * sizeof(float));
}

template <typename Body>
bool over_tiles(const Integers& call, const Body& body) {
  return parallel((call.n + TILE - 1) / TILE, GRAIN / (call.T * TILE), [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) body(index * TILE, std::min(TILE, call.n - index * TILE));
  });
}

template <typename E>
bool integers_forward(const Integers& call) {
  return over_tiles(call, [&](int64_t start, int64_t n) { integers_forward_tile<E>(call, start, n); });
}

template <typename E>
bool integers_backward(const Integers& call) {
  return over_tiles(call, [&](int64_t start, int64_t n) { integers_backward_tile<E>(call, start, n); });
}

}  // namespace
