"""Images are picked until every layer has seen spikes, and no more than are needed."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from spikefleet_models.firing import Chosen, choose_images
from spikefleet_models.neuron_config import NeuronConfig
from spikefleet_models.neurons import build_neuron
from spikefleet_models.spike_edges import layer_inputs

STEPS = 2


class Channels(nn.Module):
    """Two neurons that fire where their channel of the image is bright, and layers behind them."""

    def __init__(self, merged: bool) -> None:
        super().__init__()
        self.merged = merged
        self.stem = nn.Conv2d(3, 3, 1, bias=False)
        nn.init.dirac_(self.stem.weight)
        self.a, self.b = (build_neuron(NeuronConfig(kind="if")) for _ in range(2))
        self.after_a, self.after_b = (nn.Linear(1, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        currents = self.stem(x).expand(STEPS, *x.shape)
        a, b = self.a(currents[:, :, :1]).mean((3, 4)), self.b(currents[:, :, 1:2])
        b = b.amax((3, 4)) if not self.merged else torch.cat([step.amax((2, 3)) for step in b])
        y: Tensor = a.mean(0) * 0 + self.after_b(b).reshape(STEPS, -1, 1).mean(0)
        return y


def batches(bright: dict[int, int], count: int, size: int = 4) -> Iterator[Tensor]:
    """Dark images, some with a bright channel."""
    images = torch.zeros(count, 3, 4, 4)
    for index, channel in bright.items():
        images[index, channel] = 2.0
    yield from images.split(size)


def chosen_of(network: nn.Module, images: Iterator[Tensor]) -> Chosen:
    network.eval()
    return choose_images(network, layer_inputs(network, torch.zeros(1, 3, 4, 4)), images)


@pytest.mark.parametrize("merged", [False, True])
def test_images_are_picked_on_which_a_layer_fires_first(merged: bool) -> None:
    chosen = chosen_of(Channels(merged), batches({5: 0, 6: 0, 9: 1, 10: 1}, 32))
    assert chosen.positions == [5, 9]
    assert chosen.silent == ()
    assert chosen.outputs_vary
    assert chosen.looked_at == 12  # no batch after the one in which the last layer fired


def test_layers_that_stay_silent_are_named_and_two_images_are_picked_all_the_same() -> None:
    chosen = chosen_of(Channels(merged=False), batches({5: 0}, 8))
    assert chosen.positions == [0, 5]
    assert chosen.silent == ("b",)
    assert (chosen.looked_at, chosen.outputs_vary) == (8, False)
    dark = chosen_of(Channels(merged=False), batches({}, 8))
    assert (dark.positions, dark.silent) == ([0, 1], ("a", "b"))
    assert chosen_of(Channels(merged=False), batches({}, 1)).positions == [0]


def test_the_first_image_with_another_output_is_picked() -> None:
    chosen = chosen_of(Channels(merged=False), batches({0: 1, 1: 0, 2: 1, 7: 2, 6: 0}, 8))
    assert chosen.positions == [0, 1]
    assert chosen.outputs_vary
