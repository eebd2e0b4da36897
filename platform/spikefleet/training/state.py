"""The whole state of a training as one object, saved and restored bit by bit."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from spikefleet.config.schema import Config, differences
from spikefleet.config.train_config import may_differ_by_segment
from spikefleet.errors import UserError
from spikefleet.training.checkpoint_state import CheckpointState, WorldSize
from spikefleet.training.checkpoints import Snapshot, fitting_tensors, optimizer_tensors, restore_optimizer
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.fine_tuning import check_names, freeze, hold_statistics
from spikefleet.training.graphed import GraphedPass
from spikefleet.training.optimizer import build_ema, build_optimizer, learning_rate, set_rates
from spikefleet.training.precision import autocast
from spikefleet.training.stream import Lanes
from spikefleet.training.threads import resume_threads, thread_counts
from spikefleet.training.time_limit import TrainingClock
from spikefleet.training.weight_gradients import described, settle_weight_gradients
from spikefleet_models.families import build_model
from spikefleet_models.kernels import CpuForm
from spikefleet_models.packed_spikes import packed_spikes
from spikefleet_models.recomputation import recompute_stages
from spikefleet_models.shortcut import ShortcutNetwork, balance_coefficient
from spikefleet_models.weight_gradients import WeightGradients

if TYPE_CHECKING:
    from spikefleet.training.step import UnreadStep

_BUFFERS_IN_FORWARD = (  # the first was renamed after torch 2.10
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    else "broadcast_buffers"
)
"""The option of DDP by which rank 0's buffers are copied to all ranks before each forward pass."""


