"""Blocks that compute their activations again in the backward pass instead of keeping them.

    recompute_stages(network, 1)     # the stage with the largest planes

Of a block in such a stage, autograd keeps its input alone, which is spikes in most families. Its forward pass runs a
second time in the backward pass (`torch.utils.checkpoint`, not re-entrant), from the same random state and membranes
and in the same form of its units; running statistics are updated by the first pass only. Losses and gradients are equal
to the last bit. State dicts do not change.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spikefleet_models.neurons import spiking_nodes


@runtime_checkable
class StagedNetwork(Protocol):
    """A network whose stages can be recomputed; its configuration has their number as `stage_count`."""

    def stage_blocks(self) -> list[list[nn.Module]]:
        """The blocks of each stage, from the one with the largest planes: modules that map a tensor to a tensor."""
        ...


def recompute_stages(network: nn.Module, count: int) -> None:
    """Have the blocks of the first stages recompute their activations in training.

    Args:
        network: a `StagedNetwork`; changed in place.
        count: number of stages, from the one with the largest planes; 0 changes nothing.

    Raises:
        ValueError: the network has no stages, or fewer.
    """
    if not count:
        return
    stages = network.stage_blocks() if isinstance(network, StagedNetwork) else []
    if not 0 < count <= len(stages):
        raise ValueError(
            f"{count} stages to recompute, but {type(network).__name__} has {len(stages)}; give at most that many"
        )
    for stage in stages[:count]:
        for block in stage:
            # A wrapping module would change the names of the state dict.
            setattr(block, "forward", _Recomputed(block))  # noqa: B010


class _Recomputed:
    """The forward of a block."""

    def __init__(self, block: nn.Module) -> None:
        self._block = block

    def __call__(self, x: Tensor) -> Any:
        block = self._block
        forward = partial(type(block).forward, block)
        if not block.training or not torch.is_grad_enabled():
            return forward(x)
        return checkpoint(forward, x, use_reentrant=False, context_fn=partial(_contexts, block))


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What surrounds the first and the second pass; called at the start of the first one."""
    return nullcontext(), _second_pass(block, _Seen(block))


class _Seen:
    """What a pass over a block reads beside its input and its weights."""

    def __init__(self, block: nn.Module) -> None:
        self._buffers = [(buffer, buffer.clone()) for buffer in block.buffers()]
        self._states = [(node, node.keep_state, node.v) for node in spiking_nodes(block).values()]
        # A unit that a hook observes calls its modules, and saves other tensors than a fused one.
        self.observed = [m for m in block.modules() if m._forward_hooks or m._forward_pre_hooks]

    def set(self) -> None:
        """Sets running statistics, which a border may be computed from, and membranes."""
        with torch.no_grad():
            for buffer, value in self._buffers:
                buffer.copy_(value)
        for node, keeps, v in self._states:
            node.keep_state, node.v = keeps, v


@contextmanager
def _second_pass(block: nn.Module, first: _Seen) -> Iterator[None]:
    """Sets what the first pass saw of the block, and undoes it and what the second pass changes."""
    now = _Seen(block)
    handles = [module.register_forward_hook(_nothing) for module in first.observed if module not in now.observed]
    try:
        first.set()
        yield
    finally:
        now.set()
        for handle in handles:
            handle.remove()


def _nothing(*_: object) -> None:
    return None
