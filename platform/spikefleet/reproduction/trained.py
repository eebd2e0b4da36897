"""The trainings of a search, as a report needs them."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from spikefleet.certificates.energy_card import ENERGY, read_card
from spikefleet.config.schema import Config, without_unused_branches
from spikefleet.reproduction.plan import config_of
from spikefleet.reproduction.results import Training
from spikefleet.runs.options import Options
from spikefleet.runs.run_dir import Run
from spikefleet_pipelines.sources import check_options, find_source
from spikefleet_tune.journal import TrialRecord
from spikefleet_tune.result import SearchResult


def trainings_of(
    result: SearchResult, options: Options, wanted: Container[str]
) -> tuple[dict[str, Training], dict[str, str]]:
    """The finished trainings of a search by digest, and for each other trial why it has no result.

    Args:
        result: of the search.
        options: where its runs are.
        wanted: digests; no other run is read.

    Raises:
        UserError: a run is missing or damaged.
    """
    trainings: dict[str, Training] = {}
    problems: dict[str, str] = {}
    trials = options.trials_dir(result.name)
    for record in result.records:
        config = config_of(result.search.recipe, record.overrides)
        digest = config.digest()
        if digest not in wanted:
            continue
        run = Run(trials / record.name)
        if record.status != "finished":
            problems[digest] = f"{record.status}: {record.reason}"
        elif differs(run, config):
            problems[digest] = (
                f"was trained by an earlier form of recipe {result.search.recipe}; move {trials.parent} away to train "
                "it again"
            )
        else:
            trainings[digest] = _training(record, run, config)
    return trainings, problems


def _training(record: TrialRecord, run: Run, config: Config) -> Training:
    data, state = run.data(), run.checkpoints.newest_state()
    card = run.path / "report" / ENERGY
    return Training(
        config,
        dict(record.overrides),
        dict(record.metrics),
        record.seconds,
        data.dataset,
        data.content_hash,
        str(run.record().get("code_version", "unknown")),
        record.name,
        () if state is None else tuple(state.history),
        read_card(card) if card.is_file() else None,
    )


def differs(run: Run, config: Config) -> bool:
    """Whether a run was trained with values that its recipe no longer has; the location of its data is ignored."""

    def compared(one: Config) -> dict[str, Any]:
        kept = ("model", "train", "optim", "shortcut", "checkpoint")
        tree = without_unused_branches(one.dump())
        options = check_options(find_source(one.data.source), one.data.options).model_dump(mode="json")
        data = {"transform": tree["data"]["transform"], "options": options, "seed": one.data.seed}
        return {**{key: tree[key] for key in kept}, **data}

    return compared(run.config()) != compared(config)
