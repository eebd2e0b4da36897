"""data prepare, data show, data sources."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from spikefleet.cli.app import Address, console
from spikefleet.errors import UserError
from spikefleet_pipelines.store.manifest import BoxAudit, Manifest

data_app = typer.Typer(help="Prepare and look at data sets.", no_args_is_help=True)


@data_app.command("prepare")
def prepare_data(
    source: Annotated[str, typer.Argument(help="Name of a source (`spikefleet data sources`).")],
    root: Annotated[
        Path | None, typer.Argument(help="Where the downloaded files are, if the source needs any.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Directory of the store; stores/SOURCE if not given.")] = None,
    images: Annotated[
        Path | None, typer.Option(help="coco: directory of the pictures of one split, instead of ROOT.")
    ] = None,
    annotations: Annotated[Path | None, typer.Option(help="coco: JSON file with the boxes of that split.")] = None,
    split: Annotated[
        str | None, typer.Option(help="coco: train, val or test. It is added to the store, if that is there.")
    ] = None,
    option: Annotated[list[str] | None, typer.Option(help="Option of the source, for example upsample=4.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the validation split, where the source has none.")] = 0,
    parallel: Annotated[
        int | None,
        typer.Option(min=1, help="Ray tasks at a time, for encoded pictures; all CPUs, where there are many pictures."),
    ] = None,
    address: Address = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a store that is there (with --split: only that split).")
    ] = False,
) -> None:
    """Convert a data set into an Arrow store, checking it on the way."""
    from spikefleet.data_access import prepare_store

    of_split = {"images": images, "annotations": annotations, "split": split}
    options: dict[str, Any] = {key: value for key, value in of_split.items() if value is not None}
    if options and len(options) < len(of_split):
        lacking = " and ".join(f"--{key}" for key in of_split if key not in options)
        raise UserError(f"{' and '.join(f'--{key}' for key in options)} given without {lacking}; they go together")
    for item in option or []:
        key, equals, value = item.partition("=")
        if not equals:
            raise UserError(f"--option {item!r} is not of the form key=value, for example upsample=4")
        options[key] = value
    where = out or Path("stores") / source
    how = {"seed": seed, "parallel": parallel, "overwrite": overwrite}
    store = prepare_store(source, root, where, console, options, address=address, **how)
    console.print(_summary(store.manifest, str(where)))


@data_app.command("show")
def show_store(store: Annotated[str, typer.Argument(help="Directory or URI of a store.")]) -> None:
    """Verify every shard of a store and print what it holds."""
    from spikefleet_pipelines.store.reader import Store

    console.print(_summary(Store.open(store, verify=True).manifest, store))


@data_app.command("sources")
def sources() -> None:
    """List the sources that can be prepared."""
    from spikefleet_pipelines.sources import list_sources

    for name in list_sources():
        console.print(name, highlight=False)


def _findings(boxes: BoxAudit) -> str:
    """The number of objects, and what is unusual about them."""
    unusual = {
        "around crowds": boxes.crowds,
        "without area": boxes.no_area,
        "reaching over the border": boxes.beyond_border,
        "outside their image": boxes.outside,
        "given w x h as their area": boxes.computed_areas,
    }
    parts = [f"{count} {what}" for what, count in unusual.items() if count]
    empty = f"; {boxes.empty_images} images without objects" if boxes.empty_images else ""
    return f"{', '.join([str(boxes.objects), *parts])}{empty}"


def _summary(manifest: Manifest, where: str) -> Table:
    image = "x".join(map(str, manifest.image_shape)) if manifest.image_shape else "encoded, of varying size"
    table = Table(title=where, show_header=False, title_justify="left")
    table.add_row("source", manifest.source)
    table.add_row("task", manifest.task)
    table.add_row("images", image)
    table.add_row("classes", f"{len(manifest.class_names)}: {escape(', '.join(manifest.class_names[:10]))}")
    if manifest.category_ids is not None:
        ids = ", ".join(map(str, manifest.category_ids[:10]))
        table.add_row("category ids", f"{ids}{', ...' if len(manifest.category_ids) > 10 else ''}")
    audit = manifest.audit
    same_as = audit.same_as or {}
    for split, count in manifest.splits.items():
        table.add_row(split, f"{count}, the same images as {same_as[split]}" if split in same_as else str(count))
    for split, boxes in (audit.boxes or {}).items():
        table.add_row(f"boxes of {split}", _findings(boxes))
    table.add_row("duplicates", f"{audit.duplicates}, of which in two splits {audit.cross_split_duplicates}")
    for split, names in audit.empty_classes.items():
        table.add_row(f"classes missing in {split}", escape(", ".join(names)))
    table.add_row("content", manifest.content_hash)
    return table
