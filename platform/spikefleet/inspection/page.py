"""The page of a network: one HTML file, with all styles, charts and images inside, which asks for nothing outside."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image

from spikefleet.inspection.charts import reliability, shade, share_line
from spikefleet.inspection.measuring import Inspection, expected_calibration_error
from spikefleet.status import one_line
from spikefleet.tasks.mistakes import Confusion
from spikefleet.versions import code_version
from spikefleet_tune.atomic import write_atomically
from spikefleet_tune.messages import counted

PAGE = "inspect.html"
"""File name of a page in the report of a run."""

_LARGEST_SIDE = 480
_SMALL_SIDE = 64
_MOST_CLASSES = 25
"""With more classes, the confusion matrix would not be readable; the most frequent confusions are listed."""

_MOST_ROWS = 100
_LISTED_CONFUSIONS = 20


@dataclass(frozen=True)
class Cell:
    """A cell of a table."""

    text: str
    kind: str = ""
    """Its CSS class."""
    share: str | None = None
    """Width of a bar in percent, which is drawn instead of the text."""


@dataclass(frozen=True)
class Table:
    """A table with a header."""

    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class ShownImage:
    """An image of a figure, as a `data:` address."""

    address: str
    says: str
    small: bool


@dataclass(frozen=True)
class Figure:
    """Images over a caption."""

    images: tuple[ShownImage, ...]
    says: str


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    key: str
    title: str
    texts: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    chart: Markup | None = None
    figures: tuple[Figure, ...] = ()
    wide: bool = False


def write_page(inspection: Inspection, path: Path) -> None:
    """Writes the page, atomically. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page_text(inspection))


