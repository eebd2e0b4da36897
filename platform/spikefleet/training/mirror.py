"""A copy of a run's checkpoints and report at another place, from which an empty run directory resumes.

Any URI of `pyarrow.fs`: `s3://`, `gs://`, `file://`. A checkpoint's manifest is copied last and removed first, so that
a copy that was cut short is none.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from spikefleet.errors import UserError
from spikefleet.training.checkpoints import MANIFEST, CheckpointFolder, verify_checkpoint
from spikefleet.training.events import CheckpointSaved, Event, EventSink, Note

_CHECKPOINTS = "checkpoints"
_REPORT = "report"
_CHUNK = 16 << 20
"""Bytes that are read at once: each read of an object is a request."""


class Mirror:
    """The mirror of one run.

    Args:
        uri: of the place where runs are mirrored.
        run: name of the run.

    Raises:
        UserError: nothing can be stored at the URI.
    """

    def __init__(self, uri: str, run: str) -> None:
        from pyarrow import ArrowInvalid
        from pyarrow.fs import FileSystem

        self.uri = uri
        try:
            self._files, place = FileSystem.from_uri(uri)
        except (ArrowInvalid, OSError) as error:
            raise UserError(
                f"checkpoint.mirror={uri} cannot be used: {str(error)[:200]}; set it to a URI such as "
                "s3://BUCKET/runs, gs://BUCKET/runs or file:///DIRECTORY"
            ) from None
        self._place = f"{place.rstrip('/')}/{run}"

    def keep(self, folder: CheckpointFolder) -> None:
        """Makes the mirror hold the committed checkpoints of a folder, and no others. Raises OSError."""
        wanted = {path.name: path for path in folder.committed()}
        for name in self._directories(_CHECKPOINTS):
            if name not in wanted:
                self._remove(f"{_CHECKPOINTS}/{name}")
        for name, path in wanted.items():
            if self._read(f"{_CHECKPOINTS}/{name}/{MANIFEST}") != (path / MANIFEST).read_bytes():
                self._remove(f"{_CHECKPOINTS}/{name}")
                self._copy(path, f"{_CHECKPOINTS}/{name}")

    def keep_report(self, report: Path) -> None:
        """Copies the report of a run. Raises OSError."""
        if report.is_dir():
            self._copy(report, _REPORT)

    def restore(self, folder: CheckpointFolder) -> list[str]:
        """Fetches the checkpoints of the mirror into a folder that has none; returns their names, oldest first.

        Raises:
            UserError: one is damaged.
            OSError: the mirror cannot be read.
        """
        if folder.latest() is not None:
            return []
        found = [name for name in self._directories(_CHECKPOINTS) if self._read(f"{_CHECKPOINTS}/{name}/{MANIFEST}")]
        for name in found:
            partial = folder.folder / f"partial-{name}"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            for entry in self._entries(f"{_CHECKPOINTS}/{name}"):
                with (
                    self._files.open_input_stream(entry.path) as source,
                    (partial / entry.base_name).open("wb") as file,
                ):
                    shutil.copyfileobj(source, file, _CHUNK)
            verify_checkpoint(partial)
            partial.replace(folder.folder / name)
        return found

    def _copy(self, folder: Path, to: str) -> None:
        self._files.create_dir(f"{self._place}/{to}", recursive=True)
        for path in sorted(folder.iterdir(), key=lambda path: path.name == MANIFEST):
            if path.is_file() and not path.name.startswith("."):
                with (
                    path.open("rb") as file,
                    self._files.open_output_stream(f"{self._place}/{to}/{path.name}") as target,
                ):
                    shutil.copyfileobj(file, target, _CHUNK)

    def _remove(self, folder: str) -> None:
        if self._read(f"{folder}/{MANIFEST}") is not None:
            self._files.delete_file(f"{self._place}/{folder}/{MANIFEST}")
        for entry in self._entries(folder):
            self._files.delete_file(entry.path)
        if self._read_type(folder) == "directory":
            self._files.delete_dir(f"{self._place}/{folder}")

    def _read(self, path: str) -> bytes | None:
        if self._read_type(path) != "file":
            return None
        with self._files.open_input_stream(f"{self._place}/{path}") as file:
            return bytes(file.read())

    def _read_type(self, path: str) -> str:
        return str(self._files.get_file_info(f"{self._place}/{path}").type.name.lower())

    def _entries(self, folder: str) -> list[Any]:
        from pyarrow.fs import FileSelector

        found = self._files.get_file_info(FileSelector(f"{self._place}/{folder}", allow_not_found=True))
        return [entry for entry in found if entry.is_file]

    def _directories(self, folder: str) -> list[str]:
        from pyarrow.fs import FileSelector

        found = self._files.get_file_info(FileSelector(f"{self._place}/{folder}", allow_not_found=True))
        return sorted(entry.base_name for entry in found if not entry.is_file and entry.base_name.startswith("step-"))


class MirroringSink:
    """Passes events on, and brings the mirror up to date after each checkpoint. Where that fails, a note says so.

    Args:
        sink: of the run, on rank 0.
        mirror: of the run.
        folder: of its checkpoints.
    """

    def __init__(self, sink: EventSink, mirror: Mirror, folder: CheckpointFolder) -> None:
        self._sink, self._mirror, self._folder = sink, mirror, folder

    def emit(self, event: Event) -> None:
        """Passes an event on."""
        self._sink.emit(event)
        if isinstance(event, CheckpointSaved):
            try:
                self._mirror.keep(self._folder)
            except OSError as error:
                where = f"checkpoint.mirror={self._mirror.uri}"
                self._sink.emit(
                    Note(f"{where} did not take the checkpoint of step {event.step}, the next one tries again: {error}")
                )


def mirrored(uri: str | None, run_dir: Path, sink: EventSink) -> EventSink:
    """Fetches the checkpoints of a run whose directory has none from its mirror, on rank 0.

    Args:
        uri: `checkpoint.mirror`.
        run_dir: of the run.
        sink: of the run.

    Returns:
        the sink that keeps the mirror up to date.

    Raises:
        UserError: the mirror cannot be used, or its checkpoints are damaged.
    """
    if uri is None:
        return sink
    mirror, folder = Mirror(uri, run_dir.name), CheckpointFolder(run_dir / _CHECKPOINTS)
    try:
        found = mirror.restore(folder)
    except OSError as error:
        raise UserError(
            f"checkpoint.mirror={uri} cannot be read: {str(error)[:200]}; check access to it, or set another one"
        ) from None
    if found:
        sink.emit(Note(f"{found[-1]} was fetched from {mirror.uri}"))
    return MirroringSink(sink, mirror, folder)
