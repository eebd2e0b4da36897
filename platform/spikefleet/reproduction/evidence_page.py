"""The page of evidence, EVIDENCE.md: every number on it is computed from recorded results."""

from __future__ import annotations

import os
import shlex
import statistics
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from spikefleet.reproduction.depth_gradients import DepthGradients
from spikefleet.reproduction.evidence import TableEvidence, collect_evidence
from spikefleet.reproduction.evidence_plots import (
    GRADIENTS_PLOT,
    draw_evidence,
    draw_gradients,
    has_courses,
    has_rates,
    plot_name,
    plot_names,
)
from spikefleet.reproduction.evidence_text import LARGEST_RATIO, READ, SEEDS, scattered, settings_of
from spikefleet.reproduction.front_plot import draw_front, front_plot_name
from spikefleet.reproduction.front_section import front_section
from spikefleet.reproduction.paired_seeds import smallest_effect
from spikefleet.reproduction.recorded_search import RecordedSearch, recorded_searches
from spikefleet.reproduction.report import SCALES
from spikefleet.reproduction.results import Training, mixtures
from spikefleet.reproduction.scales import FEW_IMAGES
from spikefleet.reproduction.table import Column, Entry, list_tables, load_table
from spikefleet.reproduction.training_time import words_of
from spikefleet.reproduction.verdict import JudgedClaim, JudgedPair
from spikefleet_models.gradient_flow import TRAINABLE
from spikefleet_tune.atomic import write_atomically
from spikefleet_tune.messages import counted

SHIPPED = "platform/spikefleet/reproduction/results"
"""Where the repository has the results that come with the package."""


@dataclass(frozen=True)
class Evidence:
    """All that the page is about."""

    tables: Sequence[TableEvidence]
    gradients: DepthGradients | None = None
    """By depth, if they were measured."""
    searches: Sequence[RecordedSearch] = ()

    @classmethod
    def read(cls, results: Path) -> Self:
        """What a directory of recorded results says. Raises UserError if a file is damaged."""
        return cls(collect_evidence(results), DepthGradients.read(results), tuple(recorded_searches(results)))


def write_evidence(evidence: Evidence, page: Path, plots: Path, command: str, results: str = SHIPPED) -> list[Path]:
    """Writes the page, and the plots of each table and scale that was run.

    Args:
        evidence: all of it.
        page: the Markdown file.
        plots: directory of the plots.
        command: that writes the page.
        results: directory of the recorded results, for the commands on the page.

    Returns:
        The paths of the plots that could be drawn.
    """
    paths = [path for one in evidence.tables for path in draw_evidence(one, plots)]
    paths += [path for one in evidence.searches if draw_front(one, path := plots / front_plot_name(one))]
    if evidence.gradients is not None and draw_gradients(evidence.gradients, plots / GRADIENTS_PLOT):
        paths.append(plots / GRADIENTS_PLOT)
    undrawn = {path.name for path in plots_of(evidence, plots)} - {path.name for path in paths}
    write_atomically(page, as_page(evidence, _relative(plots, page), command, results, undrawn))
    return paths


def plots_of(evidence: Evidence, plots: Path) -> list[Path]:
    """The paths of the plots that `write_evidence` draws."""
    names = [name for one in evidence.tables for name in plot_names(one)]
    names += [front_plot_name(one) for one in evidence.searches]
    return [plots / name for name in [*names, *([] if evidence.gradients is None else [GRADIENTS_PLOT])]]


def as_page(evidence: Evidence, plots: str, command: str, results: str = SHIPPED, undrawn: Collection[str] = ()) -> str:
    """The page as Markdown.

    Args:
        evidence: all of it.
        plots: directory of the plots, as links of the page name it.
        command: that writes the page.
        results: directory of the recorded results, for the commands on the page.
        undrawn: file names of plots that could not be drawn.
    """
    found = evidence.tables
    run = [one for one in found if one.was_run]
    lines = ["# Evidence: which of the papers' claims hold here", ""]
    lines += [f"Written by `{command}` from recorded results; `--force` replaces the page and its plots.", ""]
    trainings = _distinct(run)
    seconds = sum(one.seconds for one in trainings.values()) + sum(one.seconds for one in evidence.searches)
    count = len(trainings) + sum(one.trainings for one in evidence.searches)
    lines += [f"{counted(count, 'training')}, {words_of(seconds)} in all.", ""]
    lines += ["## Verdicts", "", *_verdicts(found), "", "## How to read this", "", *READ, ""]
    for one in run:
        lines += [*_section(one, plots, results, undrawn), ""]
    lines += [*_gradients(evidence.gradients, plots, undrawn), ""]
    for search in evidence.searches:
        says = "The first objective over the second, and over time steps"
        image = _image(says, plots, front_plot_name(search), undrawn)
        lines += [*front_section(search, image, results), ""]
    lines += ["## Not run, and why", "", *_not_run(found, results), "", "## Origin of the results", "", *_origin(run)]
    return "\n".join(lines).rstrip() + "\n"


