"""Conversion of the weights released by SpikeYOLO's authors to a state dict of this package's `SpikeYolo`.

The conversion reads a plain mapping of names to tensors and nothing else: load the authors' file in an environment that
you trust with it, and pass its state dict.

It was checked against the published structure (layers, modules in them, shapes, parameter counts) and not against a
released file. It therefore assumes little about the names:

* `model.<number>.` in front, with the numbers of the published table of layers; a stage of one block is the block
  itself, a stage of several holds them in order;
* a convolution and a batch norm are modules of their own with torch's tensor names;
* modules nest as published: in a block, SepConv (found by its 7x7 convolution), then the first and the second
  convolution or RepConv, each a module; SepRepConv a module in SepConv; in the head one module of the box branches,
  then one of the class branches, then the DFL;
* in each of these modules convolutions come in the order in which they are applied, and so do batch norms; the order
  of convolutions among batch norms, and the inner names, do not matter.

Every shape is verified. The order decides only between modules of equal shape in the same module: the two 1x1
convolutions and the two batch norms of a RepConv whose ratio is 1, the first two batch norms of SepConv, and in the
head two batch norms of one branch.
"""

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from spikefleet_models.spike_yolo.blocks import Block1, Block2, RepConv, SepConv, SepRepConv, SpikeSPPF
from spikefleet_models.spike_yolo.config import REG_MAX, SpikeYoloConfig
from spikefleet_models.spike_yolo.head import DecoupledHead
from spikefleet_models.spike_yolo.network import LAYERS, SpikeYolo

_LAYER_KEY = re.compile(r"(?:model\.)+(\d+)\.(.+)")
_OPTIONAL = "num_batches_tracked"
_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def convert_released(state_dict: Mapping[str, Tensor], config: SpikeYoloConfig) -> dict[str, Tensor]:
    """Convert a released state dict to one of `SpikeYolo(config)`.

    16-bit weights become fp32. Where any are fp64, all are converted to fp64, with a warning: nothing is rounded here,
    but `load_state_dict` of an fp32 network would round them.

    Args:
        state_dict: names and tensors of the released network in registration order, as its `state_dict()` gives them.
        config: of the same size and number of classes.

    Returns:
        Names and tensors in the order of `SpikeYolo(config).state_dict()`.

    Raises:
        ValueError: `config` is not a published network, or names are missing, unexpected, of another shape, or not of
            16, 32 or 64 floating-point bits; the message lists all of them.
    """
    published = {"reparameterise": True, "low_block": "block1", "high_block": "block2", "head": "anchor_free"}
    foreign = [
        f"{name}={getattr(config, name)!r}" for name, value in published.items() if getattr(config, name) != value
    ]
    if foreign:
        raise ValueError(
            f"no weights of this variant were released ({', '.join(foreign)}); leave these fields at their defaults"
        )
    with torch.device("meta"):
        network = SpikeYolo(config)
    layers: dict[int, _Module] = {}
    conversion = _Conversion(network.state_dict(), _common_type(state_dict.values()))
    for key, tensor in state_dict.items():
        match = _LAYER_KEY.fullmatch(key)
        number = int(match[1]) if match else -1
        if match is None or number not in LAYERS:
            conversion.left_over.append(key)
        else:
            layers.setdefault(number, _Module(key[: match.start(2) - 1])).insert(match[2].split("."), tensor)
    for number, name in LAYERS.items():
        pattern = _pattern(network.get_submodule(name), name)
        conversion.convert(pattern, _collapse(layers.get(number, _Module(f"model.{number}"))), f"layer {number}")
    conversion.raise_problems()
    if conversion.dtype is torch.float64:
        warnings.warn(
            "the released weights are fp64 and stay fp64; load them into build_model(config).double(), or convert them "
            "with .float() to round them to fp32",
            stacklevel=2,
        )
    return {name: conversion.converted[name] for name in network.state_dict()}


def _common_type(tensors: Iterable[Tensor]) -> torch.dtype:
    """The type that holds all weights without rounding, of at least fp32."""
    return torch.float64 if any(tensor.dtype is torch.float64 for tensor in tensors) else torch.float32


