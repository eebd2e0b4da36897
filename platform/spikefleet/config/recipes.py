"""Recipes and overrides: from a name and `section.key=value` to a validated configuration.

A recipe is a YAML file. It overrides the recipe of its `base: NAME`; overrides, a mapping of dotted keys such as
`{"model.timesteps": 2}`, override both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from spikefleet.config.limits import beyond_limits
from spikefleet.config.messages import did_you_mean, error_messages, quoted
from spikefleet.config.schema import Config
from spikefleet.config.strict_yaml import parse_value, read_mapping, read_yaml_text
from spikefleet.config.task_table import find_task
from spikefleet.config.worker_count import parse_worker_count
from spikefleet.errors import UserError
from spikefleet_models.families import DEFAULT_FAMILY, AnyModelConfig, find_family
from spikefleet_models.family import ModelConfig
from spikefleet_pipelines.transforms.batch_transform_config import BatchTransformConfig
from spikefleet_pipelines.transforms.kinds import DEFAULT_KIND, AnyTransformConfig, transform_kinds
from spikefleet_tune.kinds import changed_kinds

_MODEL: TypeAdapter[ModelConfig] = TypeAdapter(AnyModelConfig)
_TRANSFORM: TypeAdapter[BatchTransformConfig] = TypeAdapter(AnyTransformConfig)


def list_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("spikefleet") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def recipe_header(name: str) -> str:
    """The comments of a recipe: command, hardware, time, expected metric. Raises UserError for an unknown name."""
    lines = _recipe_text(name).splitlines()
    return "\n".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))


def load_config(recipe: str, overrides: Mapping[str, Any] | None = None) -> Config:
    """Resolves a recipe and its overrides.

    Args:
        recipe: a name (`list_recipes`) or the path of a YAML file.
        overrides: values by dotted key, such as `{"optim.lr": 0.05}`; a later one overrides an earlier one.

    Raises:
        UserError: an unknown recipe or key, with the nearest one, or an invalid value, with what is allowed.
    """
    tree = _read_recipe(recipe)
    apply_overrides(tree, overrides or {})
    tree.setdefault("recipe", Path(recipe).stem)
    return parse_config(tree, origin=f"recipe {recipe}")


def override_config(config: Config, overrides: Mapping[str, Any], origin: str) -> Config:
    """A configuration with other values.

    Args:
        config: the configuration, which is not modified.
        overrides: values by dotted key.
        origin: where the overrides are from, for error messages.

    Raises:
        UserError: one message for each invalid field.
    """
    tree = config.dump()
    apply_overrides(tree, overrides)
    return parse_config(tree, origin)


def override_model(model: ModelConfig, overrides: Mapping[str, Any], origin: str) -> ModelConfig:
    """A model's configuration with other values.

    Args:
        model: the configuration, which is not modified.
        overrides: values by dotted key, such as `{"model.timesteps": 2}`.
        origin: name of the model, for error messages.

    Raises:
        UserError: a key of another section, or an invalid value.
    """
    tree: dict[str, Any] = {"model": model.model_dump(mode="json")}
    apply_overrides(tree, overrides)
    if others := tree.keys() - {"model"}:
        raise UserError(
            f"{origin}: a model has only keys of the section model, found {others.pop()!r}; use a recipe instead"
        )
    return parse_model(tree["model"], origin)


def parse_config(tree: Mapping[str, Any], origin: str) -> Config:
    """Validates plain data. The stored configuration of an earlier version needs `renamed.with_current_keys` first.

    Args:
        tree: plain data of a whole configuration.
        origin: recipe or file, for error messages.

    Raises:
        UserError: one message for each invalid field.
    """
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{origin}: {error_messages(error, Config, tree, concrete=_concrete)}") from None
    _check_values(tree, config, origin)
    return config


def parse_model(tree: Any, origin: str) -> ModelConfig:
    """Validates plain data of the section `model`. Raises UserError with a message for each invalid field."""
    try:
        model = _MODEL.validate_python(tree)
    except ValidationError as error:
        raise UserError(f"{origin}: {error_messages(error, Config, tree, at=('model',), concrete=_concrete)}") from None
    _check_values(tree, model, origin, "model")
    return model


def parse_transform(tree: Any, origin: str) -> BatchTransformConfig:
    """Validates plain data of `data.transform`. Raises UserError with a message for each invalid field."""
    try:
        transform = _TRANSFORM.validate_python(tree)
    except ValidationError as error:
        where = ("data", "transform")
        raise UserError(f"{origin}: {error_messages(error, Config, tree, at=where, concrete=_concrete)}") from None
    _check_values(tree, transform, origin, "data.transform")
    return transform


def _check_values(tree: Any, validated: BaseModel, origin: str, at: str = "") -> None:
    """Raises UserError where validation took `true` for 1 or `yes` for true, and for a value beyond any limit."""
    plain = validated.model_dump(mode="json")
    if problems := [*changed_kinds(tree, plain, at), *beyond_limits(plain, at)]:
        raise UserError(f"{origin}: {'; '.join(problems)}")


def check_uses(tree: Mapping[str, Any], origin: str) -> None:
    """Checks the task and the transform of a stored configuration, which serving needs, and nothing of its training.

    Raises:
        UserError: there is no such task, or the transform has a field that is wrong.
    """
    try:
        find_task(str(tree["task"]))
    except ValueError as error:
        raise UserError(f"{origin}: task={tree['task']!r}: {error}") from None
    data = tree["data"]
    if isinstance(data, Mapping) and "transform" in data:
        parse_transform(data["transform"], origin)


def _concrete(declared: type[BaseModel], data: Any) -> type[BaseModel]:
    """The class of a model family or of a kind of transform."""
    fields = data if isinstance(data, Mapping) else {}
    if declared is ModelConfig:
        return find_family(fields.get("family", DEFAULT_FAMILY))
    if declared is BatchTransformConfig:
        return transform_kinds().get(fields.get("kind", DEFAULT_KIND), declared)
    return declared


def _recipe_text(recipe: str) -> str:
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml"):
        return read_yaml_text(path, "recipe")
    if recipe not in list_recipes():
        hint = did_you_mean(recipe, list_recipes(), "`spikefleet recipes` lists them")
        raise UserError(f"recipe {recipe!r} does not exist; {hint}")
    return (resources.files("spikefleet") / "recipes" / f"{recipe}.yaml").read_text(encoding="utf-8")


def _read_recipe(recipe: str, below: tuple[str, ...] = ()) -> dict[str, Any]:
    if recipe in below:
        raise UserError(f"recipe {recipe}: its bases form a cycle: {' -> '.join((*below, recipe))}")
    tree = read_mapping(_recipe_text(recipe), f"recipe {recipe}", "model, data, train and optim")
    base = tree.pop("base", None)
    if base is None:
        return tree
    return _merged(_read_recipe(str(base), (*below, recipe)), tree)


def _merged(under: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Override fields; a transform of another kind has other fields, and takes none of those under it."""
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), dict)
        if both and key == "transform" and value.get("kind", _kind(merged[key])) != _kind(merged[key]):
            both = False
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _kind(transform: Mapping[str, Any]) -> Any:
    return transform.get("kind", DEFAULT_KIND)


