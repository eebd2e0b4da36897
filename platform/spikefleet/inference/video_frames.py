"""Frames of video files, read by PyAV (the extra `spikefleet[video]`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from spikefleet.errors import UserError
from spikefleet.inference.image_entry import Loaded
from spikefleet.inference.image_input import Pixels
from spikefleet_pipelines.store.image_header import check_size

if TYPE_CHECKING:
    from types import ModuleType

VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts"})

# Formats that hold their pictures themselves: a playlist that is named as a video would have others opened.
_FORMATS = "mov,matroska,webm,avi,mpeg,mpegts,mpegvideo"


def is_video(path: PurePosixPath | Path) -> bool:
    """Whether a file is named as a video."""
    return path.suffix.lower() in VIDEO_SUFFIXES


@dataclass(frozen=True)
class VideoEntry:
    """A video file, of which every `every`-th frame is an image."""

    local: Path
    place: PurePosixPath
    name: str
    every: int
    frames: int
    """How many images its header promises; 1 where it does not say."""

    @classmethod
    def of(cls, path: Path, place: PurePosixPath, every: int = 1) -> VideoEntry:
        """The entry of a file. Raises UserError if there is no PyAV to read it with."""
        if importlib.util.find_spec("av") is None:
            raise UserError(f"{path} is a video, which PyAV reads; install it: pip install 'spikefleet[video]'")
        return cls(path, place, str(path), every, max(1, -(-_declared_frames(path) // every)))

    def images(self) -> Iterator[Loaded]:
        """Decodes the frames in the order in which they are shown; damage ends them with the reason."""
        import av

        number = -1
        try:
            with self.local.open("rb") as file, _opened(av, file) as container:
                stream = _video_stream(container)
                start = float(stream.start_time * stream.time_base) if stream.start_time is not None else 0.0
                for number, frame in enumerate(container.decode(stream)):
                    if number % self.every:
                        continue
                    yield Loaded(self.name, _pixels(frame), "", number, _seconds(frame, start))
                if number < 0:
                    yield Loaded(self.name, None, "the video has no frames")
        except (ValueError, OSError, av.error.FFmpegError) as error:
            after = f"after frame {number}: " if number >= 0 else ""
            yield Loaded(self.name, None, f"{after}{_reason(error)}")


def _opened(av: ModuleType, file: Any) -> Any:
    # By the open file and not by its name, which FFmpeg would read as a protocol or a pattern.
    return av.open(file, options={"format_whitelist": _FORMATS, "protocol_whitelist": "none"})


def _video_stream(container: Any) -> Any:
    if not container.streams.video:
        raise ValueError("the file has no video stream")
    stream = container.streams.video[0]
    context = stream.codec_context
    if context is None:
        raise ValueError("the codec of the video is not known")
    check_size(context.width, context.height)
    return stream


def _declared_frames(path: Path) -> int:
    import av

    try:
        with path.open("rb") as file, _opened(av, file) as container:
            stream = _video_stream(container)
            if stream.frames:
                return int(stream.frames)
            if container.duration and stream.average_rate:
                return int(container.duration / 1_000_000 * stream.average_rate)
    except (ValueError, OSError, av.error.FFmpegError):
        pass  # reading it says what is wrong
    return 0


def _pixels(frame: Any) -> Pixels:
    """RGB pixels `[3, H, W]`, turned as the video is to be shown."""
    check_size(frame.width, frame.height)
    pixels: Pixels = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)).transpose(2, 0, 1))


def _seconds(frame: Any, start: float) -> float | None:
    """When a frame is shown, after the start of its stream, whose clock need not begin at 0 (MPEG-TS)."""
    return None if frame.time is None else round(float(frame.time) - start, 6)


def _reason(error: Exception) -> str:
    """PyAV's errors name the input and not only the reason; some of them are ValueErrors too."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text if type(error) is ValueError else f"the video cannot be decoded: {text}"
