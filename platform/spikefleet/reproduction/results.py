"""Finished trainings, kept in Parquet files: with them a reproduction resumes without the directories of its runs.

There is one file for each search, `paper-SCALE-RECIPE.parquet`. Files only grow: a training that a file holds is not
written again. They hold what a report needs and no weights.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from spikefleet.config.recipes import parse_config
from spikefleet.config.renamed import with_current_keys
from spikefleet.config.schema import Config
from spikefleet.errors import UserError
from spikefleet_models.energy import EnergyCard
from spikefleet_tune.atomic import replacing
from spikefleet_tune.lock import LockedError, hold
from spikefleet_tune.messages import counted

SUFFIX = ".parquet"

_SCHEMA = pa.schema(
    [
        pa.field("digest", pa.string(), nullable=False),
        pa.field("recipe", pa.string(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("overrides", pa.string(), nullable=False),
        pa.field("metrics", pa.map_(pa.string(), pa.float64()), nullable=False),
        pa.field("seconds", pa.float64(), nullable=False),
        pa.field("dataset", pa.string(), nullable=False),
        pa.field("data_hash", pa.string(), nullable=False),
        pa.field("code_version", pa.string(), nullable=False),
        pa.field("trial", pa.string(), nullable=False),
        pa.field("config", pa.string(), nullable=False),
        pa.field("history", pa.string(), nullable=False),
        pa.field("energy_card", pa.string()),
    ]
)
"""`overrides`, `config`, `history` and `energy_card` are JSON."""

_PATIENCE_S = 60.0

_TOGETHER = ("totals", "rows", "conventions")
"""Parts of a card that are computed from the rest."""


@dataclass(frozen=True)
class Training:
    """A finished training: what it was, and what came of it."""

    config: Config
    overrides: Mapping[str, Any]
    metrics: Mapping[str, float]
    """Of its checkpoint with the best validation metric, such as `test/top1`; those of the last one are `last/...`."""
    seconds: float
    """Wall time, evaluations and the energy card included."""
    dataset: str
    data_hash: str
    code_version: str
    trial: str
    """Name of its run."""
    history: tuple[Mapping[str, float], ...] = ()
    """Metrics of each epoch."""
    card: EnergyCard | None = None
    """Of its best checkpoint."""

    @property
    def digest(self) -> str:
        """Digest of its configuration, under the present schema."""
        return self.config.digest()

    @property
    def seed(self) -> int:
        """Its `train.seed`."""
        return self.config.train.seed

    @property
    def setting(self) -> str:
        """Digest of its configuration but for the seed: equal in all trainings of a row."""
        return setting_of(self.config)

    def to_row(self) -> dict[str, Any]:
        """Its row of a Parquet file."""
        card = None if self.card is None else self.card.to_dict()
        if card is not None:
            card = {key: value for key, value in card.items() if key not in _TOGETHER}
        return {
            "digest": self.digest,
            "recipe": self.config.recipe,
            "seed": self.seed,
            "overrides": _json(self.overrides),
            "metrics": sorted(self.metrics.items()),
            "seconds": self.seconds,
            "dataset": self.dataset,
            "data_hash": self.data_hash,
            "code_version": self.code_version,
            "trial": self.trial,
            "config": _json(self.config.dump()),
            "history": _json([{key: float(f"{value:.6g}") for key, value in row.items()} for row in self.history]),
            "energy_card": None if card is None else _json(card),
        }

    @classmethod
    def of_row(cls, row: Mapping[str, Any], origin: str) -> Self:
        """The training of a row. Raises UserError where its configuration is none of this version."""
        return cls(
            parse_config(with_current_keys(json.loads(row["config"])), origin),
            json.loads(row["overrides"]),
            dict(row["metrics"]),
            row["seconds"],
            row["dataset"],
            row["data_hash"],
            row["code_version"],
            row["trial"],
            tuple(json.loads(row["history"])),
            None if row["energy_card"] is None else EnergyCard.from_dict(json.loads(row["energy_card"])),
        )


def mixtures(trainings: Iterable[Training]) -> Iterator[str]:
    """What is not the same in trainings that are compared, in words: version of the code, content of the data."""
    given = list(trainings)
    codes = sorted({one.code_version for one in given})
    contents = sorted({one.data_hash[:12] for one in given})
    if len(codes) > 1:
        yield f"trainings of {len(codes)} versions of the code ({', '.join(codes)})"
    if len(contents) > 1:
        yield f"trainings on {len(contents)} contents of the data ({', '.join(contents)})"


def setting_of(config: Config) -> str:
    """Digest of a configuration but for its seed."""
    return config.model_copy(update={"train": config.train.model_copy(update={"seed": 0})}).digest()


def read_results(path: Path) -> dict[str, Training]:
    """Reads the trainings of a file, by digest; none if it does not exist.

    Trainings whose configuration is none of this version are left out, with a warning that counts them.

    Raises:
        UserError: the file is damaged, or of another form.
    """
    known, unread = _read(path)
    if unread:
        logging.getLogger(__name__).warning(
            "%s: %s of another version left out: %s", path, counted(len(unread), "training"), unread[0][1]
        )
    return known


_Unread = list[tuple[dict[str, Any], str]]
"""Rows, and why their trainings cannot be read."""


def _read(path: Path) -> tuple[dict[str, Training], _Unread]:
    """The trainings of a file by digest, and the rows of those that this version cannot read."""
    if not path.is_file():
        return {}, []
    known: dict[str, Training] = {}
    unread: _Unread = []
    try:
        for row in pq.read_table(path, schema=_SCHEMA).to_pylist():
            try:
                training = Training.of_row(row, f"training {row['trial']}")
            except UserError as error:
                unread.append((row, str(error)))
            else:
                known[training.digest] = training
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is not a file of results ({str(error)[:200]}); restore it, or give another --results"
        ) from None
    return known, unread


def add_results(path: Path, trainings: Iterable[Training]) -> int:
    """Adds trainings to a file, atomically; those that it holds stay as they are, also those of another version.

    Args:
        path: the file, or where it is to be.
        trainings: finished ones.

    Returns:
        The number of trainings that were added; with none the file is not written.

    Raises:
        UserError: the file is damaged, or another process has been writing it for a minute.
        OSError: it cannot be written.
    """
    given = list(trainings)
    known = read_results(path)
    if all(training.digest in known for training in given):  # nothing is written, which a directory may not allow
        return 0
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = hold(path.with_name(f".{path.name}.lock"), _PATIENCE_S)
    except LockedError as error:
        raise UserError(f"{path} is being written by {error.holder}; run the same command again") from None
    with lock:
        return _add(path, given)


def _add(path: Path, trainings: Sequence[Training]) -> int:
    known, unread = _read(path)  # another process may have added some since
    new = {training.digest: training for training in trainings if training.digest not in known}
    if not new:
        return 0
    rows = [*(row for row, _ in unread), *(training.to_row() for training in (*known.values(), *new.values()))]
    rows.sort(key=lambda row: (row["overrides"], row["digest"]))  # the same trainings are the same file
    with replacing(path) as partial:
        pq.write_table(pa.Table.from_pylist(rows, _SCHEMA), partial, compression="zstd", use_dictionary=False)
    return len(new)


def shipped_results() -> Path:
    """The directory of the results that come with the package."""
    return Path(str(resources.files("spikefleet.reproduction"))) / "results"


def _json(data: Any) -> str:
    return json.dumps(data, sort_keys=True, separators=(",", ":"))
