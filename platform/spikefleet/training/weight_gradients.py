"""How convolutions on a CPU compute their weight gradients: one form for all ranks, and for all parts of a run.

The forms of `spikefleet_models.weight_gradients` round differently, so each checkpoint records the form, and resumption
restores it; each of them runs on every CPU.
"""

from __future__ import annotations

import socket

from torch import nn

from spikefleet.config.train_config import TrainConfig
from spikefleet.errors import UserError
from spikefleet.training.distributed import ProcessGroup
from spikefleet_models.weight_gradients import WeightGradients, chosen_form, use_weight_gradients


def settle_weight_gradients(
    network: nn.Module, train: TrainConfig, group: ProcessGroup, recorded: WeightGradients | None
) -> WeightGradients:
    """Chooses the form for all ranks, and sets it in a network. Collective.

    Args:
        network: of this rank, that is trained.
        train: of the run.
        group: this process's rank and group.
        recorded: form in the checkpoint that the run is resumed from; None in a new run.

    Returns:
        The form; torch's own on GPUs, in fp32 and fp16, in contiguous layout, and with `train.compile`.

    Raises:
        UserError: SPIKEFLEET_WEIGHT_GRADIENTS has no known value on some rank; raised on all ranks.
    """
    if group.device.type != "cpu" or train.precision != "bf16" or not train.channels_last or train.compile:
        return "torch"
    form = recorded or _agreed(group)
    use_weight_gradients(network, form)
    return form


def described(units: str, form: WeightGradients) -> str:
    """The kernels of a run in words: the form of its spiking units, and of these gradients if not torch's."""
    return units if form == "torch" else f"{units}, weight gradients of convolutions in {form}"


def _agreed(group: ProcessGroup) -> WeightGradients:
    """The form that all ranks choose; torch's where they choose different ones."""
    try:
        chosen, flaw = chosen_form(), None
    except ValueError as error:
        chosen, flaw = "torch", f"{error} on {socket.gethostname()}"
    found: list[tuple[WeightGradients, str | None]] = group.all_gather((chosen, flaw))
    for _, problem in found:
        if problem is not None:
            raise UserError(problem)
    forms = {form for form, _ in found}
    return forms.pop() if len(forms) == 1 else "torch"