@dataclass
class _Module:
    """A module of the released network: its own tensors and its children, in registration order."""

    name: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    children: dict[str, "_Module"] = field(default_factory=dict)

    def insert(self, path: list[str], tensor: Tensor) -> None:
        if len(path) == 1:
            self.tensors[path[0]] = tensor
        else:
            child = self.children.setdefault(path[0], _Module(f"{self.name}.{path[0]}"))
            child.insert(path[1:], tensor)

    @property
    def is_bn(self) -> bool:
        return any(tensor.ndim < 2 for name, tensor in self.tensors.items() if name != "bias")

    def leaves(self) -> Iterator["_Module"]:
        """Yield the modules that have tensors of their own."""
        if self.tensors:
            yield self
        for child in self.children.values():
            yield from child.leaves()


@dataclass(frozen=True)
class _Pattern:
    """Expected content of a released module; `convs` and `bns` are names of our modules, in order of application.

    With `nested` patterns, convs and bns are direct children; without, they may lie at any depth.
    """

    convs: tuple[str, ...] = ()
    bns: tuple[str, ...] = ()
    nested: tuple["_Pattern", ...] = ()

    def names(self) -> Iterator[str]:
        yield from self.convs
        yield from self.bns
        for pattern in self.nested:
            yield from pattern.names()


def _pattern(module: nn.Module, name: str) -> _Pattern:
    """The pattern of one of our modules, called `name`."""
    if isinstance(module, RepConv):
        chain_bns = (f"{name}.pad_bn.bn", f"{name}.bn")
        return _Pattern((f"{name}.first", f"{name}.depthwise", f"{name}.last"), chain_bns)
    if isinstance(module, SepRepConv):
        return _Pattern((f"{name}.pointwise", f"{name}.depthwise"), (f"{name}.pad_bn.bn",))
    if isinstance(module, SepConv):
        bns = (f"{name}.expand.bn", f"{name}.depthwise.bn", f"{name}.project.bn")
        chain = _pattern(module.project.conv, f"{name}.project.conv")
        return _Pattern((f"{name}.expand.conv", f"{name}.depthwise.conv"), bns, (chain,))
    if isinstance(module, Block1):
        nested = (_pattern(getattr(module, part), f"{name}.{part}") for part in ("sep_conv", "expand", "project"))
        return _Pattern(nested=tuple(nested))
    if isinstance(module, Block2):
        parts = (
            _pattern(module.sep_conv, f"{name}.sep_conv"),
            _pattern(module.expand.conv, f"{name}.expand.conv"),
            _pattern(module.project.conv, f"{name}.project.conv"),
        )
        return _Pattern(bns=(f"{name}.expand.bn", f"{name}.project.bn"), nested=parts)
    if isinstance(module, SpikeSPPF):
        return _Pattern(nested=(_pattern(module.reduce, f"{name}.reduce"), _pattern(module.merge, f"{name}.merge")))
    if isinstance(module, DecoupledHead):
        branches = (_pattern(module.box, f"{name}.box"), _pattern(module.classes, f"{name}.classes"))
        return _Pattern(convs=(f"{name}.bins",), nested=branches)
    if isinstance(module, nn.ModuleList) or (
        isinstance(module, nn.Sequential) and isinstance(module[0], Block1 | Block2)
    ):
        blocks = tuple(_pattern(child, f"{name}.{index}") for index, child in enumerate(module))
        return blocks[0] if len(blocks) == 1 else _Pattern(nested=blocks)
    # Convolutions and batch norms one after the other: SpikeConv, a branch of the head, the stem.
    leaves = [(path, leaf) for path, leaf in module.named_modules() if isinstance(leaf, nn.Conv2d | nn.BatchNorm2d)]
    convs = tuple(f"{name}.{path}" for path, leaf in leaves if isinstance(leaf, nn.Conv2d))
    return _Pattern(convs, tuple(f"{name}.{path}" for path, leaf in leaves if isinstance(leaf, nn.BatchNorm2d)))


def _collapse(module: _Module) -> _Module:
    """Remove modules whose only content is one other module."""
    children = {name: _collapse(child) for name, child in module.children.items()}
    if len(children) == 1 and not module.tensors:
        return next(iter(children.values()))
    return _Module(module.name, module.tensors, children)


