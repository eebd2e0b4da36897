"""`data show`: what it prints of a store of events, and the grid that it draws of every kind of store."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner

from spikefleet import data_grid
from spikefleet.cli import app
from spikefleet.cli.data import _findings
from spikefleet.errors import UserError
from spikefleet_pipelines.errors import StoreError
from spikefleet_pipelines.events import event_images
from spikefleet_pipelines.events.label_frames import LabelFrames
from spikefleet_pipelines.sources import prepare
from spikefleet_pipelines.store.event_format import EventFormat
from spikefleet_pipelines.store.event_shard_writer import SourceRecording
from spikefleet_pipelines.store.event_writer import EventStoreWriter
from spikefleet_pipelines.store.manifest import BoxAudit
from spikefleet_pipelines.store.reader import Store
from support.event_arrays import at_times, random_events

SENSOR = (34, 34)


def events_store(out: Path, seed: int = 0, boxes: bool = False) -> Path:
    fields = {"source": "test", "class_names": ("left", "right"), "events": EventFormat.of(SENSOR), "options": {}}
    place = np.array([[5.0, 5, 20, 12], [1, 1, 8, 8], [-9, -9, 4, 4]])
    frames = LabelFrames.of_objects(np.array([100_000, 200_000, 200_000]), place, np.array([1, 2, 2]))
    kind = {"frames": frames} if boxes else {"label": 1}
    with EventStoreWriter(out, category_ids=[1, 2] if boxes else None, **fields) as writer:  # type: ignore[arg-type]
        given = [random_events(2000, SENSOR, 300_000, seed + n) for n in range(3)]
        writer.write_recordings("test", [SourceRecording([one], t0=0, **kind) for one in given])  # type: ignore[arg-type]
        writer.write_recordings("test", [SourceRecording([at_times([], SENSOR)], t0=0, duration=300_000, **kind)])  # type: ignore[arg-type]
        writer.commit()
    return out


def drawn(store: Path, path: Path) -> NDArray[np.uint8]:
    data_grid.draw_rows(Store.open(store), 1, path)
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.mark.parametrize("boxes", [False, True])
def test_events_are_drawn_over_time(tmp_path: Path, boxes: bool) -> None:
    image = drawn(events_store(tmp_path / "a", boxes=boxes), tmp_path / "a.png").astype(int)
    assert ((image[..., 2] - image[..., 0]) > 60).any(), "no ON"
    assert ((image[..., 0] - image[..., 2]) > 60).any(), "no OFF"
    green = ((image[..., 1] - image[..., [0, 2]].max(-1)) > 60).any()
    assert green == boxes
    again = drawn(events_store(tmp_path / "b", boxes=boxes), tmp_path / "b.png")
    other = drawn(events_store(tmp_path / "c", seed=7, boxes=boxes), tmp_path / "c.png")
    assert np.array_equal(image, again)
    assert not np.array_equal(image, other)


def test_polarity_has_its_colour() -> None:
    counts = np.zeros((2, 1, 3), np.int32)
    counts[1, 0, 0] = counts[0, 0, 1] = 5
    red, _, blue = (channel[0].tolist() for channel in event_images.coloured(counts, 5.0))
    assert red[0] < 50 < 150 < blue[0]
    assert blue[1] < 50 < 150 < red[1]
    assert red[2] == blue[2] == 238


@pytest.mark.parametrize("source", ["digits", "scenes"])
def test_images_are_drawn(source: str, tmp_path: Path) -> None:
    options = {} if source == "digits" else {"train": 6, "val": 2, "test": 2}
    prepare(source, None, tmp_path / "s", **options)
    assert data_grid.draw_rows(Store.open(tmp_path / "s"), 3, tmp_path / "s.png") == "train"
    image = np.asarray(Image.open(tmp_path / "s.png").convert("RGB")).astype(int)
    assert (image.std((0, 1)) > 20).all()
    assert (np.ptp(image, axis=-1) > 60).any() == (source == "scenes")  # boxes have colours


def test_another_split_is_drawn(tmp_path: Path) -> None:
    store = Store.open(prepare("scenes", None, tmp_path / "s", train=6, val=2, test=2).location)
    grids = []
    for split in (None, "train", "test"):
        assert data_grid.draw_rows(store, 2, tmp_path / "s.png", split) == (split or "train")
        grids.append((tmp_path / "s.png").read_bytes())
    assert grids[0] == grids[1] != grids[2]
    with pytest.raises(StoreError, match="has no split 'exam', expected one of 'train', 'val', 'test'"):
        data_grid.draw_rows(store, 2, tmp_path / "s.png", "exam")


def test_rows_are_spread() -> None:
    assert data_grid._spread(100, 4) == [0, 25, 50, 75]
    assert data_grid._spread(3, 8) == [0, 1, 2]
    assert data_grid._spread(0, 8) == []


def test_the_command_prints_and_draws(tmp_path: Path) -> None:
    store, out = events_store(tmp_path / "store", boxes=True), tmp_path / "grid.png"
    shown = CliRunner().invoke(app, ["data", "show", str(store), "--n", "4", "--out", str(out)])
    assert shown.exit_code == 0, shown.output
    text = " ".join(shown.stdout.split())
    for part in ("34 x 34 pixels", "13 bits of address", "4 recordings", "6,000 in", "1 recordings without events"):
        assert part in text
    assert "images" not in text.replace("outside their image", "").replace("images without objects", "")
    assert out.is_file()
    plain = json.loads(CliRunner().invoke(app, ["data", "show", str(store), "--json"]).stdout)
    assert plain["events"] == {"sensor": [34, 34], "address_bits": 13, "tick_bits": 19, "orientation": "as-read"}
    assert plain["audit"]["events"]["test"]["events"] == 6000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--n", "3"], "--n 3 is the number of rows in a grid"),
        (["--split", "test"], "--split test is the split of a grid"),
        (["--out", "grid.jpg"], "--out grid.jpg must end in .png"),
        (["--out", "STORE/grid.png"], "would overwrite what the command reads"),
        (["--out", "there.png"], "exists; give another place, or --force"),
    ],
)
def test_wrong_options_are_refused(
    tmp_path: Path, options: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    events_store(Path("STORE"))
    Path("there.png").write_bytes(b"")
    found = CliRunner().invoke(app, ["data", "show", "STORE", *options])
    assert isinstance(found.exception, UserError | SystemExit)
    assert message in " ".join((str(found.exception) + found.output).split())
    assert Path("there.png").read_bytes() == b""


@pytest.mark.parametrize(("computed", "said"), [(0, "9"), (9, "9"), (2, "9, 2 given w x h as their area")])
def test_areas_are_named_where_some_are_missing_and_not_where_a_format_has_none(computed: int, said: str) -> None:
    usual = {"crowds": 0, "no_area": 0, "beyond_border": 0, "outside": 0}
    boxes = BoxAudit(objects=9, objects_per_class=(9,), empty_images=1, computed_areas=computed, **usual)
    assert _findings(boxes) == f"{said}; 1 image without objects"
