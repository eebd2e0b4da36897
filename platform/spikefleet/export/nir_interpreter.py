"""Runs a NIR graph without cycles over T steps, node by node, in fp64: what an exported file computes."""

from __future__ import annotations

from graphlib import TopologicalSorter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    import nir


def run_graph(graph: nir.NIRGraph, x_seq: Tensor) -> dict[str, Tensor]:
    """Runs all steps with dt = 1 from v_reset.

    Args:
        graph: with one input.
        x_seq: fp64 [T, B, C, H, W] into it.

    Returns:
        The output [T, B, ...] of every node by its name.
    """
    sources: dict[str, list[str]] = {name: [] for name in graph.nodes}
    for source, target in graph.edges:
        sources[target].append(source)
    values: dict[str, Tensor] = {}
    for name in TopologicalSorter(sources).static_order():
        given = [values[source] for source in sources[name]]
        values[name] = _run_node(graph.nodes[name], sum(given[1:], given[0]) if given else x_seq)
    return values


def _run_node(node: Any, x: Tensor) -> Tensor:
    kind = type(node).__name__
    if kind in ("Input", "Output"):
        return x
    if kind in ("IF", "LIF"):
        return _fire(node, x)
    if kind == "Threshold":
        return (x > _tensor(node.threshold)).to(x.dtype)
    if kind == "Scale":
        return x * _tensor(node.scale)
    if kind == "Affine":
        return F.linear(x, _tensor(node.weight), _tensor(node.bias))
    if kind == "Flatten":
        return x.flatten(2 + int(node.start_dim), -1 if int(node.end_dim) < 0 else 2 + int(node.end_dim))
    merged = x.flatten(0, 1)
    if kind == "Conv2d":
        stride, padding, dilation = (_pair(side) for side in (node.stride, node.padding, node.dilation))
        y = F.conv2d(merged, _tensor(node.weight), _tensor(node.bias), stride, padding, dilation, int(node.groups))
    elif kind in ("SumPool2d", "AvgPool2d"):
        window, stride, padding = (_pair(side) for side in (node.kernel_size, node.stride, node.padding))
        y = F.avg_pool2d(merged, window, stride, padding)
        y = (y * (window[0] * window[1])).round() if kind == "SumPool2d" else y  # sums of spikes
    else:
        raise ValueError(f"no rule for the NIR node {kind}")
    return y.unflatten(0, x.shape[:2])


def _fire(node: Any, x_seq: Tensor) -> Tensor:
    threshold, reset, resistance = (_tensor(part) for part in (node.v_threshold, node.v_reset, node.r))
    v = reset.expand_as(x_seq[0])
    spikes = []
    for x in x_seq:
        current = resistance * x
        v = v + current if type(node).__name__ == "IF" else v + (_tensor(node.v_leak) - v + current) / _tensor(node.tau)
        fired = v > threshold
        v = torch.where(fired, reset, v)
        spikes.append(fired.to(x.dtype))
    return torch.stack(spikes)


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(np.asarray(array)).double()


def _pair(side: Any) -> tuple[int, int]:
    first, second = np.broadcast_to(np.asarray(side), (2,)).tolist()
    return int(first), int(second)
