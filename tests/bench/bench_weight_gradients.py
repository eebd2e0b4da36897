"""Weight gradients of convolutions in bf16 on this CPU: torch's kernel against the forms of `weight_gradients.py`.

    python tests/bench/bench_weight_gradients.py [--rounds N]

The convolutions of SG ResNet18 (CIFAR stem) at T * B = 64 images of 32x32, spikes as input, channels_last, one thread.
Milliseconds of processor time, medians of interleaved calls, so that the load of a shared machine falls on all alike.
"fp32" columns have fp32 tensors: what the same convolution takes without autocast. The last row adds up the network.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from spikefleet_models.weight_gradients import _backward, _Geometry, _kind, _weight_gradient, chosen_form, fastest_form

IMAGES = 64
# in, out, kernel, stride, height, how often
CONVOLUTIONS = [
    (64, 64, 3, 1, 32, 4),
    (64, 128, 3, 2, 32, 1),
    (64, 128, 1, 2, 32, 1),
    (128, 128, 3, 1, 16, 3),
    (128, 256, 3, 2, 16, 1),
    (128, 256, 1, 2, 16, 1),
    (256, 256, 3, 1, 8, 3),
    (256, 512, 3, 2, 8, 1),
    (256, 512, 1, 2, 8, 1),
    (512, 512, 3, 1, 4, 3),
]


def calls(channels: int, out: int, kernel: int, stride: int, height: int) -> dict[str, Callable[[], Any]]:
    """What is timed of one convolution."""
    geometry = _Geometry((kernel, kernel), (stride, stride), (kernel // 2, kernel // 2))
    layout = torch.channels_last
    x = (torch.rand(IMAGES, channels, height, height) < 0.2).bfloat16().to(memory_format=layout)
    weight = (torch.randn(out, channels, kernel, kernel) * 0.05).bfloat16().to(memory_format=layout)
    grad = torch.randn_like(F.conv2d(x, weight, None, stride, kernel // 2))
    wide = x.float(), weight.float(), grad.float()
    chosen = _kind(chosen_form(), x, out, geometry)

    def torchs() -> Any:
        return _backward(grad, x, weight, geometry, (False, True, False))

    return {
        "forward": lambda: F.conv2d(x, weight, None, stride, kernel // 2),
        "forward fp32": lambda: F.conv2d(wide[0], wide[1], None, stride, kernel // 2),
        "torch": torchs,
        "torch fp32": lambda: _backward(wide[2], wide[0], wide[1], geometry, (False, True, False)),
        "bf16 product": lambda: _weight_gradient(grad, x, weight, geometry, "bf16 product"),
        "fp32 product": lambda: _weight_gradient(grad, x, weight, geometry, "fp32 product"),
        "fp32 kernel": lambda: _weight_gradient(grad, x, weight, geometry, "fp32 kernel"),
        "chosen": torchs if chosen is None else lambda: _weight_gradient(grad, x, weight, geometry, chosen),
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="calls of each kind")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}; the form for this CPU: {fastest_form()}; chosen: {chosen_form()}")
    total: dict[str, float] = {}
    for *shape, count in CONVOLUTIONS:
        timed = calls(*shape)
        milliseconds: dict[str, list[float]] = {name: [] for name in timed}
        for number in range(arguments.rounds + 1):
            for name, call in timed.items():
                start = time.process_time()
                call()
                if number:  # the first round warms up
                    milliseconds[name].append((time.process_time() - start) * 1e3)
        channels, out, kernel, stride, height = shape
        row = {name: statistics.median(times) for name, times in milliseconds.items()}
        label = f"{channels}->{out}@{height}, {kernel}x{kernel}/{stride}, {count} times"
        if not total:
            print(f"{'':30}" + "".join(f"{name:>14}" for name in row))
        print(f"{label:30}" + "".join(f"{value:14.1f}" for value in row.values()), flush=True)
        total = {name: total.get(name, 0.0) + count * value for name, value in row.items()}
    print(f"{'all':30}" + "".join(f"{value:14.0f}" for value in total.values()))


if __name__ == "__main__":
    main()
