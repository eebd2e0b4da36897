"""Loading: the same batches from any number of processes, after a resume, and from a config to an open store."""

import multiprocessing
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from spikefleet_pipelines.data_config import DataConfig, store_name
from spikefleet_pipelines.errors import SourceError, StoreError
from spikefleet_pipelines.loading import Batch, BatchLoader
from spikefleet_pipelines.opening import open_or_prepare
from spikefleet_pipelines.sampling import EpochPlan, EvaluationPlan
from spikefleet_pipelines.sources import prepare
from spikefleet_pipelines.store.manifest import ImageFormat
from spikefleet_pipelines.store.reader import Split, Store
from spikefleet_pipelines.store.shards import write_shard
from spikefleet_pipelines.store.writer import StoreWriter
from spikefleet_pipelines.transforms.classification_config import TransformConfig

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding")

AUGMENTED = TransformConfig(crop_padding=1, horizontal_flip=0.5, cutout=3, normalise="digits")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return prepare("digits", None, tmp_path_factory.mktemp("digits") / "store")


@pytest.fixture(scope="module")
def train(store: Store) -> Split:
    return store.split("train")


def plan(split: Split, **changes: int) -> EpochPlan:
    return EpochPlan(**{"samples": len(split), "global_batch": 128, "seed": 3, **changes})  # type: ignore[arg-type]


def assert_equal(expected: Sequence[Batch], found: Sequence[Batch]) -> None:
    assert len(expected) == len(found)
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.targets, other.targets)
        assert torch.equal(one.indices, other.indices)
        assert one.global_count == other.global_count


def test_batches_are_what_the_plan_asks_for(train: Split) -> None:
    batches = list(BatchLoader(train, AUGMENTED, train=True).epoch(plan(train), 0))
    for batch, step in zip(batches, plan(train).batches(0), strict=True):
        assert batch.images.shape == (len(step.indices), 1, 8, 8)
        assert batch.images.dtype == torch.float32
        assert batch.targets.dtype == batch.indices.dtype == torch.int64
        assert np.array_equal(batch.indices.numpy(), step.indices)
        assert np.array_equal(batch.targets.numpy(), train.labels[step.indices])
        assert batch.global_count == step.global_count


@pytest.mark.parametrize("processes", [1, 2])
def test_loader_processes_change_no_bit(train: Split, processes: int) -> None:
    here = BatchLoader(train, AUGMENTED, train=True, seed=5)
    there = BatchLoader(train, AUGMENTED, train=True, seed=5, processes=processes)
    for epoch in (0, 1):
        assert_equal(list(here.epoch(plan(train), epoch)), list(there.epoch(plan(train), epoch)))
    # An epoch that was left early does not leak into the next one.
    next(there.epoch(plan(train), 2))
    assert_equal(list(here.epoch(plan(train), 3)), list(there.epoch(plan(train), 3)))


@pytest.mark.parametrize("processes", [0, 1])
@pytest.mark.parametrize("channels_last", [False, True])
def test_pixels_that_the_device_normalises_become_the_same_bits(
    train: Split, channels_last: bool, processes: int
) -> None:
    config = AUGMENTED.model_copy(update={"cutout": 0})
    floats = list(BatchLoader(train, config, train=True, seed=5).epoch(plan(train), 1))
    sent = list(BatchLoader(train, config, train=True, seed=5, processes=processes, pixels=True).epoch(plan(train), 1))
    assert {batch.images.dtype for batch in sent} == {torch.uint8}
    there = [batch.to("cpu", channels_last) for batch in sent]
    assert_equal([batch.to("cpu", channels_last) for batch in floats], there)
    assert {batch.scaling for batch in there} == {None}
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert all(batch.images.is_contiguous(memory_format=layout) for batch in there)
    # Cutout erases what is normalised: such batches are sent as floats.
    (batch, *_) = BatchLoader(train, AUGMENTED, train=True, pixels=True).epoch(plan(train), 0)
    assert (batch.images.dtype, batch.scaling) == (torch.float32, None)


def test_resume_gives_the_same_tail(train: Split) -> None:
    whole = list(BatchLoader(train, AUGMENTED, train=True, seed=5).epoch(plan(train), 4))
    for start in (1, len(whole) - 1, len(whole)):
        tail = BatchLoader(train, AUGMENTED, train=True, seed=5).epoch(plan(train), 4, start)
        assert_equal(whole[start:], list(tail))


