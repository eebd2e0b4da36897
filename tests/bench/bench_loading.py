"""Training images per second: our loader over a store against torchvision's data sets and a DataLoader.

    python tests/bench/bench_loading.py [--one-core | --augment-on-device] [--quick] [--json FILE]

CIFAR: random crop of the padded image, flip, normalise (and once more with AutoAugment), from generated files in the
official format. JPEG: RandomResizedCrop(224), flip, normalise, from generated images of 500x375. Full training epochs,
interleaved; medians; every line gives the ratio ours / torchvision, the smallest and the largest of a round behind it.

With `--one-core` both load in this process, in one thread, and images are counted per second of its processor time.

With `--augment-on-device` one process of our loader, as for a GPU: its processor time for an image where it crops,
flips and cuts out, and where it leaves that to the device; and that of `Batch.to`, with a core of this machine as the
device.
"""

import argparse
import io
import json
import multiprocessing
import pickle
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
import torchvision.transforms.v2 as v2
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader
from torchvision.datasets import CIFAR10, ImageFolder

from spikefleet_pipelines.loading import BatchLoader
from spikefleet_pipelines.sampling import EpochPlan
from spikefleet_pipelines.sources import prepare
from spikefleet_pipelines.store.reader import Split
from spikefleet_pipelines.transforms.classification_config import TransformConfig
from spikefleet_pipelines.transforms.normalise_config import NORMALISATIONS

CIFAR_BATCH, JPEG_BATCH = 128, 64


class GeneratedCIFAR10(CIFAR10):
    """Torchvision's reader, without the checksums of the official files."""

    train_list = [(f"data_batch_{number}", None) for number in range(1, 6)]  # noqa: RUF012
    test_list = [("test_batch", None)]  # noqa: RUF012
    meta = {"filename": "batches.meta", "key": "label_names", "md5": None}  # noqa: RUF012


@dataclass(frozen=True)
class Line:
    workload: str
    processes: int
    ours: int
    torchvision: int
    ratio: float
    least: float
    most: float


