"""Inference in fp32, bf16 and int8: SpikeYOLO beside its ANN twin, one image, one interleaved run.

    python tests/bench/bench_precision.py [--model spike_yolo_s] [--side 640] [--rounds N] [--threads N] [--json FILE]

Every network is deployed: batch norms folded, the chains of the spiking one merged (every convolution then reads
spikes) or, for fp32, kept as factors, which is the faster form in dense arithmetic. The twin's precisions are fp32 and
torch's bf16 autocast; torch has no int8 for it without calibration. Weights are drawn: times do not depend on them,
what rounding does to answers does, and `spikefleet evaluate --precision` measures that on trained networks. Ratios are
of medians, and of best times, to the twin in fp32. With --processor-time the time of the process is measured, which
says something on a machine that others use too.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn

from spikefleet_models.families import build_model, model_config
from spikefleet_models.kernels import unit_form
from spikefleet_models.reparam import deploy

TWIN = "ANN twin, fp32"


def variants(model: str, side: int) -> dict[str, Callable[[], None]]:
    """Forward passes of one image by name."""
    torch.manual_seed(0)
    config = model_config(model)
    twin = config.twin()
    assert twin is not None, f"{model} has no ANN twin"
    spiking, analogue = build_model(config).eval(), build_model(twin).eval()
    image = torch.rand(1, 3, side, side).contiguous(memory_format=torch.channels_last)

    def run(network: nn.Module, autocast: bool = False) -> Callable[[], None]:
        deployed = network.to(memory_format=torch.channels_last)

        def forward() -> None:
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
                deployed(image)

        return forward

    return {
        TWIN: run(deploy(analogue, merge=False)),
        "ANN twin, bf16 autocast": run(deploy(analogue, merge=False), autocast=True),
        "spiking, fp32, factored": run(deploy(spiking, merge=False)),
        "spiking, fp32, merged": run(deploy(spiking)),
        "spiking, bf16": run(deploy(spiking, precision="bf16")),
        "spiking, int8": run(deploy(spiking, precision="int8")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="spike_yolo_s")
    parser.add_argument("--side", type=int, default=640, help="of the image, in pixels")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--processor-time", action="store_true", help="of the process, instead of wall-clock time")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.processor_time else time.perf_counter
    seconds: dict[str, list[float]] = {}
    passes = variants(arguments.model, arguments.side)
    for number in range(arguments.rounds + 1):
        for name, forward in passes.items():
            start = clock()
            forward()
            if number:  # the first round packs weights
                seconds.setdefault(name, []).append(clock() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, times in seconds.items():
        ratio, best = medians[name] / medians[TWIN], min(times) / min(seconds[TWIN])
        print(f"{name:26} {1e3 * medians[name]:8.1f} ms   {ratio:.2f} of the twin in fp32 (best/best {best:.2f})")
    print(f"int8 / fp32 of the faster form: {medians['spiking, int8'] / medians['spiking, fp32, factored']:.2f}")
    print(f"threads {arguments.threads}, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}")
    print(f"spiking units: {unit_form(torch.device('cpu'))}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"seconds": seconds, "medians": medians}, indent=2) + "\n")


if __name__ == "__main__":
    main()
