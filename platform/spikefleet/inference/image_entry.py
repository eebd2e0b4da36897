"""One entry of what is predicted: a file, an object in a cloud store, or a video with its frames."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np

from spikefleet.inference.image_input import Pixels, read_unnamed
from spikefleet_pipelines.store.decode import decode_rgb


@dataclass(frozen=True)
class Loaded:
    """An image that was read, or the reason why it was not."""

    name: str
    """As the user or the folder names it."""
    pixels: Pixels | None
    error: str = ""
    """Why there are no pixels."""
    frame: int | None = None
    """Number in its video, from 0; None of an image file, and of a video that cannot be read at all."""
    time_s: float | None = None
    """When the frame is shown, from the start of the video."""

    @property
    def origin(self) -> dict[str, Any]:
        """Where the image is from, as the first keys of an answer: `image`; of a frame also `frame` and `time_s`."""
        frame = {} if self.frame is None else {"frame": self.frame, "time_s": self.time_s}
        return {"image": self.name, **frame}

    @property
    def shown(self) -> str:
        """Where the image is from, in words."""
        return self.name if self.frame is None else f"{self.name} frame {self.frame}"


class ImageEntry(Protocol):
    """What is read one after the other."""

    @property
    def name(self) -> str:
        """As answers name it."""
        ...

    @property
    def place(self) -> PurePosixPath:
        """Its path below the folder or pattern by which it was found; the name of a file that was given by itself."""
        ...

    @property
    def local(self) -> Path | None:
        """The file on this machine, over which nothing may be written; None elsewhere."""
        ...

    @property
    def frames(self) -> int | None:
        """How many images are expected of a video; None of a single image."""
        ...

    def images(self) -> Iterator[Loaded]:
        """Reads the image, or the frames of the video."""
        ...


@dataclass(frozen=True)
class FileEntry:
    """An image file on this machine."""

    local: Path
    place: PurePosixPath
    name: str
    frames: None = None

    def images(self) -> Iterator[Loaded]:
        """Reads it."""
        yield _loaded(self.name, lambda: read_unnamed(self.local))


@dataclass(frozen=True)
class BytesEntry:
    """An image whose encoded bytes are read by a function, which raises ValueError or OSError where it cannot."""

    name: str
    place: PurePosixPath
    read: Callable[[], bytes]
    local: None = None
    frames: None = None

    def images(self) -> Iterator[Loaded]:
        """Reads it."""
        yield _loaded(self.name, lambda: decode_rgb(np.frombuffer(self.read(), np.uint8)).numpy())


@dataclass(frozen=True)
class FailedEntry:
    """What was listed and stands for no image; the reason is its answer."""

    local: Path | None
    place: PurePosixPath
    name: str
    reason: str
    frames: None = None

    def images(self) -> Iterator[Loaded]:
        """Says why there is none."""
        yield Loaded(self.name, None, self.reason)


def _loaded(name: str, read: Callable[[], Pixels]) -> Loaded:
    try:
        return Loaded(name, read())
    except (ValueError, OSError) as error:
        return Loaded(name, None, str(error))
