"""Reading COCO's JSON element by element: what the json module reads, in little memory; what is no JSON is refused."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.sources import json_stream
from spikefleet_pipelines.sources.coco_json import read_coco_json
from spikefleet_pipelines.sources.json_stream import list_elements


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected '{', found the end of the file, near character 0"),
        ("[]", "expected '{', found '\\['"),
        ('{"other": [{"id": 1}', "expected ',', found the end"),
        ('{"other": [{"id": 1}, ]}', "near character 22"),
        ('{"images": [], "images": []}', "'images' occurs twice"),
        ('{"images": []} {}', "expected the end of the file"),
        ('{1: []}', "expected a name in quotes"),
        ('{"images": [' + "[" * 200_000, "nested too deeply|near character"),
        ("\xff", "not text in UTF-8"),
    ],
)  # fmt: skip
def test_text_that_is_no_such_json_is_refused_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(SourceError, match=message) as caught:
        read_coco_json(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 1 << 20])
def test_elements_are_those_of_the_json_module_whatever_the_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(json_stream, "_CHUNK", chunk)
    content = {
        "a": [1, -2.5e3, 12345678901234567890, True, None, 'x]}\\"é\U0001f98e', [], {}, [[1], [2, {"b": []}]]],
        "b": {"c": [1, 2, 3]},
        "d": 123456,
        "e": [],
        "f": [{"id": 10 * n, "text": "y" * n} for n in range(20)],
    }
    for indent in (None, 2):
        (tmp_path / "file").write_text(json.dumps(content, indent=indent, ensure_ascii=False), encoding="utf-8")
        found: dict[str, list[Any]] = {}
        for name, position, element in list_elements(tmp_path / "file"):
            assert position == len(found.setdefault(name, []))
            found[name].append(element)
        assert found == {"a": content["a"], "f": content["f"]}


def test_polygons_do_not_fill_the_memory(tmp_path: Path) -> None:
    polygon = [float(n) + 0.25 for n in range(400)]
    annotations = [
        {"id": n, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "segmentation": [polygon]} for n in range(4000)
    ]
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 9, "width": 9}],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "a"}],
    }
    path = tmp_path / "file.json"
    path.write_text(json.dumps(content))
    assert path.stat().st_size > 10_000_000

    def peak(read: Callable[[], object]) -> int:
        tracemalloc.start()
        read()
        try:
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(lambda: read_coco_json(path)) < 8_000_000
    assert peak(lambda: json.loads(path.read_text())) > 40_000_000  # what the usual way takes
