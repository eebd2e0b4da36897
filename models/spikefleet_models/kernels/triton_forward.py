"""Triton kernel of the spiking unit's forward: batch norm with known statistics, T steps of a neuron, and the gate.

One source serves both memory layouts: a tile holds `P` positions of `CB` channels (NCHW: one channel), and all T steps
of it, whose membranes stay in registers.

Membrane and normalisation are fp32. Products and sums are rounded as torch's native CUDA kernels round them: one fused
multiply-add in the normalisation, none elsewhere, for which callers switch fp fusion off.
"""

import triton
import triton.language as tl


@triton.jit
def zeros(mask):
    """Zeros of a tile's shape."""
    return tl.where(mask, 0.0, 0.0)


@triton.jit
def tile_count(count, SIZE: tl.constexpr):
    """How many tiles of SIZE cover `count`."""
    return (count + SIZE - 1) // SIZE


@triton.jit
def place_of(positions, channels, channel_count, plane, CHANNELS_LAST: tl.constexpr):
    """Offsets [P, CB] inside a step of positions (b, h, w) and channels."""
    if CHANNELS_LAST:
        return positions[:, None] * channel_count + channels[None, :]
    sample = positions // plane
    inside = positions - sample * plane
    return (sample * channel_count * plane + inside)[:, None] + channels[None, :] * plane


@triton.jit
def normalise(z, mean, invstd, gamma, beta):
    """Batch norm, rounded as torch's native kernel for CUDA rounds it."""
    return tl.fma(gamma * (z - mean), invstd, beta)


@triton.jit
def leaked(x, leak, LEAK: tl.constexpr):
    """Divide x by tau; `leak` is tau for a division and 1 / tau for a product."""
    if LEAK == "division":
        return tl.div_rn(x, leak)
    return x * leak


@triton.jit
def leak_of(tau, q_ptr, LEAK: tl.constexpr):
    """`learned` reads q = 1 / tau from memory; `factor` has 1 / tau in the place of tau."""
    if LEAK == "learned":
        return tl.load(q_ptr)
    return tau


@triton.jit
def charge(v, x, rest, leak, LEAK: tl.constexpr, DECAY_INPUT: tl.constexpr):
    """The membrane h[t] of v[t-1] and x[t]; membrane.py has the equations."""
    if LEAK == "none":
        return v + x
    if DECAY_INPUT:
        return v + leaked(x - (v - rest), leak, LEAK)
    return (v - leaked(v - rest, leak, LEAK)) + x


@triton.jit
def reset(h, fired, threshold, rest, SOFT: tl.constexpr):
    """The voltage v[t] of h[t]."""
    if SOFT:
        return tl.where(fired, h - threshold, h)
    return tl.where(fired, rest, h)


@triton.jit
def gated(fired, shortcut, GATE: tl.constexpr):
    """The block's output Y of H and X."""
    if GATE == "bsg":
        return tl.where(fired, 1.0, shortcut)
    if GATE == "add":
        return tl.where(fired, 1.0, 0.0) + shortcut
    if GATE == "and":
        return tl.where(fired, shortcut, 0.0)
    return tl.where(fired, 0.0, shortcut)


@triton.jit
def forward(
    z_ptr,
    shortcut_ptr,
    mean_ptr,
    invstd_ptr,
    gamma_ptr,
    beta_ptr,
    q_ptr,
    out_ptr,
    position_count,
    channel_count,
    plane,
    slab,
    threshold,
    rest,
    tau,
    T: tl.constexpr,
    REPEAT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    GATE: tl.constexpr,
    POST_ADD: tl.constexpr,
    LEAK: tl.constexpr,
    DECAY_INPUT: tl.constexpr,
    SOFT: tl.constexpr,
    P: tl.constexpr,
    CB: tl.constexpr,
):
    """Spikes of one tile for all steps; `slab` is the number of elements of a step."""
    columns = tile_count(channel_count, CB)
    program = tl.program_id(0)
    positions = program // columns * P + tl.arange(0, P)
    channels = program % columns * CB + tl.arange(0, CB)
    real = channels < channel_count
    mask = (positions < position_count)[:, None] & real[None, :]
    place = place_of(positions, channels, channel_count, plane, CHANNELS_LAST)
    mean = tl.load(mean_ptr + channels, mask=real, other=0.0)[None, :]
    invstd = tl.load(invstd_ptr + channels, mask=real, other=0.0)[None, :]
    gamma = tl.load(gamma_ptr + channels, mask=real, other=0.0)[None, :]
    beta = tl.load(beta_ptr + channels, mask=real, other=0.0)[None, :]
    leak = leak_of(tau, q_ptr, LEAK)
    v = tl.full([P, CB], 0.0, tl.float32) + rest
    if REPEAT:
        current = normalise(tl.load(z_ptr + place, mask=mask, other=0.0).to(tl.float32), mean, invstd, gamma, beta)
    for t in tl.static_range(T):
        if REPEAT:
            x = current
        else:
            z = tl.load(z_ptr + t * slab + place, mask=mask, other=0.0).to(tl.float32)
            x = normalise(z, mean, invstd, gamma, beta)
        if GATE != "none" or POST_ADD:
            shortcut = tl.load(shortcut_ptr + t * slab + place, mask=mask, other=0.0).to(tl.float32)
        if POST_ADD:
            x = x + shortcut
        h = charge(v, x, rest, leak, LEAK, DECAY_INPUT)
        fired = h >= threshold
        v = reset(h, fired, threshold, rest, SOFT)
        if GATE == "none":
            y = tl.where(fired, 1.0, 0.0)
        else:
            y = gated(fired, shortcut, GATE)
        tl.store(out_ptr + t * slab + place, y.to(out_ptr.dtype.element_ty), mask=mask)
