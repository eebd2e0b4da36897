// One step of a tile: normalisation, charge, fire and reset, gates, and their gradients. All loops are over floats.

#pragma once

#include "native_elements.h"

namespace {

// x = z * scale + shift; NCHW with large planes has one channel in a tile, else each position has its own numbers.
template <bool EACH, typename E>
void normalise(const E* __restrict from, const float* __restrict scale, const float* __restrict shift,
               float* __restrict to, int64_t n) {
  const float a = scale[0], b = shift[0];
  if (EACH)
    for (int64_t i = 0; i < n; ++i) to[i] = fused(to_float(from[i]), scale[i], shift[i]);
  else
    for (int64_t i = 0; i < n; ++i) to[i] = fused(to_float(from[i]), a, b);
}

template <int32_t LEAK>
inline float leaked(float x, float tau) {
  return LEAK == DIVISION ? x / tau : x * tau;
}

// h[t] and v[t] of v[t-1] and x[t]; `out` gets h[t] or s[t].
template <int32_t LEAK, bool DECAY, bool SOFT, bool SPIKES>
void step(float* __restrict v, const float* __restrict x, float* __restrict out, int64_t n, const Spec& spec,
          float tau) {
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

// The same of I-LIF: h[t] is u[t], v[t] is u[t] - s[t].
template <bool SPIKES>
void integer_step(float* __restrict v, const float* __restrict x, float* __restrict out, int64_t n, const Spec& spec,
                  float leak) {
  const float bound = spec.bound, scale = spec.scale;
  for (int64_t i = 0; i < n; ++i) {
    const float u = v[i] * leak + x[i] * scale;
    const float s = emitted_by(u, bound);
    out[i] = SPIKES ? s : u;
    v[i] = u - s;
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
  if (spec.leak == INTEGERS) return integer_step<SPIKES>;
  return spec.soft ? step_of<true, SPIKES>(spec) : step_of<false, SPIKES>(spec);
}

// Y of H in `s` and X.
void join(int32_t gate, const float* __restrict s, const float* __restrict x, float* __restrict y, int64_t n) {
  if (gate == BSG)
    for (int64_t i = 0; i < n; ++i) y[i] = s[i] > 0.0f ? 1.0f : x[i];
  else if (gate == ADD)
    for (int64_t i = 0; i < n; ++i) y[i] = s[i] + x[i];
  else if (gate == AND)
    for (int64_t i = 0; i < n; ++i) y[i] = s[i] > 0.0f ? x[i] : 0.0f;
  else
    for (int64_t i = 0; i < n; ++i) y[i] = s[i] > 0.0f ? 0.0f : x[i];
}

// dL/dH and dL/dX from dL/dY, of one position.
template <int32_t GATE, bool EXACT>
void join_backward(float threshold, const float* __restrict grad, const float* __restrict h, const float* __restrict x,
                   float* __restrict to_spikes, float* __restrict to_shortcut, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const float g = grad[i];
    const bool fired = h[i] >= threshold;
    to_shortcut[i] = fired == (GATE == AND) ? g : 0.0f;
    if (GATE == BSG && EXACT)
      to_spikes[i] = g - g * x[i];
    else if (GATE == BSG)
      to_spikes[i] = ((fired ? 2.0f : 0.0f) - x[i]) * g;
    else
      to_spikes[i] = GATE == AND ? g * x[i] : -(g * x[i]);
  }
}

using JoinBackward = void (*)(float, const float*, const float*, const float*, float*, float*, int64_t);

JoinBackward join_backward_of(const Spec& spec) {
  if (spec.gate == BSG) return spec.exact ? join_backward<BSG, true> : join_backward<BSG, false>;
  return spec.gate == AND ? join_backward<AND, false> : join_backward<IAND, false>;
}

// exp(x) of x <= 0 to some 1e-7, in operations that the compiler computes for many numbers at a time. NaN stays NaN.
inline float exponential(float x) {
  constexpr float SHIFT = 12582912.0f;  // 1.5 * 2^23: sums near it are integers, in the last bits of the float
  const float least = x < -87.0f ? -87.0f : x;
  const float shifted = least * 1.44269504f + SHIFT, n = shifted - SHIFT;
  const float r = fused(n, 2.12194440e-4f, fused(n, -0.693359375f, least));  // least - n ln 2
  const float high = fused(fused(fused(r, 1.0f / 5040, 1.0f / 720), r, 1.0f / 120), r, 1.0f / 24);
  const float series = fused(fused(fused(fused(high, r, 1.0f / 6), r, 0.5f), r, 1.0f), r, 1.0f);
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127u) << 23;  // 2^n
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return series * power;
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
    if (SURROGATE == ERF) a = static_cast<float>(sharpness / std::sqrt(pi));
    if (SURROGATE == DSPIKE) a = static_cast<float>(2.0 * sharpness / std::tanh(half));
  }
  // dL/ds times the surrogate's derivative at d = h - V_th
  float operator()(float grad, float d) const {
    const float distance = std::fabs(d);
    if (SURROGATE == ATAN) return grad / (a + b * (d * d));
    if (SURROGATE == RECT) return distance < a ? grad * alpha : 0.0f;
    if (SURROGATE == PIECEWISE_QUADRATIC) return distance > a ? 0.0f : grad * (alpha - distance * b);
    if (SURROGATE == SOFT_SIGN) return grad / ((a + distance) * (a + distance) * b);
    if (SURROGATE == PIECEWISE_EXP) return grad * (alpha * 0.5f) * exponential(-alpha * distance);
    if (SURROGATE == ERF) return grad * a * exponential(-(alpha * d) * (alpha * d));
    if (SURROGATE == SIGMOID || SURROGATE == DSPIKE) {
      // s (1 - s) of the logistic function s; 1 - tanh^2 is four times that of twice the number.
      const float e = exponential((SURROGATE == SIGMOID ? -alpha : -2.0f * alpha) * distance);
      const float slope = e / ((1.0f + e) * (1.0f + e));
      if (SURROGATE == SIGMOID) return grad * alpha * slope;
      return distance > 0.5f ? 0.0f : grad * a * slope;
    }
    return grad * alpha / ((1.0f + distance) * (1.0f + distance));
  }
};

