"""The summary of a data set, saved with each run and version: what is needed to use a network trained on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from spikefleet.errors import UserError
from spikefleet.files import read_json_object, write_json
from spikefleet_pipelines.events.readers.recorded import options_of_files
from spikefleet_pipelines.store.data_set_name import is_data_set_name
from spikefleet_pipelines.store.manifest import Manifest
from spikefleet_pipelines.transforms.batch_transform_config import BatchTransformConfig

DATA_SUMMARY = "data.json"
"""File name of the summary in a run, a search and a registered version."""


@dataclass(frozen=True)
class DataSummary:
    """The summary of one prepared data set."""

    source: str
    """Name of the source that prepared it."""
    content_hash: str
    """SHA-256 over the content of the store."""
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...] = ()
    """Detection: the data set's id of each class."""
    image_shape: tuple[int, int, int] | None = None
    """`[C, H, W]` of the training images; None if their sizes vary."""
    name: str = ""
    """Name of the data set; empty in summaries of earlier versions."""
    sensor: tuple[int, int] | None = None
    """Height and width of an event camera; None for images."""
    orientation: str = ""
    """How x, y and polarity of events were read; empty for images."""
    reading: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Options by which the files of recordings were read; empty for images, and where the files say it all."""

    @property
    def dataset(self) -> str:
        """Name of the data set; where it is not known, that of its source."""
        return self.name or self.source

    def input_shape(self, transform: BatchTransformConfig) -> tuple[int, int, int] | None:
        """`[C, H, W]` that a transform gives to a network, before images are cropped; None if sizes vary."""
        return transform.input_shape(self.image_shape, self.sensor)

    @classmethod
    def of(cls, manifest: Manifest) -> DataSummary:
        """The summary of a store."""
        return cls(
            manifest.source,
            manifest.content_hash,
            manifest.class_names,
            tuple(manifest.category_ids or ()),
            manifest.image_shape,
            manifest.name or manifest.source,
            None if manifest.events is None else manifest.events.sensor,
            "" if manifest.events is None else manifest.events.orientation,
            {} if manifest.events is None else options_of_files(manifest.source, manifest.options),
        )

    @classmethod
    def read(cls, folder: Path) -> DataSummary:
        """Reads the summary from a folder. Raises UserError if the file is missing or damaged."""
        path = folder / DATA_SUMMARY
        plain = read_json_object(path)
        try:
            shape, sensor = plain["image_shape"], plain.get("sensor")
            sizes_fit = isinstance(shape, list | None) and isinstance(sensor, list | None)
            if not isinstance(plain["class_names"], list) or not sizes_fit:
                raise TypeError("class_names, image_shape and sensor must be lists")
            return cls(
                str(plain["source"]),
                str(plain["content_hash"]),
                tuple(map(str, plain["class_names"])),
                tuple(map(int, plain.get("category_ids") or ())),  # missing in runs of the first releases
                (int(shape[0]), int(shape[1]), int(shape[2])) if shape else None,
                _name(plain.get("name", "")),
                (int(sensor[0]), int(sensor[1])) if sensor else None,  # missing in runs of images of earlier versions
                str(plain.get("orientation", "")),
                {str(name): str(value) for name, value in plain.get("reading", {}).items()},
            )
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
            raise UserError(f"{path} is damaged: expected the summary of a data set ({error!r})") from None

    def write(self, folder: Path) -> None:
        """Writes the summary into a folder, atomically. Raises OSError."""
        plain = asdict(self)
        if self.sensor is None:  # a summary of images is the same file as in earlier versions
            del plain["sensor"], plain["orientation"]
        if not self.reading:
            del plain["reading"]
        write_json(folder / DATA_SUMMARY, plain)


def _name(name: object) -> str:
    if not isinstance(name, str) or (name and not is_data_set_name(name)):
        raise ValueError(f"name is {name!r}")
    return name
