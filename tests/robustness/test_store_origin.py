"""A store is known by the files that it was prepared from; what killed writers leave is removed."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spikefleet_pipelines.data_config import DataConfig
from spikefleet_pipelines.errors import SourceError, StoreError
from spikefleet_pipelines.opening import open_or_prepare
from spikefleet_pipelines.sources import prepare
from spikefleet_pipelines.store.origin import ORIGIN_NAME, Origin
from spikefleet_pipelines.store.reader import Store
from spikefleet_pipelines.store.writer import remove_remains


def save(path: Path, level: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((12, 10, 3), level, np.uint8)).save(path)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        for k, name in enumerate(("cat", "dog")):
            for i in range(3):
                save(tmp_path / "raw" / split / name / f"{split}_{i}.png", 40 + 60 * k + i)
    return tmp_path / "raw"


class Opened:
    """Stores as trainings open them."""

    def __init__(self, raw: Path, stores: Path) -> None:
        self.config = DataConfig(source="image_folder", root=raw)
        self.stores, self.said = stores, list[str]()

    def again(self) -> Store:
        self.said = []
        return open_or_prepare(self.config, self.stores, say=self.said.append)


@pytest.fixture
def opened(raw: Path, tmp_path: Path) -> Opened:
    return Opened(raw, tmp_path / "stores")


def swap(raw: Path) -> None:
    (raw / "train" / "cat").rename(raw / "x")
    (raw / "train" / "dog").rename(raw / "train" / "cat")
    (raw / "x").rename(raw / "train" / "dog")


def rewrite(raw: Path) -> None:
    """Another image under the same name, of the same size in bytes: only its time and its content differ."""
    path = raw / "train" / "cat" / "train_0.png"
    content = bytearray(path.read_bytes())
    save(path, 41)
    assert len(path.read_bytes()) == len(content)


CHANGES = {
    "corrected labels": swap,
    "an added image": lambda raw: save(raw / "train" / "cat" / "more.png", 7),
    "a removed image": lambda raw: (raw / "val" / "dog" / "val_0.png").unlink(),
    "a renamed class": lambda raw: [(raw / split / "dog").rename(raw / split / "eel") for split in ("train", "val")],
    "another image of the same size": rewrite,
}


@pytest.mark.parametrize("what", CHANGES)
def test_changed_files_lead_to_another_store(what: str, opened: Opened, raw: Path) -> None:
    first = opened.again()
    assert opened.again().location == first.location
    assert opened.said == []
    time.sleep(0.01)
    CHANGES[what](raw)
    second = opened.again()
    assert second.location != first.location
    assert second.manifest.content_hash != first.manifest.content_hash
    assert "preparing them anew" in opened.said[0]
    assert Store.open(first.location).manifest == first.manifest, "the old one stays"
    assert opened.again().location == second.location
    assert opened.said == []


def test_equal_contents_at_another_time_are_the_same(
    opened: Opened, raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: a copy, or a checkout anew, is not a change; and its hashes are computed once."""
    first = opened.again()
    for path in raw.rglob("*.png"):
        os.utime(path, ns=(1, path.stat().st_mtime_ns + 5_000_000_000))
    assert opened.again().location == first.location
    monkeypatch.setattr(Origin, "with_content", lambda *_: pytest.fail("hashed again"))
    assert opened.again().location == first.location


def rewrite_in_secret(raw: Path, level: int) -> None:
    """As `rewrite`, with the time of the old file: only the content differs."""
    path = raw / "train" / "cat" / "train_0.png"
    before = path.stat()
    save(path, level)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


def test_contents_are_compared_on_request(opened: Opened, raw: Path) -> None:
    first = opened.again()
    rewrite_in_secret(raw, 41)
    assert opened.again().location == first.location, "names, sizes and times agree"
    opened.config = opened.config.model_copy(update={"check_content": True})
    places = [first.location]
    for level in (41, 43):  # twice: the second change has the names, sizes and times of the first
        rewrite_in_secret(raw, level)
        places.append(opened.again().location)
        assert "comparing the contents of 12 files" in opened.said[0]
        assert "preparing them anew" in opened.said[1]
        assert opened.again().location == places[-1]
        assert len(opened.said) == 1
    assert len(set(places)) == 3


