"""Random damage of every format that is read: an answer or a sentence, never a traceback, a gigabyte or a long wait."""

from __future__ import annotations

import io
import json
import pickle
import random
import resource
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from spikefleet_pipelines.errors import SourceError, StoreError
from spikefleet_pipelines.sources import prepare
from spikefleet_pipelines.sources.coco_json import read_coco_json
from spikefleet_pipelines.sources.fashion_mnist import read_idx
from spikefleet_pipelines.sources.python2_pickle import read_plain_pickle
from spikefleet_pipelines.store.decode import decode_rgb
from spikefleet_pipelines.store.manifest import MANIFEST_NAME, parse_manifest
from spikefleet_pipelines.store.reader import Store
from support.damage import Change, damaged, write_new
from support.damage import try_all as fuzz

pytestmark = [
    pytest.mark.filterwarnings("ignore:::PIL"),
    pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning"),
]

_LARGEST_BYTES = 1_000_000_000

RNG = np.random.default_rng(0)
SMOOTH = PIL.Image.fromarray(RNG.integers(0, 256, (5, 6, 3), np.uint8)).resize((50, 40), PIL.Image.Resampling.BICUBIC)


@pytest.fixture(autouse=True)
def memory() -> Iterator[None]:
    """No test may raise the peak of this process by a gigabyte."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert (after - before) * 1024 < _LARGEST_BYTES


def try_all(whole: bytes, read: Callable[[bytes], object], count: int, change: Change = damaged) -> int:
    return fuzz(whole, read, count, change, (SourceError, StoreError, ValueError))


def with_checksums(content: bytes, draw: random.Random) -> bytes:
    """A damaged PNG, every other one as an attacker would write it: its checksums hold."""
    data, at = bytearray(damaged(content, draw)), 8
    if draw.random() < 0.5:
        return bytes(data)
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        if at + 12 + length > len(data):
            break
        struct.pack_into(">I", data, at + 8 + length, zlib.crc32(data[at + 4 : at + 8 + length]))
        at += 12 + length
    return bytes(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_fuzz_images(kind: str) -> None:
    stream = io.BytesIO()
    SMOOTH.save(stream, kind)

    def read(content: bytes) -> None:
        image = decode_rgb(np.frombuffer(content, np.uint8))
        assert image.ndim == 3
        assert image.shape[0] == 3

    refused = try_all(stream.getvalue(), read, 300, with_checksums if kind == "PNG" else damaged)
    assert refused


def batch(protocol: int) -> bytes:
    content = {b"labels": [k % 10 for k in range(20)], b"data": RNG.integers(0, 256, (20, 3072), np.uint8)}
    return pickle.dumps(content, protocol)


@pytest.mark.parametrize("protocol", [2, 5])
def test_fuzz_pickles(protocol: int, tmp_path: Path) -> None:
    def read(content: bytes) -> None:
        write_new(tmp_path / "batch", content)
        read_plain_pickle(tmp_path / "batch")

    assert try_all(batch(protocol)[:4000] + batch(protocol)[-60:], _ignoring(read), 300)
    assert try_all(batch(protocol), read, 100)


def _ignoring(read: Callable[[bytes], None]) -> Callable[[bytes], None]:
    """The first, shortened batch is refused itself: more of its damage hits the opcodes."""
    first = True

    def reading(content: bytes) -> None:
        nonlocal first
        if first:
            first = False
            return
        read(content)

    return reading


def test_fuzz_whole_cifar(tmp_path: Path) -> None:
    folder = tmp_path / "raw"
    folder.mkdir()
    for name in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"):
        (folder / name).write_bytes(batch(2))
    meta = pickle.dumps({"label_names": [f"c{k}" for k in range(10)]}, 2)
    (folder / "batches.meta").write_bytes(meta)

    def read(content: bytes) -> None:
        write_new(folder / "batches.meta", content)
        prepare("cifar10", folder, tmp_path / "store", overwrite=True)

    assert try_all(meta, read, 60)


def test_fuzz_idx(tmp_path: Path) -> None:
    import gzip

    values = RNG.integers(0, 256, (30, 5, 6), np.uint8)
    whole = b"\0\0\x08\x03" + struct.pack(">3I", *values.shape) + values.tobytes()

    def read(content: bytes) -> None:
        write_new(tmp_path / "file", content)
        assert read_idx(tmp_path / "file").size

    assert try_all(whole, read, 300)
    assert try_all(gzip.compress(whole), read, 300)


def coco_json() -> bytes:
    images = [{"id": k, "file_name": f"{k}.jpg", "width": 40, "height": 32} for k in range(1, 4)]
    boxes = [
        {"id": k, "image_id": 1 + k % 3, "category_id": 3, "bbox": [1, 2, 5.5, 4], "area": 22.0, "iscrowd": 0}
        for k in range(6)
    ]
    categories = [{"id": 3, "name": "cat", "supercategory": "animal"}, {"id": 7, "name": "dog"}]
    return json.dumps({"images": images, "annotations": boxes, "categories": categories}).encode()


def test_fuzz_coco(tmp_path: Path) -> None:
    for number in range(1, 4):
        SMOOTH.resize((40, 32)).save(tmp_path / f"{number}.jpg")

    def read(content: bytes) -> None:
        write_new(tmp_path / "boxes.json", content)
        read_coco_json(tmp_path / "boxes.json")

    def whole(content: bytes) -> None:
        write_new(tmp_path / "boxes.json", content)
        how = {"images": tmp_path, "annotations": tmp_path / "boxes.json", "split": "train"}
        prepare("coco", None, tmp_path / "store", overwrite=True, **how)
        Store.open(tmp_path / "store").split("train").image(0)

    assert try_all(coco_json(), read, 600)
    assert try_all(coco_json(), whole, 60)


def test_fuzz_manifests_and_shards(tmp_path: Path) -> None:
    store = prepare("digits", None, tmp_path / "store")
    manifest = (tmp_path / "store" / MANIFEST_NAME).read_bytes()
    shard = tmp_path / "store" / store.manifest.shards["val"][0].file

    def read(content: bytes) -> None:
        write_new(tmp_path / "store" / MANIFEST_NAME, content)
        parse_manifest(content, "manifest").to_json()
        opened = Store.open(tmp_path / "store", verify=False)
        opened.split("val").gather(np.arange(1))

    assert try_all(manifest, read, 300)
    (tmp_path / "store" / MANIFEST_NAME).write_bytes(manifest)
    whole = shard.read_bytes()

    def shards(content: bytes) -> None:
        write_new(shard, content)
        Store.open(tmp_path / "store")

    assert try_all(whole, shards, 40)


@pytest.mark.parametrize("half", [b"\xed\xa0\x80", b"\\ud800"])
def test_a_manifest_with_a_half_of_a_surrogate_is_refused(half: bytes, tmp_path: Path) -> None:
    """Found by fuzzing: JSON takes it as bytes and escaped, and the manifest could not be written again."""
    prepare("digits", None, tmp_path / "store")
    manifest = (tmp_path / "store" / MANIFEST_NAME).read_bytes()
    parse_manifest(manifest, "here").to_json()
    with pytest.raises(StoreError, match=r"^here( is not JSON|: field '\w+' is invalid| has text that is not Unicode)"):
        parse_manifest(manifest.replace(b'"digits"', b'"digit' + half + b's"'), "here")


def test_a_fuzzer_finds_a_traceback() -> None:
    """The negative control."""

    def read(content: bytes) -> None:
        if content != b'{"a": 1}':
            raise KeyError("a")

    with pytest.raises(AssertionError, match="is a traceback"):
        try_all(b'{"a": 1}', read, 5)
