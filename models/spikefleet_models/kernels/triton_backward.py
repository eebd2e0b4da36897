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
def _current_gradients(
    z_ptr,
    shortcut_ptr,
    grad_ptr,
    grad_shortcut_ptr,
    place,
    mask,
    mean,
    invstd,
    gamma,
    beta,
    leak,
    slab,
    threshold,
    rest,
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
):
    """z[t] and dL/dx[t] of one tile as tuples over t (one element with REPEAT), and the tile of dL/dq.

    Writes dL/dshortcut with TO_SHORTCUT.
    """
    READS_SHORTCUT: tl.constexpr = POST_ADD or (GATE != "none" and GATE != "add")
    zs = ()
    shortcuts = ()
    currents = ()
    membranes = ()
    v = zeros(mask) + rest
    for t in tl.static_range(T):
        if t == 0 or not REPEAT:
            z = tl.load(z_ptr + t * slab + place, mask=mask, other=0.0).to(tl.float32)
            zs = zs + (z,)
            normalised = normalise(z, mean, invstd, gamma, beta)
        x = normalised
        if READS_SHORTCUT:
            shortcut = tl.load(shortcut_ptr + t * slab + place, mask=mask, other=0.0).to(tl.float32)
            shortcuts = shortcuts + (shortcut,)
            if POST_ADD:
                x = x + shortcut
        if LEARNS_Q and DECAY_INPUT:
            currents = currents + (x,)
        h = charge(v, x, rest, leak, LEAK, DECAY_INPUT)
        membranes = membranes + (h,)
        v = reset(h, h >= threshold, threshold, rest, SOFT)
    grads = ()
    total = zeros(mask)
    grad_q = zeros(mask)
    carry = zeros(mask)
    for t in tl.static_range(T - 1, -1, -1):
        h = membranes[t]
        fired = h >= threshold
        grad = tl.load(grad_ptr + t * slab + place, mask=mask, other=0.0).to(tl.float32)
        grad_s = grad
        if READS_SHORTCUT and not POST_ADD:
            grad_s = _gate_to_spikes(grad, fired, shortcuts[t], GATE, EXACT)
            if TO_SHORTCUT:
                to_shortcut = _gate_to_shortcut(grad, fired, GATE).to(grad_shortcut_ptr.dtype.element_ty)
                tl.store(grad_shortcut_ptr + t * slab + place, to_shortcut, mask=mask)
        if not DETACHED:
            if SOFT:
                grad_s = grad_s - carry * threshold
            else:
                grad_s = grad_s + carry * (rest - h)
        grad_h = carry
        if not SOFT:
            grad_h = tl.where(fired, 0.0, carry)
        grad_h = grad_h + grad_s * _surrogate(h - threshold, SURROGATE, ALPHA)
        if LEARNS_Q:
            if t == 0:
                offset = zeros(mask)
            else:
                before = membranes[t - 1]
                offset = reset(before, before >= threshold, threshold, rest, SOFT) - rest
            if DECAY_INPUT:
                grad_q = grad_q + grad_h * (currents[t] - offset)
            else:
                grad_q = grad_q - grad_h * offset
        if LEAK == "none":
            carry = grad_h
            grad_x = grad_h
        else:
            share = leaked(grad_h, leak, LEAK)
            carry = grad_h - share
            grad_x = grad_h
            if DECAY_INPUT:
                grad_x = share
        if POST_ADD and TO_SHORTCUT:
            tl.store(grad_shortcut_ptr + t * slab + place, grad_x.to(grad_shortcut_ptr.dtype.element_ty), mask=mask)
        if REPEAT:
            total = total + grad_x
        else:
            grads = (grad_x,) + grads
    if REPEAT:
        grads = (total,)
    return zs, grads, grad_q


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
    q_sums_ptr,
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
    """Sums of each channel over the tiles g, g + groups, ... of program g, as fp64 [2, groups, C]."""
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
    plain = tl.full([CB], 0.0, tl.float64)
    centred = tl.full([CB], 0.0, tl.float64)
    of_q = tl.full([CB], 0.0, tl.float64)
    for tile in range(group, tile_count(position_count, P), groups):
        positions = tile * P + tl.arange(0, P)
        mask = (positions < position_count)[:, None] & real[None, :]
        place = place_of(positions, channels, channel_count, plane, CHANNELS_LAST)
        zs, grads, grad_q = _current_gradients(
            z_ptr,
            shortcut_ptr,
            grad_ptr,
            grad_shortcut_ptr,
            place,
            mask,
            mean,
            invstd,
            gamma,
            beta,
            leak,
            slab,
            threshold,
            rest,
            T,
            REPEAT,
            GATE,
            EXACT,
            POST_ADD,
            LEAK,
            DECAY_INPUT,
            SOFT,
            DETACHED,
            SURROGATE,
            ALPHA,
            LEARNS_Q,
            TO_SHORTCUT,
        )
        tile_plain = zeros(mask)
        tile_centred = zeros(mask)
        for t in tl.static_range(1 if REPEAT else T):
            tile_plain += grads[t]
            tile_centred += grads[t] * (zs[t] - mean)
        plain += tl.reduce(tile_plain, 0, _plus).to(tl.float64)
        centred += tl.reduce(tile_centred, 0, _plus).to(tl.float64)
        if LEARNS_Q:
            of_q += tl.reduce(grad_q, 0, _plus).to(tl.float64)
    tl.store(sums_ptr + group * channel_count + channels, plain, mask=real)
    tl.store(sums_ptr + (groups + group) * channel_count + channels, centred, mask=real)
    if LEARNS_Q:
        tl.store(q_sums_ptr + group * channel_count + channels, of_q, mask=real)


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
    leak = leak_of(tau, q_ptr, LEAK)
    zs, grads, _ = _current_gradients(
        z_ptr,
        shortcut_ptr,
        grad_ptr,
        grad_ptr,
        place,
        mask,
        mean,
        invstd,
        gamma,
        beta,
        leak,
        slab,
        threshold,
        rest,
        T,
        REPEAT,
        GATE,
        EXACT,
        POST_ADD,
        LEAK,
        DECAY_INPUT,
        SOFT,
        DETACHED,
        SURROGATE,
        ALPHA,
        False,
        False,
    )
    for t in tl.static_range(1 if REPEAT else T):
        grad_z = (grads[t] - centre - (zs[t] - mean) * slope) * (gamma * invstd)
        tl.store(grad_z_ptr + t * slab + place, grad_z.to(grad_z_ptr.dtype.element_ty), mask=mask)
