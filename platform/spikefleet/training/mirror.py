"""A copy of a run's checkpoints and report at another place, from which an empty run directory resumes.

Any URI of `pyarrow.fs`: `s3://`, `gs://`, `file://`. A checkpoint's manifest is copied last and removed first, so that
a copy that was cut short is none; what the run has removed is removed once the new copies are whole. One run directory
writes a mirror (`mirror_owner`).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from spikefleet.disks import disk_problem
from spikefleet.errors import UserError
from spikefleet.training.checkpoints import MANIFEST, CheckpointFolder, verify_checkpoint
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.events import CheckpointSaved, Event, EventSink, Note
from spikefleet.training.mirror_owner import OWNER, Owner, refuse_other

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
        self.where = f"{uri.partition('?')[0].rstrip('/')}/{run}"
        """The run's place, for messages."""
        try:
            self._files, place = FileSystem.from_uri(uri)
        except (ArrowInvalid, OSError) as error:
            raise UserError(
                f"checkpoint.mirror={uri} cannot be used: {str(error)[:200]}; set it to a URI such as "
                "s3://BUCKET/runs, gs://BUCKET/runs or file:///DIRECTORY"
            ) from None
        self._place = f"{place.rstrip('/')}/{run}"
        self.damaged: dict[str, str] = {}
        """Copies that `restore` found damaged: a sentence for each."""

    def owner(self) -> Owner | None:
        """The run directory that writes the mirror; None if there is no record of one. Raises OSError."""
        return Owner.parse(self._read(OWNER))

    def claim(self, owner: Owner) -> None:
        """Records who writes the mirror, and that it does so now. Raises OSError."""
        self._files.create_dir(self._place, recursive=True)
        with self._files.open_output_stream(f"{self._place}/{OWNER}") as file:
            file.write(owner.content())

    def keep(self, folder: CheckpointFolder) -> None:
        """Makes the mirror hold the committed checkpoints of a folder, and of others only newer ones. Raises OSError.

        Nothing is removed before everything is copied, but a checkpoint that another of the same step replaces.
        """
        wanted = {path.name: path for path in folder.committed()}
        for name, path in wanted.items():
            copied = self._read(f"{_CHECKPOINTS}/{name}/{MANIFEST}")
            if copied != (path / MANIFEST).read_bytes() or name in self.damaged:
                self._remove(f"{_CHECKPOINTS}/{name}")
                self._copy(path, f"{_CHECKPOINTS}/{name}")
                self.damaged.pop(name, None)
        for name in self._directories(_CHECKPOINTS):
            if name not in wanted and name < max(wanted, default=""):
                self._remove(f"{_CHECKPOINTS}/{name}")

    def keep_report(self, report: Path) -> None:
        """Copies the report of a run. Raises OSError."""
        if report.is_dir():
            self._copy(report, _REPORT)

    def restore(self, folder: CheckpointFolder) -> list[str]:
        """Fetches the intact checkpoints of the mirror into a folder that has none; returns their names, oldest first.

        Raises:
            UserError: the mirror has checkpoints, and none of them is intact.
            OSError: the mirror cannot be read.
        """
        if folder.latest() is not None:
            return []
        fetched: list[Path] = []
        for name in reversed(self._directories(_CHECKPOINTS)):
            if self._read(f"{_CHECKPOINTS}/{name}/{MANIFEST}") is None:
                continue
            partial = self._fetched(name, folder)
            try:
                verify_checkpoint(partial)
            except UserError as error:
                shutil.rmtree(partial, ignore_errors=True)
                reason = str(error).partition("; ")[0]
                self.damaged[name] = reason.replace(str(partial), f"{self.where}/{_CHECKPOINTS}/{name}")
            else:
                fetched.append(partial)
        if self.damaged and not fetched:
            raise UserError(
                f"checkpoint.mirror: no checkpoint in {self.where} is intact: {next(iter(self.damaged.values()))}; set "
                f"another --name, or remove {self.where} to start from scratch"
            )
        names = [partial.name.removeprefix("partial-") for partial in reversed(fetched)]
        for name in names:  # all are here: oldest first, as they were committed
            (folder.folder / f"partial-{name}").replace(folder.folder / name)
        return names

    def _fetched(self, name: str, folder: CheckpointFolder) -> Path:
        partial = folder.folder / f"partial-{name}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for entry in self._entries(f"{_CHECKPOINTS}/{name}"):
            with (
                self._files.open_input_stream(entry.path) as source,
                (partial / entry.base_name).open("wb") as file,
            ):
                shutil.copyfileobj(source, file, _CHUNK)
        return partial

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
    """Passes events on, and brings the mirror up to date after each checkpoint; the training waits for the copy.

    Whatever keeps the mirror from taking it costs a note, and not the training.

    Args:
        sink: of the run, on rank 0.
        mirror: of the run.
        folder: of its checkpoints.
        owner: the run's directory.
    """

    def __init__(self, sink: EventSink, mirror: Mirror, folder: CheckpointFolder, owner: Owner) -> None:
        self._sink, self._mirror, self._folder, self._owner = sink, mirror, folder, owner

    def emit(self, event: Event) -> None:
        """Passes an event on."""
        self._sink.emit(event)
        if isinstance(event, CheckpointSaved):
            try:
                self._keep()
            except Exception as error:  # file systems of clouds raise more than OSError
                where = f"checkpoint.mirror={self._mirror.uri}"
                self._sink.emit(
                    Note(f"{where} did not take the checkpoint of step {event.step}, the next one tries again: {error}")
                )

    def _keep(self) -> None:
        held = self._mirror.owner()
        if held is not None and held.id != self._owner.id:
            raise UserError(f"{self._mirror.where} now belongs to {held}")
        self._mirror.claim(self._owner)
        self._mirror.keep(self._folder)


