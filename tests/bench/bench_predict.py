"""Images per second of `predict --batch N` against one image at a time, and whether the answers are the same.

Reads a folder of images as the command does, with networks of the recipes and random weights that spike. Both ways take
turns, so that what else the machine does weighs on both alike. Prints the medians of wall and of processor time, their
ratios, and the largest difference of the answers.

    python tests/bench/bench_predict.py [ROUNDS] [--images 64] [--batch 16] [--gpu]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from spikefleet.inference.image_lists import ImageList, list_of_images
from spikefleet.inference.prediction import predict_files
from spikefleet.inference.predictor import Predictor
from spikefleet.inference.trained_network import TrainedNetwork
from support.small_detector import noise, small_classifier, small_detector

Answers = list[Mapping[str, Any]]


class Timed(NamedTuple):
    """Answers, and the seconds that they took."""

    answers: Answers
    wall: float
    processor: float


def answers_of(trained: TrainedNetwork, images: ImageList, batch: int, gpu: bool) -> Timed:
    """Predicts all images."""
    answers: Answers = []
    predictor = Predictor(trained, gpu=gpu, batch=batch)
    wall, processor = time.perf_counter(), time.process_time()
    predict_files(trained, images, predictor, answered=answers.append)
    return Timed(answers, time.perf_counter() - wall, time.process_time() - processor)


def difference(alone: Answers, together: Answers) -> str:
    """The images with another class or other objects, and the largest difference of numbers in the others."""
    other, largest = 0, 0.0
    for one, two in zip(alone, together, strict=True):
        found = [answer.get("classes") or answer["objects"] for answer in (one, two)]
        if [item["name"] for item in found[0]] != [item["name"] for item in found[1]]:
            other += 1
            continue
        for first, second in zip(*found, strict=True):
            for key in ("probability", "score", "box"):
                if key in first:
                    largest = max(largest, float(np.abs(np.subtract(first[key], second[key])).max()))
    return f"{other} of {len(alone)} images with other answers, numbers differ by at most {largest:.2g}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("rounds", nargs="?", type=int, default=5)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--gpu", action="store_true")
    given = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, {given.images} images, batches of {given.batch}, {given.rounds} rounds")
    with tempfile.TemporaryDirectory() as scratch:
        for name, trained, side in (("classifier", small_classifier(), 8), ("detector", small_detector(), 64)):
            folder = Path(scratch, name)
            folder.mkdir()
            for number in range(given.images):
                Image.fromarray(noise(side, side, seed=number)).save(folder / f"{number:04d}.png")
            images = list_of_images([str(folder)])
            answers_of(trained, images, given.batch, given.gpu)  # warms up
            rounds = [
                [answers_of(trained, images, batch, given.gpu) for batch in (1, given.batch)]
                for _ in range(given.rounds)
            ]
            for what in ("wall", "processor"):
                alone, together = (statistics.median(getattr(one[way], what) for one in rounds) for way in (0, 1))
                print(
                    f"{name}, {what}: one at a time {given.images / alone:.4g} images/s, in batches "
                    f"{given.images / together:.4g}, ratio {alone / together:.2f}"
                )
            print(f"{name}: {difference(rounds[0][0].answers, rounds[0][1].answers)}", flush=True)


if __name__ == "__main__":
    main()
