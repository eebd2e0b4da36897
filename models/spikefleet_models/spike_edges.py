"""Which layers of a network are fed with spikes, as `spike_flow.py` finds it.

A convolution or linear layer is fed with spikes when its input is the output of a neuron, or what a gate or a selection
(max-pool, upsampling, concatenation) made of such outputs; or event frames that are declared binary. Every other one is
analogue, with a reason: its input is the image, another layer's real-valued output, or an average of spikes.

What no hardware of binary events could run is refused by name. On the way to a neuron, spikes may only

* pass nn.Conv2d or nn.Linear, as 0 and 1 in D slots a step, and be added up behind it, with biases and with branches
  that depend on the image alone;
* with D = 1, be added to such a current themselves: a synapse of weight 1;
* be selected: max-pools, nearest upsampling, concatenation, zero padding, views and copies, of spikes and of currents;
* meet other binary spikes in a gate that keeps them binary.

Behind the last neuron everything is allowed but integers (D > 1) or sums of spikes (SEW ResNet's ADD) in the place of
binary spikes. Neurons may do what they want inside; they and the layers must be of these classes, not of subclasses,
and without methods of their own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from spikefleet_models.neurons import spiking_nodes
from spikefleet_models.slots import NotSpikeDrivenError
from spikefleet_models.spike_flow import NEURONS, Operation, SpikeFlow, own_methods
from spikefleet_models.spike_origins import FOREIGN, Origin


@dataclass(frozen=True)
class SpikeFed:
    """A layer whose input is spikes of `nodes`, which run `timesteps` T and emit at most `bound` D a step."""

    nodes: tuple[str, ...]
    timesteps: int
    bound: int


@dataclass(frozen=True)
class Analogue:
    """A layer whose input is not spikes, and why."""

    reason: str


LayerInput = SpikeFed | Analogue


def layer_inputs(network: nn.Module, images: Tensor | None = None, binary_input: bool = False) -> dict[str, LayerInput]:
    """What feeds each convolution and linear layer, in the order in which they run.

    Args:
        network: in eval mode; not changed.
        images: images [B, C, H, W] or frames [T, B, C, H, W] to follow; by default a noise image of 64x64 pixels with
            the channels that `network.config` names.
        binary_input: whether `images` are event frames of 0 and 1, which feed a layer with spikes.

    Raises:
        ValueError: `binary_input`, and the frames hold something else.
        NotSpikeDrivenError: the network has no spiking neuron, or uses spikes as binary events cannot be used; the
            sentence names layer or operation, and neuron.
    """
    if not spiking_nodes(network):
        raise NotSpikeDrivenError("the network has no spiking neurons, so it has no spike-driven form")
    for name, node in spiking_nodes(network).items():
        if type(node) not in NEURONS:
            raise NotSpikeDrivenError(
                f"neuron {name} is a {type(node).__name__}, which could compute anything; use IF, LIF, PLIF or ILIF"
            )
        if replaced := own_methods(node):
            raise NotSpikeDrivenError(
                f"neuron {name} has methods of its own ({', '.join(replaced)}), which could compute anything; use IF, "
                "LIF, PLIF or ILIF as they are"
            )
    followed = images if images is not None else noise_image(network)
    samples = followed.split(1, dim=followed.ndim - 4)
    judge = _Judge(network, binary_input)
    for sample in samples:
        judge.run(sample)
    if judge.keeps_state:
        judge.run(samples[0])  # now with what it kept
    return judge.inputs


def check_finite(network: nn.Module) -> None:
    """Refuse parameters and buffers that hold NaN or infinity, of which no sum is exact and many vanish unseen.

    Raises:
        NotSpikeDrivenError: the first such weight, bias or statistic by its name.
    """
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if not tensor.isfinite().all():
            raise NotSpikeDrivenError(f"{name} holds NaN or infinity; train again from a checkpoint before that")


def noise_image(network: nn.Module) -> Tensor:
    """[1, C, 64, 64] in [0, 1], the same each time, of the type and on the device of the network.

    Raises:
        ValueError: the network does not say how many channels it takes.
    """
    channels = getattr(getattr(network, "config", None), "in_channels", None)
    if channels is None:
        raise ValueError("the network has no config.in_channels to make an image from; give images")
    parameter = next(network.parameters())
    noise = torch.rand((1, channels, 64, 64), generator=torch.Generator().manual_seed(0))
    return noise.to(parameter.device, parameter.dtype)


class _Judge(SpikeFlow):
    """Finds what feeds each layer, and refuses spikes that are used as binary events cannot be used."""

    def __init__(self, network: nn.Module, binary_input: bool) -> None:
        super().__init__(network, binary_input)
        self.inputs: dict[str, LayerInput] = {}
        self._read = ""

    def run(self, image: Tensor) -> None:
        """Follow one image, or the frames of one sample."""
        self._read = ""
        for output in tree_leaves(self.follow(image.clone())):
            origin = self.origin(output) if isinstance(output, Tensor) else None
            if origin is not None and origin.kind == "spikes" and origin.bound > 1:
                raise NotSpikeDrivenError(
                    f"neuron {', '.join(origin.nodes)} (D={origin.bound}) is an output of the network; binary slots "
                    "must end in a layer"
                )

    def after_reading(self, name: str) -> None:
        self._read = self._read or name

    def after_neuron(self, name: str, fed_by: Origin | None) -> None:
        if self._read:
            raise NotSpikeDrivenError(
                f"neuron {name} runs after {self._read} has read values that depend on spikes into Python, where they "
                "cannot be followed; compute with tensors"
            )
        if fed_by is None or fed_by.kind == "image":
            return
        of_nodes = f" (made of the spikes of {', '.join(fed_by.nodes)})" if fed_by.nodes else ""
        if fed_by.kind == "real":
            raise NotSpikeDrivenError(
                f"neuron {name} depends on {fed_by.culprit}{of_nodes}; on the way to a neuron spikes may only pass "
                "nn.Conv2d and nn.Linear, be added to such currents, or be selected (max-pool, nearest upsampling, "
                "concatenation, binary gates); fold batch norms and merge chains with reparam.deploy"
            )
        if fed_by.kind == "spikes" and fed_by.bound > 1:
            raise NotSpikeDrivenError(
                f"neuron {name} is fed with integers (D={fed_by.bound}){of_nodes}, without a layer"
            )

    def after_operation(self, operation: Operation) -> None:
        if operation.in_layer:
            return
        for origin in operation.inputs:
            slots = origin.kind == "spikes" and origin.bound > 1 and operation.output.kind != "spikes"
            # A convolution by hand would escape the bookkeeping of biases even for one slot.
            if slots or (origin.is_spiking and "convolution" in operation.name):
                raise NotSpikeDrivenError(
                    f"neuron {', '.join(origin.nodes)} (D={origin.bound}) feeds {operation.name}; a spike-driven "
                    "network lets integers feed only nn.Conv2d and nn.Linear, and spikes no convolution but these"
                )

    def after_layer(self, name: str, fed_by: Origin | None) -> None:
        found = _layer_input(name, fed_by)
        earlier = self.inputs.setdefault(name, found)
        if isinstance(earlier, SpikeFed) and isinstance(found, SpikeFed):
            nodes = tuple(dict.fromkeys(earlier.nodes + found.nodes))
            self.inputs[name] = SpikeFed(nodes, found.timesteps, found.bound)
            agree = (earlier.timesteps, earlier.bound) == (found.timesteps, found.bound)
        else:
            agree = isinstance(earlier, Analogue) and isinstance(found, Analogue)
        if not agree:
            raise NotSpikeDrivenError(
                f"layer {name} runs more than once, on {earlier} and on {found}; give each its own layer"
            )


def _layer_input(name: str, fed_by: Origin | None) -> LayerInput:
    """What feeds a layer.

    Raises:
        NotSpikeDrivenError: sums of spikes do.
    """
    if fed_by is None:
        return Analogue("its input does not depend on the image")
    if fed_by.kind == "spikes":
        return SpikeFed(fed_by.nodes, fed_by.timesteps, fed_by.bound)
    if fed_by is FOREIGN:
        return Analogue(f"its input is {fed_by.culprit}")
    operations = ", ".join(fed_by.operations)
    if fed_by.kind == "sum":
        raise NotSpikeDrivenError(
            f"layer {name} is fed with integers computed from the spikes of {', '.join(fed_by.nodes)} by {operations}, "
            "not with binary events; join spikes with a gate that keeps them binary (bsg, bsg_star, and, iand)"
        )
    if fed_by.layer:
        return Analogue(f"its input is real-valued, from the output of {fed_by.layer}")
    if fed_by.kind == "image":
        return Analogue("its input is the image")
    return Analogue(f"its input is real-valued, computed from spikes by {operations}")
