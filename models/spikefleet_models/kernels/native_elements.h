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
enum Leak : int32_t { NO_LEAK, DIVISION, PRODUCT };
enum Surrogate : int32_t { ATAN, RECT, PIECEWISE_QUADRATIC, SOFT_SIGN, SUPER_SPIKE };

struct Spec {
  int64_t T, B, C, plane;
  int32_t channels_last, bf16, repeat, gate, exact, leak, decay_input, soft, detached, surrogate, threads, learned;
  float threshold, rest, tau, alpha;
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

// Fetches what the next tile needs while this one is computed: runs of a tile are too short for the processor to guess.
template <int WRITE, typename E>
inline void fetch(const E* from, int64_t n) {
  for (int64_t i = 0; i < n; i += LINE / static_cast<int64_t>(sizeof(E))) __builtin_prefetch(from + i, WRITE, 3);
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

}  // namespace
