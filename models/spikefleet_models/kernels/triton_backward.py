"""Triton kernels of the spiking unit's backward.

    backward_sums    sums over each channel of dL/dx and dL/dx (z - mean), and dL/dshortcut
    finish_sums      these sums -> dL/dgamma, dL/dbeta and what the next kernel needs
    backward_input   dL/dz

Both passes recompute dL/dx, so no temporary of z's size exists. Partial sums have a place for each program and are
added in a fixed order in fp64: the same bits every time.
"""

import math

import triton
import triton.language as tl

from spikefleet_models.kernels.triton_forward import (
    charge,
    leak_of,
    leaked,
    normalise,
    place_of,
    reset,
    tile_count,
    zeros,
)


@triton.jit
def _plus(a, b):
    return a + b


@triton.jit
def _gate_to_spikes(grad, fired, shortcut, GATE: tl.constexpr, EXACT: tl.constexpr):
    """dL/dH from dL/dY."""
    if GATE == "bsg":
        if EXACT:
            return grad * (1.0 - shortcut)
        return grad * (tl.where(fired, 2.0, 0.0) - shortcut)
    if GATE == "and":
        return grad * shortcut
    if GATE == "iand":
        return -(grad * shortcut)
    return grad


@triton.jit
def _gate_to_shortcut(grad, fired, GATE: tl.constexpr):
    """dL/dX from dL/dY."""
    if GATE == "and":
        return tl.where(fired, grad, 0.0)
    return tl.where(fired, 0.0, grad)


@triton.jit
def _surrogate(d, SURROGATE: tl.constexpr, ALPHA: tl.constexpr):
    """The surrogate's derivative at d = h - V_th."""
    if SURROGATE == "atan":
        scaled = d * (math.pi / 2 * ALPHA)
        return (ALPHA / 2) / (1.0 + scaled * scaled)
    if SURROGATE == "rect":
        return tl.where(tl.abs(d) < 0.5 / ALPHA, ALPHA, 0.0)
    if SURROGATE == "piecewise_quadratic":
        return tl.where(tl.abs(d) > 1 / ALPHA, 0.0, ALPHA - tl.abs(d) * (ALPHA * ALPHA))
    if SURROGATE == "piecewise_exp":
        return (ALPHA / 2) * tl.exp(tl.abs(d) * -ALPHA)
    if SURROGATE == "sigmoid":
        opened = 1.0 / (1.0 + tl.exp(d * -ALPHA))
        return (1.0 - opened) * opened * ALPHA
    if SURROGATE == "soft_sign":
        distance = 1 / ALPHA + tl.abs(d)
        return 1.0 / (distance * distance * (2 * ALPHA))
    if SURROGATE == "super_spike":
        distance = 1.0 + tl.abs(d)
        return ALPHA / (distance * distance)
    if SURROGATE == "erf":
        scaled = d * ALPHA
        return tl.exp(-(scaled * scaled)) * (ALPHA / math.sqrt(math.pi))
    # dspike: 1 - tanh^2(a) = 4 e / (1 + e)^2 with e = exp(-2 |a|)
    shrunk = tl.exp(tl.abs(d) * (-2 * ALPHA))
    slope = 4.0 * shrunk / ((1.0 + shrunk) * (1.0 + shrunk)) * (ALPHA / (2 * math.tanh(ALPHA / 2)))
    return tl.where(tl.abs(d) <= 0.5, slope, 0.0)


