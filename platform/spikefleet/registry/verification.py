"""Whether a version is what was registered: every file against its hash, and the registry's tags against the files.

The content hash in the registry covers the card, which lists the SHA-256 of the package's files and holds metrics and
tags. A second tag lists the files beside the package, which MLflow runs or obeys. So whoever changes files is found;
whoever can change the registry's database too can change both.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spikefleet.config.recipes import parse_model
from spikefleet.data_summary import DATA_SUMMARY, DataSummary
from spikefleet.errors import UserError
from spikefleet.files import sha256_of
from spikefleet.registry.flaws import FLAW, flaw_tag
from spikefleet.registry.history import History, load_history
from spikefleet.registry.mlflow_model import ARTIFACTS, serving_files
from spikefleet.registry.mlflow_store import connect, download, resolve
from spikefleet.registry.package import CARD, CONFIG, WEIGHTS, Card, load_network, read_card, read_config
from spikefleet.registry.package_access import is_registered, registry_uri, scratch_directory
from spikefleet.registry.version import SERVING_FILES, SPIKE_DRIVEN, RegisteredVersion
from spikefleet_tune.messages import counted

_DECIDING = (FLAW, SPIKE_DRIVEN, "task", "dataset", "data_hash")
"""Tags by which versions are promoted and found: they must be there."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    subject: str
    """Path of a file in the version, or what else."""
    intact: bool
    says: str
    """What was found, in words; names the subject."""


@dataclass(frozen=True)
class Verification:
    """All that was looked at in one version."""

    reference: str
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    """What could not be looked at, or is worth knowing."""

    @property
    def intact(self) -> bool:
        """Whether nothing was found to be changed."""
        return all(finding.intact for finding in self.findings)

    @property
    def problems(self) -> list[str]:
        """What was found to be changed, in words."""
        return [finding.says for finding in self.findings if not finding.intact]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "uri": self.reference,
            "intact": self.intact,
            "checked": [{"subject": one.subject, "intact": one.intact, "says": one.says} for one in self.findings],
            "notes": list(self.notes),
        }


def verify(uri: str | Path, *, tracking_uri: str | None = None) -> Verification:
    """Compares a version with what was registered.

    Args:
        uri: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, or a pulled directory, whose card is trusted.
        tracking_uri: of the registry; by default MLFLOW_TRACKING_URI, else SQLite in ./runs.

    Raises:
        UserError: the version does not exist, or its files cannot be downloaded.
    """
    if not is_registered(uri):
        findings = list(_package(Path(uri), None))
        notes = ["the card of the directory was trusted; name a registered version to compare it with the registry"]
        return Verification(str(uri), tuple(findings), tuple(notes + _unlisted(Path(uri), findings)))
    with connect(registry_uri(tracking_uri)) as client, scratch_directory() as model:
        version = resolve(client, str(uri))
        download(client, version, "", model, of="")
        package = model / ARTIFACTS
        findings = list(_package(package, version))
        notes = [*_unlisted(package, findings), *_of_earlier_releases(package, findings, version)]
        if SERVING_FILES in version.tags:
            findings += _served(model, version.tags[SERVING_FILES])
        else:
            beside = ", ".join(serving_files(model))
            notes.append(
                f"no hash covers {beside}, since an earlier spikefleet registered it; `spikefleet registry renew "
                f"{version.name}/{version.version}` registers it again"
            )
        history = load_history(client, version.name)
        if history.changes or history.damage is not None:
            findings.append(_history(history))
        moved = {alias: history.aliases().get(alias) for alias in version.aliases}
        notes += [
            f"alias {alias} was given to version {version.version} by hand: by the history of {version.name} it is "
            f"that of {'no version' if known is None else f'version {known}'}"
            for alias, known in moved.items()
            if history.changes and known != version.version
        ]
        return Verification(version.uri, tuple(findings), tuple(notes))


def _history(history: History) -> Finding:
    """The hash-chained record of what happened to the aliases."""
    if history.damage is not None:
        return Finding("history", False, f"the history of the aliases of {history.name} is damaged: {history.damage}")
    changes = counted(len(history.changes), "change")
    return Finding("history", True, f"{changes} of the aliases of {history.name}, each with the hash of the one before")


