"""The configuration of a run: typed, frozen, checked as a whole before anything starts.

A recipe is a YAML file inside the package; `base: NAME` lays a recipe over another one, dotted overrides
(`model.timesteps=2`) lay over both. Each section is owned by the component it configures.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, Tag, TypeAdapter, ValidationError, model_validator
from pydantic.fields import FieldInfo

from spikefleet.config.strict_yaml import parse_yaml
from spikefleet.errors import UserError
from spikefleet_models.build import ModelConfig, task_of
from spikefleet_models.sg_resnet import SGResNetConfig
from spikefleet_models.shortcut import ShortcutConfig, branch_channels
from spikefleet_models.spike_yolo.config import SpikeYoloConfig, SpikingYoloV8Config
from spikefleet_pipelines.data_config import DataConfig

_RECIPE_LIMIT_BYTES = 1 << 20
_PLAIN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"


class Section(BaseModel):
    """A frozen part of the configuration that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TrainConfig(Section):
    """How long, how much at once and in which arithmetic."""

    epochs: int = Field(ge=1, description="passes over the training split")
    global_batch: int = Field(ge=1, description="samples in one optimizer step, over all workers")
    accumulate: int = Field(1, ge=1, description="micro-batches that a worker sums up before one optimizer step")
    eval_batch: int = Field(256, ge=1, description="samples in one evaluation batch of one worker")
    evaluate_every: int = Field(1, ge=1, description="epochs between evaluations on the validation split")
    seed: int = Field(0, ge=0, description="seed of initialisation, sample order and augmentation")
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="autocast type; membranes stay fp32")
    channels_last: bool = Field(False, description="NHWC memory layout")
    compile: bool = Field(False, description="torch.compile the network")
    sync_bn: bool = Field(False, description="batch normalisation over all workers (CUDA only)")
    deterministic: bool = Field(False, description="refuse kernels that do not give the same bits twice")
    clip_norm: float | None = Field(None, gt=0, description="largest L2 norm of the whole gradient")
    ema_decay: float | None = Field(None, gt=0, lt=1, description="decay of the exponential moving average of weights")
    ema_ramp: float | None = Field(
        None,
        gt=0,
        description="steps over which that decay grows: decay * (1 - exp(-step / ramp)); null: from the start",
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="classification only")
    loss: Literal["mean", "sum"] = Field(
        "mean", description="over the samples of a global batch; sum makes the rate depend on the batch (SpikeYOLO)"
    )


class OptimConfig(Section):
    """SGD with momentum and a learning rate that is a pure function of the position in training."""

    lr: float = Field(gt=0, description="learning rate after warm-up, for the global batch")
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(0.0, ge=0)
    decay_norm_and_bias: bool = Field(True, description="weight decay on batch-norm, gate and bias parameters too")
    schedule: Literal["constant", "step", "cosine", "linear"] = "cosine"
    milestones: tuple[int, ...] = Field((), description="epochs at which `step` multiplies the rate by gamma")
    gamma: float = Field(0.1, gt=0, le=1)
    warmup_epochs: float = Field(0.0, ge=0, description="epochs of linear growth from zero")
    warmup_bias_lr: float | None = Field(None, ge=0, description="biases start warm-up from this rate instead of zero")
    warmup_momentum: float | None = Field(None, ge=0, lt=1, description="momentum grows from this during warm-up")
    final_factor: float = Field(0.0, ge=0, le=1, description="last learning rate / lr, for cosine and linear")

    @model_validator(mode="after")
    def _warm_up_is_there(self) -> Self:
        for name in ("warmup_bias_lr", "warmup_momentum"):
            if getattr(self, name) is not None and not self.warmup_epochs:
                raise ValueError(f"{name}={getattr(self, name)} has no effect without warmup_epochs")
        return self

    @model_validator(mode="after")
    def _milestones_belong_to_step(self) -> Self:
        if self.schedule == "step" and not self.milestones:
            raise ValueError("schedule=step needs milestones, for example optim.milestones=[100,150]")
        if self.schedule != "step" and self.milestones:
            raise ValueError(f"milestones={list(self.milestones)} have no effect with schedule={self.schedule}")
        if list(self.milestones) != sorted(set(self.milestones)) or any(m < 1 for m in self.milestones):
            raise ValueError(f"milestones={list(self.milestones)} must be growing epochs from 1 on")
        return self