def as_verdicts(found: Sequence[TableEvidence]) -> list[dict[str, Any]]:
    """The verdicts as plain data, one for each claim and scale."""
    return [
        {
            "table": one.table.name,
            "scale": one.scale,
            "claim": judged.claim.name,
            "says": judged.claim.says,
            "verdict": judged.verdict,
            "run": one.was_run,
            "pairs": [
                {
                    "at": pair.rows.at,
                    "first": pair.rows.first,
                    "second": pair.rows.second,
                    "found": pair.found,
                    "seeds": 0 if pair.ours is None else pair.ours.seeds,
                    "difference": None if pair.ours is None else pair.ours.difference,
                    "interval": None if pair.ours is None else pair.ours.interval,
                    "paper": pair.paper,
                    "adjusted_p": pair.adjusted_p,
                }
                for pair in judged.pairs
            ],
        }
        for one in found
        for judged in one.claims
    ]


def _verdicts(found: Sequence[TableEvidence]) -> Iterator[str]:
    head = "| claim | {} | scale | verdict | shown, reversed, open, not run |"
    yield from (head.format("paper"), f"|{' --- |' * 5}", *_verdicts_of("paper", found))
    if ours := list(_verdicts_of("project", found)):
        yield from ("", "Claims of this project, adjusted apart:", "")
        yield from (head.format("table of the paper"), f"|{' --- |' * 5}", *ours)


def _verdicts_of(source: str, found: Sequence[TableEvidence]) -> Iterator[str]:
    tables = {one.table.name: one.table for one in found}
    for name, table in tables.items():
        of_table = [one for one in found if one.table.name == name]
        shown = [one for one in of_table if one.was_run] or of_table[:1]
        for one in shown:
            for judged in (judged for judged in one.claims if judged.claim.source == source):
                states = [pair.found for pair in judged.pairs]
                counts = ", ".join(str(states.count(state)) for state in ("shown", "reversed", "open", "not run"))
                scale = f"`{one.scale}`" if one.was_run else "-"
                yield f"| {judged.claim.says} | {table.paper} | {scale} | {judged.verdict} | {counts} |"


def _section(one: TableEvidence, plots: str, results: str, undrawn: Collection[str]) -> Iterator[str]:
    yield f"## {one.table.title}, on `{one.scale}`"
    yield ""
    yield f"{one.table.paper}. Scale `{one.scale}`: {SCALES[one.scale]}."
    yield ""
    yield settings_of(one)
    yield ""
    chosen = {name for entry in one.table.entries(_only(one)) for name in (entry.row.name, entry.full_name)}
    beyond = len(chosen & set(one.untrained))
    more = f" It trains {counted(beyond, 'row')} beyond those recorded, too." if beyond else ""
    yield f"Command: `{_command(one, results)}`.{more}"
    yield ""
    yield from (*(f"* {note}" for note in one.table.notes), *scattered(one), "")
    for judged in one.claims:
        yield from _claim(one, judged)
    yield _image(
        "Differences by seed, with intervals from two seeds on, and the paper's", plots, plot_name(one), undrawn
    )
    if has_rates(one):
        yield ""
        name = plot_name(one, "training")
        says = f"Firing rates by layer{'; the balance coefficient by epoch' if has_courses(one) else ''}"
        yield _image(says, plots, name, undrawn)


def _image(says: str, plots: str, name: str, undrawn: Collection[str]) -> str:
    return f"{says}: the plot could not be drawn." if name in undrawn else f"![{says}]({plots}/{name})"