def test_preparing_compares_contents_on_request(raw: Path, tmp_path: Path) -> None:
    prepare("image_folder", raw, tmp_path / "store", check_content=True)
    prepare("image_folder", raw, tmp_path / "store", check_content=True)
    rewrite_in_secret(raw, 41)
    prepare("image_folder", raw, tmp_path / "store")
    with pytest.raises(StoreError, match=r"from other files.*--overwrite"):
        prepare("image_folder", raw, tmp_path / "store", check_content=True)


def test_the_same_files_elsewhere_have_the_same_content(opened: Opened, raw: Path, tmp_path: Path) -> None:
    shutil.copytree(raw, tmp_path / "copy")
    other = Opened(tmp_path / "copy", tmp_path / "others")
    assert other.again().manifest.content_hash == opened.again().manifest.content_hash


def test_files_that_are_gone_are_said(opened: Opened, raw: Path) -> None:
    first = opened.again()
    shutil.rmtree(raw)
    assert opened.again().location == first.location
    assert "is not there any more" in opened.said[0]
    shutil.rmtree(opened.stores)
    with pytest.raises(SourceError, match="not found"):
        opened.again()


def test_a_store_without_a_record_is_used_if_nothing_changed_since(opened: Opened, raw: Path) -> None:
    first = Path(opened.again().location)
    (first / ORIGIN_NAME).unlink()
    assert opened.again().location == str(first)
    assert Origin.read(first) is not None
    (first / ORIGIN_NAME).write_text("{")
    time.sleep(0.01)
    swap(raw)
    assert opened.again().location != str(first)


def test_a_store_that_is_named_is_taken_as_it_is(opened: Opened, raw: Path) -> None:
    first = opened.again()
    swap(raw)
    config = DataConfig(source="image_folder", store=first.location)
    assert open_or_prepare(config, opened.stores).location == first.location


def test_a_store_of_other_options_is_another_one(tmp_path: Path) -> None:
    """Whichever was prepared first; a store of other options has a longer digest in its name."""

    def shape(**options: int) -> tuple[int, int, int] | None:
        config = DataConfig(source="digits", options=options, transform={"kind": "image"})  # type: ignore[arg-type]
        return open_or_prepare(config, tmp_path).manifest.image_shape

    assert shape(upsample=2) == (1, 16, 16)
    assert shape() == (1, 8, 8)
    assert shape(upsample=2) == (1, 16, 16)


def test_preparing_over_changed_files_is_refused(raw: Path, tmp_path: Path) -> None:
    prepare("image_folder", raw, tmp_path / "store")
    prepare("image_folder", raw, tmp_path / "store")
    time.sleep(0.01)
    swap(raw)
    with pytest.raises(StoreError, match=r"from other files.*--overwrite"):
        prepare("image_folder", raw, tmp_path / "store")
    prepare("image_folder", raw, tmp_path / "store", overwrite=True)
    prepare("image_folder", raw, tmp_path / "store")


KILLED = """
import os, signal, sys
from pathlib import Path
from spikefleet_pipelines.sources import prepare
from spikefleet_pipelines.store.writer import StoreWriter
StoreWriter.commit = lambda self: os.kill(os.getpid(), signal.SIGKILL)
prepare("image_folder", Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_what_a_killed_writer_leaves_is_removed_by_the_next(raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "stores" / "pets"
    killed = subprocess.run([sys.executable, "-c", KILLED, raw, out], check=False)
    assert killed.returncode == -9
    (left,) = out.parent.iterdir()
    assert left.suffix == ".part"
    prepare("image_folder", raw, out)
    assert [path.name for path in out.parent.iterdir()] == ["pets"]


def test_a_living_writer_is_left_alone_and_a_store_is_put_back(raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "stores" / "pets"
    prepare("image_folder", raw, out)
    living, old = out.parent / ".pets.0123.part", out.parent / ".pets.4567.old"
    living.mkdir()
    descriptor = os.open(living, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    out.rename(old)  # killed between the two renames of --overwrite
    remove_remains(out)
    assert sorted(path.name for path in out.parent.iterdir()) == [".pets.0123.part", "pets"]
    os.close(descriptor)
    remove_remains(out)
    assert [path.name for path in out.parent.iterdir()] == ["pets"]
    assert Store.open(out).manifest.class_names == ("cat", "dog")