class TrainingState:
    """Network, optimizer, EMA of the weights, loss scale, and the position: next epoch and step within it.

    `best` has step, epoch and metrics of the best checkpoint so far; `history` has one row of metrics for each finished
    epoch; `sums` has the sums of the metrics of the current epoch.

    Args:
        config: of the run.
        group: this process's rank and group.
        data_hash: content hash of the data.
        steps_per_epoch: optimizer steps per epoch.

    Raises:
        UserError: the network does not support the configured side branches.
    """

    def __init__(self, config: Config, group: ProcessGroup, data_hash: str, steps_per_epoch: int) -> None:
        self.config, self.group, self.data_hash = config, group, data_hash
        self.steps_per_epoch = steps_per_epoch
        torch.manual_seed(config.train.seed)
        network = build_model(config.model).to(group.device)
        if config.train.channels_last:
            network = network.to(memory_format=torch.channels_last)
        if config.train.sync_bn and group.size > 1:
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        check_names(config, network)
        freeze(network, config.train.freeze)
        recompute_stages(network, config.train.recompute)
        self.network: nn.Module = network
        """The network without side branches, which is evaluated and registered."""
        self.train_model = self._with_branches(network)
        self.ddp_model = self._with_ddp(self.train_model)
        self.graphed = GraphedPass(self.train_model, config.train, group.device) if config.train.cuda_graphs else None
        self.optimizer = build_optimizer(self.train_model, config.optim)
        decay = config.train.ema_decay
        self.ema = build_ema(network, decay, config.train.ema_ramp) if decay is not None else None
        self.reads_late = group.device.type == "cuda" and config.optim.fused
        """Whether the numbers of a step are read one step later (step_reading.py); else within the step."""
        self.unread: UnreadStep | None = None
        """The last step, if its numbers are not read yet."""
        self.scaler = torch.amp.GradScaler(group.device.type, enabled=config.train.precision == "fp16")
        stream = config.train.stream
        self.lanes = Lanes(carries=stream is not None and stream.state == "carried")
        """Membranes of streams; empty without streams."""
        self.clock = TrainingClock()
        self.epoch = 0
        self.step_in_epoch = 0
        self.best: dict[str, Any] | None = None
        self.history: list[dict[str, float]] = []
        self.sums: dict[str, float] = {}
        self.cpu_form: CpuForm | None = None
        """The form of the spiking units on a CPU, once all ranks have settled it."""
        self.weight_gradients: WeightGradients | None = None
        """How convolutions compute the gradients of their weights: the form in the checkpoint, then the settled one."""
        self.world_sizes = [{"from_step": 0, "workers": group.size}]
        """From which step on how many workers trained."""
        self.noted_large_step = False
        """Whether this process has warned of a step larger than the weights of a layer; not part of a checkpoint."""

    def _with_branches(self, network: nn.Module) -> nn.Module:
        """The network with the side branches of shortcut back-propagation, which exist only in training."""
        if not self.config.shortcut.enabled:
            return network
        try:
            return ShortcutNetwork(network, self.config.shortcut).to(self.group.device)
        except ValueError as error:
            raise UserError(f"shortcut: {error}") from None

    def _with_ddp(self, network: nn.Module) -> nn.Module:
        model = network
        if self.group.size > 1:
            devices = [self.group.device] if self.group.device.type == "cuda" else None
            # `rank_statistics.py` averages batch-norm statistics, instead of a broadcast of rank 0's.
            unsynced: dict[str, Any] = {_BUFFERS_IN_FORWARD: False}
            model = DistributedDataParallel(network, device_ids=devices, gradient_as_bucket_view=True, **unsynced)
        if self.config.train.compile:
            model = torch.compile(model)  # type: ignore[assignment]
        return model

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.epoch * self.steps_per_epoch + self.step_in_epoch

    @property
    def eval_model(self) -> nn.Module:
        """The network to evaluate: the EMA of the weights if there is one."""
        return self.ema.module if self.ema is not None else self.network

    @property
    def balance(self) -> float:
        """The balance coefficient of the next step; 0 without side branches."""
        if not self.config.shortcut.enabled:
            return 0.0
        total = self.config.train.epochs * self.steps_per_epoch - self.first_step
        return balance_coefficient(self.config.shortcut, self.step - self.first_step, total)

    @property
    def first_step(self) -> int:
        """The step at which the schedules of the run's latest segment start."""
        segment = self.config.train.segment
        return 0 if segment is None else segment.from_step

    @property
    def _position(self) -> tuple[int, int]:
        return self.step - self.first_step, self.steps_per_epoch

    @property
    def scheduled_epochs(self) -> float:
        """The epochs from `first_step` to the end of the training."""
        first, epochs = self.first_step, self.config.train.epochs
        return epochs - first / self.steps_per_epoch if first else epochs

    def train_mode(self) -> None:
        """Sets the network to training; the batch-norm statistics of frozen modules stay as they are."""
        self.train_model.train()
        hold_statistics(self.network, self.config.train.freeze)

    def autocast(self) -> AbstractContextManager[Any]:
        """The autocast context of forward passes."""
        return autocast(self.config.train.precision, self.group.device)

    def packing(self) -> AbstractContextManager[None]:
        """The context of forward passes in training in which autograd keeps spikes as bits, where it is to."""
        return packed_spikes() if self.config.train.spike_bits else nullcontext()

    def settle_weight_gradients(self, units: str) -> str:
        """Sets how convolutions compute the gradients of their weights. Collective; call it after `restore`.

        Args:
            units: the form of the spiking units in words.

        Returns:
            The kernels of the run in words.
        """
        form = settle_weight_gradients(self.train_model, self.config.train, self.group, self.weight_gradients)
        self.weight_gradients = form
        return described(units, form)

    def set_learning_rate(self) -> float:
        """Sets the learning rates and the momentum of the next step; returns the rate of the weights."""
        position = self.config.optim, *self._position, self.scheduled_epochs
        set_rates(self.optimizer, *position)
        return learning_rate(*position)

    def snapshot(self) -> Snapshot:
        """The whole state. Collective: every rank must call it, since each adds its random state."""
        states = self.group.all_gather(_random_state(self.group.device))
        random = {f"{kind}/{rank}": tensor for rank, state in enumerate(states) for kind, tensor in state.items()}
        tensors: dict[str, Mapping[str, torch.Tensor]] = {
            "model": self.network.state_dict(),
            "optimizer": optimizer_tensors(self.optimizer, self.train_model),
            "random": random,
        }
        if isinstance(self.train_model, ShortcutNetwork):
            tensors["branches"] = self.train_model.branches.state_dict()
        if self.ema is not None:
            tensors["average"] = self.ema.module.state_dict()
        if carried := self.lanes.tensors(self.group):
            tensors["carried"] = carried
        state = {
            "epoch": self.epoch,
            "step_in_epoch": self.step_in_epoch,
            "steps_per_epoch": self.steps_per_epoch,
            "world_size": self.group.size,
            "data_hash": self.data_hash,
            "best": self.best,
            "history": self.history,
            "sums": self.sums,
            "scaler": self.scaler.state_dict(),
            "threads": thread_counts(self.group),
            "kernels": self.cpu_form,
            "weight_gradients": self.weight_gradients or "torch",
            "averaged": 0 if self.ema is None else self.ema.count,
            "world_sizes": self.world_sizes,
        }
        if self.config.train.max_minutes is not None:
            state |= {"seconds": self.clock.seconds, "longest_epoch": self.clock.longest_epoch}
        return Snapshot(tensors, state, self.config.dump())

    def restore(self, snapshot: Snapshot) -> str | None:
        """Restores a snapshot, and the number of threads that it was trained with. Collective.

        Returns:
            One line for the user where that number was changed or could not be; None otherwise.

        Raises:
            UserError: the snapshot has another configuration or data, or a number of workers that the configuration
                does not allow; the message lists the fields.
        """
        state = CheckpointState.of(snapshot.state, "to resume from")
        begins = self._begins_segment(state)
        differing = [
            line
            for line in differences(snapshot.config, self.config.dump())
            if not (begins and may_differ_by_segment(line.partition(":")[0]))
        ]
        if state.data_hash != self.data_hash:
            differing.append(f"data: expected content hash {state.data_hash[:12]}, found {self.data_hash[:12]}")
        if state.world_size != self.group.size and not self.config.cluster.elastic:
            differing.append(f"cluster.workers: expected {state.world_size}, found {self.group.size}")
        if differing:
            raise UserError(
                f"the run cannot be resumed with another configuration: {'; '.join(differing)}; "
                "use its values to resume it, or set another --name"
            )
        self.load(snapshot)
        with fitting_tensors():
            restore_optimizer(self.optimizer, self.train_model, snapshot.tensors["optimizer"])
            if state.scaler:
                self.scaler.load_state_dict(state.scaler)
            _set_random_state(snapshot.tensors["random"], self.group)
            self.lanes.restore(self.network, snapshot.tensors.get("carried", {}), self.group)
        self.best = None if state.best is None else state.best.model_dump()
        self.history, self.sums = state.history, state.sums
        self._note_world_size(state)
        threads = state.threads
        if threads is not None and len(threads) != self.group.size:
            threads = [threads[rank % len(threads)] for rank in range(self.group.size)]
        self.weight_gradients = state.weight_gradients
        self.clock.restart(0.0 if begins else state.seconds, state.longest_epoch)
        return resume_threads(threads, self.group)

    def _note_world_size(self, state: CheckpointState) -> None:
        """Continues the list of world sizes of a checkpoint."""
        before = state.world_sizes or [WorldSize(from_step=0, workers=state.world_size)]
        kept = [size.model_dump() for size in before if size.from_step < self.step or not self.step]
        if not kept or kept[-1]["workers"] != self.group.size:
            kept.append({"from_step": self.step, "workers": self.group.size})
        self.world_sizes = kept

    def _begins_segment(self, state: CheckpointState) -> bool:
        """Whether a checkpoint is the end of the segment before the configured one."""
        step = state.epoch * state.steps_per_epoch + state.step_in_epoch
        return self.config.train.segment is not None and step == self.config.train.segment.from_step

    def load(self, snapshot: Snapshot) -> None:
        """Restores the weights, also those of side branches, and the position."""
        self.load_weights(snapshot)
        with fitting_tensors():
            if isinstance(self.train_model, ShortcutNetwork):
                self.train_model.branches.load_state_dict(dict(snapshot.tensors["branches"]))
        state = CheckpointState.of(snapshot.state, "that was loaded")
        self.epoch, self.step_in_epoch = state.epoch, state.step_in_epoch

    def start_from(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Sets the initial weights, and with them their EMA. Raises UserError if they are those of another network.

        With `init.from` they may be a part of the network's; the others stay as they were initialised.
        """
        whole = self.network.state_dict()
        if self.config.init.source is not None and weights.keys() <= whole.keys():
            weights = {**whole, **weights}
        with fitting_tensors():
            self.network.load_state_dict(dict(weights))
            if self.ema is not None:
                self.ema.module.load_state_dict(dict(weights))

    def load_weights(self, snapshot: Snapshot) -> None:
        """Restores only the weights and their EMA."""
        with fitting_tensors():
            self.network.load_state_dict(dict(snapshot.tensors["model"]))
            if self.ema is not None:
                self.ema.module.load_state_dict(dict(snapshot.tensors["average"]))
                self.ema.count = snapshot.state["averaged"]


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_random_state(states: Mapping[str, torch.Tensor], group: ProcessGroup) -> None:
    """Sets the random state of this rank; one that the snapshot does not have takes that of another."""
    rank = group.rank % max(1, sum(name.startswith("cpu/") for name in states))
    torch.set_rng_state(states[f"cpu/{rank}"])
    if group.device.type == "cuda":
        torch.cuda.set_rng_state(states[f"cuda/{rank}"], group.device)
