"""Spike health of a network: firing rates, dead and saturated neurons, per layer and per step."""

from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from spikefleet_models.neurons import spiking_nodes


class SpikeMonitor:
    """Counts the spikes of every spiking layer inside a `with` block; entering the block starts from zero.

    A neuron is one (c, h, w) of a layer. It is dead when it never fired on any recorded sample, and saturated when it
    emitted its maximum (1; D for I-LIF) at every step of every sample. Rates are fractions of that maximum, so 1 means
    saturated for every kind of neuron. Inside the block, units call their neurons as modules instead of the fused
    form: the numbers are the same, the speed is a little lower.
    """

    def __init__(self, model: nn.Module) -> None:
        self._nodes = spiking_nodes(model)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._counts: dict[str, Tensor] = {}
        self._samples: dict[str, int] = {}

    def __enter__(self) -> Self:
        self._counts, self._samples = {}, {}
        for name, node in self._nodes.items():
            self._handles.append(node.register_forward_hook(self._hook(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, name: str) -> Any:
        def record(node: nn.Module, inputs: tuple[Tensor, ...], spikes: Tensor) -> None:
            # Spikes over the batch as [T, C, H, W]: all that every statistic below needs.
            counts = spikes.detach().sum(1, dtype=torch.float32)
            if name not in self._counts:
                self._counts[name], self._samples[name] = counts, spikes.shape[1]
                return
            if counts.shape != self._counts[name].shape:
                raise ValueError(
                    f"layer {name}: spikes have shape {tuple(counts.shape)}, expected "
                    f"{tuple(self._counts[name].shape)} as before; record images of one size in one `with` block"
                )
            self._counts[name] += counts
            self._samples[name] += spikes.shape[1]

        return record

    def table(self) -> list[dict[str, Any]]:
        """One row per spiking layer, in network order.

        Returns:
            Rows of `layer`, `channels`, `rate`, `dead`, `saturated` (fractions) and `rate_per_step` (T values).
        """
        rows = []
        for name, counts in self._counts.items():
            most = self._samples[name] * self._nodes[name].bound
            possible = most * counts.shape[0]
            per_neuron = counts.sum(0)
            rows.append(
                {
                    "layer": name,
                    "channels": counts.shape[1],
                    "rate": per_neuron.mean().item() / possible,
                    "dead": (per_neuron == 0).float().mean().item(),
                    "saturated": (per_neuron == possible).float().mean().item(),
                    "rate_per_step": (counts.flatten(1).mean(1) / most).tolist(),
                }
            )
        return rows

    def summary(self) -> dict[str, float]:
        """Firing rate, dead and saturated fraction over the neurons of all layers; empty if no spiking layer ran."""
        if not self._counts:
            return {}
        rows = self.table()
        sizes = [counts[0].numel() for counts in self._counts.values()]
        total = sum(sizes)

        def pooled(key: str) -> float:
            return sum(row[key] * size for row, size in zip(rows, sizes, strict=True)) / total

        return {
            "firing_rate": pooled("rate"),
            "dead_fraction": pooled("dead"),
            "saturated_fraction": pooled("saturated"),
        }
