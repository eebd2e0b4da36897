"""What an image does not show is compared all the same: silent layers and channels, later steps, images of a batch."""

import copy
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from spikefleet_models import slots
from spikefleet_models.deployment import check_deployment
from spikefleet_models.equivalence import check_equivalence
from spikefleet_models.neurons import ILIF
from spikefleet_models.slots import NotSpikeDrivenError
from unit.test_spike_rule import ACAUSAL, STEPS, Net, images


def plain(net: Net, s: Tensor) -> Tensor:
    return net.conv(s)


@torch.no_grad()
def with_silent(net: Net, channels: slice) -> Net:
    """The first neuron is silent in these channels, whatever the image."""
    net.stem.bias[channels] = -100.0
    return net.double().eval()


@pytest.mark.parametrize("bound", [1, 4])
@pytest.mark.parametrize("channels", [slice(None), slice(0, 1)], ids=["all", "one"])
def test_weights_that_no_spike_reached_are_those_of_the_trained_network(bound: int, channels: slice) -> None:
    trained = with_silent(Net(bound, plain), channels)
    samples = list(images().double().split(1))
    right = check_deployment(trained, copy.deepcopy(trained), samples)
    assert right.why is None
    emitted = STEPS * 3 * 4 * 4 * len(samples)
    assert all(segment.emitted in (0, emitted) for segment in right.segments)  # drawn spikes are not counted
    wrong = copy.deepcopy(trained)
    with torch.no_grad():
        wrong.conv.weight[:, 0] *= 3
    proof = check_deployment(trained, wrong, samples)
    assert [(segment.name, segment.layers) for segment in proof.differing] == [("last.neuron", ("conv",))]
    assert not check_equivalence(wrong, images(), trained=trained).passed


@pytest.mark.parametrize("bound", [1, 4])
@pytest.mark.parametrize("channels", [slice(0, 0), slice(None)], ids=["alive", "silent"])
def test_later_steps_are_found_though_the_image_is_dark(bound: int, channels: slice) -> None:
    name = "cat of reversed views"
    dark = torch.cat((torch.zeros(1, 3, 4, 4), images(1)))
    failure = check_equivalence(with_silent(Net(bound, ACAUSAL[name]), channels), dark).failure
    assert "depends in its first 1 of 3 steps on spikes of later ones" in str(failure)
    assert check_equivalence(with_silent(Net(bound, plain), channels), dark).failure is None


class FramesLate(Net):
    """The first neuron sees the frames in reverse."""

    def forward(self, frames: Tensor) -> Tensor:
        x = self.stem(frames.flatten(0, 1)).unflatten(0, (STEPS, -1))
        current = torch.cat(x.split(1)[::-1]) if self.bound == 1 else x
        y: Tensor = self.head(self.last(self.conv(self.first(current.flatten(0, 1))))).sum()
        return y


def test_later_frames_are_found_though_they_are_dark() -> None:
    dark = torch.zeros(STEPS, 1, 3, 4, 4)
    assert "neuron first.neuron depends" in str(check_equivalence(FramesLate(1, plain), dark).failure)
    assert check_equivalence(FramesLate(4, plain), dark).failure is None


