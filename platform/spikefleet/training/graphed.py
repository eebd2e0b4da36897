"""Forward and backward pass as one CUDA graph: on a GPU small networks wait for kernel launches, not for arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from spikefleet.config.train_config import TrainConfig
from spikefleet.tasks import AnyTask
from spikefleet.training.precision import autocast
from spikefleet_pipelines.loading import Batch

_WARM_UP = 3
"""Passes without a graph before the capture: libraries choose their algorithms and allocate workspaces in them."""


class GraphedPass:
    """Passes over full batches, captured once and then replayed; the same kernels as without a graph.

    The weight of the loss and the balance coefficient change between steps, so the graph reads them from the device.

    Args:
        model: the network that is trained.
        config: of the training.
        device: a CUDA device.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, device: torch.device) -> None:
        self._model, self._precision = model, config.precision
        self._batch_size, self._device = config.global_batch, device
        self._weight, self._balance = (torch.zeros((), device=device) for _ in range(2))
        self._warmed = 0
        self._captured: _Captured | None = None

    def __call__(self, task: AnyTask, batch: Batch, balance: float, weight: float) -> dict[str, torch.Tensor] | None:
        """Runs forward and backward pass, and sets the gradients.

        Args:
            task: computes the loss; the same one in each call.
            batch: on the device; its targets have one entry for each image.
            balance: balance coefficient of the step.
            weight: factor of the loss.

        Returns:
            The values of the task's loss; None for a batch that the caller must run itself: the first ones, and a
            partial one.
        """
        if len(batch.images) != self._batch_size:
            return None
        if self._warmed < _WARM_UP:
            self._warmed += 1
            return None
        self._weight.fill_(weight)
        self._balance.fill_(balance)
        if self._captured is None:
            self._captured = self._capture(task, batch)
        captured = self._captured
        assert isinstance(batch.targets, torch.Tensor)
        captured.images.copy_(batch.images)
        captured.targets.copy_(batch.targets)
        captured.graph.replay()
        for parameter, gradient in captured.gradients.items():
            parameter.grad = gradient
        return dict(captured.values)

    def _capture(self, task: AnyTask, batch: Batch) -> _Captured:
        """Records a pass over copies of a batch; recording computes nothing."""
        assert isinstance(batch.targets, torch.Tensor)
        images, targets = batch.images.clone(), batch.targets.clone()
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        parameters = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        for parameter in parameters:
            parameter.grad = None  # so that the graph writes the gradients and does not add to them
        with torch.cuda.graph(graph):
            with autocast(self._precision, self._device, cached=False):
                values = task.loss(self._model, batch._replace(images=images, targets=targets), self._balance)
            (values["loss"] * self._weight).backward()
        gradients = {parameter: parameter.grad for parameter in parameters if parameter.grad is not None}
        kept = {name: value.detach() for name, value in values.items()}
        return _Captured(graph, images, targets, kept, gradients)


@dataclass(frozen=True)
class _Captured:
    """A graph with the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    images: torch.Tensor
    targets: torch.Tensor
    values: dict[str, torch.Tensor]
    gradients: dict[nn.Parameter, torch.Tensor]
