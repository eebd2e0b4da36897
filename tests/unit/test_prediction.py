"""Predictions do not depend on batches, tiles map back exactly, and everything that a user may name is read."""

from __future__ import annotations

import io
import time
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pyarrow.fs import FileInfo, FileType, LocalFileSystem

from spikefleet.errors import UserError
from spikefleet.inference.answer_files import YoloLabels, _Names
from spikefleet.inference.cloud_images import cloud_entries, shown_uri
from spikefleet.inference.image_entry import FileEntry
from spikefleet.inference.image_lists import ImageList, list_of_images
from spikefleet.inference.predictor import Predictor, overlap_threshold, with_overlap_threshold
from spikefleet.inference.tiles import Tiling, cut_out, merge_tiles
from spikefleet.inference.trained_network import TrainedNetwork
from spikefleet.tasks.coco_metrics import FoundBoxes
from support.small_detector import noise, small_classifier, small_detector

TOLERANCE = 1e-3
"""Pixels, and scores: convolutions of other batches may add in another order."""


@pytest.fixture(scope="module")
def detector() -> TrainedNetwork:
    return small_detector()


def chw(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return noise(height, width, seed).transpose(2, 0, 1)


def same(one: FoundBoxes, other: FoundBoxes, tolerance: float) -> bool:
    """The same boxes; with a tolerance in any order, because scores may be as near to one another as rounding."""
    if one.labels.shape != other.labels.shape:
        return False
    near = np.abs(one.boxes[:, None] - other.boxes).max(axis=2) <= tolerance
    near &= np.abs(one.scores[:, None] - other.scores) <= tolerance
    near &= one.labels[:, None] == other.labels
    return bool(near.any(axis=0).all() and near.any(axis=1).all() and (tolerance or near.diagonal().all()))


@pytest.mark.parametrize("recipe", ["scenes_spike_yolo", "scenes_retinanet"])
def test_the_batch_does_not_change_the_answers(recipe: str) -> None:
    trained = small_detector(recipe)
    sizes = [(64, 64), (40, 90), (64, 64), (90, 40), (40, 90), (64, 64), (33, 35)]
    images = [chw(*size, seed=number) for number, size in enumerate(sizes)]
    alone = [prediction for _, prediction in Predictor(trained, score=0)(images)]
    assert all(len(one.scores) for one in alone)
    assert not same(alone[0], alone[2], TOLERANCE), "other images have other answers"
    for batch in (2, 3, 8):
        together = [prediction for _, prediction in Predictor(trained, score=0, batch=batch)(images)]
        assert all(same(*pair, TOLERANCE) for pair in zip(alone, together, strict=True)), batch


def test_the_batch_does_not_change_classes() -> None:
    trained = small_classifier()
    images = [chw(20 + number, 20, seed=number) for number in range(7)]
    alone, together = (Predictor(trained, batch=batch)(images) for batch in (1, 4))
    for (_, one), (_, other) in zip(alone, together, strict=True):
        assert one.classes == other.classes
        assert np.allclose(one.probabilities, other.probabilities, rtol=0, atol=TOLERANCE)
    assert len({one.probabilities for _, one in alone}) > 1


def test_an_image_in_one_tile_has_the_answer_of_the_whole_image(detector: TrainedNetwork) -> None:
    images = [chw(64, 64), chw(50, 64, seed=1)]
    whole = Predictor(detector, score=0)(images)
    tiled = Predictor(detector, score=0, tiling=Tiling(64))(images)
    for (_, one), (_, other) in zip(whole, tiled, strict=True):
        assert same(one, other, 0)
    (_, larger), (_, smaller) = Predictor(detector, score=0, tiling=Tiling(50))(images)
    assert not same(whole[0][1], larger, TOLERANCE), "smaller tiles are other images to the network"
    assert not same(whole[1][1], smaller, TOLERANCE)


def test_boxes_of_tiles_map_back_exactly(detector: TrainedNetwork) -> None:
    image, tiling = chw(100, 150), Tiling(64, overlap=0.25)
    windows = tiling.windows(100, 150)
    assert len(windows) == 6
    parts = [prediction for _, prediction in Predictor(detector, score=0)([cut_out(image, one) for one in windows])]
    ((_, found),) = Predictor(detector, score=0, batch=3, tiling=tiling)([image])
    expected = merge_tiles(windows, parts, (100, 150), overlap_threshold(detector))
    assert same(found, expected, TOLERANCE)
    empty = FoundBoxes(np.empty((0, 4)), np.empty(0), np.empty(0, np.int64))
    for number, (left, top, _, _) in enumerate(windows):
        alone = [part if place == number else empty for place, part in enumerate(parts)]
        moved = merge_tiles(windows, alone, (100, 150), 0.5)
        assert np.array_equal(moved.boxes, parts[number].boxes + np.array([left, top, left, top]))


@pytest.mark.parametrize(("side", "overlap"), [(64, 0.2), (64, 0), (50, 0.9), (16, 0.5), (16, 0.2), (1000, 0.2)])
def test_tiles_cover_the_image_and_overlap(side: int, overlap: float) -> None:
    for height, width in ((64, 64), (65, 200), (200, 63), (129, 131), (1, 1)):
        windows = Tiling(side, overlap).windows(height, width)
        seen = np.zeros((height, width), int)
        for left, top, right, bottom in windows:
            assert (right - left, bottom - top) == (min(side, width), min(side, height))
            seen[top:bottom, left:right] += 1
        assert seen.min() == 1 or overlap
        assert seen.min() >= 1
        assert len(set(windows)) == len(windows)
        for starts in (sorted({one[0] for one in windows}), sorted({one[1] for one in windows})):
            gaps = np.diff(starts)
            assert not len(gaps) or gaps.max() <= max(1, side * (1 - overlap) + 1e-9)


def boxes(*rows: tuple[float, float, float, float, float, int]) -> FoundBoxes:
    table = np.array(rows, np.float64).reshape(-1, 6)
    return FoundBoxes(table[:, :4], table[:, 4], table[:, 5].astype(np.int64))


def test_merging_joins_parts_and_keeps_neighbours() -> None:
    windows = [(0, 0, 64, 64), (44, 0, 108, 64)]
    # In the overlap, whole in both tiles: once, as the better one has it.
    merged = merge_tiles(windows, [boxes((48, 10, 58, 20, 0.8, 1)), boxes((4.5, 10, 14.5, 20, 0.9, 1))], (64, 108), 0.5)
    assert merged.boxes.tolist() == [[48.5, 10, 58.5, 20]]
    assert merged.scores.tolist() == [0.9]
    # Cut by the border of the first tile: the box around both.
    merged = merge_tiles(windows, [boxes((50, 10, 64, 20, 0.9, 1)), boxes((5, 10, 36, 20, 0.8, 1))], (64, 108), 0.5)
    assert merged.boxes.tolist() == [[49, 10, 80, 20]]
    # Not cut: a small object on a large one of its class stays.
    apart = [boxes((30, 10, 60, 50, 0.9, 1)), boxes((4, 20, 12, 28, 0.8, 1))]
    assert len(merge_tiles(windows, apart, (64, 108), 0.5).scores) == 2
    # Another class, and two of one tile.
    assert (
        len(
            merge_tiles(
                windows, [boxes((48, 10, 58, 20, 0.8, 1)), boxes((4, 10, 14, 20, 0.9, 2))], (64, 108), 0.5
            ).scores
        )
        == 2
    )
    pair = [boxes((10, 10, 30, 20, 0.9, 1), (12, 10, 32, 20, 0.8, 1)), boxes()]
    assert len(merge_tiles(windows, pair, (64, 108), 0.5).scores) == 2
    # Over three tiles, part by part.
    three = [(0, 0, 64, 64), (44, 0, 108, 64), (88, 0, 152, 64)]
    parts = [boxes((40, 10, 64, 20, 0.7, 1)), boxes((0, 10, 64, 20, 0.9, 1)), boxes((0, 10, 30, 20, 0.6, 1))]
    assert merge_tiles(three, parts, (64, 152), 0.5).boxes.tolist() == [[40, 10, 118, 20]]


def test_tiles_and_thresholds_are_for_networks_that_have_them(detector: TrainedNetwork) -> None:
    classifier = small_classifier()
    with pytest.raises(UserError, match="--tile merges the boxes of tiles, and small finds none"):
        Predictor(classifier, tiling=Tiling(64))
    with pytest.raises(UserError, match="has no overlap threshold"):
        with_overlap_threshold(classifier, 0.5)
    with pytest.raises(UserError, match=r"--overlap 1 must be"):
        Tiling(64, 1)
    images = [chw(64, 64)]
    counts = [
        len(Predictor(with_overlap_threshold(detector, iou), score=0)(images)[0][1].scores) for iou in (0.05, 0.3)
    ]
    assert counts[0] < counts[1], "a lower threshold drops more boxes"
    assert overlap_threshold(with_overlap_threshold(detector, 0.3)) == 0.3


# ---------------------------------------------------------------------------------------- what a user may name


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for place in ("a.png", "b.JPG", "notes.txt", "deep/c.png", "deep/er/d.png", "[x].png"):
        path = tmp_path / "photos" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".txt":
            path.write_text("text")
        else:
            Image.fromarray(noise(20, 24, seed=len(place))).save(path, format="png")
    return tmp_path


def names(*words: str, **how: Any) -> list[str]:
    return [entry.name for entry in list_of_images(words, **how).entries]


def test_folders_patterns_and_lists(photos: Path) -> None:
    assert names("photos") == ["photos/[x].png", "photos/a.png", "photos/b.JPG"]
    assert len(names("photos", recursive=True)) == 5
    assert names("photos/[x].png") == ["photos/[x].png"], "a file of that name comes before a pattern"
    assert names("photos/*.png") == ["photos/[x].png", "photos/a.png"]
    found = list_of_images(["photos/**/*"])
    assert [str(entry.place) for entry in found.entries] == ["[x].png", "a.png", "b.JPG", "deep/c.png", "deep/er/d.png"]
    assert found.summary == "1 files that are named as no image"
    assert [str(entry.place) for entry in list_of_images(["photos/d*/c.png"]).entries] == ["deep/c.png"]
    listed = ["photos/a.png", "", "photos/deep", "photos/gone.png", "photos/b.JPG"]
    found = list_of_images(["-", "photos/a.png"], listed=listed)
    assert [entry.name for entry in found.entries] == [
        *("photos/a.png", "photos/deep/c.png", "photos/gone.png", "photos/b.JPG", "photos/a.png")
    ]
    (gone,) = found.entries[2].images()
    assert (gone.pixels, gone.error) == (None, "No such file or directory")
    uri = (photos / "photos").as_uri()
    assert names(uri) == [str(photos / "photos" / name) for name in ("[x].png", "a.png", "b.JPG")]
    for words, problem in {
        ("photos/gone.png",): "image photos/gone.png does not exist",
        ("photos/*.gif",): r"pattern photos/\*.gif matches no image$",
        ("photos/*.txt",): "matches no image; the 1 matches are folders or other files",
        ("-",): "no image is listed on stdin; give one path a line",
        ("ftp://host/photos",): "ftp://host/photos cannot be opened: .*check the URI",
    }.items():
        with pytest.raises(UserError, match=problem):
            list_of_images(words)


def test_bad_lines_of_a_list_keep_no_others_from_their_answers(photos: Path) -> None:
    (photos / "hollow").mkdir()
    bad = ["photos/[a].png", "hollow", "ftp://KEY:SECRET@host/x", "n" * 5000, "file://[x"]
    found = list_of_images(["-"], listed=[*bad, "photos/a.png"])
    *failed, good = [next(iter(entry.images())) for entry in found.entries]
    assert [one.name for one in failed] == [bad[0], bad[1], "ftp://host/x", *bad[3:]]
    assert good.pixels is not None
    for one, reason in zip(
        failed, ("No such file", "has no images", "cannot be opened", "too long", "Invalid"), strict=True
    ):
        assert one.pixels is None
        assert reason in one.error
        assert "SECRET" not in one.error


def test_images_of_another_file_system(photos: Path) -> None:
    root = f"disk://{photos / 'photos'}"
    entries, unused = cloud_entries(root, False, LocalFileSystem())
    assert [entry.name for entry in entries] == [f"{root}/{name}" for name in ("[x].png", "a.png", "b.JPG")]
    assert unused == {"files that are named as no image": 1, "sub-folders": 1}
    deep, unused = cloud_entries(f"{root}/", True, LocalFileSystem())
    assert [str(entry.place) for entry in deep] == ["[x].png", "a.png", "b.JPG", "deep/c.png", "deep/er/d.png"]
    assert unused == {"files that are named as no image": 1}
    (loaded,) = entries[1].images()
    (local,) = list_of_images(["photos/a.png"]).entries[0].images()
    assert np.array_equal(loaded.pixels, local.pixels)
    (photos / "photos" / "a.png").write_bytes(b"no image")
    assert [next(iter(entry.images())).pixels is None for entry in entries] == [False, True, False]
    (photos / "photos" / "b.JPG").unlink()
    assert "b.JPG" in next(entries[2].images()).error
    with pytest.raises(UserError, match=r"gone.png does not exist"):
        cloud_entries(f"{root}/gone.png", False, LocalFileSystem())
    (photos / "hollow" / "inside").mkdir(parents=True)
    with pytest.raises(UserError, match=r"has no images .* it has 1 sub-folders"):
        cloud_entries(f"disk://{photos}/hollow", False, LocalFileSystem())


class Keys:
    """What an object store lists, where `..` is a part of a key as any other."""

    def get_file_info(self, asked: Any) -> Any:
        if isinstance(asked, str):
            return FileInfo(asked, FileType.Directory)
        return [FileInfo(f"bucket/photos/{key}", FileType.File) for key in ("a.png", "../../x.png", "z/../../y.png")]


def test_names_of_images_lead_nowhere_else(detector: TrainedNetwork, tmp_path: Path) -> None:
    entries, unused = cloud_entries("keys://bucket/photos", True, Keys())
    assert [str(entry.place) for entry in entries] == ["a.png"]
    assert unused == {"files whose names lead out of the folder (..)": 2}
    for place in ("../x.png", "/x.png"):
        outside = ImageList([FileEntry(tmp_path / "x.png", PurePosixPath(place), "x.png")])
        with pytest.raises(UserError, match=r"image x.png: its name .*/x.png leads out of "):
            YoloLabels(detector, outside, tmp_path / "labels", False)


def test_many_images_of_one_name_have_files_of_their_own() -> None:
    def found(*places: str) -> list[str]:
        entries = [FileEntry(Path("x", str(number)), PurePosixPath(place), "x") for number, place in enumerate(places)]
        return [path.as_posix() for path in _Names(entries, Path("out"), ".png", nested=False).paths]

    assert found("a/x.jpg", "b/x.png", "x-2.png", "c/x.gif") == [
        *("out/x.png", "out/x-2.png", "out/x-2-2.png", "out/x-3.png")
    ]
    # macOS and Windows take these names for one.
    assert found("a/IMG.jpg", "b/img.png", "z\u00fc.png", "ZU\u0308.png") == [
        *("out/IMG.png", "out/img-2.png", "out/z\u00fc.png", "out/ZU\u0308-2.png")
    ]
    start = time.process_time()
    names = found(*(f"{number}/image.jpg" for number in range(5_000)))
    assert len(set(names)) == 5_000
    assert time.process_time() - start < 10, "12 million steps, if each number were tried again"


def test_keys_and_queries_of_uris_are_not_shown() -> None:
    for uri in ("ftp://KEY:SECRET@bucket/photos?endpoint_override=host:9000", "ftp://KEY:SEC/RET@bucket/photos"):
        with pytest.raises(UserError) as refused:
            cloud_entries(uri, True)
        assert str(refused.value).startswith("ftp://bucket/photos cannot be opened: ")
        assert not any(word in str(refused.value) for word in ("SEC", "RET", "endpoint"))
    for uri in ("hdfs://host:9000/photos/a@b.png", "s3://bucket/a@b.png", "disk:///photos/x@2.png"):
        assert shown_uri(uri) == uri
    assert [entry.name for entry in cloud_entries("keys://bucket/photos/", True, Keys())[0]] == [
        "keys://bucket/photos/a.png"
    ]


# ---------------------------------------------------------------------------------------- videos


def write_video(path: Path, frames: list[NDArray[np.uint8]], codec: str, pixels: str) -> None:
    """By PyAV, which also reads; what is compared are the pixels that went in."""
    av = pytest.importorskip("av", reason="PyAV (the extra `video`) is not installed")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pixels
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


FRAMES = [noise(48, 64, seed=seed) for seed in range(7)]


def test_frames_of_a_video(tmp_path: Path) -> None:
    path = tmp_path / "clip.mkv"
    write_video(path, FRAMES, "ffv1", "bgr0")  # lossless
    (entry,) = list_of_images([str(path)]).entries
    loaded = list(entry.images())
    assert [one.frame for one in loaded] == list(range(7))
    assert [one.time_s for one in loaded] == [number / 10 for number in range(7)]
    assert entry.frames == 7
    for one, frame in zip(loaded, FRAMES, strict=True):
        assert np.array_equal(one.pixels, frame.transpose(2, 0, 1))
    found = list_of_images([str(path)], every=3)
    assert [one.frame for one in found.entries[0].images()] == [0, 3, 6]
    assert found.expected == 3
    assert names(str(tmp_path / "*.mkv")) == [str(path)]
    assert loaded[3].origin == {"image": str(path), "frame": 3, "time_s": 0.3}


def test_times_are_from_the_start_of_the_video(tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason="PyAV (the extra `video`) is not installed")
    path = tmp_path / "clip.ts"
    write_video(path, FRAMES, "mpeg2video", "yuv420p")
    with av.open(str(path)) as container:
        assert container.streams.video[0].start_time > 0, "the clock of MPEG-TS does not begin at 0"
    (entry,) = list_of_images([str(path)]).entries
    assert [one.time_s for one in entry.images()] == [number / 10 for number in range(7)]


def test_a_video_is_turned_as_it_is_to_be_shown(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write_video(path, FRAMES, "mpeg4", "yuv420p")
    (flat,) = list_of_images([str(path)], every=100).entries
    upright = next(flat.images()).pixels
    assert upright is not None
    assert np.abs(upright.astype(int) - FRAMES[0].transpose(2, 0, 1)).mean() < 40
    content = path.read_bytes()
    # The matrix of the track's header (ISO 14496-12, 8.3.2): x' = -y, y' = x turns clockwise by 90 degrees.
    start = content.index(b"tkhd") + 4 + 40
    matrix = b"".join((number << 16).to_bytes(4, "big", signed=True) for number in (0, 1, 0, -1, 0, 0, 48, 0))
    path.write_bytes(content[:start] + matrix + content[start + 32 :])
    (turned,) = list_of_images([str(path)], every=100).entries
    assert np.array_equal(next(turned.images()).pixels, np.rot90(upright, -1, axes=(1, 2)))


def test_damaged_videos_and_what_only_looks_like_one(tmp_path: Path) -> None:
    whole = tmp_path / "whole.mkv"
    write_video(whole, FRAMES, "ffv1", "bgr0")
    content = whole.read_bytes()

    def read(name: str, damaged: bytes) -> list[Any]:
        (tmp_path / name).write_bytes(damaged)
        (entry,) = list_of_images([str(tmp_path / name)]).entries
        return list(entry.images())

    cut = read("cut.mkv", content[: len(content) // 2])
    assert 0 < len([one for one in cut if one.pixels is not None]) < 7
    for name, damaged in (("text.mp4", b"no video"), ("empty.mov", b""), ("photo.avi", image_bytes())):
        (only,) = read(name, damaged)
        assert only.pixels is None
        assert "cannot be decoded" in only.error
        assert only.frame is None
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{whole}\n#EXT-X-ENDLIST\n"
    (only,) = read("list.mp4", playlist.encode())
    assert only.pixels is None, "a playlist has no other file opened"


def image_bytes() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(FRAMES[0]).save(stream, format="jpeg")
    return stream.getvalue()


def test_without_pyav_a_video_is_refused_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    (tmp_path / "clip.mp4").write_bytes(b"video")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"clip.mp4 is a video, .*pip install 'spikefleet\[video\]'"):
        list_of_images([str(tmp_path / "clip.mp4")])
    (listed,) = list_of_images(["-"], listed=[str(tmp_path / "clip.mp4")]).entries
    assert listed.local == tmp_path / "clip.mp4"
    assert "install it" in next(iter(listed.images())).error