class ClusterConfig(Section):
    """Where it runs. Workers see other samples together in batch norm, and threads add up in another order."""

    workers: int = Field(1, ge=0, description="Ray Train workers; 0 trains in this process, without Ray")
    gpu: bool = Field(False, description="one GPU for each worker")
    cpus_per_worker: float = Field(1, gt=0)
    max_failures: int = Field(3, ge=-1, description="restarts after a worker's death; -1 for no limit")


class CheckpointConfig(Section):
    """When state is saved, and what is kept of it."""

    every_epochs: int = Field(1, ge=1)
    every_steps: int | None = Field(None, ge=1, description="also within an epoch")
    keep_last: int = Field(2, ge=1, description="newest checkpoints kept besides the best one")
    metric: str = Field("top1", description="validation metric that decides which checkpoint is the best")
    mode: Literal["max", "min"] = "max"


class TrackingConfig(Section):
    """What goes to MLflow, and how often."""

    experiment: str | None = Field(None, description="MLflow experiment; the recipe's name if not given")
    every_steps: int = Field(10, ge=1, description="steps between two rows of step metrics")
    health_every_steps: int = Field(50, ge=1, description="steps between two measurements of firing rates")


class RegistryConfig(Section):
    """Under which name the best checkpoint is registered."""

    register_best: bool = True
    name: str | None = Field(None, pattern=_PLAIN_NAME, description="registered model; the recipe's name if not given")


class Config(Section):
    """One training run."""

    recipe: str = Field(pattern=_PLAIN_NAME, description="name of the recipe")
    task: Literal["classification", "detection"] = "classification"
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    optim: OptimConfig
    shortcut: ShortcutConfig = ShortcutConfig()
    cluster: ClusterConfig = ClusterConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    registry: RegistryConfig = RegistryConfig()

    @model_validator(mode="after")
    def _task_suits_model_and_data(self) -> Self:
        if (can := task_of(self.model)) != self.task:
            raise ValueError(f"task={self.task}, but model.family={self.model.family} is for {can}; set task={can}")
        kind = "image" if self.task == "classification" else "detection"
        if self.data.transform.kind != kind:
            raise ValueError(
                f"task={self.task} needs data.transform.kind={kind}; the data section has {self.data.transform.kind}"
            )
        if isinstance(self.model, SpikeYoloConfig | SpikingYoloV8Config):
            coarsest, sides = self.model.strides[-1], self.data.transform.divisor  # type: ignore[attr-defined]
            if sides % coarsest:
                raise ValueError(
                    f"data.transform.divisor={sides} is no multiple of the network's coarsest stride {coarsest}; "
                    f"set data.transform.divisor={coarsest} and a size that it divides"
                )
        if self.task == "detection" and self.shortcut.enabled:
            raise ValueError(
                f"shortcut.where={self.shortcut.where}: side branches classify, and the task is detection; "
                "set shortcut.where=none"
            )
        if self.shortcut.enabled and isinstance(self.model, SGResNetConfig):
            try:
                branch_channels(self.model, self.shortcut)
            except ValueError as error:
                raise ValueError(f"shortcut.{error}") from None
        if self.task == "detection" and self.train.label_smoothing:
            raise ValueError(f"train.label_smoothing={self.train.label_smoothing} is for classification only")
        if self.train.ema_ramp is not None and self.train.ema_decay is None:
            raise ValueError(f"train.ema_ramp={self.train.ema_ramp} has no effect without train.ema_decay")
        return self

    @model_validator(mode="after")
    def _batch_divides(self) -> Self:
        parts = max(1, self.cluster.workers) * self.train.accumulate
        if self.train.global_batch % parts:
            below = self.train.global_batch // parts * parts
            near = [n for n in (below, below + parts) if n]
            raise ValueError(
                f"train.global_batch={self.train.global_batch} cannot be divided by {max(1, self.cluster.workers)} "
                f"workers x {self.train.accumulate} micro-batches; the nearest that can: {' or '.join(map(str, near))}"
            )
        return self

    @model_validator(mode="after")
    def _sync_bn_has_gpus(self) -> Self:
        if self.train.sync_bn and not self.cluster.gpu:
            raise ValueError("train.sync_bn=true needs GPUs (torch has it for CUDA only); add --gpu or leave it out")
        return self

    @property
    def registered_name(self) -> str:
        return self.registry.name or self.recipe

    def dump(self) -> dict[str, Any]:
        """Plain data that JSON and YAML can hold; `Config.model_validate` reads it back."""
        return self.model_dump(mode="json")

    def digest(self) -> str:
        """Hash of all that decides what is learnt."""
        return hashlib.sha256(json.dumps(_identity(self.dump()), sort_keys=True).encode()).hexdigest()


