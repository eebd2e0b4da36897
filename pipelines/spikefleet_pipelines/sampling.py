"""Assignment of samples to steps and ranks: distributed, resumable, and stateless.

The order of an epoch is a pure function of (seed, epoch). Global batch s is the same set of samples for every world
size; rank r takes its contiguous slice of it. A checkpoint therefore only stores (epoch, step). Where samples are
grouped, the order also depends on the size of a rank's slice, which then has samples of one group; where the world size
may change during a training, on that of the largest one.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from spikefleet_pipelines.class_balance import ClassBalance
from spikefleet_pipelines.counter_random import Draw, random_bits


class StepBatch(NamedTuple):
    """The samples of one rank in one optimizer step."""

    step: int
    indices: NDArray[np.int64]
    """Positions in the split, [n_local]."""
    global_count: int
    """Samples of all ranks in this step; the loss of a rank is its sum divided by this."""


class TrainingRows(NamedTuple):
    """The samples of a split to train on, and those that should share a batch."""

    rows: NDArray[np.int64] | None = None
    """Positions in the split, ascending; None: all."""
    groups: NDArray[np.int64] | None = None
    """Group of each sample of the split, [n]; None: no groups."""
    balance: ClassBalance | None = None
    """Balanced sampling over the rows; None: every row once in an epoch."""


class Step(Protocol):
    """What a loader asks of the batch of a plan: `StepBatch` has it."""

    @property
    def indices(self) -> NDArray[np.int64]:
        """Positions in the split, [n_local]."""
        ...

    @property
    def global_count(self) -> int:
        """Samples of all ranks in this step that the loss is of."""
        ...


class Plan(Protocol):
    """The interface of `EpochPlan` and `EvaluationPlan` to a loader."""

    @property
    def samples(self) -> int:
        """Number of samples of the split."""
        ...

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps of an epoch."""
        ...

    def batches(self, epoch: int, start_step: int = 0) -> "Iterator[Step]":
        """Yield this rank's batches of an epoch from `start_step` on."""
        ...


