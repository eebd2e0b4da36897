"""Reading the JSON of a COCO-like data set (40,000 images, 250,000 annotations with polygons, about 130 MB).

The reader of `sources/json_stream.py` against the `json` module and against ijson with its C backend, each in a process
of its own: seconds for every element of the three lists, and the peak of the process's memory above that of an
interpreter that has imported the reader. ijson is measured if it is installed (`pip install ijson`).

    python tests/bench/bench_json_stream.py [IMAGES] [ANNOTATIONS]
"""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spikefleet_pipelines.sources.json_stream import list_elements

SECTIONS = ("images", "annotations", "categories")
ROUNDS = 3


def write_coco(path: Path, images: int, annotations: int) -> None:
    """A file as COCO's are: polygons with two decimals are most of it."""
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as stream:
        stream.write('{"info": {"year": 2017}, "licenses": [{"id": 1, "name": "none"}], "images": [')
        stream.write(", ".join(json.dumps(_image(number)) for number in range(images)))
        stream.write('], "annotations": [')
        for number in range(annotations):
            stream.write((", " if number else "") + json.dumps(_annotation(rng, number, images)))
        categories = [{"id": number + 1, "name": f"class {number}"} for number in range(80)]
        stream.write(f'], "categories": {json.dumps(categories)}}}')


def _image(number: int) -> dict[str, Any]:
    url = f"http://images.cocodataset.org/train2017/{number:012d}.jpg"
    return {"id": number, "file_name": f"{number:012d}.jpg", "height": 480, "width": 640, "license": 1, "coco_url": url}


def _annotation(rng: random.Random, number: int, images: int) -> dict[str, Any]:
    polygon = [round(rng.uniform(0, 480), 2) for _ in range(rng.randrange(20, 80))]
    box = [round(rng.uniform(1, 200), 2) for _ in range(4)]
    return {
        "segmentation": [polygon],
        "area": round(box[2] * box[3], 4),
        "iscrowd": 0,
        "image_id": rng.randrange(images),
        "bbox": box,
        "category_id": rng.randrange(1, 81),
        "id": number,
    }


def read_ours(path: Path) -> Iterator[Any]:
    for section, _, element in list_elements(path):
        if section in SECTIONS:
            yield element


def read_json_module(path: Path) -> Iterator[Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    for section in SECTIONS:
        yield from content[section]


def read_ijson(path: Path) -> Iterator[Any]:
    """One pass for each list: the C backend builds the elements of one prefix."""
    import ijson  # type: ignore[import-not-found]

    backend = ijson.get_backend("yajl2_c")
    for section in SECTIONS:
        with path.open("rb") as stream:
            yield from backend.items(stream, f"{section}.item", use_float=True)


READERS = {"ours": read_ours, "json module": read_json_module, "ijson yajl2_c": read_ijson}


def measure(name: str, path: Path) -> None:
    """Print seconds of processor time, the growth of the resident memory at its peak in bytes, and the elements."""
    if name == "ijson yajl2_c":
        importlib.import_module("ijson")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak that imports have left
    before, start = _resident("VmRSS"), time.process_time()
    count = sum(1 for _ in READERS[name](path))
    seconds = time.process_time() - start
    print(seconds, _resident("VmHWM") - before, count)


def _resident(field: str) -> int:
    """Bytes of resident memory: now (VmRSS) or at the peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


def main() -> None:
    images, annotations = (int(text) for text in (*sys.argv[1:], "40000", "250000")[:2])
    names = [name for name in READERS if name != "ijson yajl2_c" or importlib.util.find_spec("ijson")]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "instances.json"
        write_coco(path, images, annotations)
        print(f"{path.stat().st_size / 1e6:.0f} MB, {images:,} images, {annotations:,} annotations; {ROUNDS} rounds")
        found: dict[str, list[list[float]]] = {name: [] for name in names}
        for _ in range(ROUNDS):
            for name in names:
                command = [sys.executable, __file__, "--measure", name, str(path)]
                output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                found[name].append([float(value) for value in output.split()])
    assert {int(row[2]) for rows in found.values() for row in rows} == {images + annotations + 80}
    for name, rows in found.items():
        seconds, peaks = sorted(row[0] for row in rows), sorted(row[1] for row in rows)
        middle = ROUNDS // 2
        ratio = seconds[middle] / sorted(row[0] for row in found["ours"])[middle]
        print(
            f"{name:14} {seconds[middle]:6.2f} s ({ratio:.2f} of ours)  {peaks[middle] / 1e6:7.0f} MB above the start"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2], Path(sys.argv[3]))
    else:
        main()