// dL/dh[t] into `carry`, from dL/ds[t] and from dL/dv[t] in `carry`.
template <int32_t SURROGATE, bool SOFT, bool DETACHED>
void fire_backward(const float* __restrict grad, const float* __restrict h, float* __restrict carry, int64_t n,
                   const Spec& spec) {
  const Slope<SURROGATE> slope(spec.alpha);
  const float threshold = spec.threshold, rest = spec.rest;
  for (int64_t i = 0; i < n; ++i) {
    float g = grad[i];
    if (!DETACHED) g = g + carry[i] * (SOFT ? -threshold : rest - h[i]);
    const float kept = SOFT || h[i] < threshold ? carry[i] : 0.0f;
    carry[i] = slope(g, h[i] - threshold) + kept;
  }
}

// The same of I-LIF, whose slope is 1 where u[t] is in [0, D], both ends included.
void integer_fire_backward(const float* __restrict grad, const float* __restrict u, float* __restrict carry, int64_t n,
                           const Spec& spec) {
  const float bound = spec.bound;
  for (int64_t i = 0; i < n; ++i) carry[i] = carry[i] + grad[i] * (u[i] >= 0.0f && u[i] <= bound ? 1.0f : 0.0f);
}

using FireBackward = void (*)(const float*, const float*, float*, int64_t, const Spec&);

template <int32_t SURROGATE>
FireBackward fire_backward_of(const Spec& spec) {
  if (spec.soft) return spec.detached ? fire_backward<SURROGATE, true, true> : fire_backward<SURROGATE, true, false>;
  return spec.detached ? fire_backward<SURROGATE, false, true> : fire_backward<SURROGATE, false, false>;
}

FireBackward fire_backward_of(const Spec& spec) {
  if (spec.leak == INTEGERS) return integer_fire_backward;
  if (spec.surrogate == SIGMOID) return fire_backward_of<SIGMOID>(spec);
  if (spec.surrogate == PIECEWISE_EXP) return fire_backward_of<PIECEWISE_EXP>(spec);
  if (spec.surrogate == ERF) return fire_backward_of<ERF>(spec);
  if (spec.surrogate == DSPIKE) return fire_backward_of<DSPIKE>(spec);
  if (spec.surrogate == ATAN) return fire_backward_of<ATAN>(spec);
  if (spec.surrogate == RECT) return fire_backward_of<RECT>(spec);
  if (spec.surrogate == PIECEWISE_QUADRATIC) return fire_backward_of<PIECEWISE_QUADRATIC>(spec);
  if (spec.surrogate == SOFT_SIGN) return fire_backward_of<SOFT_SIGN>(spec);
  return fire_backward_of<SUPER_SPIKE>(spec);
}

// dL/dv[t-1] in `carry` from dL/dh[t] in it; returns dL/dx[t], which is in `carry` itself or in `buffer`.
const float* charge_backward(const Spec& spec, float tau, float* __restrict carry, float* __restrict buffer,
                             int64_t n) {
  if (spec.leak == NO_LEAK) return carry;
  const bool decay = spec.decay_input;
  const auto loop = [&](auto leak_of) {
    for (int64_t i = 0; i < n; ++i) {
      const float grad = carry[i], leak = leak_of(grad);
      carry[i] = grad - leak;
      buffer[i] = decay ? leak : grad;
    }
  };
  if (spec.leak == INTEGERS) {
    for (int64_t i = 0; i < n; ++i) {
      buffer[i] = carry[i] * spec.scale;
      carry[i] = carry[i] * tau;
    }
    return buffer;
  }
  if (spec.leak == DIVISION)
    loop([=](float x) { return x / tau; });
  else
    loop([=](float x) { return x * tau; });
  return buffer;
}

// dL/dq of PLIF: sum of dL/dh[t] times what q multiplies. `before` is h[t-1]; or null at the first step, which starts
// from `first`, or from rest where that is null.
double of_q(const Spec& spec, const float* __restrict grad, const float* __restrict x, const float* before,
            const float* first, int64_t n) {
  double lanes[LANES] = {};
  for (int64_t i = 0; i < n; ++i) {
    float v = first == nullptr ? spec.rest : first[i];
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

}  // namespace
