"""A split taken out of training images: nothing lost, nothing twice, equal images together, classes in proportion."""

from collections import Counter
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from spikefleet_pipelines.errors import StoreError
from spikefleet_pipelines.sources import prepare
from spikefleet_pipelines.store.manifest import ImageFormat
from spikefleet_pipelines.store.reader import Split, Store
from spikefleet_pipelines.store.splitting import choose_part, take_split
from spikefleet_pipelines.store.writer import StoreWriter

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding")


def folder(root: Path) -> Path:
    """Two classes of PNG files; each image of the first class is there twice, under two names."""
    for split, label, copies, count in (
        ("train", "cat", 2, 20),
        ("train", "dog", 1, 60),
        ("val", "cat", 1, 3),
        ("val", "dog", 1, 3),
    ):
        (root / split / label).mkdir(parents=True)
        for number in range(count):
            picture = PIL.Image.new("RGB", (9, 7), (number, len(split + label) * copies, 5))
            for copy in range(copies):
                picture.save(root / split / label / f"{number}-{copy}.png")
    return root


@pytest.fixture(params=["digits", "scenes", "image_folder"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "digits":
        return prepare("digits", None, tmp_path / "store")
    if request.param == "scenes":
        return prepare("scenes", None, tmp_path / "store", train=60, val=4, test=4)
    return prepare("image_folder", folder(tmp_path / "raw"), tmp_path / "store", holdout=0.1)


def images_of(split: Split) -> list[bytes]:
    if split.image_shape is not None:
        return [image.tobytes() for image in split.gather(np.arange(len(split)))]
    return [split.encoded_image(row).tobytes() for row in range(len(split))]


def objects_of(split: Split) -> list[object]:
    if not split.is_detection:
        return split.labels.tolist()
    found = (split.annotations(row) for row in range(len(split)))
    return [(one.image_id, one.height, one.boxes.tolist(), one.labels.tolist(), one.ids.tolist()) for one in found]


def rows_of(split: Split) -> Counter[object]:
    return Counter((image, str(target)) for image, target in zip(images_of(split), objects_of(split), strict=True))


def test_the_store_has_the_name_of_the_one_that_it_was_taken_from(tmp_path: Path) -> None:
    named = prepare("digits", None, tmp_path / "store", dataset="mine")
    assert take_split(named, tmp_path / "out", "gate", 0.1).name == "mine"


def test_training_images_are_divided_and_all_else_is_the_same(store: Store, tmp_path: Path) -> None:
    before = rows_of(store.split("train"))
    take_split(store, tmp_path / "out", "gate", 0.2, seed=3, shard_bytes=4_000)
    out = Store.open(tmp_path / "out")
    train, gate = out.split("train"), out.split("gate")
    assert rows_of(train) + rows_of(gate) == before
    assert not set(images_of(train)) & set(images_of(gate))
    assert len(gate) == pytest.approx(0.2 * (len(train) + len(gate)), abs=6)
    for name in store.manifest.shards:
        if name != "train":
            assert rows_of(out.split(name)) == rows_of(store.split(name))
            assert out.manifest.original(name) == store.manifest.original(name)
    assert out.manifest.options["taken_gate"] == {
        "split": "gate",
        "fraction": 0.2,
        "seed": 3,
        "of": store.manifest.content_hash,
    }
    assert len(out.manifest.shards["train"]) > 1


def test_each_class_gives_its_share(tmp_path: Path) -> None:
    store = prepare("digits", None, tmp_path / "store")
    out = take_split(store, tmp_path / "out", "gate", 0.1)
    gate, train = (np.array(out.audit.images_per_class[name]) for name in ("gate", "train"))
    assert np.abs(gate - 0.1 * (gate + train)).max() <= 1


def test_the_choice_depends_on_seed_and_bytes_alone(tmp_path: Path) -> None:
    store = prepare("digits", None, tmp_path / "store")
    train = store.split("train")
    reverse = np.arange(len(train))[::-1]
    writer = StoreWriter(
        tmp_path / "reversed",
        source="digits",
        class_names=store.manifest.class_names,
        image=store.manifest.image,
        options={},
    )
    with writer:
        writer.write_images("train", train.gather(reverse), train.labels[reverse])
        writer.commit()
    gates = []
    for number, (source, seed) in enumerate(((store, 0), (Store.open(tmp_path / "reversed"), 0), (store, 1))):
        take_split(source, tmp_path / f"out{number}", "gate", 0.1, seed)
        gates.append(Counter(images_of(Store.open(tmp_path / f"out{number}").split("gate"))))
    assert gates[0] == gates[1]
    assert gates[0] != gates[2]


def test_each_class_keeps_an_image_to_train_on(tmp_path: Path) -> None:
    """Nine tenths of one image is one image."""
    images = np.arange(22, dtype=np.uint8).reshape(22, 1, 1, 1)
    writer = StoreWriter(
        tmp_path / "store",
        source="digits",
        class_names=("often", "once", "twice"),
        image=ImageFormat(encoding="raw", shape=(1, 1, 1)),
        options={},
    )
    with writer:
        writer.write_images("train", images, np.array([0] * 19 + [1] + [2] * 2))
        writer.commit()
    out = take_split(Store.open(tmp_path / "store"), tmp_path / "out", "gate", 0.9)
    assert out.audit.images_per_class == {"train": (2, 1, 1), "gate": (17, 0, 1)}


def test_what_cannot_be_divided_is_refused(tmp_path: Path) -> None:
    store = prepare("digits", None, tmp_path / "store")
    for fraction in (0.0, 1.0, -0.5):
        with pytest.raises(StoreError, match="expected more than 0 and less than 1"):
            take_split(store, tmp_path / "out", "gate", fraction)
    with pytest.raises(StoreError, match="is no image of any class; set a larger fraction"):
        take_split(store, tmp_path / "out", "gate", 0.0001)
    with pytest.raises(StoreError, match="already has a split 'val'"):
        take_split(store, tmp_path / "out", "val", 0.1)
    (tmp_path / "link").symlink_to(tmp_path / "store")
    for place in ("store", "link"):
        with pytest.raises(StoreError, match="is the store that the split is taken from"):
            take_split(store, tmp_path / place, "gate", 0.1, overwrite=True)
    assert Store.open(tmp_path / "store").manifest == store.manifest
    assert not (tmp_path / "out").exists()
    take_split(store, tmp_path / "out", "gate", 0.1)
    with pytest.raises(StoreError, match="already contains another store"):
        take_split(store, tmp_path / "out", "gate", 0.2)
    larger = take_split(store, tmp_path / "out", "gate", 0.2, overwrite=True)
    assert Store.open(tmp_path / "out").manifest == larger


def test_equal_images_of_two_groups_hold_the_groups_together() -> None:
    digests = [b"z", b"a", b"z", b"b", b"c", b"c2", b"d", b"e"]
    groups = [b"g1", b"g1", b"g2", b"g2", b"g3", b"g3", b"g4", b"g5"]
    found = set()
    for seed in range(40):
        chosen = choose_part(digests, np.zeros(8, np.int64), 0.5, seed, groups=groups)
        assert len(set(chosen[:4].tolist())) == 1, "z is in both groups"
        assert chosen[4] == chosen[5]
        found.add(tuple(chosen.tolist()))
    assert len(found) > 1, "the seed chooses"
