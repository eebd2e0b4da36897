"""What a retraining would train on, and why: the champion's configuration on the data as they are now."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from rich.console import Console

from spikefleet import registry
from spikefleet.config.recipes import override_config, parse_config
from spikefleet.config.renamed import with_current_keys
from spikefleet.config.schema import Config
from spikefleet.data_access import open_data, store_at
from spikefleet.data_summary import DataSummary
from spikefleet.errors import UserError
from spikefleet.files import sha256_of
from spikefleet.gates.gate_store import check_gate_store, open_gate_store
from spikefleet.registry.package import WEIGHTS, load_network, read_config
from spikefleet.registry.package_access import package_files
from spikefleet.registry.version import RegisteredVersion
from spikefleet.retraining.reasons import reasons_to_train
from spikefleet.retraining.record import Record, Retrainings
from spikefleet.runs.options import Options
from spikefleet.status import Announce, silent, waiting
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.splits import prepare_parts
from spikefleet.versions import code_version
from spikefleet_pipelines.store.reader import Store


@dataclass(frozen=True)
class Request:
    """What is asked for."""

    model: str
    """Name of the registered model."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Values by dotted key, over the champion's configuration."""
    start: Literal["scratch", "champion"] = "scratch"
    """Weights to start from."""
    data: str | None = None
    """Another store than the champion's."""
    force: bool = False
    """Retrain although nothing changed."""
    patience_s: float = 0.0
    """Seconds to wait for a retraining of the model that runs elsewhere; then this one is skipped."""


@dataclass(frozen=True)
class Plan:
    """What a retraining would do."""

    request: Request
    base: RegisteredVersion
    """The champion, or the newest version where there is none."""
    champion: int | None
    config: Config
    store: Store
    reasons: tuple[str, ...]
    identity: str
    """Hash of everything that decides the result."""
    before: Record | None
    """The same retraining, which has ended already."""


def plan_retraining(request: Request, options: Options, console: Console, tracking_uri: str) -> Plan:
    """Finds out what a retraining would train on, and why.

    Args:
        request: what is asked for.
        options: directories.
        console: for progress.
        tracking_uri: of the registry.

    Raises:
        UserError: the model does not exist, or an override is wrong.
        SourceError: the data are missing.
    """
    with waiting(console, "asking the registry"):
        model = registry.show(request.model, tracking_uri=tracking_uri)
        base = model.champion or model.versions[0]
        with package_files(base.uri, tracking_uri) as (directory, content_hash):
            load_network(directory, content_hash)  # what cannot be loaded cannot be compared later
            dumped = with_current_keys(read_config(directory))
            weights = sha256_of(directory / WEIGHTS)
    before = parse_config(dumped, origin=base.uri)
    decided: dict[str, Any] = {
        "registry.name": request.model,
        "registry.register_best": True,
        "train.initial_weights": weights if request.start == "champion" else None,
        "train.segment": None,
    }
    if request.data is not None:
        decided["data.store"] = store_at(request.data, options.stores_dir)
    _refuse_what_has_no_effect(request.overrides, decided)
    overrides = {**request.overrides, **decided}
    config = override_config(before, overrides, origin=f"retrain {request.model}")
    store = open_data(config.data, options.stores_dir, console)
    # From which weights it starts, and that it is trained in one segment, is a choice of the retraining, no news.
    chosen = {"initial_weights": config.train.initial_weights, "segment": None}
    compared = before.model_copy(update={"train": before.train.model_copy(update=chosen)})
    reasons = reasons_to_train(
        base,
        compared.dump(),
        config,
        store.manifest.content_hash,
        has_champion=model.champion is not None,
        force=request.force,
    )
    identity = _identity(config, store, base, options)
    return Plan(
        request,
        base,
        None if model.champion is None else model.champion.version,
        config,
        store,
        tuple(reasons),
        identity,
        Retrainings(options.runs_dir).finished(request.model, identity),
    )


def plan_of(record: Record, plan: Plan, tracking_uri: str) -> Plan:
    """The plan of a retraining that has made the present champion, for what it has not done yet.

    Args:
        record: of the retraining.
        plan: of the same request now.
        tracking_uri: of the registry.
    """
    versions = registry.show(record.model, tracking_uri=tracking_uri).versions
    base = next((version for version in versions if version.version == record.base), plan.base)
    return replace(plan, base=base, champion=record.champion, reasons=tuple(record.reasons), identity=record.identity)


def check_plan(plan: Plan, options: Options, announce: Announce = silent) -> None:
    """Checks before a training of hours what would end it, or its comparison with the champion.

    Args:
        plan: of the retraining.
        options: directories.
        announce: called with what begins.

    Raises:
        UserError: the configuration does not fit the data, or the gate store cannot judge what is trained on them.
    """
    prepare_parts(plan.config, plan.store, ProcessGroup(0, plan.config.cluster.most_workers, torch.device("cpu")))
    if plan.config.retrain.gate_store is not None:
        gate = open_gate_store(plan.config.retrain, options.stores_dir)
        check_gate_store(gate, DataSummary.of(plan.store.manifest), plan.store, announce)


_DECIDED_BY = {
    "registry.name": "the name of the model is the argument",
    "registry.register_best": "what a retraining trains is registered",
    "train.initial_weights": "--from champion starts from the champion's weights",
    "train.segment": "a retraining starts anew",
    "data.store": "--data names the store",
}
"""What a retraining decides itself, and how it is told."""


def _refuse_what_has_no_effect(overrides: Mapping[str, Any], decided: Mapping[str, Any]) -> None:
    for key, value in decided.items():
        if key in overrides and overrides[key] != value:
            raise UserError(f"{key}={overrides[key]} has no effect in a retraining: {_DECIDED_BY[key]}; leave it out")


def _identity(config: Config, store: Store, base: RegisteredVersion, options: Options) -> str:
    settings = config.retrain
    gate = None if settings.gate_store is None else open_gate_store(settings, options.stores_dir).content_hash
    plain = [
        config.digest(),
        store.manifest.content_hash,
        code_version(),
        base.content_hash,
        settings.model_dump(mode="json", exclude={"gate_store"}),
        gate,
    ]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
