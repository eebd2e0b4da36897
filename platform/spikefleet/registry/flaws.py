"""Why a network must not be used, by what was measured of it: it finds nothing, is silent, or answers by chance.

A version with a flaw gets no alias, whoever registers it, and `best` leaves it out. The rules:

* its task's (`Task.flaw`): a detector with a mAP50 below 0.01 %; a classifier that answers one class for all images, or
  whose mean accuracy over the classes is not above chance by two standard errors (at most half of the way to 100 %);
* silence: its layers receive less than 0.1 % of the spikes that are possible, by its energy card.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from spikefleet.config.recipes import parse_model
from spikefleet.data_summary import DataSummary
from spikefleet.errors import UserError
from spikefleet.files import read_json_object

if TYPE_CHECKING:
    from spikefleet.tasks import AnyTask

FLAW: Final = "flaw"
"""Tag of a version with a flaw: the sentence that says which."""

LEAST_RATE = 0.001
"""A network whose layers receive a smaller share of the possible spikes is silent."""


def find_flaw(task: AnyTask, metrics: Mapping[str, float], files: Mapping[str, Path]) -> str | None:
    """The flaw of a network, in words; None if nothing that was measured speaks against it.

    Args:
        task: of the network and its classes.
        metrics: by split and name, such as "val/top1".
        files: of the package by name; the evaluation and the energy card are looked at. Files of these names with
            another content, as other programs may register them, say nothing.
    """
    found = ((split, task.flaw(evaluation)) for split, evaluation in _evaluations(metrics, files))
    flaws = [f"on {split}, {flaw}" if split else flaw for split, flaw in found if flaw is not None]
    return "; ".join(filter(None, [*flaws[:1], _silence(files)])) or None


def flaw_tag(
    config: Mapping[str, Any], data: DataSummary, metrics: Mapping[str, float], files: Mapping[str, Path]
) -> dict[str, str]:
    """The tag of a network's flaw; empty if it has none.

    Args:
        config: of the run.
        data: summary of its data.
        metrics: as for `find_flaw`.
        files: as for `find_flaw`.

    Raises:
        UserError: the configuration is not that of a network.
    """
    from spikefleet.tasks import LossSettings, task_class  # imports torch, which searching the registry does not need

    model = parse_model(config["model"], "the configuration of a registered model")
    flaw = find_flaw(task_class(config["task"]).build(model, data, LossSettings()), metrics, files)
    return {} if flaw is None else {FLAW: flaw}


def _evaluations(metrics: Mapping[str, float], files: Mapping[str, Path]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Split and evaluation: that of the report, then the metrics of val or, without them, of test."""
    from spikefleet.tasks.task import EVALUATION  # imports torch, which searching the registry does not need

    with suppress(UserError):
        evaluation = read_json_object(files[EVALUATION]) if EVALUATION in files else {}
        yield str(evaluation.get("split", "")), evaluation
    for split in ("val", "test"):
        found = {name.removeprefix(f"{split}/"): v for name, v in metrics.items() if name.startswith(f"{split}/")}
        if found:
            yield split, {"metrics": found}
            return


def _silence(files: Mapping[str, Path]) -> str | None:
    from spikefleet.certificates.energy_card import ENERGY, read_card

    if ENERGY not in files:
        return None
    try:
        card = read_card(files[ENERGY])
    except UserError:
        return None
    if card.mean_input is None or not card.bound:
        return None
    rate = card.mean_input / card.bound
    if rate >= LEAST_RATE:
        return None
    return f"it is silent: its layers receive {rate:.3%} of the spikes that are possible, less than {LEAST_RATE:.1%}"
