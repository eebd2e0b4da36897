"""Configuration: every recipe resolves; whatever is wrong is named with its remedy."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from spikefleet.config.recipes import (
    list_recipes,
    load_config,
    parse_config,
    parse_overrides,
    recipe_header,
    with_cluster,
)
from spikefleet.config.schema import differences
from spikefleet.errors import UserError
from spikefleet_models.families import build_model


@pytest.mark.parametrize("name", list_recipes())
def test_recipe_resolves_and_names_command_hardware_time_and_expectation(name: str) -> None:
    config = load_config(name)
    assert config.recipe == name
    header = recipe_header(name)
    assert f"spikefleet train {name}" in header
    for part in ("hardware:", "time:", "expected:"):
        assert part in header


@pytest.mark.parametrize("name", [name for name in list_recipes() if "(the paper's" in recipe_header(name)])
def test_recipes_of_a_paper_list_their_deviations(name: str) -> None:
    header = recipe_header(name)
    said = re.search(r"Deviation.*: those of (\w+)", header)
    assert "Deviation" in header
    assert said is None or "Deviation" in recipe_header(said.group(1))
    headers = header if said is None else header + recipe_header(said.group(1))
    config = load_config(name).dump()
    if config["data"]["source"] in ("cifar10", "cifar100", "dvs_cifar10"):
        assert re.search(r"\bval\b", headers)  # the papers train on all images, and choose on the test split
    network = config["model"].get("backbone", config["model"])
    if network.get("connection") in ("bsg", "bsg_star") and network["gate_gradient"] == "exact":
        assert "gate" in headers


@pytest.mark.parametrize("name", [name for name in list_recipes() if name.endswith("_strong")])
def test_strong_recipes_are_what_a_practitioner_would_choose(name: str) -> None:
    config, papers = load_config(name), load_config(name.removesuffix("_strong"))
    assert config.model == papers.model
    assert (config.optim.schedule, config.optim.warmup_epochs, config.optim.nesterov) == ("cosine", 5, True)
    assert config.train.label_smoothing == 0.1
    assert config.optim.weight_decay > 0
    assert not config.optim.decay_norm_and_bias
    assert config.registry.default_name == name
    if name.startswith("cifar"):
        assert config.train.global_batch == 128
        transform = config.dump()["data"]["transform"]
        assert (transform["auto_augment"], transform["cutout"]) == ("cifar10", 16)


@pytest.mark.parametrize("name", [name for name in list_recipes() if name.startswith("cifar")])
@pytest.mark.parametrize("connection", ["bsg_star", "add", "and", "iand", "post_add", "ann"])
def test_ablations_are_overrides(name: str, connection: str) -> None:
    overrides = [f"model.connection={connection}", "model.decoder=rate", "model.width=0.0625"]
    assert build_model(load_config(name, parse_overrides(overrides)).model).timesteps == (
        1 if connection == "ann" else 4
    )


def test_paper_schedules() -> None:
    cifar100, imagenet = load_config("cifar100_sg_resnet34"), load_config("imagenet_sg_resnet50")
    assert (cifar100.train.epochs, cifar100.train.global_batch) == (200, 32)
    assert cifar100.optim.milestones == (60, 120, 160)
    assert (imagenet.train.epochs, imagenet.train.global_batch, imagenet.optim.weight_decay) == (320, 256, 0.0)
    assert (imagenet.model.block, imagenet.model.decoder) == ("bottleneck", "rate")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("model.timestep=2", ("'model.timestep'", "did you mean 'model.timesteps'?")),
        ("modle.timesteps=2", ("'modle'", "did you mean 'model'?")),
        ("optim.lr=fast", ("optim.lr='fast'", "number")),
        ("optim.lr=-1", ("optim.lr=-1", "greater than 0")),
        ("optim.lr=.inf", ("optim.lr=inf", "finite")),
        ("model.timesteps=0", ("model.timesteps=0", "greater than or equal to 1")),
        ("model.timesteps=1.5", ("model.timesteps=1.5", "integer")),
        ("model.connection=or", ("model.connection='or'", "bsg")),
        ("train.global_batch=33", ("global_batch=33", "2 workers", "32 or 34")),
        ("train.sync_bn=true", ("sync_bn", "--gpu")),
        ("optim.milestones=[3]", ("milestones=[3]", "schedule=cosine")),
        ("optim.schedule=step", ("milestones", "for example")),
        ("data.source=digit", ("data.source='digit'", "'digits'")),
        ('data.options={"upsample": 3}', ("upsample",)),
        ("optim.lr", ("optim.lr", "section.key=value")),
        ("optim.lr.x=1", ("optim.lr is the value", "not a section", 'optim.lr={"x": ...}')),
        ("data.transform.normalise.mean=[0.5]", ('data.transform.normalise={"mean": ...}',)),
        ("registry.name=a b", ("registry.name='a b'", "must have 1 to 100 letters, digits, '.', '_' or '-'")),
        (f"registry.name={'y' * 5000}", (f"{'y' * 299}... (5,002 characters): must have 1 to 100 letters",)),
        ("optim.lr=[1", ("optim.lr=[1", "JSON")),
        ("train.seed=9223372036854775808", ("train.seed=9223372036854775808", "less than")),
        ('model={"family": "sg_resnext"}', ("sg_resnet, ", "not 'sg_resnext'")),
        ("train.seed=!!python/object/apply:os.getcwd []", ("train.seed", "integer")),
        ("train.seed=__import__('os').getpid()", ("train.seed", "integer")),
    ],
)
def test_bad_override_is_named_with_its_remedy(override: str, parts: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        load_config("digits", parse_overrides(["cluster.workers=2", override]))
    for part in parts:
        assert part in str(caught.value)


def test_a_later_override_counts_also_behind_a_whole_section() -> None:
    texts = ["optim.lr=0.1", 'optim={"lr": 0.2}', "optim.lr=0.3"]
    assert [load_config("digits", parse_overrides(texts[:count])).optim.lr for count in (1, 2, 3)] == [0.1, 0.2, 0.3]


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'digits'"):
        load_config("digit")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "empty"),
        ("- 1\n", "must be a mapping"),
        ("base: digits\ntrain: {epochs: 1}\ntrain: {epochs: 2}\n", "key 'train' is repeated"),
        ("base: digits\nmodel: &a {timesteps: 1}\ntrain: *a\n", "aliases"),
        ("base: digits\ntrain: !!python/name:os.system\n", "YAML"),
        ("model: {family: sg_resnet}\n", "'optim' is missing"),
        ("base: nothing\n", "recipe 'nothing' does not exist"),
    ],
)
def test_bad_recipe_file(text: str, part: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=part):
        load_config(str(path))


def test_recipe_file_that_is_no_text_or_missing(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    with pytest.raises(UserError, match="does not exist"):
        load_config(str(path))
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        load_config(str(path))
    path.write_bytes(b"#" * (1 << 20) + b"#")
    with pytest.raises(UserError, match="1 MiB"):
        load_config(str(path))


def test_base_that_comes_back_to_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("base: b.yaml\n")
    Path("b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(UserError, match=r"a.yaml -> b.yaml -> a.yaml"):
        load_config("a.yaml")


def test_dump_reads_back() -> None:
    config = load_config("imagenet_sg_resnet18", parse_overrides(["model.neuron.kind=plif"]))
    assert parse_config(config.dump(), "dump") == config


def test_identity_covers_what_is_learnt_and_nothing_else() -> None:
    config = load_config("digits")
    here = ("tracking.every_steps=3", "cluster.max_failures=0", "data.loader_processes=1", "checkpoint.keep_last=9")
    for same in here:
        other = load_config("digits", parse_overrides([same]))
        assert other.digest() == config.digest(), same
        assert differences(config.dump(), other.dump()) == [], same
    for different in ("optim.lr=0.2", "model.timesteps=2", "train.seed=1", "cluster.workers=2", "cluster.gpu=true"):
        other = load_config("digits", parse_overrides([different]))
        assert other.digest() != config.digest(), different
        (line,) = differences(config.dump(), other.dump())
        assert line.startswith(different.partition("=")[0])


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["shortcut.combine=convex", "shortcut.lambda0=0.6"], "shortcut.lambda0=0.6 for each of 2 side branches"),
        (["model.stages=[1]"], "shortcut.where=stage: the network has only one stage"),
    ],
)
def test_branches_that_cannot_be_are_refused_with_the_configuration(overrides: list[str], part: str) -> None:
    with pytest.raises(UserError, match=part):
        load_config("digits", parse_overrides(["shortcut.where=stage", *overrides]))


def test_workers_of_a_command_hold_whatever_overrides_say() -> None:
    sections = parse_overrides(["cluster.workers=2", 'cluster={"gpu": true}'])
    config = load_config("digits", with_cluster(sections, 4, gpu=False))
    assert (config.cluster.workers, config.cluster.gpu) == (4, True)
