"""What NIR has no node for, by the layers of a network."""

from __future__ import annotations

from torch import nn

from spikefleet.errors import UserError
from spikefleet_models.decoders import AttentionSpikeDecoder
from spikefleet_models.neurons import ILIF, SpikingNode, spiking_nodes
from spikefleet_models.sg_resnet import SGResNet


def refuse_what_nir_lacks(network: nn.Module) -> None:
    """Raises UserError with the first layer of each kind that NIR cannot express, and the reason."""
    reasons: dict[str, str] = {}
    refused = "."
    for name, module in network.named_modules():
        reason = _reason(module)
        if reason is not None and not name.startswith(refused):  # what it is made of needs no reason of its own
            reasons.setdefault(reason, name)
            refused = f"{name}."
    if not spiking_nodes(network):
        reasons.setdefault("it has no spiking neuron", "the network")
    if not reasons and not isinstance(network, SGResNet):
        reasons["its connections are not those of a spiking ResNet"] = type(network).__name__
    if reasons:
        says = "; ".join(f"{name}: {reason}" for reason, name in reasons.items())
        raise UserError(f"the network cannot be written as NIR: {says}; use --format onnx or --format spikes")


def _reason(module: nn.Module) -> str | None:
    if isinstance(module, AttentionSpikeDecoder):
        return "attention multiplies spikes by weights that depend on them, and NIR has no product of signals"
    if isinstance(module, ILIF):
        return f"I-LIF emits integers up to D={module.bound} and subtracts them, and a NIR neuron emits 1 and resets"
    if isinstance(module, SpikingNode) and module.v_reset is None:
        return "soft reset subtracts the threshold, and NIR has only the reset to v_reset"
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        return "grouped convolutions are not taken by NIR's importers"
    if isinstance(module, nn.Upsample):
        return "NIR has neither upsampling nor concatenation"
    if type(module).__name__ == "FeaturePyramidNetwork":
        return "a feature pyramid upsamples, and NIR has no node for that"
    if isinstance(module, nn.ReLU):
        return "ReLU is no spiking neuron"
    return None
