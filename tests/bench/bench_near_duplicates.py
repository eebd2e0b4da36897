"""Cost of looking for near-duplicates: processor time for 10,000 JPEG of 500 x 375, decoded and compared.

python tests/bench/bench_near_duplicates.py --images 2000
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL.Image
from sklearn.datasets import load_sample_images

from spikefleet_pipelines.sources import prepare
from spikefleet_pipelines.store.near_duplicates import Seen, look_at_all, near_pairs


def main() -> None:
    """Print the time of both steps, scaled to 10,000 training images and 2,000 others."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2000)
    images = parser.parse_args().images
    photographs = [PIL.Image.fromarray(image) for image in load_sample_images().images]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for number in range(images):
            place = root / "raw" / ("val" if number % 6 == 5 else "train") / "ab"[number % 7 % 2] / f"{number}.jpg"
            place.parent.mkdir(parents=True, exist_ok=True)
            left, top = number % 140, number // 140 % 52
            photographs[number // 2 % 2].crop((left, top, left + 500, top + 375)).save(place, quality=85)
        store = prepare("image_folder", root / "raw", root / "store", holdout=0)
        start = time.process_time()
        look_at_all(store)
        decoded = time.process_time() - start
    print(f"decode and shrink: {decoded / images * 10_000:.1f} s for 10,000 images")
    rng = np.random.default_rng(0)
    rows = [rng.normal(size=(count, 256)).astype(np.float32) for count in (10_000, 2_000)]
    seen = [Seen(one / np.linalg.norm(one, axis=1, keepdims=True), np.zeros((len(one), 2), np.int64)) for one in rows]
    start = time.process_time()
    near_pairs(dict(zip(("train", "val"), seen, strict=True)))
    print(f"compare 10,000 with 2,000: {time.process_time() - start:.2f} s")


if __name__ == "__main__":
    main()