def parse_overrides(texts: Iterable[str]) -> dict[str, Any]:
    """Parses overrides.

    Args:
        texts: each of the form `section.key=value`; `strict_yaml.parse_value` says what a value is.

    Returns:
        Values by dotted key, in order.

    Raises:
        UserError: a text has another form, or its value is neither JSON nor a plain scalar.
    """
    overrides: dict[str, Any] = {}
    for path, value in map(_parse_override, texts):
        overrides.pop(path, None)  # a repeated key moves to the end, behind a later override of its whole section
        overrides[path] = value
    return overrides


def _parse_override(override: str) -> tuple[str, Any]:
    path, equals, text = override.partition("=")
    if not equals or not all(path.strip().split(".")):
        raise UserError(f"override {quoted(override)} is not of the form section.key=value, for example optim.lr=0.05")
    try:
        return path.strip(), parse_value(text)
    except yaml.YAMLError as error:
        raise UserError(f"override {quoted(override)}: value {quoted(text)}: {error}") from None


def with_cluster(
    overrides: Mapping[str, Any], workers: int | str | tuple[int, int] | None, gpu: bool
) -> dict[str, Any]:
    """Adds the workers and GPUs of a command behind all other overrides, so that they hold.

    Args:
        overrides: values by dotted key.
        workers: Ray Train workers, or "MIN:MAX"; None leaves them as they are.
        gpu: one GPU for each worker.
    """
    if workers is not None:
        with suppress(ValueError):  # whoever reads the configuration says what is wrong
            workers = parse_worker_count(workers)
    chosen = {"cluster.workers": workers, "cluster.gpu": gpu or None}
    given = {key: value for key, value in chosen.items() if value is not None}
    return {**{key: value for key, value in overrides.items() if key not in given}, **given}


def apply_overrides(tree: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    """Sets values by dotted key in a tree of plain data, in place. Raises UserError if a key's section is a value."""
    for path, value in overrides.items():
        keys = path.split(".")
        node: Any = tree
        for depth, key in enumerate(keys[:-1], start=1):
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                section = ".".join(keys[:depth])
                raise UserError(
                    f"override {path}={quoted(value)}: {section} is the value {quoted(node)} in the recipe, not a "
                    f'section; set all of it as JSON: {section}={{"{keys[depth]}": ...}}'
                )
        node[keys[-1]] = value
