"""Detection: SpikeYOLO s against its ANN twin, merged against factored inference, evaluation against pycocotools.

    python tests/bench/bench_detection.py [--quick] [--threads N] [--json FILE] [--retinanet]

A training step is forward, loss, backward and SGD on 2 images of 320x320, T = 1, D = 4, 80 classes; the twin is the
same topology with ReLU. Inference is one image of 320x320 through the deployed network, its RepConv chains merged to
dense 3x3 convolutions or kept. Evaluation is 200 images with 100 boxes each: from arrays to the twelve numbers and
the figures of each class, against pycocotools' own evaluate and accumulate on the same plain data. Variants run
interleaved in one process; medians are printed as ratios. Peak memory is the resident set of a process of its own.
`--retinanet` measures a training step of Spiking RetinaNet (SG ResNet18, T = 4) in the native form against the lean
one, and nothing else.
"""

import argparse
import contextlib
import io
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from spikefleet.tasks.coco_metrics import FoundBoxes, evaluate_boxes, ground_truth, results
from spikefleet_models.detection import Objects
from spikefleet_models.families import build_model, model_config
from spikefleet_models.kernels import Implementation, unit_form
from spikefleet_models.reparam import deploy
from spikefleet_models.spiking_unit import use_implementation
from spikefleet_pipelines.store.annotations import Annotations

SIDE, BATCH, CLASSES = 320, 2, 80
MODELS = {"spike_yolo_s": "spike_yolo_s", "ANN twin": "spike_yolo_ann_s"}


class Step:
    """A training step."""

    def __init__(self, name: str, form: Implementation = "auto") -> None:
        torch.manual_seed(0)
        config = model_config(name)
        self.network = build_model(config).to(memory_format=torch.channels_last).train()
        use_implementation(self.network, form)
        self.criterion = config.build_criterion()
        self.images = torch.rand(BATCH, 3, SIDE, SIDE).contiguous(memory_format=torch.channels_last)
        corners = torch.rand(BATCH, 8, 2) * SIDE / 2
        boxes = torch.cat([corners, corners + 16 + torch.rand(BATCH, 8, 2) * SIDE / 3], dim=2)
        self.objects = [Objects(one, torch.randint(CLASSES, (8,))) for one in boxes]
        trained = [p for p in self.network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=1e-4, momentum=0.9)

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.criterion.loss(self.network(self.images), self.objects, (SIDE, SIDE))["loss"].backward()
        self.optimizer.step()


class Inference:
    """One image through a deployed network."""

    def __init__(self, network: nn.Module, merge: bool) -> None:
        self.network = deploy(network, merge=merge).to(memory_format=torch.channels_last)
        self.image = torch.rand(1, 3, SIDE, SIDE).contiguous(memory_format=torch.channels_last)

    def __call__(self) -> None:
        with torch.inference_mode():
            self.network(self.image)


class Evaluations:
    """Boxes near the truth, as a detector in the middle of its training finds them."""

    def __init__(self, images: int) -> None:
        draw = np.random.default_rng(0)
        self.truths, self.found = [], []
        for image_id in range(images):
            corners, sizes = draw.uniform(0, 400, (7, 2)), draw.uniform(8, 200, (7, 2))
            labels = draw.integers(0, CLASSES, 7)
            self.truths.append(
                Annotations(
                    image_id, 640, 640, np.hstack([corners, sizes]), labels + 1, labels, np.zeros(7, bool),
                    sizes.prod(axis=1), 100 * image_id + np.arange(7) + 1,
                )
            )  # fmt: skip
            near = draw.integers(0, 7, 100)
            boxes = np.hstack([corners, corners + sizes])[near] + draw.normal(0, 12, (100, 4))
            scores = -np.sort(-draw.uniform(0, 1, 100))
            self.found.append(FoundBoxes(boxes, scores, labels[near]))
        self.names, self.ids = [str(k) for k in range(CLASSES)], list(range(1, CLASSES + 1))
        self.plain = ground_truth(self.truths, self.names, self.ids), results(self.found, self.truths, self.ids)

    def ours(self) -> None:
        truth = ground_truth(self.truths, self.names, self.ids)
        evaluate_boxes(truth, results(self.found, self.truths, self.ids))

    def pycocotools(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            annotated = COCO()
            annotated.dataset = self.plain[0]
            annotated.createIndex()
            evaluation = COCOeval(annotated, annotated.loadRes(self.plain[1]), "bbox")
            evaluation.evaluate()
            evaluation.accumulate()


def interleaved(variants: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of each variant; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_mib(name: str) -> float:
    """Resident set of a fresh process after two steps."""
    done = subprocess.run([sys.executable, __file__, "--memory-of", name], check=True, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 rounds, no memory figures")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--retinanet", action="store_true", help="Spiking RetinaNet's training step alone, by form")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.retinanet:
        forms: tuple[Implementation, ...] = ("lean", "native")
        steps = {form: Step("retinanet_sg_resnet18", form) for form in forms}
        lean, native = interleaved(steps, 2 if arguments.quick else arguments.rounds).values()
        print(f"Spiking RetinaNet, training step: lean {lean:.3f} s, native {native:.3f} s, ratio {native / lean:.2f}")
        return
    if arguments.memory_of:
        step = Step(arguments.memory_of)
        for _ in range(2):
            step()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    rounds = 2 if arguments.quick else arguments.rounds
    memory = {} if arguments.quick else {title: peak_mib(name) for title, name in MODELS.items()}
    network = build_model(model_config("spike_yolo_s")).eval()
    evaluations = Evaluations(50 if arguments.quick else 200)
    figures = {
        "training step": interleaved({title: Step(name) for title, name in MODELS.items()}, rounds),
        "inference": interleaved({"merged": Inference(network, True), "factored": Inference(network, False)}, rounds),
        "evaluation": interleaved(
            {"spikefleet": evaluations.ours, "pycocotools": evaluations.pycocotools}, min(rounds, 5)
        ),
    }
    for what, medians in figures.items():
        (first, one), (second, other) = medians.items()
        print(f"{what:14} {first} {one:.3f} s, {second} {other:.3f} s: ratio {one / other:.3f}", flush=True)
    for title, peak in memory.items():
        print(f"peak memory    {title} {peak:.0f} MiB")
    print(f"spiking units: {unit_form(torch.device('cpu'))}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"seconds": figures, "peak_mib": memory}, indent=2) + "\n")


if __name__ == "__main__":
    main()
