// The spiking unit on the CPU: batch norm, T steps of a neuron, and the gate, forward and backward.
//
// z is [T * B, C, H, W] (or static [B, C, H, W]) in NCHW or NHWC, float or bfloat16; everything inside is float.
// A tile holds up to TILE positions of all T steps; each line of the equations is a short loop over memory that stays
// in the first-level cache. Products and sums are rounded one by one (no contraction), except where torch's kernels
// fuse them, so that spikes and running statistics equal torch's to the bit. Partial sums have fixed places and a fixed
// order: the same bits for any number of threads; only the batch statistics in NHWC follow torch's split over threads.
//
// Built on the user's machine (native_library.py): standard headers alone, C interface, threads of torch.

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

// Positions of one step: `count` runs of `length` elements that follow one another in memory.
struct Tile {
  int64_t offset, length, count, stride;
  int64_t size() const { return length * count; }
};

template <typename E>
void load(const E* from, const Tile& tile, float* __restrict to) {
  for (int64_t run = 0; run < tile.count; ++run) {
    const E* __restrict source = from + tile.offset + run * tile.stride;
    float* __restrict place = to + run * tile.length;
    for (int64_t i = 0; i < tile.length; ++i) place[i] = to_float(source[i]);
  }
}

template <typename E>
void store(const float* __restrict from, const Tile& tile, E* to) {
  for (int64_t run = 0; run < tile.count; ++run) {
    E* __restrict place = to + tile.offset + run * tile.stride;
    const float* __restrict source = from + run * tile.length;
    for (int64_t i = 0; i < tile.length; ++i) put(place[i], source[i]);
  }
}

// Values of each channel: one number in NCHW, where a tile has one channel; in NHWC a tile's length of them.
template <bool LAST>
struct PerChannel {
  const float* values;
  float operator[](int64_t i) const { return LAST ? values[i] : values[0]; }
};

template <bool LAST, typename E>
void load_normalised(const E* from, const Tile& tile, const float* scale, const float* shift, float* __restrict to) {
  const float a = scale[0], b = shift[0];
  for (int64_t run = 0; run < tile.count; ++run) {
    const E* __restrict source = from + tile.offset + run * tile.stride;
    float* __restrict place = to + run * tile.length;
    if (LAST) {
      for (int64_t i = 0; i < tile.length; ++i) place[i] = fused(to_float(source[i]), scale[i], shift[i]);
    } else {
      for (int64_t i = 0; i < tile.length; ++i) place[i] = fused(to_float(source[i]), a, b);
    }
  }
}

template <int32_t LEAK>
inline float leaked(float x, float tau) {
  return LEAK == DIVISION ? x / tau : x * tau;
}

// h[t] and v[t] of v[t-1] and x[t]; `out` gets h[t] or s[t].
template <int32_t LEAK, bool DECAY, bool SOFT, bool SPIKES>
void step(float* __restrict v, const float* __restrict x, float* __restrict out, int64_t n, const Spec& spec, float tau) {
  const float threshold = spec.threshold, rest = spec.rest;
  for (int64_t i = 0; i < n; ++i) {
    float h;
    if (LEAK == NO_LEAK) {
      h = v[i] + x[i];
    } else if (DECAY) {
      h = v[i] + leaked<LEAK>(x[i] - (v[i] - rest), tau);
    } else {
      h = (v[i] - leaked<LEAK>(v[i] - rest, tau)) + x[i];
    }
    const bool fired = h >= threshold;
    const float after = SOFT ? h - threshold : rest;
    out[i] = SPIKES ? (fired ? 1.0f : 0.0f) : h;
    v[i] = fired ? after : h;
  }
}

using Step = void (*)(float*, const float*, float*, int64_t, const Spec&, float);

template <bool SOFT, bool SPIKES>
Step step_of(const Spec& spec) {
  if (spec.leak == NO_LEAK) return step<NO_LEAK, false, SOFT, SPIKES>;
  if (spec.leak == DIVISION)
    return spec.decay_input ? step<DIVISION, true, SOFT, SPIKES> : step<DIVISION, false, SOFT, SPIKES>;
  return spec.decay_input ? step<PRODUCT, true, SOFT, SPIKES> : step<PRODUCT, false, SOFT, SPIKES>;
}