def _claim(one: TableEvidence, judged: JudgedClaim) -> Iterator[str]:
    column = one.table.columns[judged.claim.column]
    whose = "" if judged.claim.source == "paper" else "Not in the paper: "
    yield f"**{whose}{judged.claim.says}** {judged.verdict.capitalize()}."
    yield ""
    smallest, unit = ", ".join(map(str, SEEDS)), "points" if column.unit == "%" else column.unit
    yield (
        f"| {column.label}, {column.unit} | first | second | difference, 95 % interval | paper's | ours / paper's | "
        f"effect size | seeds | adjusted p | found | smallest difference that {smallest} seeds show, {unit} |"
    )
    yield f"|{' --- |' * 11}"
    for pair in judged.pairs:
        yield _row(pair, column)
    yield ""
    mixed = [f"* {pair.rows.at}: {says}." for pair in judged.pairs if pair.ours for says in _mixtures(one, pair)]
    if mixed:
        yield from (*mixed, "")


def _mixtures(one: TableEvidence, pair: JudgedPair) -> Iterator[str]:
    """What is not the same in the trainings of a pair."""
    return mixtures(training for name in (pair.rows.first, pair.rows.second) for training in one.trainings[name])


def _row(pair: JudgedPair, column: Column) -> str:
    ours, at = pair.ours, f"{pair.rows.at}: {pair.rows.first} against {pair.rows.second}"
    paper = "-" if pair.paper is None else f"{pair.paper:+.4g}"
    if ours is None:
        return f"| {at} | - | - | - | {paper} | - | - | 0 | - | not run | - |"
    first, second = (_mean(values) for values in (ours.first, ours.second))
    between = "no interval" if ours.interval is None else f"{ours.interval[0]:+.3g} to {ours.interval[1]:+.3g}"
    relative = ours.relative_to(pair.paper) if column.unit == "%" else None
    if relative is not None and abs(relative) > LARGEST_RATIO:  # the paper's difference is next to nothing
        relative = None
    size, p = ours.effect_size, pair.adjusted_p
    deviation = ours.deviation
    smallest = "-" if deviation is None else ", ".join(f"{smallest_effect(deviation, seeds):.2g}" for seeds in SEEDS)
    cells = (
        at,
        first,
        second,
        f"{ours.difference:+.3g} ({between})",
        paper,
        _number(relative),
        _number(size),
        str(ours.seeds),
        "-" if p is None else f"{p:.2g}",
        pair.found,
        smallest,
    )
    return f"| {' | '.join(cells)} |"


def _mean(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.4g}"
    return mean if len(values) < 2 else f"{mean} +- {statistics.stdev(values):.2g}"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:+.2g}" if abs(value) < 100 else f"{value:+.0f}"


def _gradients(gradients: DepthGradients | None, plots: str, undrawn: Collection[str]) -> Iterator[str]:
    yield "## The first layer's gradient over depth, at initialisation"
    yield ""
    if gradients is None:
        yield "Not run yet: `python tests/bench/depth_gradients.py`."
        return
    yield (
        f"Gradient norm of the first layer over that of the last one that feeds neurons, at initialisation on noise; "
        f"geometric mean over {counted(gradients.seeds, 'seed')}. Recipe `{gradients.recipe}`, side branches after "
        f"each stage, with losses of their own, where the column says so; code {gradients.code_version}. "
        "`python tests/bench/depth_gradients.py`"
    )
    yield ""
    depths, ratios = gradients.depths, gradients.ratios()
    yield f"| connection | side branches | {' | '.join(f'{depth} layers' for depth in depths)} |"
    yield f"|{' --- |' * (len(depths) + 2)}"
    for (connection, branches), by_depth in ratios.items():
        cells = (f"{by_depth[depth]:.2g}" if depth in by_depth else "-" for depth in depths)
        yield f"| {connection} | {'with' if branches else 'without'} | {' | '.join(cells)} |"
    yield ""
    least, most = TRAINABLE
    outside = [
        f"{connection}, {'with' if branches else 'without'} side branches, {depth} layers"
        for (connection, branches), by_depth in ratios.items()
        for depth, ratio in by_depth.items()
        if not least <= ratio <= most
    ]
    yield (
        f"Between {least:g} and {most:g} gradients neither vanish nor explode. Outside: "
        f"{'; '.join(outside) or 'none'}. A ratio within is needed, and is not enough: it does not say whether the "
        "blocks still tell the classes apart. `models/README.md` measures that for plain networks of 34 layers."
    )
    yield ""
    says = "The first layer's gradient over depth, with and without side branches"
    yield _image(says, plots, GRADIENTS_PLOT, undrawn)


