"""Registers a finished run: the weights with their certificates, tags and metrics; then promotes the version."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from spikefleet import registry
from spikefleet.certificates.certify import Certificates
from spikefleet.config.schema import Config
from spikefleet.registry.api import Promotion
from spikefleet.registry.version import SPIKE_DRIVEN
from spikefleet.runs.run_dir import Run
from spikefleet.tasks.per_image import PER_IMAGE
from spikefleet.training.checkpoints import best_weights
from spikefleet.versions import code_version


def register_run(
    config: Config,
    run: Run,
    run_id: str,
    tracking_uri: str,
    *,
    certificates: Certificates,
    evaluation: Path,
    validation: Mapping[str, float],
    test: Mapping[str, float],
) -> Promotion:
    """Registers the best checkpoint of a run with its spike check and its energy card.

    It becomes champion if its validation metric is better than the champion's and the spike check neither refuted it
    nor shows nothing. Without a validation split it stays challenger: to compare test metrics would be to select by
    them.

    Args:
        config: of the run.
        run: its directory.
        run_id: MLflow's id of the run.
        tracking_uri: of the registry.
        certificates: of the best checkpoint.
        evaluation: file of its evaluation on the test split.
        validation: its metrics on the validation split, by name; empty without one.
        test: its metrics on the test split, by name; empty where it has only the validation images.

    Returns:
        The alias of the new version, and why.

    Raises:
        UserError: the checkpoint is damaged, or the registry fails.
    """
    data = run.data()
    metric = config.checkpoint.metric
    version = registry.register(
        config.registered_name(data.dataset),
        weights=best_weights(run.best_checkpoint()),
        config=config.dump(),
        data=data,
        tags={
            "recipe": config.recipe,
            "run_name": run.name,
            "metric": metric,
            "code_version": code_version(),
            "seed": config.train.seed,
            SPIKE_DRIVEN: certificates.verdict,
            **certificates.legs,
        },
        metrics={
            **{f"val/{name}": value for name, value in validation.items()},
            **{f"test/{name}": value for name, value in test.items()},
            "energy_mj": certificates.energy_mj,
        },
        run_id=run_id,
        tracking_uri=tracking_uri,
        extra_files={
            evaluation.name: evaluation,
            **({PER_IMAGE: results} if (results := evaluation.with_name(PER_IMAGE)).is_file() else {}),
            **{path.name: path for path in certificates.files},
        },
    )
    if not validation:
        return registry.keep_as_challenger(
            version.name,
            version.version,
            f"it was trained without a validation split, so there is no val/{metric} to compare; to compare test "
            f"metrics, call spikefleet.registry.promote({version.name!r}, {version.version}, 'test/{metric}')",
            tracking_uri=tracking_uri,
        )
    return registry.promote(
        version.name, version.version, f"val/{metric}", mode=config.checkpoint.mode, tracking_uri=tracking_uri
    )
