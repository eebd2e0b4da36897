"""From a finished run to a registered version: what goes with the weights, and the contest with the champion."""

from __future__ import annotations

from collections.abc import Mapping

from spikefleet import registry
from spikefleet.config import Config
from spikefleet.registry import Promotion
from spikefleet.runs import DATA_FACTS, Run
from spikefleet.versions import code_version


def register_run(
    config: Config,
    run: Run,
    run_id: str,
    tracking_uri: str,
    *,
    validation: Mapping[str, float],
    test: Mapping[str, float],
) -> Promotion:
    """Registers the best checkpoint of a run; it becomes champion if its validation metric beats the champion's.

    Raises UserError when the registry does not answer.
    """
    best = run.best_checkpoint()
    average = best / "average.safetensors"
    facts = run.data_facts()
    metric = config.checkpoint.metric
    version = registry.register(
        config.registered_name,
        weights=average if average.is_file() else best / "model.safetensors",
        config=config.dump(),
        tags={
            "dataset": facts["source"],
            "data_hash": facts["content_hash"],
            "recipe": config.recipe,
            "run_name": run.name,
            "metric": metric,
            "code_version": code_version(),
            "seed": config.train.seed,
        },
        metrics={
            **{f"val/{name}": value for name, value in validation.items()},
            **{f"test/{name}": value for name, value in test.items()},
        },
        run_id=run_id,
        tracking_uri=tracking_uri,
        extra_files={DATA_FACTS: run.path / DATA_FACTS, "evaluation.json": run.path / "report" / "evaluation.json"},
    )
    return registry.promote(
        version.name, version.version, f"val/{metric}", mode=config.checkpoint.mode, tracking_uri=tracking_uri
    )