def epoch_order(samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Compute the permutation of an epoch, [samples], by sorting hashed positions, which no library can change."""
    keys = random_bits(seed, epoch, np.arange(samples), Draw.ORDER)
    return np.argsort(keys, kind="stable").astype(np.int64)


def _in_groups(groups: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Order positions so that runs of `size` have one group; what is left over of each comes last.

    A run takes the place of its last member, so that groups alternate at random where the positions are shuffled.

    Args:
        groups: of each position, [n].
        size: of a run.

    Returns:
        A permutation of the positions, [n].
    """
    runs, left = [], []
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        whole = len(members) // size * size
        runs.append(members[:whole].reshape(-1, size))
        left.append(members[whole:])
    of_one_group = np.concatenate(runs)
    of_one_group = of_one_group[np.argsort(of_one_group[:, -1])]
    return np.concatenate([of_one_group.ravel(), np.sort(np.concatenate(left))])


def _check_ranks(samples: int, global_batch: int, world_size: int, rank: int) -> None:
    for name, value, least in (
        ("samples", samples, 1),
        ("global_batch", global_batch, 1),
        ("world_size", world_size, 1),
    ):
        if value < least:
            raise ValueError(f"{name} is {value}, expected at least {least}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}, expected 0 to {world_size - 1} for world_size {world_size}")


def _rank_slice(start: int, count: int, world_size: int, rank: int) -> slice:
    return slice(start + count * rank // world_size, start + count * (rank + 1) // world_size)


@dataclass(frozen=True, kw_only=True)
class EpochPlan:
    """The training steps of one rank.

    Every sample occurs exactly once per epoch. The last batch may be partial: the ranks' sizes then differ by at most
    one. A remainder that would leave a rank with fewer than two samples in one of its `accumulate` parts (batch
    statistics need two) is merged into the batch before it, so that no rank is ever empty and no sample is dropped. The
    parts of a step are `images.tensor_split(accumulate)`.

    With `drop_partial` an epoch has whole batches only; the samples that are left over are others in each epoch.

    With a balance of classes an epoch has the samples that it chooses, in random order, in the place of every sample.

    With groups a rank's slice of a batch has samples of one group, in a random order of groups. What does not fill a
    slice, fewer samples of each group than a slice has, comes at the end of the epoch, mixed.

    With `largest_world` the number of ranks may change between two steps: number of steps, order and groups are then
    those of the largest one, so that every sample still occurs once.

    Attributes:
        samples: number of samples of the split.
        global_batch: samples of all ranks per step.
        world_size: number of ranks.
        rank: of this process.
        largest_world: the largest number of ranks that the training may have; None: it has always `world_size`.
        seed: of the order.
        training: the samples to train on, and their groups.
        accumulate: parts of a step, between which gradients are accumulated.
        shuffle: permute the samples in each epoch.
        drop_partial: leave out the samples of a last, partial batch.

    Raises:
        ValueError: global_batch is not a multiple of world_size * accumulate, or there are too few samples.
    """

    samples: int
    global_batch: int
    world_size: int = 1
    rank: int = 0
    largest_world: int | None = None
    seed: int = 0
    accumulate: int = 1
    shuffle: bool = True
    drop_partial: bool = False
    training: TrainingRows = field(default=TrainingRows(), compare=False, repr=False)

    def __post_init__(self) -> None:
        _check_ranks(self._used, self.global_batch, self.world_size, self.rank)
        if self.accumulate < 1:
            raise ValueError(f"accumulate is {self.accumulate}, expected at least 1")
        parts = self.world_size * self.accumulate
        if self.global_batch % parts:
            below = self.global_batch // parts * parts
            nearest = f"{below} or {below + parts}" if below else f"{parts}"
            raise ValueError(
                f"global_batch {self.global_batch} is not a multiple of world_size {self.world_size} x accumulate "
                f"{self.accumulate} = {parts}; set global_batch to {nearest}"
            )
        if self._used < self._least_batch:
            raise ValueError(
                f"{self._used} samples are too few for world_size {self.world_size} x accumulate {self.accumulate}: "
                f"a batch needs at least {self._least_batch}; set fewer workers or a smaller accumulate"
            )
        if self.drop_partial and self._used < self.global_batch:
            raise ValueError(
                f"{self._used} samples are fewer than global_batch {self.global_batch}, so that dropping the partial "
                "batch leaves none; set a smaller global_batch, or keep the partial batch"
            )

    @property
    def _used(self) -> int:
        """Number of samples to train on in an epoch."""
        if self.training.balance is not None:
            return self.training.balance.samples
        return self.samples if self.training.rows is None else len(self.training.rows)

    @property
    def _least_batch(self) -> int:
        # One sample per part is allowed only where the user's own batch is no larger.
        return min(2 * self._ranks * self.accumulate, self.global_batch)

    @property
    def _ranks(self) -> int:
        """The number of ranks that steps and groups are made for."""
        return self.largest_world or self.world_size

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps of an epoch, the last one possibly partial."""
        full, rest = divmod(self._used, self.global_batch)
        return full + (rest >= self._least_batch and not self.drop_partial)

    @property
    def samples_per_epoch(self) -> int:
        """Number of samples in the batches of an epoch."""
        return self.steps_per_epoch * self.global_batch if self.drop_partial else self._used

    def samples_of(self, epoch: int) -> int:
        """Number of samples that the losses of an epoch are of."""
        return self.samples_per_epoch

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[StepBatch]:
        """Yield this rank's batches of an epoch from `start_step` on; none for `start_step == steps_per_epoch`.

        Raises:
            ValueError: `start_step` is not in 0 to `steps_per_epoch`.
        """
        steps = self.steps_per_epoch
        if not 0 <= start_step <= steps:
            raise ValueError(f"start_step is {start_step}, expected 0 to {steps}, the steps of an epoch")
        return self._batches(epoch, start_step)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """The samples of an epoch, in order."""
        order = epoch_order(self._used, self.seed, epoch) if self.shuffle else np.arange(self._used)
        rows, groups, balance = self.training
        if balance is not None:
            order = balance.epoch(epoch)[order]
        if rows is not None:
            order = rows[order]
        return order if groups is None else order[_in_groups(groups[order], self.global_batch // self._ranks)]

    def _batches(self, epoch: int, start_step: int) -> Iterator[StepBatch]:
        order = self._order(epoch)
        steps = self.steps_per_epoch
        for step in range(start_step, steps):
            start = step * self.global_batch
            count = self.samples_per_epoch - start if step == steps - 1 else self.global_batch
            yield StepBatch(step, order[_rank_slice(start, count, self.world_size, self.rank)], count)


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """The evaluation batches of one rank: in order, every sample exactly once over all ranks.

    The ranks' sizes differ by at most one in a step. A rank without samples in the last step gets no batch for it, so
    ranks may have different numbers of batches: gather results once, after the loop.
    """

    samples: int
    global_batch: int
    world_size: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        _check_ranks(self.samples, self.global_batch, self.world_size, self.rank)

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps, the last one possibly partial."""
        return -(-self.samples // self.global_batch)

    def batches(self, epoch: int = 0, start_step: int = 0) -> Iterator[StepBatch]:
        """Yield this rank's non-empty batches from `start_step` on; `epoch` is ignored."""
        for step in range(start_step, self.steps_per_epoch):
            start = step * self.global_batch
            count = min(self.global_batch, self.samples - start)
            part = _rank_slice(start, count, self.world_size, self.rank)
            if part.stop > part.start:
                yield StepBatch(step, np.arange(part.start, part.stop, dtype=np.int64), count)
