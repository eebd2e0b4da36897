"""data prepare, data show, data sources."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from spikefleet.cli.app import console
from spikefleet.errors import UserError
from spikefleet_pipelines.manifest import Manifest

data_app = typer.Typer(help="Prepare and look at data sets.", no_args_is_help=True)


@data_app.command("prepare")
def prepare_data(
    source: Annotated[str, typer.Argument(help="Name of a source (`spikefleet data sources`).")],
    root: Annotated[
        Path | None, typer.Argument(help="Where the downloaded files are, if the source needs any.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Directory of the store; stores/SOURCE if not given.")] = None,
    option: Annotated[list[str] | None, typer.Option(help="Option of the source, for example upsample=4.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the validation split, where the source has none.")] = 0,
    parallel: Annotated[int, typer.Option(min=1, help="Ray tasks at a time, for large sources.")] = 1,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a store that is there.")] = False,
) -> None:
    """Convert a data set into an Arrow store, checking it on the way."""
    from spikefleet.data_access import prepare_store

    options = {}
    for item in option or []:
        key, equals, value = item.partition("=")
        if not equals:
            raise UserError(f"--option {item!r} is not of the form key=value, for example upsample=4")
        options[key] = value
    where = out or Path("stores") / source
    store = prepare_store(source, root, where, console, options, seed=seed, parallel=parallel, overwrite=overwrite)
    console.print(_summary(store.manifest, str(where)))


@data_app.command("show")
def show_store(store: Annotated[str, typer.Argument(help="Directory or URI of a store.")]) -> None:
    """Verify every shard of a store and print what it holds."""
    from spikefleet_pipelines.store import Store

    console.print(_summary(Store.open(store, verify=True).manifest, store))


@data_app.command("sources")
def sources() -> None:
    """List the sources that can be prepared."""
    from spikefleet_pipelines.sources import list_sources

    for name in list_sources():
        console.print(name, highlight=False)


def _summary(manifest: Manifest, where: str) -> Table:
    image = "x".join(map(str, manifest.image_shape)) if manifest.image_shape else "encoded, of varying size"
    table = Table(title=where, show_header=False, title_justify="left")
    table.add_row("source", manifest.source)
    table.add_row("images", image)
    table.add_row("classes", f"{len(manifest.class_names)}: {', '.join(manifest.class_names[:10])}")
    for split, count in manifest.splits.items():
        table.add_row(split, str(count))
    audit = manifest.audit
    table.add_row("duplicates", f"{audit.duplicates}, of which in two splits {audit.cross_split_duplicates}")
    for split, names in audit.empty_classes.items():
        table.add_row(f"classes missing in {split}", ", ".join(names))
    table.add_row("content", manifest.content_hash)
    return table