template <bool SPIKES>
Step step_of(const Spec& spec) {
  return spec.soft ? step_of<true, SPIKES>(spec) : step_of<false, SPIKES>(spec);
}

// Y of H (in `s`, replaced) and X.
void join(int32_t gate, float* __restrict s, const float* __restrict x, int64_t n) {
  if (gate == BSG)
    for (int64_t i = 0; i < n; ++i) s[i] = s[i] > 0.0f ? 1.0f : x[i];
  else if (gate == ADD)
    for (int64_t i = 0; i < n; ++i) s[i] = s[i] + x[i];
  else if (gate == AND)
    for (int64_t i = 0; i < n; ++i) s[i] = s[i] > 0.0f ? x[i] : 0.0f;
  else
    for (int64_t i = 0; i < n; ++i) s[i] = s[i] > 0.0f ? 0.0f : x[i];
}

// dL/dY in `grad` becomes dL/dH; `to_shortcut` gets dL/dX.
void join_backward(const Spec& spec, float* __restrict grad, const float* __restrict h, const float* __restrict x,
                   float* __restrict to_shortcut, int64_t n) {
  const float threshold = spec.threshold;
  if (spec.gate == BSG && spec.exact)
    for (int64_t i = 0; i < n; ++i) {
      const float g = grad[i];
      to_shortcut[i] = h[i] >= threshold ? 0.0f : g;
      grad[i] = g - g * x[i];
    }
  else if (spec.gate == BSG)
    for (int64_t i = 0; i < n; ++i) {
      const float g = grad[i];
      to_shortcut[i] = h[i] >= threshold ? 0.0f : g;
      grad[i] = ((h[i] >= threshold ? 2.0f : 0.0f) - x[i]) * g;
    }
  else if (spec.gate == AND)
    for (int64_t i = 0; i < n; ++i) {
      const float g = grad[i];
      to_shortcut[i] = h[i] >= threshold ? g : 0.0f;
      grad[i] = g * x[i];
    }
  else
    for (int64_t i = 0; i < n; ++i) {
      const float g = grad[i];
      to_shortcut[i] = h[i] >= threshold ? 0.0f : g;
      grad[i] = -(g * x[i]);
    }
}

template <int32_t SURROGATE>
struct Slope {
  float alpha, a, b;
  explicit Slope(float sharpness) : alpha(sharpness), a(0), b(0) {
    const double pi = 3.14159265358979323846, half = sharpness / 2.0;
    if (SURROGATE == ATAN) a = static_cast<float>(1 / half), b = static_cast<float>(pi * pi * half);
    if (SURROGATE == RECT) a = static_cast<float>(0.5 / sharpness);
    if (SURROGATE == PIECEWISE_QUADRATIC) a = static_cast<float>(1.0 / sharpness), b = sharpness * sharpness;
    if (SURROGATE == SOFT_SIGN) a = static_cast<float>(1.0 / sharpness), b = static_cast<float>(2.0 * sharpness);
  }
  // dL/ds times the surrogate's derivative at d = h - V_th
  float operator()(float grad, float d) const {
    const float distance = std::fabs(d);
    if (SURROGATE == ATAN) return grad / (a + b * (d * d));
    if (SURROGATE == RECT) return distance < a ? grad * alpha : 0.0f;
    if (SURROGATE == PIECEWISE_QUADRATIC) return distance > a ? 0.0f : grad * (alpha - distance * b);
    if (SURROGATE == SOFT_SIGN) return grad / ((a + distance) * (a + distance) * b);
    return grad * alpha / ((1.0f + distance) * (1.0f + distance));
  }
};