def test_samples_look_the_same_on_any_world_size(train: Split) -> None:
    def by_index(world: int) -> dict[int, torch.Tensor]:
        batches = [
            batch
            for rank in range(world)
            for batch in BatchLoader(train, AUGMENTED, train=True).epoch(plan(train, world_size=world, rank=rank), 1)
        ]
        return {int(i): image for b in batches for i, image in zip(b.indices, b.images, strict=True)}

    alone, three = by_index(1), by_index(4)
    assert alone.keys() == three.keys() == set(range(len(train)))
    assert all(torch.equal(image, three[index]) for index, image in alone.items())


def test_seed_and_epoch_change_the_augmentation(train: Split) -> None:
    def first(seed: int, epoch: int) -> torch.Tensor:
        fixed = EpochPlan(samples=len(train), global_batch=64, shuffle=False)
        return next(BatchLoader(train, AUGMENTED, train=True, seed=seed).epoch(fixed, epoch)).images

    assert torch.equal(first(0, 0), first(0, 0))
    assert not torch.equal(first(0, 0), first(0, 1))
    assert not torch.equal(first(0, 0), first(1, 0))


def test_evaluation_sees_every_sample_as_it_is(store: Store) -> None:
    split = store.split("test")
    loader = BatchLoader(split, TransformConfig(crop_padding=1, cutout=3), train=False)
    evaluation = [EvaluationPlan(samples=len(split), global_batch=100, world_size=2, rank=rank) for rank in (0, 1)]
    batches = [batch for each in evaluation for batch in loader.epoch(each, 0)]
    order = torch.cat([batch.indices for batch in batches])
    assert torch.equal(order.sort().values, torch.arange(len(split)))
    images = torch.cat([batch.images for batch in batches])
    assert torch.allclose(images * 255, torch.from_numpy(split.gather(order.numpy())).float(), atol=1e-3)


def test_plan_for_another_split_is_refused(train: Split) -> None:
    with pytest.raises(ValueError, match=r"plan is for 10 samples, but split 'train' has 1295"):
        BatchLoader(train, AUGMENTED, train=True).epoch(EpochPlan(samples=10, global_batch=5), 0)
    with pytest.raises(ValueError, match="processes is -1"):
        BatchLoader(train, AUGMENTED, train=True, processes=-1)


KILL_A_LOADER_PROCESS = """
import multiprocessing, os, signal, sys
from spikefleet_pipelines.loading import BatchLoader
from spikefleet_pipelines.sampling import EpochPlan
from spikefleet_pipelines.store.reader import Store
from spikefleet_pipelines.transforms.classification_config import TransformConfig

split = Store.open(sys.argv[1]).split("train")
loader = BatchLoader(split, TransformConfig(), train=True, processes=1)
batches = loader.epoch(EpochPlan(samples=len(split), global_batch=16), 0)
next(batches)
try:
    try:
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        list(batches)
        os._exit(0)
    except RuntimeError as error:
        print(error, flush=True)
except RuntimeError as late:  # from torch's handler, while the first one was being dealt with
    print(late, flush=True)
os._exit(3)
"""


def test_death_of_a_loader_process_is_an_error_not_a_hang(store: Store) -> None:
    # In a process of its own: torch raises from a signal handler, wherever the program happens to be.
    command = [sys.executable, "-c", KILL_A_LOADER_PROCESS, store.location]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 3, ended.stderr
    assert re.search(r"killed by signal|exited unexpectedly", ended.stdout)


@pytest.mark.parametrize("processes", [0, 1])
def test_broken_image_is_named_by_its_row(tmp_path: Path, processes: int) -> None:
    image, labels = ImageFormat(encoding="encoded"), np.zeros(3, np.int64)
    with StoreWriter(tmp_path / "store", source="test", class_names="a", image=image, options={}) as writer:
        shard = write_shard(writer.directory / "train-00000.arrow", [b"broken"] * 3, labels, image)
        writer.add_shard("train", shard, labels, [b"1", b"2", b"3"])
        writer.commit()
    split = Store.open(tmp_path / "store").split("train")
    transform = TransformConfig(random_resized_crop=8, resize=8, center_crop=8)
    loader = BatchLoader(split, transform, train=True, processes=processes)
    with pytest.raises(
        StoreError, match=rf"^row 1 of split 'train' in {tmp_path}/store: it is not an image of a format that is read"
    ):
        list(loader.epoch(EpochPlan(samples=3, global_batch=1, shuffle=False), 0, start_step=1))