# What may differ between a run and its resumption: none of it changes a single bit of the result.
_NOT_IDENTITY = (
    "tracking.experiment",
    "tracking.every_steps",
    "registry",
    "cluster.max_failures",
    "checkpoint.every_epochs",
    "checkpoint.every_steps",
    "checkpoint.keep_last",
    "data.root",
    "data.store",
    "data.loader_processes",
)


def _identity(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if path in _NOT_IDENTITY:
            continue
        kept[key] = _identity(value, f"{path}.") if isinstance(value, Mapping) else value
    return kept


def differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Field-by-field differences of two dumped configurations, of the fields that decide what is learnt."""
    left, right = dict(leaves(_identity(_completed(saved)))), dict(leaves(_identity(wanted)))
    return [
        f"{path}: {left.get(path, 'absent')!s} in the run, {right.get(path, 'absent')!s} asked for"
        for path in sorted(left.keys() | right.keys())
        if left.get(path, "absent") != right.get(path, "absent")
    ]


def _completed(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """A configuration that an earlier version wrote, with this version's defaults for fields that it did not have."""
    try:
        return Config.model_validate(saved).dump()
    except ValidationError:
        return saved


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of a dumped configuration."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# ---------------------------------------------------------------------------------------------------- recipes


_MODEL: TypeAdapter[ModelConfig] = TypeAdapter(ModelConfig)


def list_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("spikefleet") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def recipe_header(name: str) -> str:
    """The comment at the head of a recipe: command, hardware, time, expected metric."""
    lines = _recipe_text(name).splitlines()
    return "\n".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))


def load_config(recipe: str, overrides: Sequence[str] = ()) -> Config:
    """Resolves a recipe (a name or a path to a YAML file) and its dotted overrides.

    Raises UserError naming the recipe, key or value that is wrong, the nearest that exists and what is allowed.
    """
    tree = _read_recipe(recipe)
    for override in overrides:
        apply_override(tree, override)
    tree.setdefault("recipe", Path(recipe).stem)
    return parse_config(tree, origin=f"recipe {recipe}")


def override_config(config: Config, overrides: Sequence[str], origin: str) -> Config:
    """A configuration with dotted overrides laid over it. Raises as `load_config`."""
    tree = config.dump()
    for override in overrides:
        apply_override(tree, override)
    return parse_config(tree, origin)


def override_model(model: ModelConfig, overrides: Sequence[str], origin: str) -> ModelConfig:
    """A model's configuration with overrides such as model.timesteps=2 laid over it. Raises as `load_config`."""
    tree: dict[str, Any] = {"model": model.model_dump(mode="json")}
    for override in overrides:
        apply_override(tree, override)
    if others := tree.keys() - {"model"}:
        raise UserError(
            f"{origin}: a model by its name has only keys model..., not {others.pop()}; give a recipe for those"
        )
    try:
        return _MODEL.validate_python(tree["model"])
    except ValidationError as error:
        complaints = [_sentence({**item, "loc": ("model", *item["loc"])}) for item in error.errors()]
        raise UserError(f"{origin}: " + "; ".join(dict.fromkeys(complaints))) from None