// dL/dh[t] into `grad`, from dL/ds[t] in it and from dL/dv[t] in `carry`.
template <int32_t SURROGATE, bool SOFT, bool DETACHED>
void fire_backward(float* __restrict grad, const float* __restrict h, const float* __restrict carry, int64_t n,
                   const Spec& spec) {
  const Slope<SURROGATE> slope(spec.alpha);
  const float threshold = spec.threshold, rest = spec.rest;
  for (int64_t i = 0; i < n; ++i) {
    float g = grad[i];
    if (!DETACHED) g = g + carry[i] * (SOFT ? -threshold : rest - h[i]);
    const float kept = SOFT || h[i] < threshold ? carry[i] : 0.0f;
    grad[i] = slope(g, h[i] - threshold) + kept;
  }
}

using FireBackward = void (*)(float*, const float*, const float*, int64_t, const Spec&);

template <int32_t SURROGATE>
FireBackward fire_backward_of(const Spec& spec) {
  if (spec.soft) return spec.detached ? fire_backward<SURROGATE, true, true> : fire_backward<SURROGATE, true, false>;
  return spec.detached ? fire_backward<SURROGATE, false, true> : fire_backward<SURROGATE, false, false>;
}

FireBackward fire_backward_of(const Spec& spec) {
  if (spec.surrogate == ATAN) return fire_backward_of<ATAN>(spec);
  if (spec.surrogate == RECT) return fire_backward_of<RECT>(spec);
  if (spec.surrogate == PIECEWISE_QUADRATIC) return fire_backward_of<PIECEWISE_QUADRATIC>(spec);
  if (spec.surrogate == SOFT_SIGN) return fire_backward_of<SOFT_SIGN>(spec);
  return fire_backward_of<SUPER_SPIKE>(spec);
}

// dL/dh[t] in `grad` becomes dL/dx[t]; `carry` gets dL/dv[t-1].
void charge_backward(const Spec& spec, float tau, float* __restrict grad, float* __restrict carry, int64_t n) {
  if (spec.leak == NO_LEAK) {
    std::memcpy(carry, grad, n * sizeof(float));
    return;
  }
  const bool decay = spec.decay_input;
  const auto loop = [&](auto leak_of) {
    for (int64_t i = 0; i < n; ++i) {
      const float leak = leak_of(grad[i]);
      carry[i] = grad[i] - leak;
      grad[i] = decay ? leak : grad[i];
    }
  };
  if (spec.leak == DIVISION)
    loop([=](float x) { return x / tau; });
  else
    loop([=](float x) { return x * tau; });
}

// dL/dq of PLIF: sum of dL/dh[t] times what q multiplies. `before` is h[t-1], or null at the first step.
double of_q(const Spec& spec, const float* __restrict grad, const float* __restrict x, const float* before, int64_t n) {
  double lanes[LANES] = {};
  for (int64_t i = 0; i < n; ++i) {
    float v = spec.rest;
    if (before != nullptr) {
      const bool fired = before[i] >= spec.threshold;
      v = fired ? (spec.soft ? before[i] - spec.threshold : spec.rest) : before[i];
    }
    const float offset = v - spec.rest;
    lanes[i % LANES] += (spec.decay_input ? x[i] - offset : -offset) * grad[i];
  }
  double total = 0;
  for (double lane : lanes) total += lane;
  return total;
}

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
void add_terms(Lanes& lanes, const E* __restrict from, int64_t count, const Term& term) {
  double sums[LANES];
  std::memcpy(sums, lanes.values, sizeof sums);
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES)
    for (int64_t lane = 0; lane < LANES; ++lane) sums[lane] += static_cast<double>(term(to_float(from[i + lane])));
  for (int64_t lane = 0; i < count; ++i, ++lane) sums[lane] += static_cast<double>(term(to_float(from[i])));
  std::memcpy(lanes.values, sums, sizeof sums);
}

