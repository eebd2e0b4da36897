"""Images at URIs of `pyarrow.fs`, such as `s3://BUCKET/photos`: one object, or a folder of them."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import PurePosixPath
from typing import Any

from spikefleet.errors import UserError
from spikefleet.inference.image_entry import BytesEntry
from spikefleet_pipelines.store.image_files import MAX_FILE_BYTES, counted_reasons
from spikefleet_pipelines.store.image_header import IMAGE_SUFFIXES

# A secret key that is not escaped may have slashes; digits alone after a colon are a port.
_USER_INFO = re.compile(r"^(?:[^/@]*|[^/@:]*:(?![0-9]*/).*)@")
_OTHER = "files that are named as no image"
_BELOW = "sub-folders"
_OUTSIDE = "files whose names lead out of the folder (..)"


def cloud_entries(uri: str, recursive: bool, filesystem: Any = None) -> tuple[list[BytesEntry], Counter[str]]:
    """Lists the images at a URI.

    Args:
        uri: of an object, or of a folder.
        recursive: of a folder, list sub-folders too.
        filesystem: a `pyarrow.fs.FileSystem`, for endpoints that no URI describes; its paths follow `://`.

    Returns:
        The images in the order of their paths, read when they are asked for; and the numbers of other files by reason.

    Raises:
        UserError: the URI cannot be opened, or there is no image.
    """
    shown = shown_uri(uri)
    import pyarrow as pa
    from pyarrow.fs import FileSelector, FileSystem, FileType

    try:
        files, root = (filesystem, uri.partition("://")[2]) if filesystem else FileSystem.from_uri(uri)
        info = files.get_file_info(root)
        if info.type == FileType.NotFound:
            raise UserError(f"{shown} does not exist")
        if info.type != FileType.Directory:
            return [_entry(files, info, _name(shown, info.path), PurePosixPath(info.base_name))], Counter()
        inside = files.get_file_info(FileSelector(root, recursive=recursive))
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = _first_line(error).replace(uri, shown)
        raise UserError(f"{shown} cannot be opened: {reason}; check the URI and the credentials") from None
    entries: list[BytesEntry] = []
    unused: Counter[str] = Counter()
    for one in sorted(inside, key=lambda one: one.path):
        place = PurePosixPath(one.path).relative_to(root.rstrip("/"))
        if one.type == FileType.Directory:
            unused[_BELOW] += not recursive
        elif ".." in place.parts or place.is_absolute():
            unused[_OUTSIDE] += 1
        elif place.suffix.lower() in IMAGE_SUFFIXES:
            entries.append(_entry(files, one, _name(shown, one.path), place))
        else:
            unused[_OTHER] += 1
    if not entries:
        others = f"; it has {counted_reasons(unused)}" if +unused else ""
        raise UserError(f"{shown} has no images ({', '.join(sorted(IMAGE_SUFFIXES))}){others}")
    return entries, +unused


def shown_uri(uri: str) -> str:
    """A URI as messages show it: without the keys in its user info, and without its query."""
    scheme, _, rest = uri.partition("://")
    return f"{scheme}://{_USER_INFO.sub('', rest.partition('?')[0])}"


def _name(shown: str, path: str) -> str:
    """The URI of an object; paths that start with a slash are those of a host."""
    scheme, _, rest = shown.partition("://")
    return f"{scheme}://{rest.partition('/')[0] if path.startswith('/') else ''}{path}"


def _entry(files: Any, info: Any, name: str, place: PurePosixPath) -> BytesEntry:
    def read() -> bytes:
        if not 0 < info.size <= MAX_FILE_BYTES:
            raise ValueError(f"the file has {info.size:,} bytes, expected 1 to {MAX_FILE_BYTES:,}")
        with files.open_input_stream(info.path) as stream:
            content: bytes = stream.read(MAX_FILE_BYTES + 1)
        return content

    return BytesEntry(name, place, read)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