def page_text(inspection: Inspection) -> str:
    """The page as HTML that is well-formed XML too; names from elsewhere are escaped."""
    template = (resources.files("spikefleet.inspection") / "page.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, finalize=_plain)
    found = environment.from_string(template)
    trained = inspection.trained
    return found.render(
        title=trained.reference,
        network=_network(inspection),
        data=_data(inspection),
        sections=list(_sections(inspection)),
    )


def _plain(value: Any) -> Any:
    """Text without control characters, which no HTML or XML may have."""
    return value if not isinstance(value, str) or isinstance(value, Markup) else one_line(value)


def _network(inspection: Inspection) -> str:
    model = inspection.trained.config.model
    parameters = sum(parameter.numel() for parameter in inspection.trained.network.parameters())
    tags = ", ".join(f"{key} {value}" for key, value in model.tags().items() if key != "task")
    return f"{inspection.trained.config.task}: {tags}; {parameters:,} parameters. spikefleet {code_version()}."


def _data(inspection: Inspection) -> str:
    data, details, other = inspection.trained.data, inspection.details, inspection.measured_on
    where = ""
    if other.content_hash != data.content_hash:
        where = f" of {other.dataset} in {inspection.location} (content {other.content_hash[:12]})"
    return (
        f"Measured on {counted(details['samples'], 'sample')} of {details['split']}{where}; trained on {data.dataset} "
        f"(content {data.content_hash[:12]}, {counted(len(data.class_names), 'class', 'classes')})."
    )


def _sections(inspection: Inspection) -> Iterator[Section]:
    yield _metrics(inspection)
    if inspection.evaluation.over_time:
        yield _over_time(inspection)
    if inspection.evaluation.layers:
        yield _firing(inspection)
    yield _energy(inspection)
    yield _classes(inspection)
    if inspection.confusion is not None:
        yield _confusion(inspection.confusion)
    if inspection.mistakes:
        yield _mistakes(inspection)
    if inspection.calibration is not None:
        yield _calibration(inspection)
    yield _gradients(inspection)
    yield _proof(inspection)


def _metrics(inspection: Inspection) -> Section:
    details, recorded = inspection.details, inspection.trained.metrics
    rows = []
    for name, value in details["metrics"].items():
        registered = (recorded.get(f"{split}/{name}") for split in ("val", "test"))
        rows.append((name, _share(value), *(_share(one) for one in registered)))
    health = inspection.evaluation.health
    texts = [str(details[key]) for key in ("description", "protocol_remark", "remark") if key in details]
    if health:
        texts.append(
            f"Firing rate {health['firing_rate']:.3f} of the spikes that are possible, "
            f"{health['dead_fraction']:.1%} of the neurons dead, {health['saturated_fraction']:.1%} saturated."
        )
    table = _table([("metric", f"measured on {details['split']}", "recorded: val", "recorded: test"), *rows])
    return Section("metrics", "Metrics", tuple(texts), (table,))


def _over_time(inspection: Inspection) -> Section:
    values, length = inspection.evaluation.over_time, inspection.evaluation.step_ms
    steps = [str(step + 1) for step in range(len(values))]
    places = steps if length is None else [f"{(step + 1) * length:g}" for step in range(len(values))]
    name = "time steps seen" if length is None else "time seen (ms)"
    chart = share_line(values, places, name, "accuracy after each time step")
    table = _table([("time step", "top1"), *zip(steps, map(_share, values), strict=True)])
    text = "Accuracy of the answer after each time step: how many steps a network must run to be right."
    return Section("latency", "Accuracy after each time step", (text,), (table,), chart)


def _firing(inspection: Inspection) -> Section:
    layers = inspection.evaluation.layers
    steps = max(len(row["rate_per_step"]) for row in layers)
    header = ("layer", *(f"t={step + 1}" for step in range(steps)), "mean", "dead", "saturated")
    rows = []
    for row in layers:
        rates = row["rate_per_step"]
        cells = [Cell(f"{rate:.3f}", shade(rate)) for rate in rates]
        cells += [Cell("-")] * (steps - len(rates))
        rest = (Cell(f"{row['rate']:.3f}"), Cell(f"{row['dead']:.1%}"), Cell(f"{row['saturated']:.1%}"))
        rows.append((Cell(row["layer"]), *cells, *rest))
    text = (
        f"Share of the spikes that are possible, on the first {counted(inspection.rate_images, 'sample')} of "
        f"{inspection.details['split']}; dead neurons never fired, saturated ones always."
    )
    return Section("firing", "Firing rates by layer and time step", (text,), (Table(header, tuple(rows)),))


def _energy(inspection: Inspection) -> Section:
    card = inspection.energy
    rows = card.rows()
    most = max((row["energy_mj"] for row in rows), default=0.0) or 1.0
    header = ("layer", "", "mJ", "share", "input", "rate", "MACs", "ACs")
    cells = [
        (
            Cell(row["layer"]),
            Cell("", row["input"], f"{100 * row['energy_mj'] / most:.1f}"),
            Cell(f"{row['energy_mj']:.4g}"),
            Cell(f"{row['share']:.1%}"),
            Cell(row["input"]),
            Cell("-" if row["rate"] is None else f"{row['rate']:.3f}"),
            Cell(f"{row['macs']:,.0f}"),
            Cell(f"{row['acs']:,.0f}"),
        )
        for row in rows
    ]
    source = "recorded with the network" if inspection.energy_recorded else "measured now"
    texts = [
        f"{card.energy_mj:.4g} mJ for an image, {source} on {counted(card.images, 'image')} ({card.constants.name}, "
        f"{card.form}, T={card.timesteps}, D={card.bound}): {card.macs:,.0f} MACs and {card.acs:,.0f} ACs; estimated "
        "from counted operations, not measured on a chip."
    ]
    if card.twin_ratio is not None:
        texts.append(f"The ANN twin needs {card.twin_energy_mj:.4g} mJ, {card.twin_ratio:.2f} times as much.")
    return Section("energy", "Energy by layer", tuple(texts), (Table(header, tuple(cells)),))


def _classes(inspection: Inspection) -> Section:
    report, details = inspection.trained.task.report, inspection.details
    header, *rows = report.table(details)
    texts = (f"The first {_MOST_ROWS} of {len(rows)}.",) if len(rows) > _MOST_ROWS else ()
    tables = [_table([header, *rows[:_MOST_ROWS]])]
    if by_size := report.size_table(details):
        tables.append(_table(by_size))
    return Section("classes", "Classes", texts, tuple(tables))


def _confusion(confusion: Confusion) -> Section:
    counts, names = confusion.counts, confusion.names
    says = f"{confusion.says[:1].upper()}{confusion.says[1:]}."
    if len(names) > _MOST_CLASSES:
        pairs = [
            (int(counts[row, column]), row, column)
            for row, column in zip(*counts.nonzero(), strict=True)
            if row != column
        ]
        pairs.sort(key=lambda pair: -pair[0])
        rows = [(names[row], names[column], str(count)) for count, row, column in pairs[:_LISTED_CONFUSIONS]]
        text = f"{says} The {len(rows)} most frequent confusions of {len(pairs)}."
        return Section("confusion", "Confusion matrix", (text,), (_table([("is", "taken for", "count"), *rows]),))
    sums = counts.sum(axis=1)
    matrix = tuple(
        (
            Cell(names[row]),
            *(Cell(str(count), shade(count / sums[row] if sums[row] else 0.0)) for count in counts[row].tolist()),
        )
        for row in range(len(names))
    )
    text = f"{says} The colour is the share of the row."
    return Section("confusion", "Confusion matrix", (text,), (Table(("", *names), matrix),))


def _mistakes(inspection: Inspection) -> Section:
    split = inspection.details["split"]
    figures = tuple(
        Figure(tuple(_shown(image, says) for says, image in images), f"{mistake.says} ({split} row {mistake.row})")
        for mistake, images in inspection.mistakes
    )
    wide = any(len(figure.images) > 1 or not figure.images[0].small for figure in figures)
    text = f"The {counted(len(figures), 'sample')} that the network has most wrong, the worst first."
    return Section("mistakes", "Worst mistakes", (text,), figures=figures, wide=wide)


def _calibration(inspection: Inspection) -> Section:
    found = inspection.calibration
    assert found is not None, "asked before"
    size = len(found.counts)
    bins = [
        (sure / count, right / count, count) if count else (0.0, 0.0, 0)
        for count, sure, right in zip(found.counts, found.confidence, found.right, strict=True)
    ]
    rows = [
        (f"{place / size:.3f} to {(place + 1) / size:.3f}", str(count), _share(sure), _share(right))
        for place, (sure, right, count) in enumerate(bins)
        if count
    ]
    text = (
        f"Expected calibration error {expected_calibration_error(found):.4f}, over {size} equal bins of confidence and "
        f"{counted(sum(found.counts), 'answer')}: the mean of |accuracy - confidence|, weighted by the answers of a "
        "bin (Guo et al., ICML 2017). On the dashed line both are equal."
    )
    table = _table([("confidence", "answers", "mean confidence", "right"), *rows])
    chart = reliability(bins, "confidence", "accuracy by confidence")
    return Section("calibration", "Calibration", (text,), (table,), chart)


def _gradients(inspection: Inspection) -> Section:
    check, title = inspection.gradients, "Gradient norms by layer"
    if check is None:
        return Section("gradients", title, (inspection.gradients_remark,))
    most = max((row.gradient_norm for row in check.layers), default=0.0) or 1.0
    cells = tuple(
        (
            Cell(row.layer),
            Cell("", "spikes", f"{100 * row.gradient_norm / most:.1f}"),
            Cell(f"{row.gradient_norm:.3g}"),
            Cell(f"{row.weight_norm:.3g}"),
            Cell("-" if row.firing_rate is None else f"{row.firing_rate:.3f}"),
        )
        for row in check.layers
    )
    texts = [inspection.gradients_remark, f"First layer / last layer before neurons: {check.first_to_last:.3g}."]
    texts += [] if check.problem is None else [f"Will hardly train: {check.problem}."]
    header = ("layer", "", "gradient norm", "weight norm", "firing rate")
    return Section("gradients", title, tuple(texts), (Table(header, cells),))


def _proof(inspection: Inspection) -> Section:
    recorded, title = inspection.trained.proof, "Proof of spike-driven inference"
    if recorded is None:
        text = f"None is recorded; `spikefleet spike-check {inspection.trained.reference}` makes it."
        return Section("proof", title, (text,))
    texts = [f"Verdict: {recorded['verdict']}." + (f" {recorded['why']}." if recorded.get("why") else "")]
    texts += [f"{leg['says']}." for leg in recorded.get("legs") or ()]
    layers: Sequence[Mapping[str, Any]] = (recorded.get("proof") or {}).get("layers") or ()
    if not layers:
        return Section("proof", title, tuple(texts))
    header = ("layer", "kind", "T", "D", "equal", "0/1 only", "ones", "spare bits")
    rows = [
        (
            layer["name"],
            layer["kind"],
            _number(layer.get("timesteps")),
            _number(layer.get("bound")),
            "yes" if layer["equal"] else "no",
            {None: "-", True: "yes", False: "no"}[layer.get("binary")],
            _share(layer.get("ones")),
            _number(layer.get("headroom_bits")),
        )
        for layer in layers
    ]
    return Section("proof", title, tuple(texts), (_table([header, *rows]),))


def _table(rows: Iterable[Sequence[str]]) -> Table:
    header, *others = rows
    return Table(tuple(header), tuple(tuple(map(Cell, row)) for row in others))


def _shown(image: torch.Tensor, says: str) -> ShownImage:
    """An image, uint8 `[C, H, W]`, as an address that holds its PNG; large ones are shrunk."""
    pixels = image.permute(1, 2, 0).numpy()
    drawn = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
    drawn.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE))
    content = io.BytesIO()
    drawn.save(content, format="png")
    encoded = base64.b64encode(content.getvalue()).decode()
    return ShownImage(f"data:image/png;base64,{encoded}", says, max(image.shape[-2:]) <= _SMALL_SIDE)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}" if 0 <= value <= 1 else f"{value:.4g}"


def _number(value: int | None) -> str:
    return "-" if value is None else str(value)
