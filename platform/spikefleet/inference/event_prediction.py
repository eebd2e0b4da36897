"""Predictions for recordings of events: an answer for each window, with its times."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from spikefleet.errors import UserError
from spikefleet.inference.answer_files import MOST_DRAWN
from spikefleet.inference.trained_network import TrainedNetwork
from spikefleet.outputs import check_outputs
from spikefleet.training.distributed import pick_device
from spikefleet.training.precision import autocast
from spikefleet_models.carried_state import CarriedState, carried
from spikefleet_models.neurons import spiking_nodes
from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.events.durations import duration_us
from spikefleet_pipelines.events.readers.finding import RECORDING_SUFFIXES, find_reader, read_recording
from spikefleet_pipelines.events.readers.options import parse_options
from spikefleet_pipelines.events.readers.time_order import in_time_order
from spikefleet_pipelines.events.windows import StoredRecording
from spikefleet_pipelines.events_in_memory import parts_of, recording_batch
from spikefleet_pipelines.loading import Batch
from spikefleet_pipelines.sources.dvs_cifar10 import ORIENTATIONS
from spikefleet_pipelines.store.reader import Store
from spikefleet_pipelines.transforms.event_detection_config import EventDetectionTransformConfig
from spikefleet_pipelines.transforms.event_frames_config import EventFramesConfig
from spikefleet_pipelines.transforms.events_config import EventsTransformConfig


@dataclass
class PredictedWindows:
    """What became of recordings."""

    answers: list[dict[str, Any]] = field(default_factory=list)
    """For each window, in order; see `predict_recordings`."""
    bad: list[tuple[Path, str]] = field(default_factory=list)
    """Files that cannot be read, with the reasons."""


def _unheard(answer: Mapping[str, Any]) -> None:
    """Tells nobody."""


def predict_recordings(
    trained: TrainedNetwork,
    paths: Sequence[Path],
    *,
    window: str | None = None,
    stream: bool = False,
    out: Path | None = None,
    force: bool = False,
    gpu: bool = False,
    score: float = 0.3,
    options: Mapping[str, str] | None = None,
    answered: Callable[[Mapping[str, Any]], None] = _unheard,
) -> PredictedWindows:
    """Predicts recordings window by window, as they are read.

    Args:
        trained: a network of events.
        paths: recordings in any format of `events/readers`, folders of them, and stores of events (their test split).
        window: length of a window, such as 250ms; windows follow one another from the first event. None: for
            classification the window of the network's configuration, one for a recording; for detection its length.
        stream: carry the membranes from each window of a recording to the next.
        out: one PNG of the first 64 windows with their predictions.
        force: replace the file at `out`.
        gpu: run on the GPU.
        score: smallest score of an object.
        options: of the readers, such as `{"time": "ms"}`; by default those that the training's files were read by.
        answered: called with each answer as soon as it is there, and with `{"recording": PATH, "error": REASON}` for a
            file that cannot be read.

    Returns:
        The answers, `{"recording", "start_us", "end_us", "events", ...}` with times by the clock of the recording and
        the classes or objects of `spikefleet predict` on images; and the files that could not be read.

    Raises:
        UserError: a path is missing, a folder has no recordings, a length is wrong, or `out` cannot be used; a stream
            has no windows, or the network no neurons.
        SourceError: an option is unknown, or has a value that is not allowed.
    """
    if out is not None and out.suffix.lower() != ".png":
        raise UserError(f"--out {out} must end in .png")
    predictor = _WindowPredictor(trained, window, stream, gpu, score, options or {})
    sources = _sources(paths)
    if out is not None:
        check_outputs([out], inputs=[*(path for path in sources if path.is_file()), *trained.folders], force=force)
    report, done = trained.task.report, PredictedWindows()
    images: list[torch.Tensor] = []
    predictions: list[Any] = []
    names: list[str] = []
    for path in sources:
        try:
            before = None
            for name, part in _parts(path, predictor):
                if name != before:
                    predictor.restart()
                before = name
                batch, prediction = predictor(part)
                if out is not None and len(images) < MOST_DRAWN:
                    images.append(predictor.image(batch))
                    predictions.append(prediction)
                    names.append(f"{name} {shown_times(part.t0, part.t0 + part.whole().length)}")
                times = {"start_us": part.t0, "end_us": part.t0 + part.whole().length, "events": len(part)}
                done.answers.append({"recording": name, **times, **report.answer(prediction)})
                answered(done.answers[-1])
        except ValueError as error:
            done.bad.append((path, str(error)))
            answered({"recording": str(path), "error": str(error)})
    if images and out is not None:
        report.draw_files(images, predictions, names, out)
    return done


def shown_times(start_us: int, end_us: int) -> str:
    """The times of a window in words, in ms."""
    return f"{start_us / 1000:,.6g} to {end_us / 1000:,.6g} ms"


class _WindowPredictor:
    """A network on its device: windows -> their batches and predictions."""

    def __init__(
        self,
        trained: TrainedNetwork,
        window: str | None,
        stream: bool,
        gpu: bool,
        score: float,
        options: Mapping[str, str],
    ) -> None:
        transform, sensor = trained.config.transform, trained.data.sensor
        if not isinstance(transform, EventFramesConfig) or sensor is None:
            raise UserError(f"{trained.reference} is a network of images, not of recordings of events")
        self.sensor, self.length = sensor, self._length(transform, window)
        self.options = {"sensor": f"{sensor[0]}x{sensor[1]}", **trained.data.reading, **options}
        parse_options(self.options)
        self.orientation, self.reference = trained.data.orientation, trained.reference
        self.transform = _whole_windows(transform, self.length)
        self._task, self._score, self._device = trained.task, score, pick_device(gpu)
        self._network, self._precision = trained.network.to(self._device), trained.config.train.precision
        self._stream = stream
        self._state: CarriedState | None = None
        if stream and self.length is None:
            raise UserError("--stream carries membranes from window to window; add their length, such as --window 50ms")
        if stream and not spiking_nodes(self._network):
            raise UserError(f"--stream carries membranes, but {trained.reference} has no spiking neurons; leave it out")

    def restart(self) -> None:
        """Starts the next window from the reset state."""
        self._state = None

    @staticmethod
    def _length(transform: EventFramesConfig, window: str | None) -> int | None:
        """Length of the windows in us; None: each recording is one."""
        if window is not None:
            try:
                return duration_us(window)
            except ValueError as error:
                raise UserError(f"--window {error}") from None
        return duration_us(transform.window) if isinstance(transform, EventDetectionTransformConfig) else None

    def __call__(self, part: StoredRecording) -> tuple[Batch, Any]:
        batch = recording_batch([part], self.transform)
        with autocast(self._precision, self._device):
            (prediction,) = self._predict(batch.to(self._device))
        return batch, self._task.confident(prediction, self._score)

    def image(self, batch: Batch) -> torch.Tensor:
        """Draws the window of a batch, uint8 [3, h, w]."""
        image = self.transform.pixels(batch.images)[0]
        if isinstance(self.transform, EventDetectionTransformConfig):
            (target,) = batch.targets
            image = _on_sensor(image, target.placement)
        return image

    def _predict(self, batch: Batch) -> list[Any]:
        if not self._stream:
            return self._task.predict(self._network, batch)
        with carried(self._network, self._state) as carrier:
            predictions = self._task.predict(self._network, batch)
        self._state = carrier.state
        return predictions


def _whole_windows(transform: EventFramesConfig, length: int | None) -> EventFramesConfig:
    """The config for parts of a recording that are windows as they are."""
    if length is None:
        return transform
    if isinstance(transform, EventsTransformConfig):
        return transform if transform.window == "span" else transform.model_copy(update={"window": "recording"})
    return transform.model_copy(update={"window": f"{length}us"})


def _on_sensor(image: torch.Tensor, placement: Any) -> torch.Tensor:
    """The part of a canvas that shows the sensor, uint8 [3, h, w], resized to the sensor's pixels."""
    rows = (placement.top + (torch.arange(placement.height) + 0.5) * placement.scale_y).long()
    columns = (placement.left + (torch.arange(placement.width) + 0.5) * placement.scale_x).long()
    return image[:, rows[:, None], columns]


