"""Proof that integer training equals binary inference: both forms of a network, layer by layer, with torch.equal.

Sums over D slots come in another order than sums over integers, and floating point is exact in every order only where
nothing is rounded. So the proof runs in fp64 on a network whose spike-fed layers have weights and biases on a grid:
multiples of a power of two, at most 2^30 of them to the layer's largest weight. Every partial sum, in any order, is
then a whole number of steps of the grid, and up to 2^53 steps fp64 holds it exactly:

    |b| + max |w| * D * fan-in  <=  2^53 steps of the grid

(for convolutions that multiply and add, as fp64's do on a CPU; not for those by FFT or Winograd's algorithm).
`headroom_bits` is what is left of the 53 bits. Beside a bias that is millions of times larger, steps are as large as
the sum needs, and 2^8 of them the least. Moving the weights to the grid changes each by at most 2^-31 of the layer's
largest, 2^-9 there; the proof is about the wiring (slots, order in time, biases), which does not depend on it. That the
weights as they are are those of the trained network is `deployment.py`'s part. What rounding does to them in the types
that people run is `count_flips`.

Neurons with D = 1 are the same in both forms, so for them the comparison shows little. What is proved there is that
spikes are used as binary events (`spike_edges.py`) and step by step (`causality.py`).
"""

import copy
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from spikefleet_models.carried_state import with_state
from spikefleet_models.causality import acausal_neuron
from spikefleet_models.comparison import Comparison
from spikefleet_models.deployment import check_deployment
from spikefleet_models.hidden_values import check_hidden_values
from spikefleet_models.neurons import spiking_nodes
from spikefleet_models.proof import EquivalenceProof, FlipCount, LayerFlips
from spikefleet_models.slots import Layer, NotSpikeDrivenError, reuse_equal_slots
from spikefleet_models.spike_driven import spike_driven
from spikefleet_models.spike_edges import LayerInput, SpikeFed, check_finite, layer_inputs

WEIGHT_BITS = 30
LEAST_WEIGHT_BITS = 8
"""Of weights beside a bias that is far larger, as behind a batch norm whose scale has died away."""
EXACT_BITS = 53
"""Integers up to 2^53 are exact in fp64."""


def on_grid(deployed: nn.Module, inputs: Mapping[str, LayerInput] | None = None) -> tuple[nn.Module, dict[str, int]]:
    """An fp64 copy whose spike-fed layers sum without rounding in every order, and the headroom of each in bits.

    Args:
        deployed: a network after `reparam.deploy`; not changed.
        inputs: `layer_inputs(deployed, images)`; found with a noise image when left out.

    Raises:
        NotSpikeDrivenError: a layer needs more than 53 bits; or as `layer_inputs`.
    """
    network = copy.deepcopy(deployed).eval().double()
    return network, _put_on_grid(network, layer_inputs(network) if inputs is None else inputs)


def _put_on_grid(network: nn.Module, inputs: Mapping[str, LayerInput]) -> dict[str, int]:
    """Move the weights of an fp64 network; return the headroom of each spike-fed layer."""
    headroom = {}
    for name, source in inputs.items():
        if isinstance(source, SpikeFed):
            layer = network.get_submodule(name)
            assert isinstance(layer, Layer)
            headroom[name] = _to_grid(layer, source.bound)
            if headroom[name] < 0:
                raise NotSpikeDrivenError(
                    f"layer {name} needs {EXACT_BITS - headroom[name]} bits to sum exactly, but fp64 has {EXACT_BITS}: "
                    "its bias is too large beside its weights"
                )
    return headroom


@torch.no_grad()
def _to_grid(layer: Layer, bound: int) -> int:
    weight, bias = layer.weight, layer.bias
    largest = weight.abs().max().item()
    fan_in = weight[0].numel()
    # frexp: largest < 2^exponent, so that it is below 2^WEIGHT_BITS steps.
    exponent = math.frexp(largest)[1]
    step = 2.0 ** (exponent - WEIGHT_BITS) if largest else 2.0**-WEIGHT_BITS
    if bias is not None and largest:
        total = bias.abs().max().item() + largest * bound * fan_in
        step = max(step, 2.0 ** min(math.frexp(total)[1] + 1 - EXACT_BITS, exponent - LEAST_WEIGHT_BITS))
    weight.copy_((weight / step).round() * step)
    most = int(weight.abs().max().item() / step) * bound * fan_in
    if bias is not None:
        bias.copy_((bias / step).round() * step)
        most += int(bias.abs().max().item() / step)
    return EXACT_BITS - most.bit_length()


