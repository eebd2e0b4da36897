"""The Python API: train, search, load, predict. The commands do the same.

import spikefleet as sf

run = sf.train("digits", {"model.timesteps": 2}, workers=0)
run.metrics["top1"], run.predict(["four.png"])
model = sf.load("models:/sg_resnet_digits@champion")
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from spikefleet.config.recipes import load_config, override_config, with_cluster
from spikefleet.config.schema import Config
from spikefleet.errors import UserError
from spikefleet.inference.image_input import ImageInput
from spikefleet.inference.prediction import predict_images
from spikefleet.inference.trained_network import TrainedNetwork, in_precision, open_trained_network
from spikefleet.plugins import load_plugins
from spikefleet.registry import Promotion
from spikefleet.runs.options import Options
from spikefleet.runs.run_dir import find_run
from spikefleet.runs.segments import extended
from spikefleet.runs.train_run import FinishedRun, run_training
from spikefleet.tracking.mlflow_client import resolve_tracking_uri
from spikefleet_models.energy import EnergyCard
from spikefleet_models.low_precision import Precision

if TYPE_CHECKING:
    from torch import nn

    from spikefleet_tune.result import SearchResult


@dataclass(frozen=True)
class Model:
    """A trained network with its configuration, metrics and energy card."""

    reference: str
    """The reference that it was loaded with."""
    trained: TrainedNetwork
    metrics: Mapping[str, float]
    """Metrics by split and name, such as "test/top1"; a registered version also has "energy_mj"."""
    card: EnergyCard | None
    """Operations and energy per image, layer by layer; None if they were not measured."""

    @property
    def network(self) -> nn.Module:
        """The torch module, in evaluation mode."""
        return self.trained.network

    @property
    def config(self) -> Config:
        """The configuration that it was trained with."""
        return self.trained.config

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of its classes, in the order of its outputs."""
        return self.trained.data.class_names

    def predict(
        self, images: ImageInput | Iterable[ImageInput], *, score: float = 0.3, gpu: bool = False
    ) -> list[dict[str, Any]]:
        """Predicts images.

        Args:
            images: one or more files, PIL images, or uint8 arrays `[H, W]`, `[H, W, C]` or `[C, H, W]`.
            score: detection: smallest score of an object.
            gpu: run on the GPU.

        Returns:
            For each image, in order, `{"classes": [{"name", "probability"}, ...]}`, the most likely first, or
            `{"objects": [{"name", "score", "box"}, ...]}` with boxes x1 y1 x2 y2 in pixels of the image.

        Raises:
            UserError: an image cannot be read, the network is one of events, or there is no GPU.
        """
        if self.config.data.transform.reads_events:
            raise UserError(f"{self.reference} is a network of events, not of images; call predict_recordings")
        report = self.trained.task.report
        found = predict_images(self.trained, _each(images), gpu=gpu, score=score)
        return [report.answer(prediction) for _, prediction in found]

    def predict_recordings(
        self,
        recordings: str | Path | Iterable[str | Path],
        *,
        window: str | None = None,
        stream: bool = False,
        options: Mapping[str, str] | None = None,
        score: float = 0.3,
        gpu: bool = False,
    ) -> list[dict[str, Any]]:
        """Predicts recordings of an event camera, window by window.

        Args:
            recordings: one or more files, folders of them, or stores.
            window: length of the windows, such as "250ms"; None: as `spikefleet predict`.
            stream: carry the membranes from each window of a recording to the next.
            options: what the files do not say, such as `{"time": "ms"}`; as those of the training by default.
            score: detection: smallest score of an object.
            gpu: run on the GPU.

        Returns:
            For each window, in order, `{"recording", "start_us", "end_us", "events"}` with the classes or objects of
            `predict`.

        Raises:
            UserError: a recording cannot be read, the network is one of images, or there is no GPU.
        """
        from spikefleet.inference.event_prediction import predict_recordings

        given = [recordings] if isinstance(recordings, str | Path) else recordings
        done = predict_recordings(
            self.trained, [*map(Path, given)], window=window, stream=stream, options=options, score=score, gpu=gpu
        )
        if done.bad:
            path, reason = done.bad[0]
            raise UserError(f"recording {path} cannot be read: {reason}")
        return done.answers


