"""Registers a finished run: the weights with their certificates, tags and metrics; then promotes the version."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from spikefleet import registry
from spikefleet.certificates.certify import Certificates
from spikefleet.certificates.drift_reference import REFERENCE
from spikefleet.certificates.latency import LATENCY_MS
from spikefleet.certificates.reference_measurement import reference_of
from spikefleet.config.schema import Config
from spikefleet.data_summary import DataSummary
from spikefleet.gates.gate_store import check_gate_store, open_gate_store
from spikefleet.gates.promoting import promote_through_gates
from spikefleet.registry.api import Promotion
from spikefleet.registry.version import LATENCY_DEVICE, SPIKE_DRIVEN, RegisteredVersion
from spikefleet.runs.initial_weights import INIT, lineage
from spikefleet.runs.run_dir import Run
from spikefleet.runs.segments import segments_of
from spikefleet.status import Announce
from spikefleet.tasks.per_image import PER_IMAGE
from spikefleet.training.checkpoints import best_weights
from spikefleet.versions import code_version
from spikefleet_pipelines.store.reader import Store


def register_run(
    config: Config,
    run: Run,
    run_id: str,
    tracking_uri: str,
    *,
    store: Store,
    certificates: Certificates,
    evaluation: Path,
    validation: Mapping[str, float],
    test: Mapping[str, float],
) -> RegisteredVersion:
    """Registers the best checkpoint of a run with its spike check, its energy card and its latency.

    Args:
        config: of the run.
        run: its directory.
        run_id: MLflow's id of the run.
        tracking_uri: of the registry.
        store: its data.
        certificates: of the best checkpoint.
        evaluation: file of its evaluation on the test split.
        validation: its metrics on the validation split, by name; empty without one.
        test: its metrics on the test split, by name; empty where it has only the validation images.

    Returns:
        The new version.

    Raises:
        UserError: the checkpoint is damaged, or the registry fails.
    """
    data, report = run.data(), run.path / "report"
    reference_of(store).write(report)  # what a drift report compares with, when the data have changed
    return registry.register(
        config.registered_name(data.dataset),
        weights=best_weights(run.best_checkpoint()),
        config=config.dump(),
        data=data,
        tags={
            "recipe": config.recipe,
            "run_name": run.name,
            "metric": config.checkpoint.metric,
            "code_version": code_version(),
            "seed": config.train.seed,
            **lineage(run),
            **({"segments": segments} if (segments := segments_of(run)) else {}),
            SPIKE_DRIVEN: certificates.verdict,
            **certificates.legs,
            LATENCY_DEVICE: certificates.latency.device,
        },
        metrics={
            **{f"val/{name}": value for name, value in validation.items()},
            **{f"test/{name}": value for name, value in test.items()},
            "energy_mj": certificates.energy_mj,
            LATENCY_MS: certificates.latency.median_ms,
        },
        run_id=run_id,
        tracking_uri=tracking_uri,
        extra_files={
            evaluation.name: evaluation,
            REFERENCE: report / REFERENCE,
            **({INIT: record} if (record := run.path / INIT).is_file() else {}),
            **({PER_IMAGE: results} if (results := evaluation.with_name(PER_IMAGE)).is_file() else {}),
            **{path.name: path for path in certificates.files},
        },
    )


def check_gates(config: Config, store: Store, stores_dir: Path) -> None:
    """Looks before the training for what a promotion would find after it.

    Args:
        config: of the run.
        store: its data.
        stores_dir: directory of prepared stores, for the gate store.

    Raises:
        UserError: the gate store is not there or damaged, lacks the split, or has other classes than the data.
    """
    if config.registry.register_best and config.retrain.gate_store is not None:
        gate = open_gate_store(config.retrain, stores_dir)
        check_gate_store(gate, DataSummary.of(store.manifest), None)  # images are compared when it is promoted


def promote_version(
    config: Config,
    version: RegisteredVersion,
    store: Store,
    stores_dir: Path,
    tracking_uri: str,
    announce: Announce,
    *,
    validation: bool,
) -> Promotion:
    """Promotes a run's version: through the gates where a gate store is configured, else by the plain metric.

    By the plain metric it becomes champion if its validation metric is better than the champion's and the spike check
    neither refuted it nor shows nothing. Without a validation split it stays challenger: to compare test metrics would
    be to select by them.

    Args:
        config: of the run.
        version: its registered version.
        store: its data.
        stores_dir: directory of prepared stores, for the gate store.
        tracking_uri: of the registry.
        announce: called with what begins.
        validation: whether the run has a validation split.

    Returns:
        The alias of the version, and why.

    Raises:
        UserError: the gate store cannot be used, or the registry fails.
    """
    name, number, metric = version.name, version.version, config.checkpoint.metric
    if config.retrain.gate_store is not None:
        gated = promote_through_gates(
            name,
            number,
            config.retrain,
            stores_dir,
            tracking_uri,
            used=store,
            gpu=config.cluster.gpu,
            announce=announce,
        )
        return gated.promotion
    if not validation:
        return registry.keep_as_challenger(
            name,
            number,
            f"it was trained without a validation split, so there is no val/{metric} to compare; to compare test "
            f"metrics, call spikefleet.registry.promote({name!r}, {number}, 'test/{metric}')",
            tracking_uri=tracking_uri,
            announce=announce,
        )
    promotion = registry.promote(
        name, number, f"val/{metric}", mode=config.checkpoint.mode, tracking_uri=tracking_uri, announce=announce
    )
    return replace(promotion, reason=f"{promotion.reason}; by the plain metric, without gates (retrain.gate_store)")


def keep_back(version: RegisteredVersion, tracking_uri: str, announce: Announce) -> Promotion:
    """Leaves the promotion of a run's version to the caller: it is challenger until then."""
    return registry.keep_as_challenger(
        version.name, version.version, "it is compared later", tracking_uri=tracking_uri, announce=announce
    )
