"""Weights of other programs as safetensors of our networks, which `init.from` reads.

A file of torch is read with `weights_only=True`, as plain tensors, and there is no fallback: one that holds objects is
refused, with the way to take the tensors out where it can be trusted.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from spikefleet.errors import UserError
from spikefleet_models.families import build_model
from spikefleet_models.family import ModelConfig
from spikefleet_models.spike_yolo.config import SpikeYoloConfig
from spikefleet_models.spike_yolo.released_weights import convert_released
from spikefleet_tune.atomic import replacing

_WRAPPERS = ("state_dict", "model", "ema", "model_state_dict")
"""Keys under which programs put the state dict of a checkpoint."""


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a file of torch or of safetensors; nothing is unpickled.

    Args:
        path: a `.safetensors` file, or a file of `torch.save` with a mapping of names to tensors, or with one under
            `state_dict`, `model` or `ema`.

    Raises:
        UserError: it cannot be read, holds other objects, or has no tensors by name.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file; give the weights to convert")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except Exception as error:  # a foreign or damaged file can fail in any way
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(
            f"{path} is not read, since it holds more than plain tensors or is damaged ({reason}); where you trust it, "
            "take them out in the program that wrote it: "
            "torch.save(torch.load(FILE, weights_only=False)['model'].float().state_dict(), 'weights.pt')"
        ) from None
    for key in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{path} holds {type(content).__name__}, expected a mapping of names to tensors")
    other = next((name for name, value in content.items() if not isinstance(value, torch.Tensor)), None)
    if other is not None:
        raise UserError(
            f"{path}: {str(other)[:80]!r} is {type(content[other]).__name__}, expected a tensor; give the state dict "
            "alone"
        )
    return {str(name): value for name, value in content.items()}


def convert_weights(path: Path, config: ModelConfig, out: Path) -> int:
    """Write the weights of a file as safetensors with the names of a network of ours.

    The names are those of the network already, or those that SpikeYOLO's authors released.

    Args:
        path: the weights; see `read_tensors`.
        config: of the network.
        out: the safetensors file, written atomically.

    Returns:
        Number of tensors.

    Raises:
        UserError: the file cannot be read, or its tensors are not those of the network; the message lists what differs.
    """
    given = read_tensors(path)
    with torch.device("meta"):
        expected = build_model(config).state_dict()
    if expected.keys() != given.keys() and isinstance(config, SpikeYoloConfig):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of fp64, which is rounded below
                given = convert_released(given, config)
        except ValueError as error:
            raise UserError(f"{path} does not fit: {error}") from None
    problems = [f"{name} is missing" for name in expected if name not in given]
    problems += [f"{name} is unexpected" for name in given if name not in expected]
    problems += [
        f"{name} has shape {list(given[name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in given and given[name].shape != tensor.shape
    ]
    if problems:
        more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise UserError(f"{path} does not fit {config.family}: {'; '.join(problems[:10])}{more}")
    found = {name: given[name].to(tensor.dtype).clone().contiguous() for name, tensor in expected.items()}
    with replacing(out) as partial:
        save_file(found, partial)
    return len(found)