@dataclass(frozen=True)
class Run:
    """A finished training run."""

    finished: FinishedRun
    runs_dir: Path

    @property
    def name(self) -> str:
        """Name of the run, for commands and `load`."""
        return self.finished.run.name

    @property
    def path(self) -> Path:
        """Its directory, with checkpoints/ and report/."""
        return self.finished.run.path

    @property
    def metrics(self) -> Mapping[str, float]:
        """Metrics of the best checkpoint on the test split, or on the validation split where there is no other."""
        return self.finished.test or self.finished.validation

    @property
    def validation(self) -> Mapping[str, float]:
        """Metrics of the best checkpoint on the validation split, which selects it."""
        return self.finished.validation

    @property
    def last(self) -> Mapping[str, float]:
        """Metrics of the last checkpoint by split and name, such as "test/top1"."""
        return self.finished.last

    @property
    def promotion(self) -> Promotion | None:
        """The result of the registration; None if nothing was registered now."""
        return self.finished.promotion

    @property
    def tracking_uri(self) -> str:
        """URI of the tracking server or database with the run and the registry."""
        return resolve_tracking_uri(self.runs_dir)

    @cached_property
    def model(self) -> Model:
        """The network of the best checkpoint."""
        return load(self.name, runs_dir=self.runs_dir)

    def predict(
        self, images: ImageInput | Iterable[ImageInput], *, score: float = 0.3, gpu: bool = False
    ) -> list[dict[str, Any]]:
        """Predicts images with the best checkpoint; see `Model.predict`."""
        return self.model.predict(images, score=score, gpu=gpu)


def train(
    recipe: str,
    overrides: Mapping[str, Any] | None = None,
    *,
    workers: int | str | None = None,
    gpu: bool = False,
    name: str | None = None,
    resume: str | None = None,
    extend_epochs: int | None = None,
    address: str | None = None,
    runs_dir: str | Path = "runs",
    stores_dir: str | Path = "stores",
    plugins: Sequence[str] = (),
    verbose: bool = False,
    console: Console | None = None,
) -> Run:
    """Trains a recipe; then tests, certifies and registers its best checkpoint. The same call resumes the run.

    Args:
        recipe: a name (`spikefleet recipes` lists them), or the path of a YAML file.
        overrides: values by dotted key, such as `{"model.timesteps": 2}`.
        workers: Ray Train workers; 0 trains in this process, without Ray; "MIN:MAX" as many as the hosts have places
            for.
        gpu: use one GPU per worker.
        name: of the run; by default the recipe with a digest of the configuration.
        resume: name of an existing run to resume with its own configuration.
        extend_epochs: train the run `resume` for so many epochs beyond its end, with its schedule from the start.
        address: HOST:PORT of the Ray cluster; by default RAY_ADDRESS, else a local Ray is started.
        runs_dir: directory of runs and of their tracking database.
        stores_dir: directory of prepared stores.
        plugins: modules that register model families, tasks, sources or transforms.
        verbose: show the logs of Ray and of its workers.
        console: for progress; `rich.console.Console(quiet=True)` shows none.

    Returns:
        The finished run.

    Raises:
        UserError: an error that the user can fix, before training starts.
        RunError: the training or the registration failed.
        Interrupted: SIGINT or SIGTERM, a KeyboardInterrupt; the same call resumes the run.
    """
    load_plugins(plugins)
    given = with_cluster(overrides or {}, workers, gpu)
    folder = Path(runs_dir)
    if resume is not None:
        resume = find_run(folder, resume).name
        if name not in (None, resume):
            raise UserError(f"--name {name} and --resume {resume} are two runs; give one of them")
    if resume is None and extend_epochs is not None:
        raise UserError(f"--extend-epochs {extend_epochs} extends an existing run; name it by --resume RUN")
    config = load_config(recipe, given) if resume is None else _resumed(recipe, resume, given, folder)
    if resume is not None and extend_epochs is not None:
        config = extended(find_run(folder, resume), config, extend_epochs)
    options = Options(folder, Path(stores_dir), address, verbose)
    return Run(run_training(config, options, console or Console(), name or resume), folder)


