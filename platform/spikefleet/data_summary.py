"""What must be known of a data set to use a network that was trained on it: one record, beside each run and version."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from spikefleet.errors import UserError
from spikefleet.files import read_json, write_json
from spikefleet_pipelines.store.manifest import Manifest

DATA_SUMMARY = "data.json"
"""Name of the record's file in a run, a search and a registered version."""


@dataclass(frozen=True)
class DataSummary:
    """Of one prepared data set."""

    source: str
    content_hash: str
    """Of the whole store."""
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...] = ()
    """For detection, the data's id of each class."""
    image_shape: tuple[int, int, int] | None = None
    """[C, H, W] of the training images; None where their sizes vary."""

    @classmethod
    def of(cls, manifest: Manifest) -> DataSummary:
        """The summary of a store."""
        return cls(
            manifest.source,
            manifest.content_hash,
            manifest.class_names,
            tuple(manifest.category_ids or ()),
            manifest.image_shape,
        )

    @classmethod
    def read(cls, folder: Path) -> DataSummary:
        """The summary that lies in a folder. Raises UserError naming the file when there is none, or another file."""
        path = folder / DATA_SUMMARY
        plain = read_json(path)
        try:
            shape = plain["image_shape"]
            return cls(
                str(plain["source"]),
                str(plain["content_hash"]),
                tuple(map(str, plain["class_names"])),
                tuple(map(int, plain.get("category_ids") or ())),  # runs before detection have none
                (int(shape[0]), int(shape[1]), int(shape[2])) if shape else None,
            )
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise UserError(f"{path} is damaged: it is not the summary of a data set ({error!r})") from None

    def write(self, folder: Path) -> None:
        """Writes the summary into a folder, atomically."""
        write_json(folder / DATA_SUMMARY, asdict(self))
