"""A question in window 2 about window 1: what membrane state that is carried over windows is worth.

`first_digit` shows one digit, then another; the label is the first one. Its recordings are cut in two windows of T=4,
one for each digit, and the network answers from the second window alone. The small network is trained in three ways:

    carried     the state of window 1 is the initial state of window 2, gradients go through both windows
    detached    likewise, but the gradient ends between the windows (truncated back-propagation)
    reset       window 2 starts from the reset state: all that it can know is that the answer is not its own digit

python tests/bench/carried_digit.py [--seeds 3] [--epochs 12] [--variants carried detached reset]
"""

import argparse
import time
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikefleet_models.carried_state import CarriedState, with_state
from spikefleet_models.families import build_model, model_config
from spikefleet_models.neurons import PLIF, spiking_nodes
from spikefleet_pipelines.events.binning_config import BinningConfig
from spikefleet_pipelines.events.representations import bin_events
from spikefleet_pipelines.events.twins import FirstDigit
from spikefleet_pipelines.events.windows import recording_of
from spikefleet_pipelines.sampling import epoch_order
from spikefleet_pipelines.sources.digits import read_digits
from spikefleet_pipelines.sources.digits_config import DigitsOptions

STEPS = 4
"""T of a window."""
BATCH = 32
RATE = 3e-3
BINNING = BinningConfig(slices=2 * STEPS, size=(17, 17), resize="area")

Split = tuple[Tensor, Tensor]
"""Frames [2 T, N, 2, 17, 17] and classes [N]."""


def frames_of(task: FirstDigit, split: str) -> Split:
    samples = task.samples(split, range(task.counts[split]))
    frames = np.stack(
        [bin_events(recording_of(events, task.sensor).window(0, task.duration_us), BINNING) for events, _ in samples], 1
    )
    return torch.from_numpy(frames).float(), torch.tensor([label for _, label in samples])


def answer(network: nn.Module, frames: Tensor, variant: str) -> Tensor:
    """Logits [B, K] of the second window."""
    first, second = frames.split(STEPS)
    state: CarriedState | None = None
    if variant != "reset":
        _, state = with_state(network, first)
        state = state.detach() if variant == "detached" else state
    logits: Tensor
    logits, _ = with_state(network, second, state)
    return logits


def batches(split: Split, seed: int, epoch: int) -> Iterator[Split]:
    frames, labels = split
    order = torch.from_numpy(epoch_order(len(labels), seed, epoch))
    for rows in order[: len(order) // BATCH * BATCH].split(BATCH):
        yield frames[:, rows], labels[rows]


def train(split: Split, variant: str, seed: int, epochs: int) -> nn.Module:
    torch.manual_seed(seed)
    network = build_model(model_config("small_event_net", timesteps=STEPS))
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE)
    steps = epochs * (len(split[1]) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for epoch in range(epochs):
        for frames, labels in batches(split, seed, epoch):
            optimizer.zero_grad()
            F.cross_entropy(answer(network, frames, variant), labels).backward()
            optimizer.step()
            schedule.step()
    return network


@torch.no_grad()
def accuracy(network: nn.Module, split: Split, variant: str) -> float:
    frames, labels = split
    network.eval()
    return (answer(network, frames, variant).argmax(1) == labels).float().mean().item()


def taus(network: nn.Module) -> str:
    values = [1 / node.w.sigmoid().item() for node in spiking_nodes(network).values() if isinstance(node, PLIF)]
    return ", ".join(f"{value:.1f}" for value in values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--variants", nargs="+", default=["carried", "detached", "reset"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = FirstDigit(read_digits(None, DigitsOptions(), 0).splits)
    training, test = (frames_of(task, split) for split in ("train", "test"))
    print(f"{len(training[1])} training and {len(test[1])} test recordings; chance 10 %, 11 % knowing the second digit")
    print("| membrane state | test accuracy by seed | mean | tau of the layers, last seed | processor time |")
    print("|---|---|---|---|---|")
    for variant in options.variants:
        start, scores = time.process_time(), []
        for seed in range(options.seeds):
            network = train(training, variant, seed, options.epochs)
            scores.append(100 * accuracy(network, test, variant))
        each = ", ".join(f"{score:.1f}" for score in scores)
        seconds = time.process_time() - start
        print(f"| {variant} | {each} % | {np.mean(scores):.1f} % | {taus(network)} | {seconds:.0f} s |", flush=True)


if __name__ == "__main__":
    main()