def write_cifar(root: Path, rows: int) -> None:
    """Five training files of `rows` images: digits, enlarged and coloured, with noise."""
    folder, rng = root / "cifar-10-batches-py", np.random.default_rng(0)
    folder.mkdir(parents=True)
    digits = load_digits()
    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]:
        chosen = rng.integers(0, len(digits.images), rows)
        grey = np.kron(digits.images[chosen] * 12, np.ones((4, 4)))[:, None]
        images = grey * rng.random((rows, 3, 1, 1)) + rng.integers(0, 60, (rows, 3, 32, 32))
        batch = {"data": images.astype(np.uint8).reshape(rows, -1), "labels": digits.target[chosen].tolist()}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    names = {"label_names": [f"class{number}" for number in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(names, protocol=2))


def write_jpegs(root: Path, count: int) -> None:
    """Images of 500x375 with texture on every scale, about 50 kB each as photographs have."""
    rng = np.random.default_rng(0)
    for number in range(count + 3):
        image = np.full((375, 500, 3), 128.0)
        for scale in (4, 8, 16, 32, 64, 128):
            coarse = rng.normal(0, 3 * scale**0.6, (375 // scale + 2, 500 // scale + 2, 3)).astype(np.float32)
            for channel in range(3):
                plane = PIL.Image.fromarray(coarse[..., channel]).resize((500, 375), PIL.Image.Resampling.BICUBIC)
                image[..., channel] += np.asarray(plane)
        image += rng.normal(0, 4, image.shape)
        stream = io.BytesIO()
        PIL.Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
        folder = root / ("train" if number < count else "val") / f"class{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:05d}.jpg").write_bytes(stream.getvalue())


def torchvision_transform(normalisation: str, *random: Any) -> v2.Compose:
    statistics_ = NORMALISATIONS[normalisation]
    normalise = v2.Normalize(list(statistics_.mean), list(statistics_.std))
    return v2.Compose([*random, v2.ToImage(), v2.ToDtype(torch.float32, scale=True), normalise])


def ours(split: Split, config: TransformConfig, batch: int, processes: int) -> Callable[[int], Iterator[torch.Tensor]]:
    loader = BatchLoader(split, config, train=True, processes=processes)
    plan = EpochPlan(samples=len(split), global_batch=batch)
    return lambda epoch: (loaded.images for loaded in loader.epoch(plan, epoch))


def theirs(dataset: Any, batch: int, processes: int) -> Callable[[int], Iterator[torch.Tensor]]:
    loader = DataLoader(dataset, batch, shuffle=True, num_workers=processes, persistent_workers=processes > 0)
    return lambda epoch: (images for images, _ in loader)


def images_per_second(epoch: Callable[[int], Iterator[torch.Tensor]], number: int, clock: Callable[[], float]) -> float:
    start = clock()
    count = sum(len(images) for images in epoch(number))
    return count / (clock() - start)


def compare(
    workload: str,
    processes: int,
    us: Callable[[int], Iterator[torch.Tensor]],
    them: Callable[[int], Iterator[torch.Tensor]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Line:
    for warm in (us, them):
        images_per_second(warm, 0, clock)
    figures, threads = [], torch.get_num_threads()
    for number in range(1, rounds + 1):
        mine = images_per_second(us, number, clock)
        torch.set_num_threads(1)  # faster for torchvision: its operations on single images are too small for more
        figures.append((mine, images_per_second(them, number, clock)))
        torch.set_num_threads(threads)
    ours_median, theirs_median = (statistics.median(column) for column in zip(*figures, strict=True))
    ratios = sorted(round(mine / their, 2) for mine, their in figures)
    ratio = round(ours_median / theirs_median, 2)
    line = Line(workload, processes, round(ours_median), round(theirs_median), ratio, ratios[0], ratios[-1])
    print(
        f"{workload:24s} processes {processes}: ours {line.ours:9,}/s   torchvision {line.torchvision:9,}/s   "
        f"ratio {line.ratio} ({line.least} to {line.most})",
        flush=True,
    )
    return line


@dataclass(frozen=True)
class DeviceLine:
    workload: str
    loader_us: float
    device_us: float
    ratio: float
    least: float
    most: float
    to_loader_us: float
    to_device_us: float


def process_of(loader: BatchLoader, plan: EpochPlan) -> int:
    """Start the process of a loader by an epoch; return the number of the clock of its processor time."""
    before = set(multiprocessing.active_children())
    for _ in loader.epoch(plan, 0):
        pass
    (process,) = set(multiprocessing.active_children()) - before
    assert process.pid is not None
    return (~process.pid << 3) | 2  # as Linux numbers the clocks of processes


def processor_time(loader: BatchLoader, plan: EpochPlan, clock: int, epoch: int) -> tuple[float, float]:
    """Microseconds for an image: of the loader's process, and of `Batch.to` here."""
    start, moving = time.clock_gettime(clock), 0.0
    for batch in loader.epoch(plan, epoch):
        before = time.process_time()
        batch.to("cpu")
        moving += time.process_time() - before
    return 1e6 * (time.clock_gettime(clock) - start) / plan.samples, 1e6 * moving / plan.samples


def compare_devices(split: Split, rounds: int) -> list[DeviceLine]:
    """Where images are augmented, interleaved."""
    lines, plan = [], EpochPlan(samples=len(split), global_batch=CIFAR_BATCH)
    for workload, cutout in (("CIFAR crop+flip", 0), ("CIFAR crop+flip+cutout", 8)):
        fields: dict[str, Any] = {"crop_padding": 4, "horizontal_flip": 0.5, "normalise": "cifar10", "cutout": cutout}
        measured = []
        for where in ("loader", "device"):
            config = TransformConfig(**fields, augment_on=where)  # type: ignore[arg-type]
            loader = BatchLoader(split, config, train=True, processes=1, pixels=True)
            measured.append((loader, plan, process_of(loader, plan)))
        figures = [
            [value for one in measured for value in processor_time(*one, epoch)] for epoch in range(1, rounds + 1)
        ]
        here, to_here, there, to_there = (statistics.median(column) for column in zip(*figures, strict=True))
        ratios = sorted(round(one / other, 2) for one, _, other, _ in figures)
        here, there, to_here, to_there, ratio = (
            round(value, 2) for value in (here, there, to_here, to_there, here / there)
        )
        line = DeviceLine(workload, here, there, ratio, ratios[0], ratios[-1], to_here, to_there)
        print(
            f"{workload:24s} us an image: loader {line.loader_us}   device {line.device_us}   ratio {line.ratio} "
            f"({line.least} to {line.most})   Batch.to {line.to_loader_us} and {line.to_device_us}",
            flush=True,
        )
        lines.append(line)
    return lines


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = arguments.add_mutually_exclusive_group()
    kinds.add_argument("--one-core", action="store_true", help="one thread, by processor time")
    kinds.add_argument("--augment-on-device", action="store_true", help="our loader by where images are augmented")
    arguments.add_argument("--quick", action="store_true", help="fewer images and rounds")
    arguments.add_argument("--json", type=Path, help="also write the figures to this file")
    options = arguments.parse_args()
    rounds, clock = 3 if options.quick else 5, time.process_time if options.one_core else time.perf_counter
    counts = (0,) if options.one_core else (0, 2)
    if options.one_core or options.augment_on_device:
        torch.set_num_threads(1)
    lines: list[Line] = []
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        write_cifar(root / "cifar", 400 if options.quick else 2000)
        cifar = prepare("cifar10", root / "cifar", root / "cifar-store").split("train")
        if options.augment_on_device:
            write_json(options.json, compare_devices(cifar, 2 * rounds))
            return
        crop = (v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip())
        policy = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)
        fields: dict[str, Any] = {"crop_padding": 4, "horizontal_flip": 0.5, "normalise": "cifar10"}
        for processes in counts:
            for workload, config, random in (
                ("CIFAR crop+flip", TransformConfig(**fields), crop),
                ("CIFAR crop+flip+policy", TransformConfig(**fields, auto_augment="cifar10"), (*crop, policy)),
            ):
                dataset = GeneratedCIFAR10(str(root / "cifar"), transform=torchvision_transform("cifar10", *random))
                us, them = ours(cifar, config, CIFAR_BATCH, processes), theirs(dataset, CIFAR_BATCH, processes)
                lines.append(compare(workload, processes, us, them, rounds, clock))
        write_jpegs(root / "jpeg", 120 if options.quick else 600)
        jpeg = prepare("image_folder", root / "jpeg", root / "jpeg-store", parallel=1).split("train")
        config = TransformConfig(
            random_resized_crop=224,
            horizontal_flip=0.5,
            resize=256,
            center_crop=224,
            normalise=NORMALISATIONS["imagenet"],
        )
        transform = torchvision_transform("imagenet", v2.RandomResizedCrop(224), v2.RandomHorizontalFlip())
        for processes in counts:
            dataset = ImageFolder(str(root / "jpeg" / "train"), transform=transform)
            us, them = ours(jpeg, config, JPEG_BATCH, processes), theirs(dataset, JPEG_BATCH, processes)
            lines.append(compare("JPEG 500x375 to 224", processes, us, them, rounds, clock))
    write_json(options.json, lines)


def write_json(file: Path | None, lines: Sequence[Line | DeviceLine]) -> None:
    if file:
        file.write_text(json.dumps([asdict(line) for line in lines], indent=2) + "\n")


if __name__ == "__main__":
    main()