def check_equivalence(
    deployed: nn.Module, images: Tensor, trained: nn.Module | None = None, binary_input: bool = False
) -> EquivalenceProof:
    """Run the integer and the binary form in fp64, one image at a time and two together, and compare every layer.

    Args:
        deployed: a network after `reparam.deploy`, of any floating-point type; not changed.
        images: images [B, C, H, W] or frames [T, B, C, H, W]. Memory is that of two images.
        trained: the network that was deployed, to compare with before weights are moved to the grid; not changed.
        binary_input: whether `images` are event frames of 0 and 1: then what they feed is spike-fed too.

    Raises:
        NotSpikeDrivenError: the network has no spike-driven form, see `spike_edges.py`; a weight, bias or statistic is
            not finite; or as `on_grid`.
        ValueError: there are no images, or they hold NaN or infinity, or with `binary_input` anything but 0 and 1.
    """
    samples = _one_by_one(images.double())
    for network in (deployed, trained):
        if network is not None:
            check_finite(network)
    integer = copy.deepcopy(deployed).eval().double()
    inputs = layer_inputs(integer, images.double(), binary_input)
    check_hidden_values(integer, samples[0])
    deployment = None if trained is None else check_deployment(trained, deployed, samples)
    headroom = _put_on_grid(integer, inputs)
    acausal = acausal_neuron(integer, samples[0])
    binary = spike_driven(integer, inputs)
    reuse_equal_slots(binary)
    comparison = Comparison(integer, binary, inputs)
    for sample in samples:
        comparison.run(sample)
    silent = () if comparison.failure else comparison.run_silent_alone()
    mixed = _mixed_batch(integer, binary, inputs, samples) if comparison.equal else None
    difference = comparison.output_difference
    return EquivalenceProof(
        layers=comparison.rows(headroom, silent),
        outputs_equal=difference == 0.0,
        max_output_difference=difference,
        images=len(samples),
        failure=comparison.failure or acausal or mixed,
        deployment=deployment,
        outputs_vary=comparison.outputs_vary,
    )


@torch.no_grad()
def check_carried(deployed: nn.Module, windows: Sequence[Tensor]) -> str | None:
    """Run both forms in fp64 over the windows of a stream with the membrane state carried from each to the next.

    An I-LIF membrane is the same number in both forms, as its D slots carry no dynamics; so its integers are equal in
    every window.

    Args:
        deployed: a network after `reparam.deploy`; not changed.
        windows: consecutive frames [T, B, C, H, W] of the same B recordings.

    Returns:
        The first difference in words, None where membranes and outputs are equal to the last bit.

    Raises:
        NotSpikeDrivenError: as `check_equivalence`.
    """
    integer, _ = on_grid(deployed, layer_inputs(copy.deepcopy(deployed).eval().double(), windows[0].double()))
    binary = spike_driven(integer, layer_inputs(integer, windows[0].double()))
    expected_state = found_state = None
    for number, window in enumerate(windows):
        expected, expected_state = with_state(integer, window.double(), expected_state)
        found, found_state = with_state(binary, window.double(), found_state)
        for name, v in expected_state.membranes.items():
            if not torch.equal(v, found_state.membranes[name]):
                return f"window {number}: the membrane of {name} differs"
        for one, other in zip(tree_leaves(expected), tree_leaves(found), strict=True):
            if not torch.equal(one, other):
                return f"window {number}: an output differs"
    return None


def _mixed_batch(
    integer: nn.Module, binary: nn.Module, inputs: Mapping[str, LayerInput], samples: list[Tensor]
) -> str | None:
    """What goes wrong in the binary form with two images in a batch, in words.

    Slots are by time, then by image: a network that flattens [B, T] would mix them, which one image does not show.
    """
    if all(node.bound == 1 for node in spiking_nodes(integer).values()):
        return None  # without slots both forms are the same
    pair = Comparison(integer, binary, inputs)
    pair.run(torch.cat((samples[0], samples[-1]), dim=samples[0].ndim - 4))
    if pair.equal:
        return None
    first = next((name for name, tally in pair.tallies.items() if tally.unequal), "its outputs")
    return (
        f"the binary form mixes the images of a batch, first in {first}, though it is equal on each alone; flatten "
        "time before images: [T * B, ...]"
    )


def count_flips(
    deployed: nn.Module, images: Tensor, dtype: torch.dtype = torch.float32, binary_input: bool = False
) -> FlipCount:
    """Run both forms in `dtype` on the weights as they are, and count emitted integers that differ.

    A rounding error of a current flips an integer where the membrane is within that error of x.5. Layers of the
    binary form sum in at least fp32.

    Args:
        deployed: a network after `reparam.deploy`; not changed.
        images: as for `check_equivalence`.
        dtype: float32, bfloat16 or float16.
        binary_input: as for `check_equivalence`.

    Raises:
        NotSpikeDrivenError: the forms cannot be compared, or as `layer_inputs`.
        ValueError: there are no images, or they hold NaN or infinity.
    """
    check_finite(deployed)
    integer = copy.deepcopy(deployed).eval().to(dtype)
    for module in integer.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()  # as under autocast, where one is left
    samples = _one_by_one(images.to(dtype))
    inputs = layer_inputs(integer, samples[0], binary_input)
    binary = spike_driven(integer, inputs)
    reuse_equal_slots(binary)
    comparison = Comparison(integer, binary, inputs)
    for sample in samples:
        comparison.run(sample)
    if comparison.failure is not None:
        raise NotSpikeDrivenError(comparison.failure)
    layers = [LayerFlips(n, tally.unequal, tally.elements) for n, tally in comparison.tallies.items() if tally.node]
    return FlipCount(str(dtype).removeprefix("torch."), tuple(layers), comparison.output_difference)


def _one_by_one(images: Tensor) -> list[Tensor]:
    if not images.numel():
        raise ValueError(f"images has shape {tuple(images.shape)}; give at least one image")
    if not images.isfinite().all():
        raise ValueError("images holds NaN or infinity; give finite values")
    return list(images.split(1, dim=images.ndim - 4))