def test_config_prepares_once_and_opens_later(tmp_path: Path) -> None:
    config = DataConfig(source="digits", options={"upsample": 2}, seed=1)
    calls: list[tuple[int, int]] = []
    first = open_or_prepare(config, tmp_path, progress=lambda done, total: calls.append((done, total)))
    assert first.manifest.image_shape == (1, 16, 16)
    assert calls[-1] == (1797, 1797)
    calls.clear()
    again = open_or_prepare(config, tmp_path, progress=lambda done, total: calls.append((done, total)))
    assert not calls
    assert again.manifest == first.manifest
    assert again.location == first.location == str(tmp_path / store_name(config))
    # A prepared store serves as `store` and as `root`, also of a config that names nothing else.
    for fields in ({"store": first.location}, {"root": first.location}):
        assert open_or_prepare(DataConfig(source="digits", **fields), tmp_path).manifest == first.manifest  # type: ignore[arg-type]


def test_a_store_of_other_options_that_the_user_prepared_is_named(tmp_path: Path) -> None:
    own = prepare("digits", None, tmp_path / "digits", upsample=2, seed=3)
    sentences: list[str] = []
    assert open_or_prepare(DataConfig(source="digits"), tmp_path, say=sentences.append).manifest == own.manifest
    (sentence,) = sentences
    others = "upsample=2 where data.options has 1, seed=3 where data.seed is 0"
    assert sentence.startswith(f"{own.location} was prepared with {others}: used as it is;")
    open_or_prepare(DataConfig(source="digits", options={"upsample": 2}), tmp_path, say=sentences.append)
    assert len(sentences) == 1


def test_store_names_tell_configs_apart() -> None:
    names = [
        store_name(DataConfig(**fields))  # type: ignore[arg-type]
        for fields in (
            {"source": "digits"},
            {"source": "digits", "options": {"upsample": 2}},
            {"source": "digits", "seed": 1},
            {"source": "cifar10", "root": "a"},
            {"source": "cifar10", "root": "b"},
        )
    ]
    assert len(set(names)) == 5
    assert names[0] == "digits"
    assert store_name(DataConfig(source="digits", options={"upsample": 1}, loader_processes=2)) == "digits"


def _prepare_in_process(directory: str) -> None:
    open_or_prepare(DataConfig(source="digits"), Path(directory))


def test_processes_that_race_end_with_one_store(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    racers = [context.Process(target=_prepare_in_process, args=(str(tmp_path),)) for _ in range(4)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(60)
    assert [racer.exitcode for racer in racers] == [0] * 4
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]
    Store.open(tmp_path / "digits")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "digit"}, "unknown data source 'digit'; did you mean 'digits'"),
        ({"source": "digits", "options": {"upsample": 3}}, "source 'digits': option upsample=3: must be 1, 2 or 4"),
        (
            {"source": "digits", "options": {"upscale": 2}},
            "unknown option 'upscale'; did you mean 'upsample'",
        ),
        ({"source": "digits", "loader_processes": -1}, "loader_processes"),
        ({"source": "digits", "rot": "x"}, "rot"),
        ({"source": "digits", "transform": {"crop": 1}}, r"transform\.crop"),
        ({"source": "scenes", "transform": {"kind": "detection", "crop": 1}}, r"transform\.crop"),
    ],
)
def test_bad_config_is_refused_by_field(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig(**fields)  # type: ignore[arg-type]


def test_missing_data_says_where_it_looked_and_what_to_do(tmp_path: Path, store: Store) -> None:
    with pytest.raises(SourceError, match=r"'cifar10' not found: root is not set.*spikefleet data prepare cifar10 DIR"):
        open_or_prepare(DataConfig(source="cifar10"), tmp_path)
    with pytest.raises(SourceError, match=rf"not found: {tmp_path}/absent is missing.*cifar-10-python\.tar\.gz"):
        open_or_prepare(DataConfig(source="cifar10", root=tmp_path / "absent"), tmp_path)
    with pytest.raises(StoreError, match="absent is not a store"):
        open_or_prepare(DataConfig(source="digits", store=str(tmp_path / "absent")), tmp_path)
    with pytest.raises(StoreError, match="is a store of source 'digits', expected 'cifar10'"):
        open_or_prepare(DataConfig(source="cifar10", store=store.location), tmp_path)
    assert not any(tmp_path.iterdir())