def _command(one: TableEvidence, results: str) -> str:
    """What trains the rows of a table with the most seeds that its comparisons have; five where there are none."""
    seeds = max((pair.ours.seeds for judged in one.claims for pair in judged.pairs if pair.ours), default=5)
    only = f" --only {shlex.quote(pattern)}" if (pattern := _only(one)) != "*" else ""
    place = shlex.quote(results)
    return f"spikefleet reproduce {one.table.name} --scale {one.scale} --seeds {seeds}{only} --results {place}"


def _only(one: TableEvidence) -> str:
    """The pattern of the rows that a table's command trains: a group, where its rows alone are recorded; else all."""
    groups = {entry.group.name for entry in one.table.entries() if _has_trainings(one, entry)}
    return f"{groups.pop()}: *" if len(groups) == 1 and len(one.table.groups) > 1 else "*"


def _has_trainings(one: TableEvidence, entry: Entry) -> bool:
    names = (entry.row.name, entry.full_name)
    return any(rows.get(name) for rows in (one.trainings, one.others) for name in names)


def _not_run(found: Sequence[TableEvidence], results: str) -> Iterator[str]:
    yield "* A table is run whole at one scale, since each further one takes as many hours again on two cores."
    tables = {one.table.name: one.table for one in found}
    for name, table in tables.items():
        head = f"* {table.paper}, {table.title}:"
        of_table = [one for one in found if one.table.name == name]
        run = [one for one in of_table if one.was_run]
        missing = [one for one in of_table if not one.was_run and one.scale != "full"]
        if any(one.scale == "full" for one in of_table):
            yield f"{head} scale `full` needs the paper's data and GPUs."
        if missing:
            reason = f"judged at {_scales(run)} instead" if run else "not run yet"
            first = next((one for scale in FEW_IMAGES for one in missing if one.scale == scale), missing[0])
            yield f"{head} {_scales(missing)}: {reason}. `{_command(first, results)}`"
        for one in run:
            if one.untrained:
                yield f"{head} rows not trained at `{one.scale}`: {'; '.join(one.untrained)}."
    for table in tables.values():
        for entry in table.entries():
            refusals = dict.fromkeys(entry.group.refusal(entry.row, scale) for scale in table.scales)
            for reason in filter(None, refusals):
                yield f"* {table.paper}, row {entry.row.name}: {reason}."
    for name in list_tables():
        if name not in tables:
            table = load_table(name)
            head = f"* {table.paper}, {table.title}: no claim of it is judged:"
            yield f"{head} {table.not_judged}. `spikefleet reproduce {name}`"


def _scales(found: Sequence[TableEvidence]) -> str:
    return ", ".join(f"`{one.scale}`" for one in found)


def _origin(run: Sequence[TableEvidence]) -> Iterator[str]:
    if not run:
        yield "There are no recorded results yet."
        return
    yield "| scale | data | trainings | time | code | content of the data |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for scale in dict.fromkeys(one.scale for one in run):
        of_scale = [one for one in run if one.scale == scale]
        trainings = list(_distinct(of_scale).values())
        data, code, hashes = (
            ", ".join(dict.fromkeys(values))
            for values in (
                [one.dataset for one in trainings],
                sorted(one.code_version for one in trainings),
                [one.data_hash[:12] for one in trainings],
            )
        )
        time = words_of(sum(one.seconds for one in trainings))
        yield f"| `{scale}` | {data} | {len(trainings)} | {time} | {code} | {hashes} |"


def _distinct(found: Sequence[TableEvidence]) -> dict[str, Training]:
    """Trainings by digest; tables share them."""
    return {digest: one for evidence in found for digest, one in evidence.distinct.items()}


def _relative(plots: Path, page: Path) -> str:
    """The directory of the plots as seen from the page's."""
    return Path(os.path.relpath(plots.resolve(), page.resolve().parent)).as_posix()