// Sums of dL/dx and of dL/dx (z - mean) of one step of a tile in NCHW, fp32 in 16 lanes, then fp64.
void add_gradients(Lanes& plain, Lanes& centred, const float* __restrict grad, const float* __restrict z, float mean,
                   int64_t n) {
  float first[LANES] = {}, second[LANES] = {};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES)
    for (int64_t lane = 0; lane < LANES; ++lane) {
      first[lane] += grad[i + lane];
      second[lane] += grad[i + lane] * (z[i + lane] - mean);
    }
  for (int64_t lane = 0; i < n; ++i, ++lane) {
    first[lane] += grad[i];
    second[lane] += grad[i] * (z[i] - mean);
  }
  for (int64_t lane = 0; lane < LANES; ++lane) plain.values[lane] += first[lane];
  for (int64_t lane = 0; lane < LANES; ++lane) centred.values[lane] += second[lane];
}

struct Forward {
  const void *z, *shortcut;
  const float *gamma, *beta, *q;
  float *running_mean, *running_var, *mean, *invstd;
  void* out;
  double momentum, eps;
  int32_t train;
};

struct Backward {
  const void *z, *shortcut, *grad;
  const float *gamma, *beta, *mean, *invstd, *q;
  void *grad_z, *grad_shortcut, *rest;  // `rest`: of z's shape and type, for bfloat16 in NHWC
  float *grad_gamma, *grad_beta, *grad_q;
};

struct Geometry {
  int64_t slab, positions, frames, elements, rows, tile, tiles;
  explicit Geometry(const Spec& spec)
      : slab(spec.B * spec.C * spec.plane),
        positions(spec.B * spec.plane),
        frames(spec.repeat ? spec.B : spec.T * spec.B),
        elements(frames * spec.plane) {
    if (spec.channels_last) {
      rows = std::max<int64_t>(1, TILE / spec.C);
      tile = rows * spec.C;
      tiles = (positions + rows - 1) / rows;
    } else if (spec.plane >= TILE) {
      rows = (spec.plane + TILE - 1) / TILE;  // tiles of a plane
      tile = TILE;
      tiles = rows * spec.B;
    } else {
      rows = TILE / spec.plane;  // planes of a tile
      tile = rows * spec.plane;
      tiles = (spec.B + rows - 1) / rows;
    }
  }
  Tile at(const Spec& spec, int64_t index, int64_t channel) const {
    if (spec.channels_last) {
      const int64_t first = index * rows, count = std::min(rows, positions - first);
      return {first * spec.C, count * spec.C, 1, 0};
    }
    const int64_t picture = spec.C * spec.plane, base = channel * spec.plane;
    if (spec.plane >= TILE) {
      const int64_t start = index % rows * TILE;
      return {index / rows * picture + base + start, std::min(TILE, spec.plane - start), 1, 0};
    }
    const int64_t first = index * rows;
    return {first * picture + base, spec.plane, std::min(rows, spec.B - first), picture};
  }
};

