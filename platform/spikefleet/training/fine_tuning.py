"""Fine-tuning: which tensors of a trained network fit another one, and which modules stay as they are."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from spikefleet.config.init_config import matches
from spikefleet.config.schema import Config
from spikefleet.errors import UserError


@dataclass(frozen=True)
class Fitted:
    """What a network takes of given weights."""

    taken: dict[str, torch.Tensor]
    anew: tuple[str, ...]
    """Tensors of the network that are initialised anew, each with its shape and the reason."""
    unused: tuple[str, ...]
    """Tensors that the network does not have, each with its shape."""


def fit_weights(network: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> Fitted:
    """Take the tensors that have the name and the shape of one of the network's.

    Args:
        network: state dict of the network to train; a meta device is enough.
        given: trained weights.

    Raises:
        UserError: none fits, or one that fits has values that are not finite in the network's type.
    """
    taken: dict[str, torch.Tensor] = {}
    anew = []
    for name, tensor in network.items():
        there = given.get(name)
        if there is None:
            anew.append(f"{name} {list(tensor.shape)} (not there)")
        elif there.shape != tensor.shape:
            anew.append(f"{name} {list(tensor.shape)} (there {list(there.shape)})")
        elif there.is_floating_point() != tensor.is_floating_point():
            anew.append(f"{name} {tensor.dtype} (there {there.dtype})")
        else:
            found = there.to(tensor.dtype).contiguous()
            if found.is_floating_point() and not bool(torch.isfinite(found).all()):
                raise UserError(f"init.from: tensor {name} has values that are not finite; use other weights")
            taken[name] = found
    unused = tuple(f"{name} {list(tensor.shape)}" for name, tensor in given.items() if name not in network)
    if not any(tensor.ndim > 1 for tensor in taken.values()):
        some = ", ".join(list(given)[:3])
        raise UserError(
            f"init.from: none of its {len(given)} tensors ({some}, ...) has the name and the shape of a weight of this "
            "network; use weights of the same family and width"
        )
    return Fitted(taken, tuple(anew), unused)


def with_unit_names(network: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of an ANN twin under the names of its spiking network.

    A shortcut that changes the shape has a batch norm alone in the twin, `shortcut.unit.weight`, and a whole unit in a
    spiking network, `shortcut.unit.bn.weight`.

    Args:
        network: state dict of the network to train.
        given: trained weights.
    """
    renamed = {}
    for name, tensor in given.items():
        path, _, last = name.rpartition(".")
        inner = f"{path}.bn.{last}"
        renamed[inner if name not in network and inner in network and path.endswith("unit") else name] = tensor
    return renamed


def check_names(config: Config, network: nn.Module) -> None:
    """Check the names of modules in `train.freeze` and `optim.lr_factors`.

    Args:
        config: of the run.
        network: its network.

    Raises:
        UserError: a name is that of no module with parameters, the message names the nearest; or nothing is left to
            train.
    """
    names = [name for name, _ in network.named_parameters()]
    for field, prefixes in (("train.freeze", config.train.freeze), ("optim.lr_factors", config.optim.lr_factors)):
        for prefix in prefixes:
            if not any(matches(name, prefix) for name in names):
                known = sorted({".".join(name.split(".")[:depth]) for name in names for depth in (1, 2, 3)})
                nearest = difflib.get_close_matches(prefix, known, 1, 0.5)
                hint = f"did you mean {nearest[0]!r}?" if nearest else f"expected one of {', '.join(known[:8])}, ..."
                raise UserError(f"{field} has {prefix!r}, which is no module of the network; {hint}")
    if names and all(any(matches(name, prefix) for prefix in config.train.freeze) for name in names):
        raise UserError(
            f"train.freeze={list(config.train.freeze)} leaves no parameter to train; leave out the name of the head"
        )


def freeze(network: nn.Module, prefixes: Iterable[str]) -> None:
    """Take the parameters of modules out of training."""
    prefixes = tuple(prefixes)
    for name, parameter in network.named_parameters():
        if any(matches(name, prefix) for prefix in prefixes):
            parameter.requires_grad_(False)


def hold_statistics(network: nn.Module, prefixes: Iterable[str]) -> None:
    """Let the batch norms of modules use their statistics and not change them."""
    prefixes = tuple(prefixes)
    if not prefixes:
        return
    for name, module in network.named_modules():
        if isinstance(module, _BatchNorm) and any(matches(name, prefix) for prefix in prefixes):
            module.eval()