class ByImage(nn.Module):
    """Flattens [T, B] by time or by image."""

    def __init__(self, bound: int, timesteps: int, by_image: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)
        self.first, self.last = ILIF(bound), ILIF(bound)
        self.timesteps, self.by_image = timesteps, by_image

    def weigh(self, layer: nn.Conv2d, spikes: Tensor, images: int) -> Tensor:
        if not self.by_image:
            return layer(spikes.flatten(0, 1)).unflatten(0, (-1, images))
        return layer(spikes.transpose(0, 1).flatten(0, 1)).unflatten(0, (images, -1)).transpose(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.linspace(4, 8, self.timesteps, dtype=x.dtype).view(-1, 1, 1, 1, 1)
        current = self.weigh(self.conv, self.first(self.stem(x) * steps), len(x))
        return self.weigh(self.head, self.last(current), len(x)).mean(0)


@pytest.mark.parametrize("timesteps", [1, 2])
def test_a_binary_form_that_mixes_the_images_of_a_batch_is_refused(timesteps: int) -> None:
    for by_image, bound, sound in ((True, 4, False), (False, 4, True), (True, 1, True)):
        proof = check_equivalence(ByImage(bound, timesteps, by_image), images())
        assert proof.passed is sound
        assert ("mixes the images of a batch, first in conv" in str(proof.why)) is not sound


@pytest.mark.parametrize("scale", [0.01, 1.0])
def test_a_silent_neuron_is_compared_on_currents_that_it_answers(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    net = with_silent(Net(4, plain), slice(None))
    net.first.neuron = ILIF(4, input_scale=scale)
    assert "first.neuron" in check_equivalence(net, images()).silent

    right = slots.thermometer

    def wrong(counts: Tensor, bound: int) -> Tensor:
        return right(counts.clamp(max=bound - 1), bound)

    monkeypatch.setattr(slots, "thermometer", wrong)
    assert "first.neuron" in check_equivalence(net, images()).unequal


@pytest.mark.parametrize("bound", [1, 4])
def test_methods_of_a_module_of_its_own_are_not_those_of_its_class(bound: int) -> None:
    """They could compute anything, and with D = 1 both forms would be the same."""
    net = Net(bound, plain)
    forward = net.last.neuron.multi_step_forward
    vars(net.last.neuron)["multi_step_forward"] = lambda x: forward(x.flip(0))
    with pytest.raises(NotSpikeDrivenError, match=r"last.neuron has methods of its own \(multi_step_forward\)"):
        check_equivalence(net, images())
    net = Net(bound, plain)
    convolve = net.conv._conv_forward
    vars(net.conv)["_conv_forward"] = lambda x, weight, bias: convolve(x, weight, bias).sigmoid()
    with pytest.raises(NotSpikeDrivenError, match=r"feeds convolution; .* no convolution but these"):
        check_equivalence(net, images())


@pytest.mark.parametrize(("share", "vary"), [(0.0, False), (1e-9, False), (1.0, True)])
def test_outputs_that_differ_by_rounding_alone_are_the_same(share: float, vary: bool) -> None:
    class Reads(Net):
        def forward(self, images: Tensor) -> Tensor:
            y: Tensor = super().forward(images) + share * images.mean()
            return y

    proof = check_equivalence(with_silent(Reads(4, plain), slice(None)), images())
    assert proof.passed
    assert proof.outputs_vary is vary


class Loop(nn.Module):
    """Runs its neurons step by step, the second one perhaps on spikes in reverse."""

    def __init__(self, bound: int, mode: Literal["s", "m"], reverse: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)
        self.first, self.last = (ILIF(bound, step_mode=mode) for _ in range(2))
        self.first.keep_state = self.last.keep_state = True
        self.mode, self.reverse = mode, reverse

    def fire(self, neuron: nn.Module, current: Tensor) -> Tensor:
        neuron.reset()  # type: ignore[operator]
        steps = [current[t] if self.mode == "s" else current[t : t + 1] for t in range(STEPS)]
        return (torch.stack if self.mode == "s" else torch.cat)([neuron(step) for step in steps])

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.linspace(3, 6, STEPS, dtype=x.dtype).view(-1, 1, 1, 1, 1)
        spikes = self.fire(self.first, self.stem(x) * scale)
        current = self.conv(spikes.flatten(0, 1)).unflatten(0, (STEPS, -1))
        if self.reverse:
            current = torch.cat(current.split(1)[::-1])
        return self.head(self.fire(self.last, current).flatten(0, 1)).unflatten(0, (STEPS, -1)).mean(0)


@pytest.mark.parametrize("mode", ["s", "m"])
def test_later_steps_are_found_in_a_network_that_runs_step_by_step(mode: Literal["s", "m"]) -> None:
    trained = Loop(1, mode, reverse=False)
    assert check_equivalence(trained, images(), trained=trained).passed
    assert "neuron last depends" in str(check_equivalence(Loop(1, mode, reverse=True), images()).failure)


def test_a_state_that_outlives_a_pass_does_not_reach_the_next_comparison() -> None:
    trained = Net(4, plain)
    trained.first.neuron.keep_state = True  # type: ignore[assignment]
    proof = check_deployment(trained.double(), copy.deepcopy(trained), list(images().double().split(1)))
    assert proof.why is None
    assert proof.flipped == 0
