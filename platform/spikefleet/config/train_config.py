"""The section `train`: duration, batch size, precision and regularisation of a training."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, PositiveFloat, model_validator

from spikefleet.config.section import Section
from spikefleet.config.stream_config import StreamConfig


class SegmentConfig(Section):
    """Where the schedules of learning rate, momentum and side branches start anew; `--extend-epochs` sets it."""

    from_step: int = Field(ge=1, description="optimizer steps before the segment")
    from_epoch: int = Field(ge=0, description="finished epochs before the segment")


_OF_A_SEGMENT = (
    "train.epochs",
    "train.segment",
    "optim.lr",
    "optim.schedule",
    "optim.milestones",
    "optim.gamma",
    "optim.warmup_epochs",
    "optim.warmup_bias_lr",
    "optim.warmup_momentum",
    "optim.final_factor",
)


def may_differ_by_segment(field: str) -> bool:
    """Whether a segment of a run may have another value of a field, by its dotted key, than the one before."""
    return field in _OF_A_SEGMENT or field.startswith("train.segment.")


class TrainConfig(Section):
    """Duration, batch size, precision and regularisation of training."""

    epochs: int = Field(ge=1, le=10_000_000, description="passes over the training split")
    global_batch: int = Field(ge=1, le=10_000_000, description="samples per optimizer step, over all workers")
    accumulate: int = Field(1, ge=1, le=1_000_000, description="micro-batches per worker and optimizer step")
    partial_batch: Literal["keep", "drop", "weigh"] = Field(
        "keep",
        description="the last batch of an epoch, where the samples do not fill it: a step as any other; dropped (other "
        "samples in each epoch); or a step whose gradient is scaled by the batch's share of global_batch",
    )
    eval_batch: int = Field(256, ge=1, le=1_000_000, description="samples per evaluation batch and worker")
    patience: int | None = Field(
        None, ge=1, description="epochs without a better validation metric after which the training ends; null: none"
    )
    min_delta: float = Field(0.0, ge=0, description="patience: a metric is better if it improves by more than this")
    max_minutes: float | None = Field(
        None,
        gt=0,
        le=10_000_000,
        description="minutes of training with its evaluations, over all resumptions: an epoch that would not fit is "
        "not started (the first one always is), and a larger value resumes the run; null: no limit",
    )
    segment: SegmentConfig | None = Field(
        None, description="what `--extend-epochs` trains behind the end of a run; null: the run has one segment"
    )
    evaluate_every: int = Field(1, ge=1, description="epochs between evaluations on the validation split")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of initialisation, sample order and augmentation")
    initial_weights: str | None = Field(
        None,
        pattern="^[0-9a-f]{64}$",
        description="SHA-256 of initial.safetensors in the run's directory, whose weights the training starts from; "
        "`retrain --from champion` and init.from set it",
    )
    freeze: tuple[str, ...] = Field(
        (), description="names of modules whose weights and batch-norm statistics stay as they are, such as [stem]"
    )
    stream: StreamConfig | None = Field(
        None, description="train on consecutive windows of recordings of events; null: on samples in random order"
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="autocast type; membranes stay fp32")
    channels_last: bool = Field(False, description="NHWC memory layout")
    compile: bool = Field(False, description="compile the network with torch.compile")
    cuda_graphs: bool = Field(
        False,
        description="classification on one GPU: capture the passes over a full batch as one CUDA graph and replay it, "
        "which spares small networks the time of kernel launches",
    )
    spike_bits: bool = Field(
        False,
        description="keep spikes for the backward pass as bits, and integers as bytes: half the memory, a few percent "
        "more time, the same gradients to the bit",
    )
    recompute: int = Field(
        0,
        ge=0,
        description="stages, from the one with the largest planes, whose activations the backward pass computes again: "
        "less memory, more time, the same gradients to the bit",
    )
    sync_bn: bool = Field(False, description="synchronise batch normalisation over all workers (CUDA only)")
    deterministic: bool = Field(False, description="use deterministic algorithms only")
    clip_norm: float | None = Field(None, gt=0, description="largest L2 norm of the gradient over all parameters")
    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="decay of the exponential moving average (EMA) of the weights"
    )
    ema_ramp: float | None = Field(
        None,
        gt=0,
        description="steps over which the EMA decay grows: decay * (1 - exp(-step / ramp)); null: constant decay",
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="classification only")
    class_weights: Literal["none", "balanced"] | dict[str, PositiveFloat] = Field(
        "none",
        description="classification: factor of the loss of a sample by its class: n / (K n_k) with balanced; or by "
        "names of classes, 1 for the others",
    )
    loss: Literal["mean", "sum"] = Field(
        "mean",
        description="reduction over the samples of a global batch; with sum (SpikeYOLO) the effective learning rate "
        "depends on the batch size",
    )
    loss_divisor: Literal["global", "rank"] = Field(
        "global",
        description="detection: count the divisor of the loss over the global batch, so that the loss does not depend "
        "on the number of workers; or over each rank's slice, as the released code does",
    )

    @model_validator(mode="after")
    def _patience_has_an_effect(self) -> Self:
        if self.min_delta and self.patience is None:
            raise ValueError(f"min_delta={self.min_delta} has no effect without patience; set train.patience too")
        return self

    @model_validator(mode="after")
    def _weighing_has_an_effect(self) -> Self:
        if self.partial_batch == "weigh" and self.loss == "sum":
            raise ValueError(
                "partial_batch=weigh has no effect with loss=sum, whose gradient is proportional to the batch already; "
                "set partial_batch=keep"
            )
        return self

    @model_validator(mode="after")
    def _memory_is_saved_in_eager_passes(self) -> Self:
        chosen = "spike_bits=true" if self.spike_bits else f"recompute={self.recompute}" if self.recompute else None
        other = "compile=true" if self.compile else "cuda_graphs=true" if self.cuda_graphs else None
        if chosen is not None and other is not None:
            raise ValueError(f"{chosen} cannot be combined with {other}; remove one of them")
        return self

    @model_validator(mode="after")
    def _graphs_have_whole_passes(self) -> Self:
        if self.cuda_graphs and (self.accumulate > 1 or self.compile):
            other = f"accumulate={self.accumulate}" if self.accumulate > 1 else "compile=true"
            raise ValueError(f"cuda_graphs=true cannot be combined with {other}; remove one of them")
        return self
