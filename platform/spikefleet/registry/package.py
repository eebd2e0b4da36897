"""A trained network as files: weights.safetensors, config.json, further files, and card.json.

The card lists the SHA-256 of every other file. Nothing is unpickled, and files that the card does not list are ignored.
A registered package has the code that serves it beside them (`serving_code`), which nothing here runs.
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
from spikefleet.config.renamed import with_current_keys
from spikefleet.errors import UserError
from spikefleet.files import read_json_object, sha256_of
from spikefleet.plugins import missing_plugins_named
from spikefleet.registry.package_format import FORMAT, READABLE

if TYPE_CHECKING:
    import torch


WEIGHTS = "weights.safetensors"
CONFIG = "config.json"
CARD = "card.json"
CODE = "code.zip"

_STORED_METADATA = "facts"  # the key of metadata in card.json, since the first release
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_MAX_CARD_BYTES = 1 << 20


@dataclass(frozen=True)
class Card:
    """The files of a package with their hashes, and the metadata of the network."""

    sha256: Mapping[str, str]
    metadata: Mapping[str, Any]
    """run_id, tags, metrics and plugins."""
    format: int = FORMAT

    @property
    def content_hash(self) -> str:
        """SHA-256 over the names and hashes of all files and over the metadata, which format 1 leaves out."""
        files = dict(self.sha256)
        covered = files if self.format == 1 else {"sha256": files, _STORED_METADATA: dict(self.metadata)}
        return hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()


def write_package(
    directory: Path,
    weights: Path,
    config: Mapping[str, Any],
    extra_files: Mapping[str, Path],
    metadata: Mapping[str, Any],
) -> Card:
    """Writes a package.

    Args:
        directory: an empty directory.
        weights: safetensors with the complete state dict of the network.
        config: configuration of the run.
        extra_files: further files by their names in the package.
        metadata: of the network, for its card.

    Returns:
        The card of the package.

    Raises:
        UserError: a file is missing, the name of an extra file is a path or reserved, or the configuration lacks a
            section.
    """
    check_sections(config, "the configuration of a registered model")
    for name, source in {WEIGHTS: weights, **extra_files}.items():
        if not _FILE_NAME.fullmatch(name) or name in (CONFIG, CARD) or (name == WEIGHTS and source is not weights):
            raise UserError(
                f"file {name[:80]!r} of a registered model must be a plain file name other than "
                f"{WEIGHTS}, {CONFIG} and {CARD}"
            )
        if not source.is_file():
            raise UserError(f"file {source} of a registered model does not exist")
        shutil.copyfile(source, directory / name)
    (directory / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return _write_card(directory, metadata)


def with_code(directory: Path, card: Card, code: bytes, target: Path) -> Card:
    """Writes a package again with other serving code; all else stays as it is.

    Args:
        directory: of the verified package.
        card: its card.
        code: archive of the code.
        target: an empty directory.

    Returns:
        The card of the new package.
    """
    for name in card.sha256:
        shutil.copyfile(directory / name, target / name)
    (target / CODE).write_bytes(code)
    return _write_card(target, card.metadata)


def _write_card(directory: Path, metadata: Mapping[str, Any]) -> Card:
    card = Card({path.name: sha256_of(path) for path in sorted(directory.iterdir())}, metadata)
    content = {"format": FORMAT, "sha256": card.sha256, _STORED_METADATA: card.metadata}
    (directory / CARD).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    return card


def read_card(directory: Path, expected_content_hash: str | None = None) -> Card:
    """Reads the card of a package and verifies the hashes of the files that are present.

    Args:
        directory: of the package.
        expected_content_hash: content hash in the registry; None trusts the card.

    Raises:
        UserError: the card is missing or damaged, a hash differs (the message has the expected and the found one), or
            a file name leaves the directory.
    """
    path = directory / CARD
    if not path.is_file() or path.stat().st_size > _MAX_CARD_BYTES:
        raise UserError(f"{directory} is not a registered network: it has no valid {CARD}")
    content = read_json_object(path)
    try:
        card = Card(
            {str(name): str(digest) for name, digest in content["sha256"].items()},
            dict(content[_STORED_METADATA]),
            content["format"],
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{path} is damaged: it is not the card of a network; download it again") from None
    if card.format not in READABLE:
        known = " or ".join(map(str, READABLE))
        raise UserError(f"{path}: expected format {known}, found {card.format!r}; use the spikefleet that wrote it")
    for name in card.sha256:
        if not _FILE_NAME.fullmatch(name):
            raise UserError(f"{path}: file name {name[:80]!r} is not a plain file name; do not trust this package")
    if expected_content_hash not in (None, card.content_hash):
        raise UserError(
            f"{path} is not the registered card: expected content hash {expected_content_hash}, found "
            f"{card.content_hash}; the stored files were modified"
        )
    for name, expected in card.sha256.items():
        file = directory / name
        if file.is_file() and (found := sha256_of(file)) != expected:
            raise UserError(f"{file} is not the registered file: expected SHA-256 {expected}, found {found}")
    return card


def verify_package(directory: Path, expected_content_hash: str | None = None) -> Card:
    """Reads the card as `read_card` does, and checks that every file is present.

    Args:
        directory: of the package.
        expected_content_hash: content hash in the registry; None trusts the card.

    Raises:
        UserError: the package is not intact.
    """
    card = read_card(directory, expected_content_hash)
    for name in {*card.sha256, WEIGHTS, CONFIG}:
        if name not in card.sha256 or not (directory / name).is_file():
            raise UserError(f"{directory / name} is missing; download the network again")
    return card


def load_network(directory: Path, expected_content_hash: str | None = None) -> "tuple[torch.nn.Module, dict[str, Any]]":
    """Verifies a package and loads its network.

    Args:
        directory: of the package.
        expected_content_hash: content hash in the registry; None trusts the card.

    Returns:
        The network in evaluation mode on the CPU, and the configuration of its run.

    Raises:
        UserError: the package is not intact, a plugin that it needs is not loaded, or its weights are not those of its
            configuration.
    """
    card = verify_package(directory, expected_content_hash)
    config, where = read_config(directory), str(directory / CONFIG)
    with missing_plugins_named(card.metadata.get("plugins", ()), f"the network in {directory}"):
        check_uses(config, where)
        model = parse_model(config["model"], where)
    network = model.build()
    load_weights(network, directory / WEIGHTS)
    return network.eval(), config


def read_config(directory: Path) -> dict[str, Any]:
    """Reads the configuration of a package's run, with the current names of its keys.

    Raises:
        UserError: the file is missing, or lacks a section that a network needs.
    """
    config = read_json_object(directory / CONFIG)
    check_sections(config, str(directory / CONFIG))
    return with_current_keys(config)


def check_sections(config: Any, where: str) -> None:
    """Raises UserError unless a configuration has the sections that a network needs."""
    if not isinstance(config, Mapping) or not {"model", "data", "task"} <= config.keys():
        raise UserError(f"{where} must have the keys model, data and task")


def load_weights(network: "torch.nn.Module", path: Path) -> None:
    """Loads weights from safetensors; names, shapes and types must be exactly those of the network.

    Names and shapes are compared with the header before any tensor is read, so a malicious file cannot use up memory.

    Args:
        network: the network, modified in place.
        path: the safetensors file.

    Raises:
        UserError: the file is not valid safetensors, or its tensors are not those of the network.
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
                    raise UserError(f"{path}: tensor {name!r}: expected shape {list(tensor.shape)}, found {shape}")
            tensors = {name: file.get_tensor(name) for name in wanted}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a valid safetensors file: {error}") from None
    for name, tensor in tensors.items():
        if tensor.dtype != wanted[name].dtype:
            raise UserError(f"{path}: tensor {name!r}: expected type {wanted[name].dtype}, found {tensor.dtype}")
    with torch.no_grad():
        network.load_state_dict(tensors)