def _package(package: Path, version: RegisteredVersion | None) -> Iterator[Finding]:
    """The card, the files that it lists, and what it says against what the registry says."""
    card, reason = _read_card(package, version)
    if card is None:
        yield Finding(CARD, False, reason)
        return
    yield Finding(CARD, not reason, reason or f"{CARD}: content hash {card.content_hash}")
    for name in sorted({*card.sha256, WEIGHTS, CONFIG}):
        yield _file(package, name, card.sha256.get(name))
    if reason or any(not _is_listed(package, name, card) for name in card.sha256):
        return  # what follows reads the files
    try:
        network, _ = load_network(package)
        parameters = sum(parameter.numel() for parameter in network.parameters())
        yield Finding(WEIGHTS, True, f"{WEIGHTS}: the {parameters:,} parameters are those of {CONFIG}")
        if version is not None:
            yield from _tags(version, card, package, parameters)
    except (UserError, ValueError, TypeError, KeyError) as error:
        yield Finding(CONFIG, False, f"the network cannot be built: {error}")


def _read_card(package: Path, version: RegisteredVersion | None) -> tuple[Card | None, str]:
    """The card, and what is wrong with it in words; no other file is looked at."""
    if not (package / CARD).is_file():
        return None, f"{CARD} is missing"
    with scratch_directory() as alone:
        shutil.copyfile(package / CARD, alone / CARD)
        try:
            card = read_card(alone)
        except UserError as error:
            return None, str(error).replace(f"{alone}/", "")
    if version is None or card.content_hash == version.content_hash:
        return card, ""
    return card, (
        f"{CARD} is not the registered card: expected content hash {version.content_hash}, found {card.content_hash}; "
        "its hashes, metrics or tags were changed"
    )


def _is_listed(package: Path, name: str, card: Card) -> bool:
    return (package / name).is_file() and sha256_of(package / name) == card.sha256[name]


def _file(folder: Path, name: str, expected: str | None) -> Finding:
    if expected is None:
        return Finding(name, False, f"{name} is not listed in {CARD}")
    if not (folder / name).is_file():
        return Finding(name, False, f"{name} is missing")
    if (found := sha256_of(folder / name)) != expected:
        return Finding(name, False, f"{name} is not the registered file: expected SHA-256 {expected}, found {found}")
    return Finding(name, True, f"{name}: SHA-256 {expected}")


def _served(model: Path, tag: str) -> Iterator[Finding]:
    """The files beside the package."""
    try:
        listed = {str(name): str(digest) for name, digest in json.loads(tag).items()}
    except (ValueError, AttributeError):
        yield Finding(SERVING_FILES, False, f"tag {SERVING_FILES} of the version is damaged: expected names and hashes")
        return
    yield from (_file(model, name, digest) for name, digest in listed.items())
    for name in serving_files(model):
        if name not in listed:
            yield Finding(name, False, f"{name} is not a file of the registered version, and MLflow may run it")


def _tags(version: RegisteredVersion, card: Card, package: Path, parameters: int) -> Iterator[Finding]:
    """What the registry says, which promotion and search read, against what the hashed files say."""
    config = read_config(package)
    model = parse_model(config["model"], CONFIG)
    metrics = {str(name): float(value) for name, value in _mapping(card.metadata.get("metrics")).items()}
    expected = {
        **{str(key): str(value) for key, value in model.tags().items()},
        "task": str(config["task"]),
        "parameters": str(parameters),
        **{str(key): str(value) for key, value in _mapping(card.metadata.get("tags")).items()},
    }
    problems = [
        f"tag {key} of the version is {version.tags.get(key, 'missing')[:80]!r}, but {value[:80]!r} by its files"
        for key, value in expected.items()
        if version.tags.get(key, "" if key in _DECIDING else value) != value
    ]
    problems += [
        f"metric {name} of the version is {version.metrics.get(name, 'missing')}, but {value} by {CARD}"
        for name, value in metrics.items()
        if version.metrics.get(name) != value
    ]
    yield from (Finding("tags", False, problem) for problem in problems)
    if not problems:
        says = f"{counted(len(metrics), 'metric')} and the tags of the version are those of its files"
        yield Finding("tags", True, says)


def _of_earlier_releases(package: Path, findings: list[Finding], version: RegisteredVersion) -> Iterator[str]:
    """What earlier releases did not record, where the files are those that were registered."""
    if not all(finding.intact for finding in findings):
        return
    card = read_card(package)
    if card.format == 1:
        yield f"no hash covers the metrics and tags in {CARD}, which has format 1"
    if FLAW not in version.tags and DATA_SUMMARY in card.sha256:
        files = {name: package / name for name in card.sha256}
        flaw = flaw_tag(read_config(package), DataSummary.read(package), version.metrics, files).get(FLAW)
        if flaw is not None:
            yield f"by today's rules it has a flaw, but no tag says so: {flaw}"


def _unlisted(package: Path, findings: list[Finding]) -> list[str]:
    known = {CARD, *(finding.subject for finding in findings)}
    names = sorted(path.name for path in package.iterdir() if path.name not in known) if package.is_dir() else []
    return [f"in no list, and read by nothing: {', '.join(names)}"] if names else []


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
