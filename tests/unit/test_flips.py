"""Integers that rounding flips: counted where a membrane lies at a rounding edge, and nowhere else."""

import torch
from torch import Tensor, nn

from spikefleet_models.equivalence import check_equivalence, count_flips
from spikefleet_models.neuron_config import NeuronConfig
from spikefleet_models.neurons import build_neuron


class SN(nn.Module):
    """A neuron with one step."""

    def __init__(self, neuron: nn.Module) -> None:
        super().__init__()
        self.neuron = neuron

    def forward(self, x: Tensor) -> Tensor:
        return self.neuron(x.unsqueeze(0)).flatten(0, 1)


def weight_at_an_edge() -> tuple[int, Tensor]:
    """n and an fp32 w such that n * w and w + ... + w round to different integers."""
    for n in range(3, 9):
        for half in range(1, n):
            w = torch.tensor((half + 0.5) / n)
            total = torch.zeros(())
            for _ in range(n):
                total = total + w
            if (n * w).round() != total.round():
                return n, w
    raise AssertionError("fp32 adds exactly")


def test_flips_at_a_rounding_edge_are_counted() -> None:
    n, w = weight_at_an_edge()

    class Edge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = (SN(build_neuron(NeuronConfig(kind="ilif", bound=8))) for _ in range(2))
            self.conv = nn.Conv2d(1, 1, 1, bias=False)
            nn.init.constant_(self.conv.weight, w.item())
            self.head = nn.Conv2d(1, 1, 1, bias=False)
            nn.init.ones_(self.head.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.last(self.conv(self.first(x))))

    images = torch.zeros(2, 1, 4, 4)
    images[0, 0, :, 0] = n
    images[1, 0, 0, 0] = n
    flips = count_flips(Edge(), images)
    assert [(layer.name, layer.flipped, layer.emitted) for layer in flips.layers] == [
        ("first.neuron", 0, 32),
        ("last.neuron", 5, 32),
    ]
    assert (flips.flipped, flips.emitted, flips.max_output_difference) == (5, 64, 1.0)
    assert check_equivalence(Edge(), images).passed
