"""Results by image: what is read is what was written, and a file that is not ours costs a sentence, never code."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spikefleet.errors import UserError
from spikefleet.tasks import per_image
from spikefleet.tasks.classification import Classification, Ranking
from spikefleet.tasks.coco_metrics import FoundBoxes, evaluate_boxes
from spikefleet.tasks.per_image import PER_IMAGE, Answers, Boxes, PerImage, save_per_image
from spikefleet.tasks.resampled_map import Matches
from spikefleet_pipelines.store.annotations import Annotations
from spikefleet_pipelines.store.reader import Store
from support.results import CATEGORIES, NAMES, detected, with_classes


@pytest.fixture
def written(tmp_path: Path) -> Path:
    with_classes(20, right=15).write(tmp_path / PER_IMAGE)
    return tmp_path / PER_IMAGE


def test_answers_come_back_as_they_were(written: Path) -> None:
    found = PerImage.read(written)
    assert isinstance(found.results, Answers)
    assert (found.data_hash, found.split, found.rows.tolist()) == ("d" * 64, "test", list(range(20)))
    assert found.results.right.sum() == 15
    assert found.results.score.dtype == np.float32


@pytest.mark.parametrize("noise", [0.0, 0.1], ids=["float32", "float64"])
def test_boxes_come_back_and_give_the_same_metrics(tmp_path: Path, noise: float) -> None:
    before = detected(seed=1, noise=noise)
    before.write(tmp_path / PER_IMAGE)
    after = PerImage.read(tmp_path / PER_IMAGE)
    assert isinstance(before.results, Boxes)
    assert isinstance(after.results, Boxes)
    for left, right in zip(before.results.found, after.results.found, strict=True):
        assert np.array_equal(left.boxes, right.boxes)
        assert np.array_equal(left.scores, right.scores)
        assert np.array_equal(left.labels, right.labels)
    for one, other in zip(before.results.targets, after.results.targets, strict=True):
        assert one[:3] == other[:3]
        assert all(np.array_equal(x, y) for x, y in zip(one[3:8], other[3:8], strict=True))
    coco = after.results.coco(NAMES, CATEGORIES)
    expected = evaluate_boxes(*before.results.coco(NAMES, CATEGORIES)).twelve["map50_95"]
    assert 0.1 < expected < 0.95
    assert Matches(*coco).mean_average_precision()[0] == pytest.approx(expected, abs=1e-12)


def test_images_without_boxes_are_kept(tmp_path: Path) -> None:
    nothing = FoundBoxes(np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64))
    empty = np.zeros(0, np.int64)
    target = Annotations(7, 10, 20, np.zeros((0, 4)), empty, empty, empty.astype(bool), empty.astype(float), empty)
    PerImage(Boxes([nothing] * 2, [target] * 2), "d" * 64, "test", np.arange(2)).write(tmp_path / PER_IMAGE)
    found = PerImage.read(tmp_path / PER_IMAGE).results
    assert isinstance(found, Boxes)
    assert [len(one.scores) for one in found.found] == [0, 0]
    assert [(one.image_id, one.height, one.width) for one in found.targets] == [(7, 10, 20)] * 2


def test_equal_results_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        detected(seed=1).write(tmp_path / name)
    detected(seed=2).write(tmp_path / "c")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() != (tmp_path / "c").read_bytes()


class Bomb:
    """Leaves a marker when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._marker}",)


def arrays_of(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def test_an_object_in_the_file_is_never_unpickled(written: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    bomb = np.array([Bomb(marker)], dtype=object)
    np.savez(written, allow_pickle=True, **{**arrays_of(written), "score": bomb})
    with pytest.raises(UserError, match="is damaged: it holds no results by image"):
        PerImage.read(written)
    assert not marker.exists()
    with np.load(written, allow_pickle=True) as archive:
        archive["score"]
    assert marker.exists(), "the bomb works"


def changed(**arrays: Any) -> Callable[[Path], None]:
    """Writes the file again with other arrays; None leaves one out."""

    def change(path: Path) -> None:
        kept = {name: value for name, value in {**arrays_of(path), **arrays}.items() if value is not None}
        np.savez(path, **kept)

    return change


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (changed(score=None), "is damaged"),
        (changed(score=np.zeros(19, np.float32)), r"found shape \[19\], expected \[20\]"),
        (changed(predicted=np.zeros(20)), "found float64, expected integers"),
        (changed(rows=np.zeros((20, 1), np.int64)), "is damaged"),
        (changed(kind=np.array("secrets")), "kind 'secrets'"),
        (changed(format=np.array(9)), "expected format 1, found 9; use the spikefleet that wrote it"),
        (cut, "is damaged"),
        (lambda path: path.write_bytes(b"not an archive"), "is damaged"),
        (lambda path: path.unlink(), "is damaged"),
    ],
)
def test_other_files_cost_a_sentence(written: Path, change: Callable[[Path], object], sentence: str) -> None:
    change(written)
    with pytest.raises(UserError, match=sentence):
        PerImage.read(written)


def test_a_file_that_unpacks_to_more_than_it_may_is_not_unpacked(written: Path) -> None:
    with zipfile.ZipFile(written, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("more.npy", bytes(per_image.MOST_BYTES))
    assert written.stat().st_size < 200_000
    with pytest.raises(UserError, match="more than 67,108,864; do not trust it"):
        PerImage.read(written)


def test_a_report_keeps_them_by_row_and_data_and_none_that_are_too_large(
    stores_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = Store.open(stores_dir / "digits", verify=False).split("test")
    task = Classification([str(k) for k in range(10)])
    predictions = [Ranking((3, 1), (0.75, 0.25)), Ranking((2, 1), (0.5, 0.25))]
    assert save_per_image(task, predictions, [3, 1], split, tmp_path) is None
    found = PerImage.read(tmp_path / PER_IMAGE)
    assert (found.data_hash, found.split) == (split.manifest.content_hash, "test")
    assert isinstance(found.results, Answers)
    assert found.results.right.tolist() == [True, False]
    assert found.results.score.tolist() == [0.75, 0.5]
    monkeypatch.setattr(per_image, "MOST_BYTES", 1)
    reason = save_per_image(task, predictions, [3, 1], split, tmp_path)
    assert reason is not None
    assert "are not kept" in reason
    assert not (tmp_path / PER_IMAGE).exists(), "a file of an earlier evaluation would be of other weights"
