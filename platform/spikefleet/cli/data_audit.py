"""data audit, data diff."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spikefleet.cli.completion import store_names
from spikefleet.cli.data import data_app
from spikefleet.cli.output import console, loading, messages, print_json, say, stderr
from spikefleet.cli.parameters import AsJson, Force, StoresDir
from spikefleet.cli.tables import Column, number, print_record, print_table
from spikefleet.errors import UserError
from spikefleet.outputs import check_outputs
from spikefleet.status import counting, one_line, print_line, waiting

if TYPE_CHECKING:
    import numpy as np

    from spikefleet_pipelines.store.difference import Place, StoreDifference
    from spikefleet_pipelines.store.near_duplicates import NearPair, Seen
    from spikefleet_pipelines.store.reader import Store

_SHOWN_CLASSES = 40
_SHOWN = 10
_DRAWN_PAIRS = 16

StoreName = Annotated[
    str, typer.Argument(help="Directory or URI of a store, or its name in --stores-dir.", autocompletion=store_names)
]


@data_app.command("audit")
def audit_store(
    store: StoreName,
    near: Annotated[
        float, typer.Option(help="Correlation of thumbnails, in (0, 1], from which on images are near-duplicates.")
    ] = 0.98,
    out: Annotated[Path | None, typer.Option(help="File for plots of class balance and sizes, a PNG.")] = None,
    pairs: Annotated[Path | None, typer.Option(help="File for the most similar pairs side by side, a PNG.")] = None,
    force: Force = False,
    as_json: AsJson = False,
    stores_dir: StoresDir = Path("stores"),
) -> None:
    """Look at every image of a store: class balance, sizes, and near-duplicates between splits (leaks)."""
    for option, path in (("--out", out), ("--pairs", pairs)):
        if path is not None and path.suffix.lower() != ".png":
            raise UserError(f"{option} {path} must end in .png")
    with loading("torch", stderr):
        from spikefleet.data_access import store_at
        from spikefleet_pipelines.store.near_duplicates import check_threshold, look_at_all, near_pairs
        from spikefleet_pipelines.store.reader import Store

    check_threshold(near)
    place = store_at(store, stores_dir)
    check_outputs([path for path in (out, pairs) if path is not None], inputs=[Path(place)], force=force)
    opened = Store.open(place)
    done, total = 0, opened.manifest.own_images
    with counting(messages(as_json), f"looking at {place}") as count:

        def progress(more: int) -> None:
            nonlocal done
            done += more
            if done % 100 == 0 or done == total:
                count(done, total)

        seen = look_at_all(opened, progress)
    with waiting(stderr, "comparing the splits"):
        found = near_pairs(seen, near)
    if as_json:
        print_json(_audit_record(opened, seen, found, near, place))
    else:
        _print_audit(opened, seen, found, near, place)
    if out is not None:
        from spikefleet.plots import data_overview

        data_overview(_counts(opened), opened.manifest.class_names, _sizes(opened, seen), out)
        print_line(stderr, f"class balance and sizes: {out}")
    if pairs is not None:
        _draw_pairs(opened, found[:_DRAWN_PAIRS], pairs)


def _counts(store: Store) -> dict[str, tuple[int, ...]]:
    """Number of images, or of objects, of each class, by split."""
    audit = store.manifest.audit
    if audit.boxes is not None:
        return {split: boxes.objects_per_class for split, boxes in audit.boxes.items()}
    return {split: counts for split, counts in audit.images_per_class.items() if split not in (audit.same_as or {})}


def _sizes(store: Store, seen: dict[str, Seen]) -> dict[str, np.ndarray]:
    import numpy as np

    sizes = {"images": np.concatenate([one.sizes for one in seen.values()])}
    if store.manifest.task == "detection":
        boxes = [shard.boxes[:, [3, 2]] for split in seen for shard in store.split(split).annotation_columns]
        sizes["boxes"] = np.concatenate(boxes)
    return sizes


def _audit_record(
    store: Store, seen: dict[str, Seen], pairs: list[NearPair], near: float, place: str
) -> dict[str, Any]:
    from spikefleet_pipelines.store.near_duplicates import rows_of

    sizes = _sizes(store, seen)
    return {
        "store": place,
        "class_names": list(store.manifest.class_names),
        "per_class": {split: list(values) for split, values in _counts(store).items()},
        "sizes": {
            what: {"least": pixels.min(0).tolist(), "largest": pixels.max(0).tolist()} if len(pixels) else None
            for what, pixels in sizes.items()
        },
        "near": near,
        "near_duplicates": {split: len(rows_of(pairs, split)) for split in seen},
        "pairs": [asdict(pair) for pair in pairs],
    }


def _print_audit(store: Store, seen: dict[str, Seen], pairs: list[NearPair], near: float, place: str) -> None:
    from spikefleet_pipelines.store.near_duplicates import rows_of

    counts = _counts(store)
    what = "objects" if store.manifest.task == "detection" else "images"
    totals = {split: max(1, sum(values)) for split, values in counts.items()}
    rows = [
        [name, *(f"{counts[split][k]:,} ({counts[split][k] / totals[split]:.1%})" for split in counts)]
        for k, name in enumerate(store.manifest.class_names)
    ]
    columns: list[Column | str] = ["class", *(number(split) for split in counts)]
    print_table(console, columns, rows[:_SHOWN_CLASSES], title=f"{what} of each class")
    if len(rows) > _SHOWN_CLASSES:
        say(f"and {len(rows) - _SHOWN_CLASSES} more classes (--json has all)")
    items = []
    for kind, pixels in _sizes(store, seen).items():
        if len(pixels):
            least, largest = pixels.min(0), pixels.max(0)
            items.append(
                (f"sizes of {kind}", f"{least[1]:g} x {least[0]:g} to {largest[1]:g} x {largest[0]:g} (width x height)")
            )
    for split, one in seen.items():
        leaks = len(rows_of(pairs, split))
        items.append((f"near-duplicates in {split}", f"{leaks:,} of {len(one.sizes):,} have one in another split"))
    shown = [
        f"{pair.split} {pair.row} and {pair.other_split} {pair.other_row}: {pair.correlation:.4f}"
        for pair in pairs[:_SHOWN]
    ]
    if shown:
        more = [f"and {len(pairs) - _SHOWN:,} more pairs"] if len(pairs) > _SHOWN else []
        items.append((f"pairs (split, row; correlation from {near:g})", "\n".join(shown + more)))
    print_record(console, items, title=place)
    if pairs:
        say(
            "metrics on a split with near-duplicates of training images are too good: remove them from one of the "
            "splits, or prepare the data by groups (--option group=PATTERN)"
        )


def _draw_pairs(store: Store, pairs: list[NearPair], path: Path) -> None:
    from spikefleet.plots import image_grid

    if not pairs:
        print_line(stderr, f"no near-duplicates between splits, so {path} is not drawn")
        return
    places = [at for pair in pairs for at in ((pair.split, pair.row), (pair.other_split, pair.other_row))]
    images = [store.split(split).image(row) for split, row in places]
    image_grid(images, [f"{split} {row}" for split, row in places], [None] * len(places), path)
    print_line(stderr, f"near-duplicates: {path}")


@data_app.command("diff")
def diff_stores(
    before: StoreName,
    now: Annotated[str, typer.Argument(help="The store to compare it with.", autocompletion=store_names)],
    as_json: AsJson = False,
    stores_dir: StoresDir = Path("stores"),
) -> None:
    """Compare two stores: images that were added, removed or moved, labels and boxes that changed."""
    with loading("torch", stderr):
        from spikefleet.data_access import store_at
        from spikefleet_pipelines.store.difference import compare_stores
        from spikefleet_pipelines.store.reader import Store

    first, second = (store_at(one, stores_dir) for one in (before, now))
    with waiting(stderr, f"comparing {first} and {second}"):
        found = compare_stores(Store.open(first), Store.open(second))
    if as_json:
        print_json({"before": first, "now": second, **asdict(found), "box_changes": found.box_changes})
        return
    if found.is_empty:
        say(f"{first} and {second} have the same {found.same:,} images, labels and boxes")
        return
    _print_difference(found, f"{first} -> {second}")


def _print_difference(found: StoreDifference, title: str) -> None:
    items = [("the same", f"{found.same:,} images")]
    for what, names in (("classes added", found.classes_added), ("classes removed", found.classes_removed)):
        if names:
            items.append((what, ", ".join(map(one_line, names))))
    for what, places in (("added", found.added), ("removed", found.removed)):
        if places:
            items.append((what, _listed(len(places), [_place(one) for one in places[:_SHOWN]])))
    if found.moved:
        lines = [f"{_place(was)} -> {_place(now)}" for was, now in found.moved[:_SHOWN]]
        items.append(("in another split", _listed(len(found.moved), lines)))
    if found.relabelled:
        lines = [f"{_place(at)}: {one_line(was)} -> {one_line(now)}" for at, was, now in found.relabelled[:_SHOWN]]
        items.append(("relabelled", _listed(len(found.relabelled), lines)))
    if found.boxes:
        lines = [f"{_place(at)}: {_changes(changes)}" for at, changes in found.boxes[:_SHOWN]]
        items.append(("other boxes", f"{_listed(len(found.boxes), lines)}\nin all: {_changes(found.box_changes)}"))
    print_record(console, items, title=title)


def _place(place: Place) -> str:
    return f"{place[0]} {place[1]}"


def _changes(changes: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {what}" for what, count in changes.items())


def _listed(total: int, lines: list[str]) -> str:
    more = [f"and {total - len(lines):,} more (--json has all)"] if total > len(lines) else []
    return "\n".join([f"{total:,} images (split, row)", *lines, *more])
