"""Windows of streams in training and evaluation: membranes carried from step to step, losses of labelled windows only.

Back-propagation through time is truncated at the start of each window. A lane is reset where its recording begins; it
stays on its rank for a whole epoch, and nothing outlives an epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils._pytree import tree_map

from spikefleet.tasks import AnyTask, Task
from spikefleet.tasks.task import Prediction, Target
from spikefleet.training.distributed import ProcessGroup
from spikefleet_models.carried_state import CarriedState, carried, restore_state
from spikefleet_pipelines.loading import Batch
from spikefleet_pipelines.stream_plan import NO_FRAME


class Lanes:
    """The membranes of this rank's lanes.

    Args:
        carries: whether membranes are carried; else every window starts from the reset state.
    """

    def __init__(self, carries: bool) -> None:
        self._carries = carries
        self._state: CarriedState | None = None

    def clear(self) -> None:
        """Forgets the membranes, at the end of an epoch."""
        self._state = None

    @contextmanager
    def window(self, network: nn.Module, batch: Batch) -> Iterator[None]:
        """Runs the one forward pass inside the block from the membranes of the window before, and keeps the new ones.

        Args:
            network: that the pass is of, maybe in DDP.
            batch: windows of a stream.
        """
        assert batch.stream is not None
        if not self._carries:
            yield
            return
        before = self._state
        if before is not None:
            before = before.restart(torch.from_numpy(batch.stream.starts))
        with carried(network, before) as carrier:
            yield
        self._state = carrier.state.detach()

    def tensors(self, group: ProcessGroup) -> dict[str, torch.Tensor]:
        """The membranes of all ranks for a checkpoint, by layer; empty before the first window. Collective."""
        if not self._carries:
            return {}
        parts = group.all_gather({} if self._state is None else self._state.tensors())
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def restore(self, network: nn.Module, tensors: Mapping[str, torch.Tensor], group: ProcessGroup) -> None:
        """Restores this rank's part of what `tensors` returned.

        Raises:
            ValueError: they are not those of the network.
        """
        mine = {name: v.tensor_split(group.size)[group.rank] for name, v in tensors.items()}
        self._state = restore_state(network, mine).to(group.device) if mine else None


class _Answers(nn.Module):
    """A network that gives the answers of some lanes; all lanes run."""

    def __init__(self, network: nn.Module, lanes: torch.Tensor) -> None:
        super().__init__()
        self._network, self._lanes = network, lanes

    def forward(self, x: torch.Tensor) -> object:
        """What the network returns, [B, ...] each, for the lanes."""
        return tree_map(lambda answer: answer[self._lanes.to(answer.device)], self._network(x))


def labelled_lanes(batch: Batch) -> torch.Tensor:
    """Positions in a batch of the windows with a label, int64."""
    assert batch.stream is not None
    return torch.from_numpy(batch.stream.frame_index != NO_FRAME).nonzero().flatten()


def of_lanes(batch: Batch, lanes: torch.Tensor) -> Batch:
    """A batch with targets and numbers of some lanes alone; with the images of all."""
    targets = batch.targets
    chosen = (
        targets[lanes.to(targets.device)]
        if isinstance(targets, torch.Tensor)
        else tuple(targets[lane] for lane in lanes.tolist())
    )
    return batch._replace(targets=chosen, indices=batch.indices[lanes])


def stream_loss(
    task: AnyTask, network: nn.Module, lanes: Lanes, batch: Batch, balance: float
) -> tuple[dict[str, torch.Tensor], int]:
    """The loss of the labelled windows of a batch.

    Args:
        task: the task.
        network: in training mode, maybe in DDP.
        lanes: the membranes, which are moved on.
        batch: windows of a stream, on the network's device.
        balance: as for `Task.loss`.

    Returns:
        The values of `Task.loss`, and the number of labelled windows. Where there is none the values are zero, with a
        gradient of zero: other ranks may have some, and all take part in the exchange of gradients.
    """
    chosen = labelled_lanes(batch)
    count = len(chosen)
    if not count:
        chosen = torch.zeros(1, dtype=torch.int64)
    with lanes.window(network, batch):
        values = task.loss(_Answers(network, chosen), of_lanes(batch, chosen), balance)
    return values if count else {name: value * 0 for name, value in values.items()}, count


@torch.no_grad()
def pass_over(network: nn.Module, lanes: Lanes, batch: Batch) -> None:
    """Runs a batch of windows of which no rank has a label: the membranes are moved on."""
    with lanes.window(network, batch):
        network(batch.network_input)


@torch.no_grad()
def predict_window(
    task: Task[Prediction, Target], network: nn.Module, lanes: Lanes, batch: Batch
) -> list[tuple[int, Prediction, Target]]:
    """Number of the window, prediction and target of each labelled window of a batch.

    Args:
        task: the task.
        network: in evaluation mode.
        lanes: the membranes, which are moved on.
        batch: windows of a stream, on the network's device.
    """
    chosen = labelled_lanes(batch)
    if not len(chosen):
        pass_over(network, lanes, batch)
        return []
    part = of_lanes(batch, chosen)
    with lanes.window(network, batch):
        predictions = task.predict(_Answers(network, chosen), part)
    return list(zip(part.indices.tolist(), predictions, task.targets(part), strict=True))