def _sources(paths: Sequence[Path]) -> list[Path]:
    """Recordings and stores of paths, those of a folder by name."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir() and not Store.is_store(path):
            inside = sorted(one for one in path.iterdir() if one.suffix.lower() in RECORDING_SUFFIXES)
            if not inside:
                raise UserError(f"folder {path} has no recordings ({', '.join(sorted(RECORDING_SUFFIXES))})")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise UserError(f"recording {path} does not exist")
    return found


def _parts(path: Path, predictor: _WindowPredictor) -> Iterator[tuple[str, StoredRecording]]:
    """The windows of a recording or of a store, with the name of the recording."""
    if not path.is_dir():
        _check_release(path, predictor)
        reader = read_recording(path, parse_options(predictor.options))
        part = None
        for part in parts_of(in_time_order(reader), predictor.sensor, predictor.length):
            yield str(path), part
        if part is None:
            raise SourceError(f"{path} has no event, so there is nothing to answer")
        return
    store = Store.open(path)
    splits = store.manifest.splits
    name = store.manifest.original("test" if "test" in splits else next(iter(splits)))
    recordings = store.recordings(name)
    if recordings.layout.sensor != predictor.sensor:
        height, width = recordings.layout.sensor
        raise SourceError(
            f"{path} has a sensor of {height} x {width}, but the network was trained on {predictor.sensor[0]} x "
            f"{predictor.sensor[1]}"
        )
    if store.manifest.events is not None:
        _check_orientation(path, store.manifest.events.orientation, predictor)
    for row in range(len(recordings)):
        recording = recordings.recording(row)
        if predictor.length is None:
            yield f"{path} {name}/{row}", recording
            continue
        length = recording.whole().length
        for part in parts_of([recording.events()], predictor.sensor, predictor.length, start_us=0, end_us=length):
            yield f"{path} {name}/{row}", replace(part, t0=recording.t0 + part.t0)


def _check_release(path: Path, predictor: _WindowPredictor) -> None:
    """Raises SourceError for a file of the other release of DVS-CIFAR10 than the network was trained on."""
    if predictor.orientation in ORIENTATIONS.values() and (read_as := ORIENTATIONS.get(find_reader(path).name)):
        _check_orientation(path, read_as, predictor)


def _check_orientation(path: Path, orientation: str, predictor: _WindowPredictor) -> None:
    if orientation != predictor.orientation:
        raise SourceError(
            f"x, y and polarity of {path} are read as {orientation}, but {predictor.reference} was trained on events "
            f"read as {predictor.orientation}; give recordings with the same orientation"
        )
