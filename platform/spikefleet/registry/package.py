"""A trained network as files that hold no code: weights.safetensors, config.json, further JSON, and card.json.

The card lists the SHA-256 of every other file. Nothing here unpickles, and no file is used that the card does not list.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spikefleet.config.recipes import check_uses, parse_model
from spikefleet.errors import UserError
from spikefleet.files import read_json, sha256_of
from spikefleet.plugins import missing_plugins_named

if TYPE_CHECKING:
    import torch


WEIGHTS = "weights.safetensors"
CONFIG = "config.json"
CARD = "card.json"
FORMAT = 1

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_MAX_CARD_BYTES = 1 << 20


@dataclass(frozen=True)
class Card:
    """The list of a package's files with their hashes, and what is known about the network."""

    sha256: Mapping[str, str]
    facts: Mapping[str, Any]

    @property
    def content_hash(self) -> str:
        """SHA-256 over the names and hashes of all files."""
        return hashlib.sha256(json.dumps(dict(self.sha256), sort_keys=True).encode()).hexdigest()


def write_package(
    directory: Path, weights: Path, config: Mapping[str, Any], extra_files: Mapping[str, Path], facts: Mapping[str, Any]
) -> Card:
    """Fills an empty directory with a package.

    Raises:
        UserError: a file is missing, an extra file's name is a path or taken, or the configuration lacks a section.
    """
    _check_sections(config, "the configuration of a registered model")
    for name, source in {WEIGHTS: weights, **extra_files}.items():
        if not _FILE_NAME.fullmatch(name) or name in (CONFIG, CARD) or (name == WEIGHTS and source is not weights):
            raise UserError(f"file {name[:80]!r} of a registered model: give a plain file name other than {WEIGHTS}")
        if not source.is_file():
            raise UserError(f"file {source} of a registered model: there is no such file")
        shutil.copyfile(source, directory / name)
    (directory / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    card = Card({path.name: sha256_of(path) for path in sorted(directory.iterdir())}, facts)
    content = {"format": FORMAT, "sha256": card.sha256, "facts": card.facts}
    (directory / CARD).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    return card


def read_card(directory: Path, expected_content_hash: str | None = None) -> Card:
    """Reads the card; the hashes of the files that are there must be those that it states.

    Args:
        expected_content_hash: what the registry says about the package; None to rely on the card alone.

    Raises:
        UserError: no card, a file whose hash differs (the sentence names file, expected and found hash), a file name
            that leaves the directory, or a package other than the registered one.
    """
    path = directory / CARD
    if not path.is_file() or path.stat().st_size > _MAX_CARD_BYTES:
        raise UserError(f"{directory} holds no registered network: there is no valid {CARD}")
    content = read_json(path)
    try:
        card = Card({str(name): str(digest) for name, digest in content["sha256"].items()}, dict(content["facts"]))
        version = content["format"]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{path} is damaged; it cannot be read as the card of a network") from None
    if version != FORMAT:
        raise UserError(f"{path} has format {version!r}; this version of spikefleet reads {FORMAT}")
    for name in card.sha256:
        if not _FILE_NAME.fullmatch(name):
            raise UserError(f"{path} names {name[:80]!r}, which is not a plain file name; the package is not trusted")
    if expected_content_hash not in (None, card.content_hash):
        raise UserError(
            f"{path} is not the card that was registered: expected content hash {expected_content_hash}, found "
            f"{card.content_hash}; the stored files have been changed"
        )
    for name, expected in card.sha256.items():
        file = directory / name
        if file.is_file() and (found := sha256_of(file)) != expected:
            raise UserError(f"{file} is not the file that was registered: expected SHA-256 {expected}, found {found}")
    return card


def verify_package(directory: Path, expected_content_hash: str | None = None) -> Card:
    """As `read_card`, and every file must be there."""
    card = read_card(directory, expected_content_hash)
    for name in {*card.sha256, WEIGHTS, CONFIG}:
        if name not in card.sha256 or not (directory / name).is_file():
            raise UserError(f"{directory / name} is missing; fetch the network again")
    return card


def load_network(directory: Path, expected_content_hash: str | None = None) -> "tuple[torch.nn.Module, dict[str, Any]]":
    """The network of a verified package, in evaluation mode on the CPU, and its configuration.

    Raises:
        UserError: the package is not intact, a plugin that it needs is not loaded, or its weights are not those of its
            configuration.
    """
    card = verify_package(directory, expected_content_hash)
    config, where = read_config(directory), str(directory / CONFIG)
    with missing_plugins_named(card.facts.get("plugins", ()), f"the network in {directory}"):
        check_uses(config, where)
        model = parse_model(config["model"], where)
    network = model.build()
    load_weights(network, directory / WEIGHTS)
    return network.eval(), config


def read_config(directory: Path) -> dict[str, Any]:
    """The run's configuration; raises UserError unless it has the sections of a network."""
    config = read_json(directory / CONFIG)
    _check_sections(config, str(directory / CONFIG))
    return dict(config)


def _check_sections(config: Any, where: str) -> None:
    if not isinstance(config, Mapping) or not {"model", "data", "task"} <= config.keys():
        raise UserError(f"{where} lacks the sections model, data and task of a run's configuration")


def load_weights(network: "torch.nn.Module", path: Path) -> None:
    """Copies tensors from safetensors; names, shapes and types must be exactly the network's.

    They are compared from the header, before any tensor is read: a hostile file costs no memory.

    Raises:
        UserError: not valid safetensors, or other tensors than the network's.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    wanted = network.state_dict()
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            if names != wanted.keys():
                name = min(names ^ wanted.keys())
                problem = "is not one of the network's tensors" if name in names else "is missing"
                raise UserError(
                    f"{path}: tensor {name[:80]!r} {problem} ({len(names)} tensors, {len(wanted)} expected)"
                )
            for name, tensor in wanted.items():
                shape = list(file.get_slice(name).get_shape())
                if shape != list(tensor.shape):
                    raise UserError(f"{path}: tensor {name!r} has shape {shape}; the network's is {list(tensor.shape)}")
            tensors = {name: file.get_tensor(name) for name in wanted}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a valid safetensors file: {error}") from None
    for name, tensor in tensors.items():
        if tensor.dtype != wanted[name].dtype:
            raise UserError(f"{path}: tensor {name!r} has type {tensor.dtype}; the network's is {wanted[name].dtype}")
    with torch.no_grad():
        network.load_state_dict(tensors)
