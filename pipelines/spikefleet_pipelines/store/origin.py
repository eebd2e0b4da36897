"""What a store was built from: names, sizes, times and hashes of the raw files, in `origin.json` beside the manifest.

It is not a part of the store's content: the same images from another directory give the same hash.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

ORIGIN_NAME = "origin.json"
"""File name of the record in a store."""

_READERS = 4
_TRACKING_DATABASE = "mlflow.db"


@dataclass(frozen=True)
class Origin:
    """The raw files of a store, at one moment."""

    root: str
    """Their directory, absolute."""
    files: int
    listing: str
    """SHA-256 over names, relative to the root, and sizes."""
    times: str
    """SHA-256 over names and times of modification."""
    newest: int
    """Newest time of a change of a file or a directory, in nanoseconds."""
    content: str | None = None
    """SHA-256 over names and contents."""

    @classmethod
    def of(cls, root: Path, besides: Iterable[Path] = ()) -> Self:
        """Look at the files below a directory, without reading them.

        Args:
            root: the directory.
            besides: directories below it that do not belong to the raw data.

        Raises:
            OSError: a directory cannot be read.
        """
        listing, times = hashlib.sha256(), hashlib.sha256()
        newest = count = 0
        for path, status in _files(root, besides):
            name = os.fsencode(path.relative_to(root))
            listing.update(name + b"\0%d\n" % status.st_size)
            times.update(name + b"\0%d\n" % status.st_mtime_ns)
            newest = max(newest, status.st_mtime_ns, status.st_ctime_ns)
            count += 1
        for folder in {root, *(path.parent for path, _ in _files(root, besides))}:
            newest = max(newest, folder.stat().st_mtime_ns)
        return cls(str(root.absolute()), count, listing.hexdigest(), times.hexdigest(), newest)

    def with_content(self, besides: Iterable[Path] = ()) -> Self:
        """Read all files, and record their hash. Raises OSError."""
        root = Path(self.root)
        paths = [path for path, _ in _files(root, besides)]
        digest = hashlib.sha256()
        with ThreadPoolExecutor(_READERS) as pool:
            for path, found in zip(paths, pool.map(_sha256, paths), strict=True):
                digest.update(os.fsencode(path.relative_to(root)) + b"\0" + found + b"\n")
        return replace(self, content=digest.hexdigest())

    @classmethod
    def read(cls, store: Path) -> Self | None:
        """Read the record of a store; None if it has none, or a damaged one."""
        try:
            plain = json.loads((store / ORIGIN_NAME).read_text(encoding="utf-8"))
            found = cls(**plain)
        except (OSError, ValueError, TypeError, RecursionError):
            return None
        texts = (found.root, found.listing, found.times, found.content)
        whole = all(isinstance(text, str) for text in texts) and isinstance(found.files, int)
        return found if whole and isinstance(found.newest, int) else None

    def write(self, store: Path) -> None:
        """Write the record into a store, atomically. Raises OSError."""
        partial = store / f".{ORIGIN_NAME}.{os.getpid()}.part"
        try:
            partial.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
            partial.replace(store / ORIGIN_NAME)
        finally:
            partial.unlink(missing_ok=True)


def is_built_from(store: Path, now: Origin, written_ns: int, besides: Iterable[Path] = ()) -> bool:
    """Whether a store was built from the files that are there now.

    Names and sizes must be the same. If times differ, contents are compared. For a store without a record, nothing may
    have changed since it was written.

    Args:
        store: directory of the store.
        now: the files that are there; with their content, contents are compared although times are the same.
        written_ns: when its manifest was written, in nanoseconds.
        besides: as for `Origin.of`.

    Raises:
        OSError: a file cannot be read.
    """
    then = Origin.read(store)
    if then is None:
        if now.newest > written_ns:
            return False
    elif then.listing != now.listing:
        return False
    elif then.times == now.times and now.content is None:
        return True
    found = now if now.content is not None else now.with_content(besides)
    if then is not None and then.content != found.content:
        return False
    with suppress(OSError):  # a store that cannot be written is compared again the next time
        found.write(store)
    return True


def _files(root: Path, besides: Iterable[Path]) -> Iterator[tuple[Path, os.stat_result]]:
    left_out = {path.absolute() for path in besides}

    def fail(error: OSError) -> None:
        raise error

    seen: set[tuple[int, int]] = set()
    for folder, folders, names in os.walk(root, onerror=fail, followlinks=True):
        here = Path(folder)
        status = here.stat()
        if (status.st_dev, status.st_ino) in seen:  # links that form a circle
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(
            name
            for name in folders
            if name[0] != "."
            and (here / name).absolute() not in left_out
            and not (here / name / _TRACKING_DATABASE).exists()
        )
        for name in sorted(names):
            if name[0] != ".":
                with suppress(FileNotFoundError):  # a dangling link; the reader names it
                    yield here / name, (here / name).stat()


def _sha256(path: Path) -> bytes:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()