def parse_config(tree: Mapping[str, Any], origin: str) -> Config:
    """Checks plain data against the schema. Raises UserError with one line for each field that is wrong."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        complaints = [_sentence(item) for item in error.errors()]
        raise UserError(f"{origin}: " + "; ".join(dict.fromkeys(complaints))) from None


def _recipe_text(recipe: str) -> str:
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UserError(f"recipe file {recipe} does not exist")
        if path.stat().st_size > _RECIPE_LIMIT_BYTES:
            raise UserError(f"recipe file {recipe} has {path.stat().st_size} bytes; a recipe has at most 1 MiB")
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise UserError(f"recipe file {recipe} is not UTF-8 text") from None
    if recipe not in list_recipes():
        near = difflib.get_close_matches(recipe, list_recipes(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else "`spikefleet recipes` lists them"
        raise UserError(f"there is no recipe {recipe!r}; {hint}")
    return (resources.files("spikefleet") / "recipes" / f"{recipe}.yaml").read_text(encoding="utf-8")


def _read_recipe(recipe: str, below: tuple[str, ...] = ()) -> dict[str, Any]:
    if recipe in below:
        raise UserError(f"recipe {recipe}: its chain of bases comes back to itself: {' -> '.join((*below, recipe))}")
    try:
        tree = parse_yaml(_recipe_text(recipe))
    except yaml.YAMLError as error:
        raise UserError(f"recipe {recipe} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"recipe {recipe} is empty or no mapping; it needs at least model, data, train and optim")
    base = tree.pop("base", None)
    if base is None:
        return tree
    return _overlay(_read_recipe(str(base), (*below, recipe)), tree)


def _overlay(under: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), dict)
        merged[key] = _overlay(merged[key], value) if both else value
    return merged


def parse_override(override: str) -> tuple[str, Any]:
    """Dotted key and value of `section.key=value`. Raises UserError when it has another form."""
    path, equals, text = override.partition("=")
    if not equals or not all(path.strip().split(".")):
        raise UserError(f"override {override!r} is not of the form section.key=value, for example optim.lr=0.05")
    try:
        return path.strip(), parse_yaml(text)
    except yaml.YAMLError:
        raise UserError(f"override {override!r}: the value {text!r} is not valid YAML") from None


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Sets the value of `section.key=value` in a tree of plain data. Raises UserError."""
    path, value = parse_override(override)
    keys = path.split(".")
    node: Any = tree
    for key in keys[:-1]:
        node = node.setdefault(key, {})
        if not isinstance(node, dict):
            raise UserError(f"override {override!r}: {key!r} is a value, not a section")
    node[keys[-1]] = value


# --------------------------------------------------------------------------------------------------- sentences


def _sentence(error: Mapping[str, Any]) -> str:
    location, known = _resolve([str(part) for part in error["loc"]])
    path = ".".join(location)
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {'.'.join([*location[:-1], near[0]])!r}?" if near else f"known here: {', '.join(known)}"
        return f"unknown key {path!r}; {hint}"
    if error["type"] == "missing":
        return f"{path!r} is missing"
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    if not path or isinstance(error["input"], Mapping | BaseModel):
        return f"{path + ': ' if path else ''}{message}"
    return f"{path}={error['input']!r}: {message}"


def _resolve(location: Sequence[str]) -> tuple[list[str], list[str]]:
    """A location as the user writes it, without the tags of unions that pydantic puts in, and the fields beside its
    last part."""
    plain: list[str] = []
    members: list[tuple[str | None, type[BaseModel]]] = [(None, Config)]
    beside: list[type[BaseModel]] = [Config]
    for part in location:
        if len(members) > 1 and part in (tag for tag, _ in members):
            members = [(tag, member) for tag, member in members if tag == part]
            continue
        plain.append(part)
        beside = [member for _, member in members]
        fields = (member.model_fields.get(part) for member in beside)
        members = [section for field in fields if field for section in _sections_of(field)]
    return plain, sorted({name for member in beside for name in member.model_fields})


def _sections_of(annotation: Any, tag: str | None = None) -> Iterator[tuple[str | None, type[BaseModel]]]:
    """The configurations that an annotation or a field allows, each with its tag in a union."""
    if isinstance(annotation, FieldInfo):
        yield from _sections_of(annotation.annotation)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield tag, annotation
    elif get_origin(annotation) is Annotated:
        inner, *notes = get_args(annotation)
        tag = next((note.tag for note in notes if isinstance(note, Tag)), tag)
        yield from _sections_of(inner, tag)
    elif get_origin(annotation) in (Union, UnionType):
        for argument in get_args(annotation):
            yield from _sections_of(argument, tag)