// Mean and the sum of squared distances from it, rounded as torch's kernels round them.
template <typename E>
void statistics_nchw(const Spec& spec, const Geometry& shape, const E* z, int64_t channel, float& mean, float& squares) {
  const int64_t picture = spec.C * spec.plane;
  const E* from = z + channel * spec.plane;
  Lanes sums, distances;
  for (int64_t frame = 0; frame < shape.frames; ++frame)
    add_terms(sums, from + frame * picture, spec.plane, [](float x) { return x; });
  mean = static_cast<float>(sums.total() / static_cast<double>(shape.elements));
  const float centre = mean;
  for (int64_t frame = 0; frame < shape.frames; ++frame)
    add_terms(distances, from + frame * picture, spec.plane, [centre](float x) { return (x - centre) * (x - centre); });
  squares = static_cast<float>(distances.total());
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

void update(const Forward& call, int64_t elements, int64_t channel, float mean, float squares) {
  const float count = static_cast<float>(elements), momentum = static_cast<float>(call.momentum);
  call.mean[channel] = mean;
  call.invstd[channel] = static_cast<float>(1 / std::sqrt(static_cast<double>(squares / count) + call.eps));
  float& running_mean = call.running_mean[channel];
  float& running_var = call.running_var[channel];
  running_mean = momentum * mean + (1 - momentum) * running_mean;
  const double unbiased = squares / static_cast<float>(elements - 1);
  running_var = static_cast<float>(momentum * unbiased + static_cast<double>((1 - momentum) * running_var));
}

template <bool LAST, typename E>
void forward_tile(const Spec& spec, const Geometry& shape, const Forward& call, int64_t index, int64_t channel,
                  const float* scale, const float* shift, float* memory) {
  const Tile tile = shape.at(spec, index, channel);
  const int64_t n = tile.size();
  float *v = memory, *x = v + shape.tile, *s = x + shape.tile, *joined = s + shape.tile;
  const float tau = call.q == nullptr ? spec.tau : call.q[0];
  const Step advance = step_of<true>(spec);
  const E* z = static_cast<const E*>(call.z);
  const E* shortcut = static_cast<const E*>(call.shortcut);
  E* out = static_cast<E*>(call.out);
  std::fill(v, v + n, spec.rest);
  for (int64_t t = 0; t < spec.T; ++t) {
    if (t == 0 || !spec.repeat) load_normalised<LAST>(z + t * shape.slab, tile, scale, shift, x);
    if (spec.gate != NONE) load(shortcut + t * shape.slab, tile, joined);
    if (spec.gate == POST_ADD)
      for (int64_t i = 0; i < n; ++i) x[i] = x[i] + joined[i];
    advance(v, x, s, n, spec, tau);
    if (spec.gate != NONE && spec.gate != POST_ADD) join(spec.gate, s, joined, n);
    store(s, tile, out + t * shape.slab);
  }
}

void affine(const Forward& call, int64_t channel, float& scale, float& shift) {
  scale = call.invstd[channel] * call.gamma[channel];
  shift = fused(-call.mean[channel], scale, call.beta[channel]);
}

void repeat_rows(const Spec& spec, const Geometry& shape, float* values) {
  for (int64_t row = 1; row < shape.rows; ++row) std::memcpy(values + row * spec.C, values, spec.C * sizeof(float));
}

void running(const Spec& spec, const Forward& call) {
  for (int64_t channel = 0; channel < spec.C; ++channel) {
    call.mean[channel] = call.running_mean[channel];
    call.invstd[channel] = 1 / std::sqrt(call.running_var[channel] + static_cast<float>(call.eps));
  }
}

template <typename E>
bool forward(const Spec& spec, const Forward& call) {
  const Geometry shape(spec);
  const E* z = static_cast<const E*>(call.z);
  if (!call.train) running(spec, call);
  if (!spec.channels_last)
    return parallel(spec.C, GRAIN / std::max<int64_t>(1, spec.T * shape.positions), [&](int64_t begin, int64_t end) {
      float* memory = scratch(0, 4 * shape.tile);
      for (int64_t channel = begin; channel < end; ++channel) {
        if (call.train) {
          float mean, squares;
          statistics_nchw(spec, shape, z, channel, mean, squares);
          update(call, shape.elements, channel, mean, squares);
        }
        float scale, shift;
        affine(call, channel, scale, shift);
        for (int64_t index = 0; index < shape.tiles; ++index)
          forward_tile<false, E>(spec, shape, call, index, channel, &scale, &shift, memory);
      }
    });
  std::vector<float> scale(std::max(shape.tile, spec.C)), shift(std::max(shape.tile, spec.C));
  if (call.train) {
    std::vector<float> mean(spec.C), squares(spec.C);
    if (!statistics_nhwc(spec, shape, z, mean.data(), squares.data())) return false;
    for (int64_t channel = 0; channel < spec.C; ++channel)
      update(call, shape.elements, channel, mean[channel], squares[channel]);
  }
  for (int64_t channel = 0; channel < spec.C; ++channel) affine(call, channel, scale[channel], shift[channel]);
  repeat_rows(spec, shape, scale.data());
  repeat_rows(spec, shape, shift.data());
  return parallel(shape.tiles, GRAIN / (spec.T * shape.tile), [&](int64_t begin, int64_t end) {
    float* memory = scratch(0, 4 * shape.tile);
    for (int64_t index = begin; index < end; ++index)
      forward_tile<true, E>(spec, shape, call, index, 0, scale.data(), shift.data(), memory);
  });
}

// The gradient dL/dx of all steps of a tile, last step first; `emit(t, dL/dx)` takes each, once in all where z is static.
template <bool LAST, typename E, typename Emit>
void backward_tile(const Spec& spec, const Geometry& shape, const Backward& call, const Tile& tile, const float* scale,
                   const float* shift, float* memory, double& q_sum, const Emit& emit) {
  const int64_t n = tile.size(), T = spec.T, size = shape.tile;
  float *v = memory, *carry = v + size, *grad = carry + size, *joined = grad + size, *to_shortcut = joined + size;
  float *total = to_shortcut + size, *h = total + size, *x = h + T * size;
  const float tau = call.q == nullptr ? spec.tau : call.q[0];
  const Step advance = step_of<false>(spec);
  const FireBackward fire = fire_backward_of(spec);
  const E* z = static_cast<const E*>(call.z);
  const E* shortcut = static_cast<const E*>(call.shortcut);
  E* grad_shortcut = static_cast<E*>(call.grad_shortcut);
  const bool gated = spec.gate == BSG || spec.gate == AND || spec.gate == IAND;
  std::fill(v, v + n, spec.rest);
  for (int64_t t = 0; t < T; ++t) {
    float* current = spec.learned ? x + t * size : x;
    if (t == 0 || !spec.repeat)
      load_normalised<LAST>(z + t * shape.slab, tile, scale, shift, current);
    else if (spec.learned)
      std::memcpy(current, x, n * sizeof(float));
    if (spec.gate == POST_ADD) {
      load(shortcut + t * shape.slab, tile, joined);
      for (int64_t i = 0; i < n; ++i) current[i] = current[i] + joined[i];
    }
    advance(v, current, h + t * size, n, spec, tau);
  }
  std::fill(carry, carry + n, 0.0f);
  if (spec.repeat) std::fill(total, total + n, 0.0f);
  for (int64_t t = T - 1; t >= 0; --t) {
    load(static_cast<const E*>(call.grad) + t * shape.slab, tile, grad);
    if (gated) {
      load(shortcut + t * shape.slab, tile, joined);
      join_backward(spec, grad, h + t * size, joined, to_shortcut, n);
      store(to_shortcut, tile, grad_shortcut + t * shape.slab);
    }
    fire(grad, h + t * size, carry, n, spec);
    if (spec.learned) q_sum += of_q(spec, grad, x + t * size, t == 0 ? nullptr : h + (t - 1) * size, n);
    charge_backward(spec, tau, grad, carry, n);
    if (spec.gate == POST_ADD) store(grad, tile, grad_shortcut + t * shape.slab);
    if (!spec.repeat)
      emit(t, grad);
    else
      for (int64_t i = 0; i < n; ++i) total[i] += grad[i];
  }
  if (spec.repeat) emit(0, total);
}

int64_t backward_memory(const Spec& spec, const Geometry& shape) {
  return (6 + spec.T + (spec.learned ? spec.T : 1)) * shape.tile;
}

// What dL/dz needs of a channel: dL/dz = (dL/dx - centre - (z - mean) slope) factor.
struct Finish {
  float centre, slope, factor;
};

Finish finish(const Backward& call, int64_t elements, int64_t channel, double plain, double centred) {
  const double invstd = call.invstd[channel], count = static_cast<double>(elements);
  call.grad_beta[channel] = static_cast<float>(plain);
  call.grad_gamma[channel] = static_cast<float>(centred * invstd);
  return {static_cast<float>(plain / count), static_cast<float>(centred * invstd * invstd / count),
          call.invstd[channel] * call.gamma[channel]};
}

template <typename E>
void backward_channel(const Spec& spec, const Geometry& shape, const Backward& call, int64_t channel, float* memory,
                      float* kept, double& q_sum) {
  const float mean = call.mean[channel], scale = call.invstd[channel] * call.gamma[channel];
  const float shift = fused(-mean, scale, call.beta[channel]);
  const E* z = static_cast<const E*>(call.z);
  E* grad_z = static_cast<E*>(call.grad_z);
  float* again = memory + backward_memory(spec, shape);
  Lanes plain, centred;
  const int64_t steps = spec.repeat ? 1 : spec.T;
  for (int64_t index = 0; index < shape.tiles; ++index) {
    const Tile tile = shape.at(spec, index, channel);
    backward_tile<false, E>(spec, shape, call, tile, &scale, &shift, memory, q_sum, [&](int64_t t, const float* grad) {
      load(z + t * shape.slab, tile, again);
      add_gradients(plain, centred, grad, again, mean, tile.size());
      std::memcpy(kept + (index * steps + t) * shape.tile, grad, tile.size() * sizeof(float));
    });
  }
  const Finish last = finish(call, shape.elements, channel, plain.total(), centred.total());
  for (int64_t index = 0; index < shape.tiles; ++index) {
    const Tile tile = shape.at(spec, index, channel);
    for (int64_t t = 0; t < steps; ++t)
      for (int64_t run = 0; run < tile.count; ++run) {
        const int64_t place = t * shape.slab + tile.offset + run * tile.stride;
        const E* __restrict from = z + place;
        E* __restrict to = grad_z + place;
        const float* __restrict grad = kept + (index * steps + t) * shape.tile + run * tile.length;
        for (int64_t i = 0; i < tile.length; ++i)
          put(to[i], (grad[i] - (to_float(from[i]) - mean) * last.slope - last.centre) * last.factor);
      }
  }
}

template <typename E>
bool backward_nchw(const Spec& spec, const Geometry& shape, const Backward& call) {
  std::vector<double> q_sums(spec.C);
  const int64_t steps = spec.repeat ? 1 : spec.T;
  const bool sound = parallel(spec.C, GRAIN / std::max<int64_t>(1, spec.T * shape.positions), [&](int64_t begin, int64_t end) {
    float* memory = scratch(0, backward_memory(spec, shape) + shape.tile);
    float* kept = scratch(1, shape.tiles * steps * shape.tile);
    for (int64_t channel = begin; channel < end; ++channel)
      backward_channel<E>(spec, shape, call, channel, memory, kept, q_sums[channel]);
  });
  double q_sum = 0;
  for (double sum : q_sums) q_sum += sum;
  if (spec.learned) *call.grad_q = static_cast<float>(q_sum);
  return sound;
}

template <typename E>
bool backward_nhwc(const Spec& spec, const Geometry& shape, const Backward& call) {
  const int64_t size = shape.tile, C = spec.C;
  std::vector<float> scale(size), shift(size), mean(size), centre(size), slope(size);
  for (int64_t channel = 0; channel < C; ++channel) {
    scale[channel] = call.invstd[channel] * call.gamma[channel];
    shift[channel] = fused(-call.mean[channel], scale[channel], call.beta[channel]);
    mean[channel] = call.mean[channel];
  }
  for (std::vector<float>* values : {&scale, &shift, &mean}) repeat_rows(spec, shape, values->data());
  const E* z = static_cast<const E*>(call.z);
  E* grad_z = static_cast<E*>(call.grad_z);
  E* rest = call.rest == nullptr ? grad_z : static_cast<E*>(call.rest);
  std::vector<double> sums(BLOCKS * 2 * C), q_sums(BLOCKS);
  const int64_t blocks = std::min(BLOCKS, shape.tiles), of_block = spec.T * shape.positions * C / blocks;
  bool sound = parallel(blocks, GRAIN / std::max<int64_t>(1, of_block), [&](int64_t begin, int64_t end) {
    float* memory = scratch(0, backward_memory(spec, shape) + 2 * size);
    float *plain = memory + backward_memory(spec, shape), *centred = plain + size;
    std::vector<double> totals(2 * size);
    for (int64_t block = begin; block < end; ++block) {
      std::fill(totals.begin(), totals.end(), 0.0);
      for (int64_t index = block * shape.tiles / blocks; index < (block + 1) * shape.tiles / blocks; ++index) {
        const Tile tile = shape.at(spec, index, 0);
        const int64_t n = tile.size();
        std::fill(plain, plain + 2 * size, 0.0f);
        backward_tile<true, E>(spec, shape, call, tile, scale.data(), shift.data(), memory, q_sums[block],
                               [&](int64_t t, const float* __restrict grad) {
          const E* __restrict from = z + t * shape.slab + tile.offset;
          E* __restrict to = grad_z + t * shape.slab + tile.offset;
          const float* __restrict middle = mean.data();
          float* __restrict first = plain;
          float* __restrict second = centred;
          for (int64_t i = 0; i < n; ++i) {
            first[i] += grad[i];
            second[i] += grad[i] * (to_float(from[i]) - middle[i]);
          }
          E* __restrict low = rest + t * shape.slab + tile.offset;
          for (int64_t i = 0; i < n; ++i) {
            put(to[i], grad[i]);
            put_rest(low, i, grad[i], to[i]);
          }
        });
        for (int64_t i = 0; i < n; ++i) totals[i] += plain[i];
        for (int64_t i = 0; i < n; ++i) totals[size + i] += centred[i];
      }
      double* of_channel = sums.data() + block * 2 * C;
      for (int64_t i = 0; i < size; ++i) of_channel[i % C] += totals[i];
      for (int64_t i = 0; i < size; ++i) of_channel[C + i % C] += totals[size + i];
    }
  });
  for (int64_t channel = 0; channel < C; ++channel) {
    double plain = 0, centred = 0;
    for (int64_t block = 0; block < blocks; ++block) {
      plain += sums[block * 2 * C + channel];
      centred += sums[block * 2 * C + C + channel];
    }
    const Finish last = finish(call, shape.elements, channel, plain, centred);
    centre[channel] = last.centre;
    slope[channel] = last.slope;
  }
  for (std::vector<float>* values : {&centre, &slope}) repeat_rows(spec, shape, values->data());
  double q_sum = 0;
  for (double sum : q_sums) q_sum += sum;
  if (spec.learned) *call.grad_q = static_cast<float>(q_sum);
  const int64_t tiles = (shape.elements + shape.rows - 1) / shape.rows;
  sound = sound && parallel(tiles, GRAIN / size, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t start = index * size, n = std::min(size, shape.elements * C - start);
      const E* __restrict from = z + start;
      E* __restrict to = grad_z + start;
      const E* low = rest + start;
      const float *__restrict middle = mean.data(), *__restrict less = centre.data();
      const float *__restrict times = slope.data(), *__restrict factor = scale.data();
      for (int64_t i = 0; i < n; ++i)
        put(to[i], (with_rest(to[i], low, i) - (to_float(from[i]) - middle[i]) * times[i] - less[i]) * factor[i]);
    }
  });
  return sound;
}

template <typename E>
bool backward(const Spec& spec, const Backward& call) {
  const Geometry shape(spec);
  return spec.channels_last ? backward_nhwc<E>(spec, shape, call) : backward_nchw<E>(spec, shape, call);
}

}  // namespace

// Each returns 0, or 1 where memory or torch's threads failed.
extern "C" {

void spikefleet_init(void* parallel_for) {
  torch_parallel_for = reinterpret_cast<int32_t (*)(int64_t, int64_t, int64_t, Range, void*)>(parallel_for);
}

int32_t spikefleet_forward(const Spec* spec, const Forward* call) {
  try {
    return (spec->bf16 ? forward<Bf16>(*spec, *call) : forward<float>(*spec, *call)) ? 0 : 1;
  } catch (...) {
    return 1;
  }
}

int32_t spikefleet_backward(const Spec* spec, const Backward* call) {
  try {
    return (spec->bf16 ? backward<Bf16>(*spec, *call) : backward<float>(*spec, *call)) ? 0 : 1;
  } catch (...) {
    return 1;
  }
}
}