@triton.jit
def _backward_tile(
    z_ptr,
    shortcut_ptr,
    grad_ptr,
    grad_shortcut_ptr,
    grad_z_ptr,
    place,
    mask,
    mean,
    invstd,
    gamma,
    beta,
    centre,
    slope,
    leak,
    slab,
    threshold,
    rest,
    plain,
    centred,
    of_q,
    T: tl.constexpr,
    REPEAT: tl.constexpr,
    GATE: tl.constexpr,
    EXACT: tl.constexpr,
    POST_ADD: tl.constexpr,
    LEAK: tl.constexpr,
    DECAY_INPUT: tl.constexpr,
    SOFT: tl.constexpr,
    DETACHED: tl.constexpr,
    SURROGATE: tl.constexpr,
    ALPHA: tl.constexpr,
    LEARNS_Q: tl.constexpr,
    TO_SHORTCUT: tl.constexpr,
    SUMS: tl.constexpr,
):
    """The tile's dL/dx of all steps, added to `plain` and `centred` with SUMS, else turned into dL/dz and stored.

    Only the membranes stay in registers; z and the shortcut are read again, from the first-level cache.
    """
    GATED: tl.constexpr = GATE != "none" and GATE != "add"
    membranes = ()
    v = zeros(mask) + rest
    for t in tl.static_range(T):
        if t == 0 or not REPEAT:
            z = tl.load(z_ptr + t * slab + place, mask=mask, other=0.0).to(tl.float32)
            normalised = normalise(z, mean, invstd, gamma, beta)
        x = normalised
        if POST_ADD:
            x = x + tl.load(shortcut_ptr + t * slab + place, mask=mask, other=0.0).to(tl.float32)
        h = charge(v, x, rest, leak, LEAK, DECAY_INPUT)
        membranes = membranes + (h,)
        v = reset(h, h >= threshold, threshold, rest, SOFT)
    total = zeros(mask)
    carry = zeros(mask)
    for t in tl.static_range(T - 1, -1, -1):
        h = membranes[t]
        fired = h >= threshold
        grad_s = tl.load(grad_ptr + t * slab + place, mask=mask, other=0.0).to(tl.float32)
        if GATED:
            if TO_SHORTCUT:
                to_shortcut = _gate_to_shortcut(grad_s, fired, GATE).to(grad_shortcut_ptr.dtype.element_ty)
                tl.store(grad_shortcut_ptr + t * slab + place, to_shortcut, mask=mask)
            shortcut = tl.load(shortcut_ptr + t * slab + place, mask=mask, other=0.0).to(tl.float32)
            grad_s = _gate_to_spikes(grad_s, fired, shortcut, GATE, EXACT)
        if not DETACHED:
            if SOFT:
                grad_s = grad_s - carry * threshold
            else:
                grad_s = grad_s + carry * (rest - h)
        grad_h = carry
        if not SOFT:
            grad_h = tl.where(fired, 0.0, carry)
        grad_h = grad_h + grad_s * _surrogate(h - threshold, SURROGATE, ALPHA)
        if not REPEAT or (LEARNS_Q and DECAY_INPUT):
            z = tl.load(z_ptr + (0 if REPEAT else t) * slab + place, mask=mask, other=0.0).to(tl.float32)
        if LEARNS_Q:
            offset = zeros(mask)
            if t > 0:
                before = membranes[t - 1]
                offset = reset(before, before >= threshold, threshold, rest, SOFT) - rest
            if DECAY_INPUT:
                x = normalise(z, mean, invstd, gamma, beta)
                if POST_ADD:
                    x = x + tl.load(shortcut_ptr + t * slab + place, mask=mask, other=0.0).to(tl.float32)
                of_q = of_q + grad_h * (x - offset)
            else:
                of_q = of_q - grad_h * offset
        grad_x = grad_h
        carry = grad_h
        if LEAK != "none":
            share = leaked(grad_h, leak, LEAK)
            carry = grad_h - share
            if DECAY_INPUT:
                grad_x = share
        if POST_ADD and TO_SHORTCUT:
            to_shortcut = grad_x.to(grad_shortcut_ptr.dtype.element_ty)
            tl.store(grad_shortcut_ptr + t * slab + place, to_shortcut, mask=mask)
        if REPEAT:
            total = total + grad_x
        elif SUMS:
            plain = plain + grad_x
            centred = centred + grad_x * (z - mean)
        else:
            grad_z = (grad_x - centre - (z - mean) * slope) * (gamma * invstd)
            tl.store(grad_z_ptr + t * slab + place, grad_z.to(grad_z_ptr.dtype.element_ty), mask=mask)
    if REPEAT:
        z = tl.load(z_ptr + place, mask=mask, other=0.0).to(tl.float32)
        if SUMS:
            plain = plain + total
            centred = centred + total * (z - mean)
        else:
            grad_z = (total - centre - (z - mean) * slope) * (gamma * invstd)
            tl.store(grad_z_ptr + place, grad_z.to(grad_z_ptr.dtype.element_ty), mask=mask)
    return plain, centred, of_q


