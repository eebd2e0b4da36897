// The spiking unit on the CPU: batch norm, T steps of a neuron, and the gate, forward and backward.
//
// z is [T * B, C, H, W] (or static [B, C, H, W]) in NCHW or NHWC, float or bfloat16; everything inside is float.
// A tile holds some 512 positions of all T steps; each line of the equations is a short loop over memory that stays in
// the first-level cache. Products and sums are rounded one by one (no contraction), except where torch's kernels fuse
// them, so that spikes and running statistics equal torch's to the bit. Partial sums have fixed places and a fixed
// order: the same bits for any number of threads; only the batch statistics in NHWC follow torch's split over threads.
//
// Built on the user's machine (native_library.py) with the headers beside it: standard headers alone, C interface,
// threads of torch.

#include "native_integers.h"
#include "native_statistics.h"
#include "native_steps.h"

namespace {

struct Forward {
  const void *z, *shortcut;
  const float *gamma, *beta, *q;
  float *running_mean, *running_var, *mean, *invstd;
  void* out;
  double momentum, eps;
  int32_t train;
  const float* v_init;  // v[0] [B, C, H, W] in the layout of z, or null: rest
  float* v_last;        // v[T], or null
};

struct Backward {
  const void *z, *shortcut, *grad;
  const float *gamma, *beta, *mean, *invstd, *q;
  void *grad_z, *grad_shortcut, *rest;  // `rest`: of z's shape and type, for bfloat16 in NHWC
  float *grad_gamma, *grad_beta, *grad_q;
  const float *v_init, *grad_v;  // v[0] and dL/dv[T], or null
  float* grad_v_init;            // dL/dv[0], or null
};

// The membrane before the first step.
void begin(const float* v_init, Tile tile, float rest, float* v) {
  if (v_init == nullptr)
    std::fill(v, v + tile.size, rest);
  else
    std::memcpy(v, v_init + tile.offset, tile.size * sizeof(float));
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

template <bool EACH, typename E>
void forward_tile(const Spec& spec, const Geometry& shape, const Forward& call, Tile tile, Tile next,
                  const float* scale, const float* shift, float* memory) {
  const int64_t n = tile.size;
  float *v = memory, *x = v + shape.tile, *s = x + shape.tile, *buffer = s + shape.tile, *written = buffer + shape.tile;
  const float tau = call.q == nullptr ? spec.tau : call.q[0];
  const Step advance = step_of<true>(spec);
  const bool gated = spec.gate != NONE && spec.gate != POST_ADD;
  begin(call.v_init, tile, spec.rest, v);
  for (int64_t t = 0; t < spec.T; ++t) {
    const E* z = static_cast<const E*>(call.z) + t * shape.slab;
    const E* shortcut = static_cast<const E*>(call.shortcut) + t * shape.slab;
    E* out = static_cast<E*>(call.out) + t * shape.slab;
    if (t == 0 || !spec.repeat) {
      normalise<EACH>(z + tile.offset, scale, shift, x, n);
      fetch<0>(z + next.offset, next.size);
    }
    if (spec.gate != NONE) fetch<0>(shortcut + next.offset, next.size);
    fetch<1>(out + next.offset, next.size);
    const float* joined = spec.gate == NONE ? nullptr : view(shortcut + tile.offset, n, buffer);
    if (spec.gate == POST_ADD)
      for (int64_t i = 0; i < n; ++i) x[i] = x[i] + joined[i];
    float* place = target(out + tile.offset, written);
    advance(v, x, gated ? s : place, n, spec, tau);
    if (gated) join(spec.gate, s, joined, place, n);
    store(place, out + tile.offset, n);
  }
  if (call.v_last != nullptr) std::memcpy(call.v_last + tile.offset, v, n * sizeof(float));
}

void affine(const Forward& call, int64_t channel, float& scale, float& shift) {
  scale = call.invstd[channel] * call.gamma[channel];
  shift = fused(-call.mean[channel], scale, call.beta[channel]);
}

void running(const Spec& spec, const Forward& call) {
  for (int64_t channel = 0; channel < spec.C; ++channel) {
    call.mean[channel] = call.running_mean[channel];
    call.invstd[channel] = 1 / std::sqrt(call.running_var[channel] + static_cast<float>(call.eps));
  }
}

template <bool EACH, typename E>
void forward_group(const Spec& spec, const Geometry& shape, const Forward& call, int64_t group, float* memory) {
  const int64_t first = group * shape.channels, channels = shape.channels_of(spec, group);
  float *scale = memory, *shift = scale + shape.tile, *tiles = shift + shape.tile;
  if (call.train) {
    statistics_nchw(spec, shape, static_cast<const E*>(call.z), group, scale, shift);
    for (int64_t c = 0; c < channels; ++c) update(call, shape.elements, first + c, scale[c], shift[c]);
  }
  for (int64_t c = 0; c < channels; ++c) affine(call, first + c, scale[c], shift[c]);
  spread(spec, shape, channels, scale);
  spread(spec, shape, channels, shift);
  for (int64_t index = 0; index < shape.tiles; ++index)
    forward_tile<EACH, E>(spec, shape, call, shape.at(spec, group, index), shape.after(spec, group, index), scale,
                          shift, tiles);
}

template <typename E>
bool forward(const Spec& spec, const Forward& call) {
  const Geometry shape(spec);
  const E* z = static_cast<const E*>(call.z);
  if (!call.train) running(spec, call);
  if (!spec.channels_last)
    return parallel(shape.groups, GRAIN / (spec.T * shape.positions * shape.channels), [&](int64_t begin, int64_t end) {
      float* memory = scratch(0, 7 * shape.tile);
      for (int64_t group = begin; group < end; ++group)
        if (shape.channels > 1)
          forward_group<true, E>(spec, shape, call, group, memory);
        else
          forward_group<false, E>(spec, shape, call, group, memory);
    });
  std::vector<float> scale(shape.tile), shift(shape.tile);
  if (call.train) {
    if (!statistics_nhwc(spec, shape, z, scale.data(), shift.data())) return false;
    for (int64_t channel = 0; channel < spec.C; ++channel)
      update(call, shape.elements, channel, scale[channel], shift[channel]);
  }
  for (int64_t channel = 0; channel < spec.C; ++channel) affine(call, channel, scale[channel], shift[channel]);
  spread(spec, shape, spec.C, scale.data());
  spread(spec, shape, spec.C, shift.data());
  return parallel(shape.tiles, GRAIN / (spec.T * shape.tile), [&](int64_t begin, int64_t end) {
    float* memory = scratch(0, 5 * shape.tile);
    for (int64_t index = begin; index < end; ++index)
      forward_tile<true, E>(spec, shape, call, shape.at(spec, 0, index), shape.after(spec, 0, index), scale.data(),
                            shift.data(), memory);
  });
}

// dL/dx of all steps of a tile, last step first; `emit(t, dL/dx)` takes each, or their sum where z is static.
template <bool EACH, typename E, typename Emit>
void backward_tile(const Spec& spec, const Geometry& shape, const Backward& call, Tile tile, Tile next,
                   const float* scale, const float* shift, float* memory, double& q_sum, const Emit& emit) {
  const int64_t n = tile.size, T = spec.T, size = shape.tile;
  float *v = memory, *carry = v + size, *to_spikes = carry + size, *first = to_spikes + size, *second = first + size;
  float *written = second + size, *total = written + size, *h = total + size, *x = h + T * size;
  const float tau = call.q == nullptr ? spec.tau : call.q[0];
  const Step advance = step_of<false>(spec);
  const FireBackward fire = fire_backward_of(spec);
  const JoinBackward join_back = join_backward_of(spec);
  const bool gated = spec.gate == BSG || spec.gate == AND || spec.gate == IAND;
  begin(call.v_init, tile, spec.rest, v);
  for (int64_t t = 0; t < T; ++t) {
    const E* z = static_cast<const E*>(call.z) + t * shape.slab;
    float* current = spec.learned ? x + t * size : x;
    if (t == 0 || !spec.repeat) {
      normalise<EACH>(z + tile.offset, scale, shift, current, n);
      fetch<0>(z + next.offset, next.size);
    } else if (spec.learned) {
      std::memcpy(current, x, n * sizeof(float));
    }
    if (spec.gate == POST_ADD) {
      const float* joined = view(static_cast<const E*>(call.shortcut) + t * shape.slab + tile.offset, n, first);
      for (int64_t i = 0; i < n; ++i) current[i] = current[i] + joined[i];
    }
    advance(v, current, h + t * size, n, spec, tau);
  }
  begin(call.grad_v, tile, 0.0f, carry);
  if (spec.repeat) std::fill(total, total + n, 0.0f);
  for (int64_t t = T - 1; t >= 0; --t) {
    const E* grad = static_cast<const E*>(call.grad) + t * shape.slab;
    const float* to_h = view(grad + tile.offset, n, first);
    fetch<0>(grad + next.offset, next.size);
    E* grad_shortcut = static_cast<E*>(call.grad_shortcut) + t * shape.slab;
    if (gated) {
      const E* shortcut = static_cast<const E*>(call.shortcut) + t * shape.slab;
      float* place = target(grad_shortcut + tile.offset, written);
      join_back(spec.threshold, to_h, h + t * size, view(shortcut + tile.offset, n, second), to_spikes, place, n);
      store(place, grad_shortcut + tile.offset, n);
      fetch<0>(shortcut + next.offset, next.size);
      fetch<1>(grad_shortcut + next.offset, next.size);
      to_h = to_spikes;
    }
    fire(to_h, h + t * size, carry, n, spec);
    if (spec.learned) {
      const float* start = call.v_init == nullptr ? nullptr : call.v_init + tile.offset;
      q_sum += of_q(spec, carry, x + t * size, t == 0 ? nullptr : h + (t - 1) * size, start, n);
    }
    const float* to_x = charge_backward(spec, tau, carry, to_spikes, n);
    if (spec.gate == POST_ADD)
      for (int64_t i = 0; i < n; ++i) put(grad_shortcut[tile.offset + i], to_x[i]);
    if (!spec.repeat)
      emit(t, to_x);
    else
      for (int64_t i = 0; i < n; ++i) total[i] += to_x[i];
  }
  if (spec.repeat) emit(0, total);
  if (call.grad_v_init != nullptr) std::memcpy(call.grad_v_init + tile.offset, carry, n * sizeof(float));
}

int64_t backward_memory(const Spec& spec, const Geometry& shape) {
  return (7 + spec.T + (spec.learned ? spec.T : 1)) * shape.tile;
}

// Sums of dL/dx and of dL/dx (z - mean) at each place of a tile: fp32 over the steps of a tile, fp64 over tiles.
struct TileSums {
  std::vector<double> totals;
  float *plain, *centred;
  int64_t size;
  TileSums(int64_t places, float* memory) : totals(2 * places), plain(memory), centred(memory + places), size(places) {}
  void start() { std::fill(plain, plain + 2 * size, 0.0f); }
  template <bool EACH, typename E>
  void add(const float* __restrict grad, const E* __restrict z, const float* __restrict mean, int64_t n) {
    float* __restrict first = plain;
    float* __restrict second = centred;
    const float middle = mean[0];
    for (int64_t i = 0; i < n; ++i) {
      first[i] += grad[i];
      second[i] += grad[i] * (to_float(z[i]) - (EACH ? mean[i] : middle));
    }
  }
  void finish(int64_t n) {
    for (int64_t i = 0; i < n; ++i) totals[i] += plain[i];
    for (int64_t i = 0; i < n; ++i) totals[size + i] += centred[i];
  }
};

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

template <bool EACH, typename E>
void backward_group(const Spec& spec, const Geometry& shape, const Backward& call, int64_t group, float* memory,
                    float* kept, double& q_sum) {
  const int64_t first = group * shape.channels, channels = shape.channels_of(spec, group), size = shape.tile;
  float *scale = memory, *shift = scale + size, *mean = shift + size, *centre = mean + size, *slope = centre + size;
  float *partial = slope + size, *tiles = partial + 2 * size;
  for (int64_t c = 0; c < channels; ++c) {
    mean[c] = call.mean[first + c];
    scale[c] = call.invstd[first + c] * call.gamma[first + c];
    shift[c] = fused(-mean[c], scale[c], call.beta[first + c]);
  }
  for (float* values : {scale, shift, mean}) spread(spec, shape, channels, values);
  TileSums sums(size, partial);
  const int64_t steps = spec.repeat ? 1 : spec.T;
  for (int64_t index = 0; index < shape.tiles; ++index) {
    const Tile tile = shape.at(spec, group, index);
    sums.start();
    backward_tile<EACH, E>(spec, shape, call, tile, shape.after(spec, group, index), scale, shift, tiles, q_sum,
                           [&](int64_t t, const float* grad) {
      sums.add<EACH>(grad, static_cast<const E*>(call.z) + t * shape.slab + tile.offset, mean, tile.size);
      std::memcpy(kept + (index * steps + t) * size, grad, tile.size * sizeof(float));
    });
    sums.finish(tile.size);
  }
  const int64_t of_channel = shape.channels > 1 ? spec.plane : size;
  for (int64_t c = 0; c < channels; ++c) {
    double plain = 0, centred = 0;
    for (int64_t i = c * of_channel; i < (c + 1) * of_channel; ++i) plain += sums.totals[i];
    for (int64_t i = c * of_channel; i < (c + 1) * of_channel; ++i) centred += sums.totals[size + i];
    const Finish last = finish(call, shape.elements, first + c, plain, centred);
    centre[c] = last.centre;
    slope[c] = last.slope;
  }
  for (float* values : {centre, slope}) spread(spec, shape, channels, values);
  for (int64_t index = 0; index < shape.tiles; ++index) {
    const Tile tile = shape.at(spec, group, index);
    for (int64_t t = 0; t < steps; ++t) {
      const E* __restrict from = static_cast<const E*>(call.z) + t * shape.slab + tile.offset;
      E* __restrict to = static_cast<E*>(call.grad_z) + t * shape.slab + tile.offset;
      const float* __restrict grad = kept + (index * steps + t) * size;
      for (int64_t i = 0; i < tile.size; ++i) {
        const int64_t at = EACH ? i : 0;
        put(to[i], (grad[i] - (to_float(from[i]) - mean[at]) * slope[at] - centre[at]) * scale[at]);
      }
    }
  }
}

template <typename E>
bool backward_nchw(const Spec& spec, const Geometry& shape, const Backward& call) {
  std::vector<double> q_sums(shape.groups);
  const int64_t steps = spec.repeat ? 1 : spec.T, of_group = spec.T * shape.positions * shape.channels;
  const bool sound = parallel(shape.groups, GRAIN / of_group, [&](int64_t begin, int64_t end) {
    float* memory = scratch(0, backward_memory(spec, shape) + 7 * shape.tile);
    float* kept = scratch(1, shape.tiles * steps * shape.tile);
    for (int64_t group = begin; group < end; ++group)
      if (shape.channels > 1)
        backward_group<true, E>(spec, shape, call, group, memory, kept, q_sums[group]);
      else
        backward_group<false, E>(spec, shape, call, group, memory, kept, q_sums[group]);
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
  for (std::vector<float>* values : {&scale, &shift, &mean}) spread(spec, shape, C, values->data());
  const E* z = static_cast<const E*>(call.z);
  E* grad_z = static_cast<E*>(call.grad_z);
  E* rest = call.rest == nullptr ? grad_z : static_cast<E*>(call.rest);
  std::vector<double> sums(BLOCKS * 2 * C), q_sums(BLOCKS);
  const int64_t blocks = std::min(BLOCKS, shape.tiles), of_block = spec.T * shape.positions * C / blocks;
  bool sound = parallel(blocks, GRAIN / std::max<int64_t>(1, of_block), [&](int64_t begin, int64_t end) {
    float* memory = scratch(0, backward_memory(spec, shape) + 2 * size);
    float* partial = memory + backward_memory(spec, shape);
    for (int64_t block = begin; block < end; ++block) {
      TileSums all(size, partial);
      for (int64_t index = block * shape.tiles / blocks; index < (block + 1) * shape.tiles / blocks; ++index) {
        const Tile tile = shape.at(spec, 0, index);
        all.start();
        backward_tile<true, E>(spec, shape, call, tile, shape.after(spec, 0, index), scale.data(), shift.data(), memory,
                               q_sums[block], [&](int64_t t, const float* __restrict grad) {
          const int64_t place = t * shape.slab + tile.offset;
          all.add<true>(grad, z + place, mean.data(), tile.size);
          E* __restrict to = grad_z + place;
          E* __restrict low = rest + place;
          for (int64_t i = 0; i < tile.size; ++i) {
            put(to[i], grad[i]);
            put_rest(low, i, grad[i], to[i]);
          }
        });
        all.finish(tile.size);
      }
      double* of_channel = sums.data() + block * 2 * C;
      for (int64_t row = 0; row < shape.rows; ++row)
        for (int64_t c = 0; c < C; ++c) {
          of_channel[c] += all.totals[row * C + c];
          of_channel[C + c] += all.totals[size + row * C + c];
        }
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
  for (std::vector<float>* values : {&centre, &slope}) spread(spec, shape, C, values->data());
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

int32_t spikefleet_integers_forward(const Integers* call) {
  return (call->bf16 ? integers_forward<Bf16>(*call) : integers_forward<float>(*call)) ? 0 : 1;
}

int32_t spikefleet_integers_backward(const Integers* call) {
  return (call->bf16 ? integers_backward<Bf16>(*call) : integers_backward<float>(*call)) ? 0 : 1;
}

int32_t spikefleet_backward(const Spec* spec, const Backward* call) {
  try {
    return (spec->bf16 ? backward<Bf16>(*spec, *call) : backward<float>(*spec, *call)) ? 0 : 1;
  } catch (...) {
    return 1;
  }
}
}