class _Conversion:
    """The values converted so far, and everything that does not fit."""

    def __init__(self, expected: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self.dtype = dtype
        """Of the converted weights."""
        self.converted: dict[str, Tensor] = {}
        self.missing: list[str] = []
        self.left_over: list[str] = []
        self.reshaped: list[str] = []
        self.retyped: list[str] = []
        self._expected = expected

    def convert(self, pattern: _Pattern, released: _Module, layer: str) -> None:
        """Match a released module with its pattern."""
        if not pattern.nested:
            self._convert_leaves(pattern, list(released.leaves()), layer)
            return
        groups = [child for child in released.children.values() if child.children]
        leaves = [child for child in released.children.values() if not child.children]
        # SepConv comes first in our blocks, wherever it is registered in theirs.
        if any(name.endswith(".sep_conv.depthwise.conv") for name in pattern.nested[0].convs):
            groups.sort(key=lambda group: not _has_seven_by_seven(group))
        if released.tensors:
            leaves.insert(0, _Module(released.name, released.tensors))
        self._convert_leaves(pattern, leaves, layer)
        for nested, group in zip(pattern.nested, groups, strict=False):
            self.convert(nested, group, layer)
        for nested in pattern.nested[len(groups) :]:
            self.convert(nested, _Module(released.name), layer)
        for group in groups[len(pattern.nested) :]:
            for leaf in group.leaves():
                self.left_over.extend(f"{leaf.name}.{tensor}" for tensor in leaf.tensors)

    def _convert_leaves(self, pattern: _Pattern, leaves: list[_Module], layer: str) -> None:
        for names, is_bn in ((pattern.convs, False), (pattern.bns, True)):
            candidates = [leaf for leaf in leaves if leaf.is_bn == is_bn]
            unmatched = []
            for name in names:
                fitting = [
                    leaf for leaf in candidates if self._shape(leaf) == tuple(self._expected_tensors(name)["weight"][1])
                ]
                if fitting:
                    candidates.remove(fitting[0])
                    self._take(name, fitting[0], layer)
                else:
                    unmatched.append(name)
            for name, leaf in zip(unmatched, candidates, strict=False):
                self._take(name, leaf, layer)
            for name in unmatched[len(candidates) :]:
                self.missing.extend(f"{layer}: {ours}" for ours, _ in self._expected_tensors(name).values())
            for leaf in candidates[len(unmatched) :]:
                self.left_over.extend(f"{leaf.name}.{tensor}" for tensor in leaf.tensors)

    def _shape(self, leaf: _Module) -> tuple[int, ...]:
        return tuple(leaf.tensors["weight"].shape) if "weight" in leaf.tensors else ()

    def _expected_tensors(self, name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Tensor name -> our key and the released shape, of one of our modules (or of the bins, theirs a 1x1 conv)."""
        if name in self._expected:
            return {"weight": (name, (1, REG_MAX, 1, 1))}
        keys = [key for key in self._expected if key.rpartition(".")[0] == name]
        return {key.rpartition(".")[2]: (key, tuple(self._expected[key].shape)) for key in keys}

    def _take(self, name: str, leaf: _Module, layer: str) -> None:
        expected = self._expected_tensors(name)
        self.left_over.extend(f"{leaf.name}.{tensor}" for tensor in leaf.tensors if tensor not in expected)
        for tensor_name, (ours, shape) in expected.items():
            like = self._expected[ours]
            released = leaf.tensors.get(tensor_name)
            if released is None and tensor_name == _OPTIONAL:
                released = torch.zeros(shape, dtype=like.dtype)
            if released is None:
                self.missing.append(f"{layer}: {leaf.name}.{tensor_name} for {ours}")
            elif tuple(released.shape) != shape:
                self.reshaped.append(f"{leaf.name}.{tensor_name} {tuple(released.shape)} for {ours} {shape}")
            elif like.is_floating_point() and released.dtype not in _FLOATS:
                self.retyped.append(f"{leaf.name}.{tensor_name} {released.dtype} for {ours}")
            else:
                dtype = self.dtype if like.is_floating_point() else like.dtype
                self.converted[ours] = released.detach().to(dtype).reshape(like.shape).clone()

    def raise_problems(self) -> None:
        bins = self.converted.get("head.bins")
        if bins is not None and not torch.equal(bins, torch.arange(REG_MAX, dtype=bins.dtype, device=bins.device)):
            self.reshaped.append("head.bins: the DFL's weights are not 0 to 15")
        problems = [
            f"{title}: {'; '.join(names)}"
            for title, names in (
                ("missing", self.missing),
                ("unexpected", self.left_over),
                ("of another shape", self.reshaped),
                ("not of 16, 32 or 64 floating-point bits", self.retyped),
            )
            if names
        ]
        if problems:
            raise ValueError(
                "the released state dict does not fit the configuration (check depth, width, neck_ratio and "
                f"num_classes): {'. '.join(problems)}"
            )


def _has_seven_by_seven(module: _Module) -> bool:
    return any(tensor.shape[2:] == (7, 7) for leaf in module.leaves() for tensor in leaf.tensors.values())
