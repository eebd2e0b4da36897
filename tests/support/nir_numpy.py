"""The nodes of NIR as their definitions say, in NumPy: runs an exported file without a line of what wrote it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

Array = NDArray[np.float64]


def run_file(graph: Any, image: Array, steps: int) -> dict[str, Array]:
    """What each node puts out, [T, ...], for one image [C, H, W] that is the input at every step; dt = 1."""
    before = {name: [source for source, target in graph.edges if target == name] for name in graph.nodes}
    voltage = {name: node.v_reset.astype(float) for name, node in graph.nodes.items() if hasattr(node, "v_reset")}
    outputs: dict[str, list[Array]] = {name: [] for name in graph.nodes}
    for _ in range(steps):
        values: dict[str, Array] = {}
        while len(values) < len(graph.nodes):
            for name, node in graph.nodes.items():
                if name not in values and all(source in values for source in before[name]):
                    given = sum((values[source] for source in before[name]), np.float64(0)) if before[name] else image
                    values[name] = step(node, np.asarray(given), voltage, name)
        for name, value in values.items():
            outputs[name].append(value)
    return {name: np.stack(steps_of) for name, steps_of in outputs.items()}


def step(node: Any, x: Array, voltage: dict[str, Array], name: str) -> Array:
    """One step of one node."""
    kind = type(node).__name__
    if kind in voltage_kinds:
        v = voltage[name]
        slope = node.r * x if kind == "IF" else (node.v_leak - v + node.r * x) / node.tau
        v = v + slope
        spikes = v > node.v_threshold
        voltage[name] = np.where(spikes, node.v_reset, v)
        return spikes.astype(float)
    if kind == "Threshold":
        return (x > node.threshold).astype(float)
    if kind == "Scale":
        return x * node.scale
    if kind == "Affine":
        return node.weight.astype(float) @ x + node.bias
    if kind == "Flatten":
        return x.reshape(-1)
    if kind == "Conv2d":
        patches = windows(x, node.weight.shape[2:], node.stride, node.padding)
        return np.einsum("chwij,ocij->ohw", patches, node.weight.astype(float)) + node.bias[:, None, None]
    if kind in ("SumPool2d", "AvgPool2d"):
        patches = windows(x, node.kernel_size, node.stride, node.padding)
        return patches.sum((3, 4)) if kind == "SumPool2d" else patches.mean((3, 4))
    assert kind in ("Input", "Output"), kind
    return x


voltage_kinds = ("IF", "LIF")


def windows(x: Array, size: Any, stride: Any, padding: Any) -> Array:
    """Patches [C, H', W', h, w] of x [C, H, W]."""
    (down, right), (high, wide) = (int(s) for s in stride), (int(p) for p in padding)
    padded = np.pad(x, ((0, 0), (high, high), (wide, wide)))
    return sliding_window_view(padded, tuple(int(s) for s in size), (1, 2))[:, ::down, ::right]