def _resumed(recipe: str, resume: str, overrides: Mapping[str, Any], runs_dir: Path) -> Config:
    held = find_run(runs_dir, resume).config()
    if held.recipe != Path(recipe).stem:
        raise UserError(f"run {resume} was trained by recipe {held.recipe!r}, not {recipe!r}; set recipe {held.recipe}")
    return override_config(held, overrides, origin=f"run {resume}")


def search(
    search: str | Mapping[str, Any],
    *,
    name: str | None = None,
    extend: int = 0,
    warm_start: str | None = None,
    retry_failed: bool = False,
    address: str | None = None,
    runs_dir: str | Path = "runs",
    stores_dir: str | Path = "stores",
    data: Mapping[str, Any] | None = None,
    plugins: Sequence[str] = (),
    verbose: bool = False,
    console: Console | None = None,
) -> SearchResult:
    """Runs a search, or resumes the one of this name. Its trials are runs, which `load` opens by their directories.

    Args:
        search: a name (`spikefleet searches` lists them), the path of a YAML file, or the content of one.
        name: of the search; by default the name of its file.
        extend: number of trials to add to a search that is complete.
        warm_start: name of an earlier search whose trials inform this one.
        retry_failed: run each failed trial once more.
        address: HOST:PORT of the Ray cluster; by default RAY_ADDRESS, else a local Ray is started.
        runs_dir: directory of searches, runs and their tracking database.
        stores_dir: directory of prepared stores.
        data: overrides with the location of the data, such as `{"data.root": "/data/cifar"}`.
        plugins: modules that register model families, tasks, sources or transforms.
        verbose: show the logs of Ray and of its workers.
        console: for progress.

    Returns:
        The trials (`records`), the Pareto front (`front`), its `knee`, and the search's directory (`folder`).

    Raises:
        UserError: the search is invalid or cannot be resumed; raised before any trial starts.
        Interrupted: SIGINT or SIGTERM, a KeyboardInterrupt; the same call resumes the search.
    """
    from spikefleet.search.run_search import run_tracked_search
    from spikefleet.search.search_files import load_search
    from spikefleet_tune.errors import SearchError
    from spikefleet_tune.search_file import search_of

    load_plugins(plugins)
    if isinstance(search, str):
        parsed, title = load_search(search), Path(search).stem
    else:
        try:
            parsed, title = search_of(search), "search"
        except SearchError as error:
            raise UserError(str(error)) from None
    options = Options(Path(runs_dir), Path(stores_dir), address, verbose, data or {})
    return run_tracked_search(
        parsed,
        name or title,
        options,
        console or Console(),
        extend=extend,
        warm_start=warm_start,
        retry_failed=retry_failed,
    )


def load(
    reference: str | Path,
    *,
    runs_dir: str | Path = "runs",
    plugins: Sequence[str] = (),
    precision: Precision | None = None,
) -> Model:
    """Loads a trained network with its configuration, metrics and energy card; every file is verified by its hash.

    Args:
        reference: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, the directory of a pulled version or of a checkpoint,
            or the name of a run.
        runs_dir: directory of runs and, unless MLFLOW_TRACKING_URI is set, of their tracking database.
        plugins: modules that the network needs.
        precision: deploy the network with weights of this precision, fp32, bf16 or int8; by default it runs as it was
            trained.

    Raises:
        UserError: the reference does not exist, a file is damaged, or nothing of the network can be rounded.
    """
    load_plugins(plugins)
    named, folder = str(reference), Path(runs_dir)
    trained = open_trained_network(named, folder)
    if precision is not None:
        trained = in_precision(trained, precision)
    return Model(named, trained, trained.metrics, trained.card)


def _each(images: ImageInput | Iterable[ImageInput]) -> Iterable[ImageInput]:
    import numpy as np
    from PIL import Image

    if isinstance(images, str | Path | Image.Image):
        return [images]
    if isinstance(images, np.ndarray):
        return list(images) if images.ndim == 4 else [images]
    return images