@triton.jit(do_not_specialize=["groups"])
def backward_sums(
    z_ptr,
    shortcut_ptr,
    grad_ptr,
    grad_shortcut_ptr,
    mean_ptr,
    invstd_ptr,
    gamma_ptr,
    beta_ptr,
    q_ptr,
    sums_ptr,
    position_count,
    channel_count,
    plane,
    slab,
    groups,
    threshold,
    rest,
    tau,
    T: tl.constexpr,
    REPEAT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    GATE: tl.constexpr,
    EXACT: tl.constexpr,
    POST_ADD: tl.constexpr,
    LEAK: tl.constexpr,
    DECAY_INPUT: tl.constexpr,
    SOFT: tl.constexpr,
    DETACHED: tl.constexpr,
    SURROGATE: tl.constexpr,
    ALPHA: tl.constexpr,
    LEARNS_Q: tl.constexpr,
    TO_SHORTCUT: tl.constexpr,
    P: tl.constexpr,
    CB: tl.constexpr,
):
    """Sums of each channel over the tiles g, g + groups, ... of program g, as fp64 [2, groups, C]; dL/dq is a third.

    Each place of a tile has its own fp32 sum over the program's tiles; the places are added in fp64.
    """
    columns = tile_count(channel_count, CB)
    program = tl.program_id(0)
    group = program // columns
    channels = program % columns * CB + tl.arange(0, CB)
    real = channels < channel_count
    mean = tl.load(mean_ptr + channels, mask=real, other=0.0)[None, :]
    invstd = tl.load(invstd_ptr + channels, mask=real, other=0.0)[None, :]
    gamma = tl.load(gamma_ptr + channels, mask=real, other=0.0)[None, :]
    beta = tl.load(beta_ptr + channels, mask=real, other=0.0)[None, :]
    leak = leak_of(tau, q_ptr, LEAK)
    plain = tl.full([P, CB], 0.0, tl.float32)
    centred = tl.full([P, CB], 0.0, tl.float32)
    of_q = tl.full([P, CB], 0.0, tl.float32)
    for tile in range(group, tile_count(position_count, P), groups):
        positions = tile * P + tl.arange(0, P)
        mask = (positions < position_count)[:, None] & real[None, :]
        place = place_of(positions, channels, channel_count, plane, CHANNELS_LAST)
        plain, centred, of_q = _backward_tile(
            z_ptr, shortcut_ptr, grad_ptr, grad_shortcut_ptr, grad_ptr, place, mask, mean, invstd, gamma, beta, 0.0,
            0.0, leak, slab, threshold, rest, plain, centred, of_q, T, REPEAT, GATE, EXACT, POST_ADD, LEAK, DECAY_INPUT,
            SOFT, DETACHED, SURROGATE, ALPHA, LEARNS_Q, TO_SHORTCUT, True,
        )  # fmt: skip
    tl.store(sums_ptr + group * channel_count + channels, tl.reduce(plain.to(tl.float64), 0, _plus), mask=real)
    centred_sums = tl.reduce(centred.to(tl.float64), 0, _plus)
    tl.store(sums_ptr + (groups + group) * channel_count + channels, centred_sums, mask=real)
    if LEARNS_Q:
        q_sums = tl.reduce(of_q.to(tl.float64), 0, _plus)
        tl.store(sums_ptr + (2 * groups + group) * channel_count + channels, q_sums, mask=real)


@triton.jit(do_not_specialize=["count", "groups"])
def finish_sums(
    sums_ptr,
    invstd_ptr,
    grad_gamma_ptr,
    grad_beta_ptr,
    centre_ptr,
    slope_ptr,
    count,
    channel_count,
    groups,
    G: tl.constexpr,
    CB: tl.constexpr,
):
    """dL/dgamma, dL/dbeta, the mean of dL/dx, and the factor of (z - mean) in dL/dz; [C] each."""
    channels = tl.program_id(0) * CB + tl.arange(0, CB)
    real = channels < channel_count
    plain = tl.full([G, CB], 0.0, tl.float64)
    centred = tl.full([G, CB], 0.0, tl.float64)
    for start in range(0, groups, G):
        rows = start + tl.arange(0, G)
        mask = (rows < groups)[:, None] & real[None, :]
        place = rows[:, None] * channel_count + channels[None, :]
        plain += tl.load(sums_ptr + place, mask=mask, other=0.0)
        centred += tl.load(sums_ptr + groups * channel_count + place, mask=mask, other=0.0)
    plain_sum = tl.reduce(plain, 0, _plus)
    centred_sum = tl.reduce(centred, 0, _plus)
    invstd = tl.load(invstd_ptr + channels, mask=real, other=0.0).to(tl.float64)
    tl.store(grad_beta_ptr + channels, plain_sum.to(tl.float32), mask=real)
    tl.store(grad_gamma_ptr + channels, (centred_sum * invstd).to(tl.float32), mask=real)
    tl.store(centre_ptr + channels, (plain_sum / count).to(tl.float32), mask=real)
    tl.store(slope_ptr + channels, (centred_sum * invstd * invstd / count).to(tl.float32), mask=real)


@triton.jit
def backward_input(
    z_ptr,
    shortcut_ptr,
    grad_ptr,
    mean_ptr,
    invstd_ptr,
    gamma_ptr,
    beta_ptr,
    q_ptr,
    centre_ptr,
    slope_ptr,
    grad_z_ptr,
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
    EXACT: tl.constexpr,
    POST_ADD: tl.constexpr,
    LEAK: tl.constexpr,
    DECAY_INPUT: tl.constexpr,
    SOFT: tl.constexpr,
    DETACHED: tl.constexpr,
    SURROGATE: tl.constexpr,
    ALPHA: tl.constexpr,
    P: tl.constexpr,
    CB: tl.constexpr,
):
    """dL/dz = (dL/dx - its mean - (z - mean) slope) gamma invstd of one tile."""
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
    centre = tl.load(centre_ptr + channels, mask=real, other=0.0)[None, :]
    slope = tl.load(slope_ptr + channels, mask=real, other=0.0)[None, :]
    _backward_tile(
        z_ptr, shortcut_ptr, grad_ptr, grad_ptr, grad_z_ptr, place, mask, mean, invstd, gamma, beta, centre, slope,
        leak_of(tau, q_ptr, LEAK), slab, threshold, rest, 0.0, 0.0, 0.0, T, REPEAT, GATE, EXACT, POST_ADD, LEAK,
        DECAY_INPUT, SOFT, DETACHED, SURROGATE, ALPHA, False, False, False,
    )  # fmt: skip
