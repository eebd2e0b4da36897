"""Where the values of a tensor come from, and what operations make of it.

    kind      values                                                            made by
    image     real, dependent on the image alone                                anything
    spikes    0 and 1, or integers up to D that D binary slots can carry        a neuron; a selection of such; a gate
    sum       integers: spikes added up                                         ADD, as a gate or by hand
    current   what a membrane adds up: outputs of layers that spikes feed,      a layer on spikes; selections and sums
              spikes themselves (synapses of weight 1), branches of the image   of these
    real      all others that depend on spikes                                  any other operation

A selection is an operation each of whose outputs is one of its inputs (max-pool, nearest upsampling, concatenation,
zero padding, copies): it acts on each binary slot alone. What does not depend on the image has no origin: None.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Kind = Literal["image", "spikes", "sum", "current", "real"]
Rule = Literal["view", "selection", "addition", "other"]

VIEWS = frozenset(
    {"view", "_unsafe_view", "_reshape_alias", "alias", "detach", "lift_fresh", "expand", "permute", "transpose", "t"}
    | {"slice", "select", "unsqueeze", "squeeze", "unbind", "split", "split_with_sizes", "diagonal", "unfold"}
    | {"as_strided"}
)
SELECTIONS = frozenset(
    {"clone", "_to_copy", "copy_", "cat", "stack", "repeat", "index_select", "constant_pad_nd"}
    | {"max_pool2d_with_indices", "upsample_nearest2d", "upsample_nearest3d"}
)
ADDITIONS = frozenset({"add", "add_"})
READS_SHAPE = frozenset(
    {"empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like"}
    | {"new_empty", "new_empty_strided", "new_zeros", "new_ones", "new_full"}
)
# Other types round real values, and sums may wrap round in them.
_REAL_TYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


class Origin(NamedTuple):
    """Where the values of a tensor come from."""

    kind: Kind
    nodes: tuple[str, ...] = ()
    """Names of the neurons whose spikes they are made of."""
    timesteps: int = 0
    """T of these neurons."""
    bound: int = 0
    """The most that a value of spikes or sums can be; 0 where that is not known, and for other kinds."""
    layer: str = ""
    """The layer whose output they are made of; empty for what is made of the image or of spikes themselves."""
    operations: tuple[str, ...] = ()
    """What was done to spikes to get them, where there is no layer."""
    culprit: str = ""
    """What made them real: an operation and its module, or a layer."""

    @property
    def is_spiking(self) -> bool:
        """Whether values are numbers of spikes."""
        return self.kind in ("spikes", "sum")

    @property
    def is_binary_in_slots(self) -> bool:
        """Whether values are 0 and 1, or integers that the D binary slots of their neurons carry."""
        return self.kind == "spikes" or (self.kind == "sum" and self.bound == 1)


FOREIGN = Origin("real", culprit="a tensor that is no parameter or buffer and that the network did not compute")
"""Of what a network takes from outside its forward pass: it could be anything."""


def rule_of(name: str, overload: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Rule:
    """What kind of operation this is. Which values `index_select` takes is for the caller to judge."""
    third = args[2] if len(args) > 2 else None
    if name in VIEWS and overload != "dtype":
        return "view"
    if name == "constant_pad_nd" and (kwargs.get("value", 0) if third is None else third) != 0:
        return "other"
    if name in SELECTIONS:
        return "selection"
    plain = (kwargs.get("alpha", 1) if third is None else third) == 1
    return "addition" if name in ADDITIONS and plain else "other"


def derive(rule: Rule, name: str, inputs: Sequence[Origin | None], where: str = "") -> Origin:
    """The origin of what an operation makes of inputs of which at least one has an origin.

    Args:
        rule: of the operation.
        name: of the operation.
        inputs: None stands for a constant.
        where: name of the module that runs it.
    """
    known = origins(inputs)
    if rule == "view":
        return known[0]
    if rule != "other" and not any(origin.kind == "real" for origin in known):
        spiking = all(origin.is_spiking for origin in known)
        constants = len(known) < len(inputs)
        if rule == "addition" and spiking:
            bounded = not constants and all(origin.bound for origin in known)
            return _merged("sum", name, known, sum(origin.bound for origin in known) if bounded else 0)
        if rule == "selection" and spiking and not constants:
            same = len({(origin.kind, origin.timesteps, origin.bound) for origin in known}) == 1
            kind: Kind = "spikes" if same and known[0].kind == "spikes" else "sum"
            return _merged(kind, name, known, max(origin.bound for origin in known))
        return _merged("current", name, known)
    output = _merged("real", name, known)
    if output.kind != "real":
        return output
    earlier = next((origin.culprit for origin in known if origin.culprit), "")
    return output._replace(culprit=earlier or f"operation {name}{f' in {where}' if where else ''}")


def gated(name: str, inputs: Sequence[Origin | None]) -> Origin:
    """The origin of what a gate makes of inputs of which at least one has an origin."""
    if name == "gate add":
        return derive("addition", name, inputs)
    output = derive("selection", name, inputs)
    if not output.is_spiking:
        return derive("other", name, inputs)
    # No slot of an integer is gated alone.
    return output if output.bound == 1 else _merged("sum", name, origins(inputs), output.bound)


def weighted(name: str, fed_by: Origin | None, weights: Sequence[Origin | None]) -> Origin | None:
    """The origin of the output of a layer; its weights should have none."""
    known = origins([fed_by, *weights])
    if not known:
        return None
    if all(origin.kind == "image" for origin in known):
        return Origin("image", layer=name)
    nodes = tuple(dict.fromkeys(node for origin in known for node in origin.nodes))
    timesteps = max(origin.timesteps for origin in known)
    if fed_by is not None and fed_by.kind == "spikes" and len(known) == 1:
        return Origin("current", nodes, timesteps, layer=name)
    earlier = next((origin.culprit for origin in known if origin.culprit), "")
    return Origin("real", nodes, timesteps, layer=name, culprit=earlier or f"layer {name}, not fed with spikes alone")


def rounded(origin: Origin, dtype: torch.dtype) -> bool:
    """Whether values lose something when they are held in a type."""
    if origin.kind == "spikes":
        return dtype == torch.bool and origin.bound > 1
    return origin.kind in ("sum", "current") and dtype not in _REAL_TYPES


def origins(inputs: Sequence[Origin | None]) -> tuple[Origin, ...]:
    """Without the constants."""
    return tuple(origin for origin in inputs if origin is not None)


def is_whole(tensor: Tensor) -> bool:
    """Whether a tensor is all of its storage, each element once."""
    if tensor.layout is not torch.strided or tensor.nbytes != tensor.untyped_storage().nbytes():
        return False
    return tensor.is_contiguous() or (tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last))


def _merged(kind: Kind, name: str, known: Sequence[Origin], bound: int = 0) -> Origin:
    """The origin of what an operation makes of these inputs; of the image where no spikes are among them."""
    of_spikes = [origin for origin in known if origin.kind != "image"]
    if not of_spikes:
        return next((origin for origin in known if origin.layer), known[0])
    nodes = tuple(dict.fromkeys(node for origin in of_spikes for node in origin.nodes))
    timesteps = max(origin.timesteps for origin in of_spikes)
    direct = [origin for origin in of_spikes if not origin.layer]
    if not direct:
        return Origin(kind, nodes, timesteps, bound, of_spikes[0].layer)
    done = () if kind == "spikes" else (*(one for origin in direct for one in origin.operations), name)
    return Origin(kind, nodes, timesteps, bound, "", tuple(dict.fromkeys(done)))