def mirrored(uri: str | None, run_dir: Path, group: ProcessGroup, sink: EventSink, epochs: int) -> EventSink:
    """Fetches the checkpoints of a run whose directory has none from its mirror, on rank 0; called on all ranks.

    Args:
        uri: `checkpoint.mirror`.
        run_dir: of the run.
        group: of the training.
        sink: of the run.
        epochs: of the whole training.

    Returns:
        the sink that, on rank 0, keeps the mirror up to date.

    Raises:
        UserError: the mirror cannot be used, belongs to another run, or its checkpoints are damaged; raised on all
            ranks.
    """
    if uri is None:
        return sink
    refusal = None
    if group.is_main:
        try:
            sink = _opened(Mirror(uri, run_dir.name), run_dir, sink, epochs)
        except UserError as error:
            refusal = str(error)
        except Exception as error:  # file systems of clouds raise more than OSError
            refusal = disk_problem(error) or (
                f"checkpoint.mirror={uri} cannot be used: {str(error)[:200]}; check access to it, or set another one"
            )
    if (sentence := group.broadcast(refusal)) is not None:  # one rank that raises alone leaves the others waiting
        raise UserError(sentence)
    return sink


def _opened(mirror: Mirror, run_dir: Path, sink: EventSink, epochs: int) -> MirroringSink:
    folder, own, held = CheckpointFolder(run_dir / _CHECKPOINTS), Owner.of(run_dir), mirror.owner()
    refuse_other(held, own, mirror.where, empty=folder.latest() is None)
    mirror.claim(own)
    if held is not None and held.id != own.id:
        sink.emit(Note(f"{mirror.where} belonged to {held}; it belongs to this run now"))
    if mirror.restore(folder):
        aside = folder.set_damaged_aside(epochs)  # the best one may be among those left out
        for sentence in [*(f"{damage}; it was left out" for damage in mirror.damaged.values()), *aside]:
            sink.emit(Note(sentence))
        latest = folder.latest()
        assert latest is not None, "one that can be used is left"
        sink.emit(Note(f"{latest.name} was fetched from {mirror.uri}"))
    return MirroringSink(sink, mirror, folder, own)
