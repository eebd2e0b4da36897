"""data prepare, data show, data sources."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spikefleet.cli.completion import source_names, store_names
from spikefleet.cli.output import console, loading, messages, print_json, stderr
from spikefleet.cli.parameters import Address, AsJson, Force, StoresDir
from spikefleet.cli.tables import print_record, print_table, text
from spikefleet.errors import UserError
from spikefleet.outputs import check_outputs
from spikefleet.status import one_line, print_line, waiting
from spikefleet_tune.messages import counted

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.console import Console

    from spikefleet_pipelines.store.event_format import EventAudit, EventFormat
    from spikefleet_pipelines.store.manifest import BoxAudit, Manifest

data_app = typer.Typer(help="Prepare and look at data sets.", no_args_is_help=True)

_BY_LAYOUT = frozenset({"auto", "roboflow", "label_studio", "labelstudio", "cvat"})
"""Names that people try for data whose layout says the source."""
_SHOWN_SKIPPED = 20
_SHOWN_ROWS = 8
_OTHER_NAMES = {
    **dict.fromkeys(("yolov5", "yolov8", "yolo11", "ultralytics", "darknet", "coco8", "coco128"), "yolo"),
    **dict.fromkeys(("pascal", "pascal_voc", "labelimg"), "voc"),
    **dict.fromkeys(("tsv", "file_list", "retinanet"), "csv"),
    **dict.fromkeys(("huggingface", "hf", "datasets"), "parquet"),
    **dict.fromkeys(("wds", "tar"), "webdataset"),
    **dict.fromkeys(("medmnist", "numpy"), "npz"),
    **dict.fromkeys(("imagefolder", "folder", "imagenet"), "image_folder"),
}
"""Names that people try for formats that a source reads."""


@data_app.command("prepare")
def prepare_data(
    source: Annotated[
        str,
        typer.Argument(
            help="Name of a source (`spikefleet data sources`); `auto` goes by the layout of ROOT.",
            autocompletion=source_names,
        ),
    ],
    root: Annotated[
        Path | None, typer.Argument(help="Where the downloaded files are, if the source needs any.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory of the store; SOURCE in --stores-dir if not given.")
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            help="Name of the data set; if not given, SOURCE, or the folder's name for anybody's images and "
            "recordings. "
            "A store that is there is renamed."
        ),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="coco: directory of the images of one split, instead of ROOT.")
    ] = None,
    annotations: Annotated[Path | None, typer.Option(help="coco: JSON file with the boxes of that split.")] = None,
    split: Annotated[
        str | None, typer.Option(help="coco: train, val or test. It is added to the store, if that is there.")
    ] = None,
    option: Annotated[list[str] | None, typer.Option(help="Option of the source, for example upsample=4.")] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Seed of the validation split, where the source has none.")
    ] = 0,
    parallel: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=100_000,
            help="Ray tasks at a time, for image files and recordings; all CPUs, where there are many.",
        ),
    ] = None,
    address: Address = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a store that is there (with --split: only that split).")
    ] = False,
    skip_bad: Annotated[
        bool,
        typer.Option(
            "--skip-bad", help="Leave out images and recordings that cannot be read; the manifest lists them."
        ),
    ] = False,
    check_content: Annotated[
        bool,
        typer.Option(
            "--check-content",
            help="Compare ROOT with a store that is there by content, although names, sizes and times agree.",
        ),
    ] = False,
    as_json: AsJson = False,
    stores_dir: StoresDir = Path("stores"),
) -> None:
    """Convert a data set into an Arrow store, checking it on the way."""
    from spikefleet.config.recipes import parse_overrides
    from spikefleet_pipelines.store.data_set_name import check_data_set_name

    where = messages(as_json)
    source = _found_source(source, root, where)
    if name is not None:
        check_data_set_name(name)
    of_split = {"images": images, "annotations": annotations, "split": split}
    options: dict[str, Any] = {key: value for key, value in of_split.items() if value is not None}
    if options and len(options) < len(of_split):
        lacking = " and ".join(f"--{key}" for key in of_split if key not in options)
        raise UserError(f"{' and '.join(f'--{key}' for key in options)} given without {lacking}; they go together")
    for item in option or []:
        if not all(item.partition("=")[:2]):
            raise UserError(f"--option {item!r} is not of the form key=value, for example upsample=4")
        options |= parse_overrides([item])
    with loading("torch", where):
        from spikefleet.data_access import prepare_store

    folder = out or stores_dir / source
    how = {"seed": seed, "parallel": parallel, "overwrite": overwrite, "skip_bad": skip_bad, "dataset": name}
    how["check_content"] = check_content
    store = prepare_store(source, root, folder, where, options, address=address, **how)
    _print_store(store.manifest, str(folder), as_json)


@data_app.command("show")
def show_store(
    store: Annotated[
        str,
        typer.Argument(help="Directory or URI of a store, or its name in --stores-dir.", autocompletion=store_names),
    ],
    out: Annotated[
        Path | None, typer.Option(help="File for a grid of rows, a PNG: images with boxes, or events over time.")
    ] = None,
    rows: Annotated[int | None, typer.Option("--n", min=1, max=64, help="Rows in the grid; 8 if not given.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of the grid; train if not given.")] = None,
    force: Force = False,
    as_json: AsJson = False,
    stores_dir: StoresDir = Path("stores"),
) -> None:
    """Verify every shard of a store and print what it holds; draw some of it.

    `spikefleet data audit` draws class balance and sizes, and finds near-duplicates between splits.
    """
    if rows is not None and out is None:
        raise UserError(f"--n {rows} is the number of rows in a grid; name its file with --out FILE.png")
    if split is not None and out is None:
        raise UserError(f"--split {split} is the split of a grid; name its file with --out FILE.png")
    if out is not None and out.suffix.lower() != ".png":
        raise UserError(f"--out {out} must end in .png")
    with loading("torch", stderr):
        from spikefleet.data_access import store_at
        from spikefleet_pipelines.store.reader import Store

    place = store_at(store, stores_dir)
    if out is not None:
        check_outputs([out], inputs=[Path(place)], force=force)
    with waiting(stderr, f"verifying {place}"):
        opened = Store.open(place, verify=True)
    _print_store(opened.manifest, place, as_json)
    if out is not None:
        from spikefleet.data_grid import draw_rows

        with waiting(stderr, f"drawing {out}"):
            drawn = draw_rows(opened, rows or _SHOWN_ROWS, out, split)
        print_line(stderr, f"rows of {drawn}: {out}")


@data_app.command("split")
def split_store(
    store: Annotated[
        str,
        typer.Argument(help="Directory or URI of a store, or its name in --stores-dir.", autocompletion=store_names),
    ],
    gate: Annotated[
        float,
        typer.Option(help="Fraction of the training images or recordings, in (0, 1), that becomes the split `gate`."),
    ],
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the choice.")] = 0,
    near: Annotated[
        float | None,
        typer.Option(help="Near-duplicates stay together too: images whose thumbnails correlate by at least this."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Directory of the new store; NAME-gate beside it.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a store that is there.")] = False,
    as_json: AsJson = False,
    stores_dir: StoresDir = Path("stores"),
) -> None:
    """Take images that nobody trains on out of a store's training images, into a new store.

    Of each class the same fraction; equal images stay together, with --near similar ones too. The store itself stays
    as it is. Of a store of events whole recordings; those whose events differ in time alone stay together.
    """
    where = messages(as_json)
    with loading("torch", where):
        from spikefleet.data_access import store_at
        from spikefleet_pipelines.store.near_duplicates import similar_images
        from spikefleet_pipelines.store.reader import Store
        from spikefleet_pipelines.store.splitting import take_split

    place = store_at(store, stores_dir)
    if out is None and "://" in place:
        raise UserError(f"{place} is not on this machine; name a directory for the new store with --out")
    whole = Path(place).resolve()
    folder = out or whole.with_name(f"{whole.name}-gate")
    with waiting(where, f"verifying {place}"):
        source = Store.open(place)
    groups = None
    if near is not None and source.manifest.events is not None:
        raise UserError(
            f"--near={near:g} compares thumbnails of images, but {place} holds recordings of events; leave it out: "
            "those whose events differ in time alone stay together"
        )
    if near is not None:
        with waiting(where, f"comparing the images of {place}"):
            groups = similar_images(source.split("train"), near)
    with waiting(where, f"writing {folder}"):
        manifest = take_split(source, folder, "gate", gate, seed, overwrite=overwrite, groups=groups)
    _print_store(manifest, str(folder), as_json)


@data_app.command("sources")
def sources(as_json: AsJson = False) -> None:
    """List the sources that can be prepared, the files that each needs, and its options."""
    from spikefleet_pipelines.sources import find_source, list_sources

    found = [find_source(name) for name in list_sources()]
    if as_json:
        print_json(
            [
                {
                    "source": source.name,
                    "description": source.description,
                    "files": source.files,
                    "default_root": None if source.default_root is None else str(source.default_root),
                    "options": _options(source.options),
                }
                for source in found
            ]
        )
        return
    rows = []
    for source in found:
        files = source.files or "none, built in"
        place = f"; looked for in {source.default_root}" if source.default_root is not None else ""
        options = [f"{one['name']}={_value(one['default'])}: {one['description']}" for one in _options(source.options)]
        rows.append((source.name, source.description, f"{files}{place}", "\n".join(options) or "-"))
    print_table(console, ["source", text("what it is"), text("files"), text("options (defaults)")], rows)


def check_source(source: str) -> None:
    """Checks a source whose files are elsewhere. Raises SourceError for a name that is no source and no format."""
    from spikefleet_pipelines.sources import find_source

    name = source.lower().replace("-", "_")
    if name not in _BY_LAYOUT:
        find_source(_OTHER_NAMES.get(name, source))


def _found_source(source: str, root: Path | None, where: Console) -> str:
    """The source that is meant: by another name of its format, or by the layout of the files.

    Raises UserError if there are no files to go by, SourceError if neither name nor layout is known.
    """
    from spikefleet_pipelines.sources import find_source, list_sources
    from spikefleet_pipelines.sources.layouts import source_of

    name = source.lower().replace("-", "_")
    found = _OTHER_NAMES.get(name, source)
    if root is None and found not in list_sources() and Path(source).is_dir():
        raise UserError(
            f"{source} is a directory, and the name of a source comes first; its layout says which: "
            f"spikefleet data prepare auto {source}"
        )
    if name in _BY_LAYOUT and source not in list_sources():
        if root is None:
            raise UserError(
                f"{source!r} goes by the layout of the files; name their directory: spikefleet data prepare {source} "
                "DIR"
            )
        found = source_of(root)
    if found != source:
        print_line(where, f"{root or source} is read as source {found!r}")
    find_source(found)
    return found


def _options(model: type[BaseModel]) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "default": None if field.is_required() else field.get_default(call_default_factory=True),
            "required": field.is_required(),
            "description": field.description or "",
        }
        for name, field in model.model_fields.items()
    ]


def _value(default: Any) -> str:
    if isinstance(default, float):
        return f"{default:.4g}"
    return "none" if default is None else str(default)


def _findings(boxes: BoxAudit) -> str:
    """The number of objects, and what is unusual about them."""
    unusual = {
        "around crowds": boxes.crowds,
        "without area": boxes.no_area,
        "reaching over the border": boxes.beyond_border,
        "outside their image": boxes.outside,
        # Formats without areas have none at all.
        "given w x h as their area": boxes.computed_areas if boxes.computed_areas < boxes.objects else 0,
    }
    parts = [f"{count} {what}" for what, count in unusual.items() if count]
    empty = f"; {counted(boxes.empty_images, 'image')} without objects" if boxes.empty_images else ""
    return f"{', '.join([str(boxes.objects), *parts])}{empty}"


def _content_format(manifest: Manifest) -> tuple[str, str]:
    """What a row is: a label, and the size of its image or sensor."""
    if manifest.events is not None:
        return "events", _event_format(manifest.events)
    shape = manifest.image_shape
    return "image", f"{'x'.join(map(str, shape))} (CxHxW)" if shape else "encoded, varying size"


def _event_format(events: EventFormat) -> str:
    height, width = events.sensor
    return (
        f"{width} x {height} pixels (width x height), words of {events.address_bits} bits of address and "
        f"{events.tick_bits} of time (ticks of {2**events.tick_bits / 1000:,.4g} ms), orientation {events.orientation}"
    )


def _event_findings(events: EventAudit) -> str:
    """Numbers, rates, and what is unusual about the recordings of a split."""
    usual = (
        f"{events.events:,} in {events.duration_us / 1e6:,.4g} s ({events.shortest_us / 1e6:,.4g} to "
        f"{events.longest_us / 1e6:,.4g} s each), {events.on_share:.1%} ON\n"
        f"events per second: {events.rate_min:,.0f} to {events.rate_max:,.0f}, median {events.rate_median:,.0f}"
    )
    unusual = {
        "out of order (sorted)": events.out_of_order,
        "outside the sensor (dropped)": events.dropped,
        "recordings without events": events.empty_recordings,
        "recordings without events (dropped)": events.dropped_recordings,
        "boxes in the first 0.5 s": events.early_labels,
        "boxes after the last event": events.late_labels,
        "boxes that repeat the one before": events.repeated_boxes,
        f"hot pixels with {events.hot_share:.1%} of the events": events.hot_pixels,
    }
    lines = [f"{number:,} {what}" for what, number in unusual.items() if number]
    if events.hottest:
        lines[-1] += f": {', '.join(f'({one.x}, {one.y})' for one in events.hottest[:5])}" + (
            ", ..." if events.hot_pixels > 5 else ""
        )
    return "\n".join([usual, *lines])


def _print_store(manifest: Manifest, where: str, as_json: bool) -> None:
    from spikefleet_pipelines.store.image_files import counted_reasons

    audit = manifest.audit
    if as_json:
        print_json(
            {
                "store": where,
                "name": manifest.name,
                "source": manifest.source,
                "options": dict(manifest.options),
                "task": manifest.task,
                "image_shape": manifest.image_shape,
                **({} if manifest.events is None else {"events": manifest.events.model_dump(mode="json")}),
                "class_names": list(manifest.class_names),
                "category_ids": None if manifest.category_ids is None else list(manifest.category_ids),
                "splits": manifest.splits,
                "audit": audit.model_dump(mode="json"),
                "content_hash": manifest.content_hash,
            }
        )
        return
    names, what = manifest.class_names, "images" if manifest.events is None else "recordings"
    items = [
        ("name", manifest.name or manifest.source),
        ("source", manifest.source),
        ("task", manifest.task),
        _content_format(manifest),
        ("classes", f"{len(names)}: {', '.join(map(one_line, names[:10]))}{', ...' if len(names) > 10 else ''}"),
    ]
    if manifest.category_ids is not None:
        ids = ", ".join(map(str, manifest.category_ids[:10]))
        items.append(("category ids", f"{ids}{', ...' if len(manifest.category_ids) > 10 else ''}"))
    same_as = audit.same_as or {}
    for split, count in manifest.splits.items():
        same = f", the same {what} as {same_as[split]}" if split in same_as else ""
        items.append((split, f"{count} {what}{same}"))
    items += [(f"boxes of {split}", _findings(boxes)) for split, boxes in (audit.boxes or {}).items()]
    items += [(f"events of {split}", _event_findings(events)) for split, events in (audit.events or {}).items()]
    items.append(("duplicates", f"{audit.duplicates}, of which in two splits {audit.cross_split_duplicates}"))
    items += [(f"missing in {split}", ", ".join(names)) for split, names in audit.empty_classes.items()]
    if audit.unused:
        items.append(("not used", counted_reasons(audit.unused)))
    if audit.skipped:
        lines = [one_line(f"{one.split}: {one.file}: {one.reason}") for one in audit.skipped[:_SHOWN_SKIPPED]]
        more = len(audit.skipped) - len(lines)
        items.append(("skipped", "\n".join([*lines, *([f"and {more} more, in manifest.json"] if more else [])])))
    items.append(("content", manifest.content_hash))
    print_record(console, items, title=where)
