"""Shards of tar (github.com/webdataset/webdataset; POSIX.1-1988 and -2001): consecutive files of one key are a sample.

The key is the path up to the first dot of the file's name, the rest is the field: `n01/0007.seg.png` is the field
`seg.png` of `n01/0007`. A sample has one image (`jpg`, `jpeg`, `png`, `webp`, `ppm`, `pgm`), and its class in `cls` (an
index), in `txt` (a name) or in `json`; or in `json` its objects. Names of classes are the lines of `classnames.txt` or
`classes.txt` beside the shards. Nothing is extracted: images are read from their place in the tar.
"""

import json
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.sources.boxed_images import BoxedContents
from spikefleet_pipelines.sources.image_records import Label, Record, contents_of, label_of, objects_of
from spikefleet_pipelines.sources.labelled_images import LabelledContents
from spikefleet_pipelines.sources.split_names import by_split
from spikefleet_pipelines.sources.text_files import read_text, short
from spikefleet_pipelines.sources.webdataset_config import WEBDATASET, WEBDATASET_ADVICE, WebDatasetOptions
from spikefleet_pipelines.store.image_files import MAX_FILE_BYTES

_IMAGES = ("jpg", "jpeg", "png", "webp", "ppm", "pgm")
_LABELS = ("cls", "txt", "json")
_KEYS = ("objects", "annotations", "label", "cls", "class", "category")
_NAME_FILES = ("classnames.txt", "classes.txt")
_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_MAX_LABEL_BYTES = 1 << 24


@dataclass(frozen=True)
class TarImage:
    """An image at its place in a tar."""

    shard: Path
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.shard}: {self.name}"

    def below(self, root: Path) -> str:
        """Return its name for groups."""
        return f"{self.shard.relative_to(root).as_posix()}/{self.name}"

    def read(self) -> bytes:
        """Read the encoded image. Raises ValueError with the reason if that is not possible."""
        if not 0 < self.size <= MAX_FILE_BYTES:
            raise ValueError(f"the image has {self.size:,} bytes, expected 1 to {MAX_FILE_BYTES:,}")
        return _bytes_at(self.shard, self.offset, self.size)


@dataclass
class _Sample:
    """The files of one key."""

    key: str
    fields: dict[str, tarfile.TarInfo] = field(default_factory=dict)


def read_webdataset(root: Path, options: WebDatasetOptions, seed: int) -> LabelledContents | BoxedContents:
    """Index the shards and read the labels.

    Raises:
        SourceError: there is no shard, one is damaged, or a sample is not one image with its class; the message names
            shard and sample.
    """
    paths = [path for path in root.rglob("*.tar") if not path.name.startswith(".") and not path.is_dir()]
    if not paths:
        packed = next((path for path in root.rglob("*") if path.name.lower().endswith(_PACKED)), None)
        if packed is not None:
            raise SourceError(f"{packed} is compressed, in which images have no place of their own; unpack it to .tar")
        raise WEBDATASET.missing(root)
    unused: Counter[str] = Counter()
    splits = {
        split: [record for path in files for record in _read_shard(path, options, unused)]
        for split, files in by_split(root, paths).items()
    }
    _refuse_captions(root, splits)
    return contents_of(WEBDATASET.name, root, splits, _names(root), options, seed, unused, WEBDATASET_ADVICE)


def _refuse_captions(root: Path, splits: Mapping[str, list[Record]]) -> None:
    """The text of each image for itself, as of pairs of images and captions, is no class."""
    labels = [record.label for records in splits.values() for record in records if record.label is not None]
    if len(labels) > 1 and len(set(labels)) == len(labels) and all(isinstance(label, str) for label in labels):
        raise SourceError(
            f"{root}: each class has one image, such as {short(labels[0])}, so that they are captions and no classes; "
            "name the key of the class in .json with option label=KEY, or write classes to .cls"
        )


def _names(root: Path) -> list[str] | None:
    for name in _NAME_FILES:
        if (root / name).is_file():
            lines = [line.strip() for line in read_text(root / name).rstrip().split("\n")]
            if "" in lines:
                raise SourceError(
                    f"{root / name}, line {lines.index('') + 1} is empty, and the classes after it would have other "
                    "numbers; write the name of each class in its line"
                )
            return lines
    return None


def _read_shard(path: Path, options: WebDatasetOptions, unused: Counter[str]) -> Iterator[Record]:
    try:
        with tarfile.open(path, "r:") as shard:
            for sample in _samples(path, shard, unused):
                yield _record(path, sample, options, unused)
    except (tarfile.TarError, OSError, UnicodeError, EOFError) as error:
        raise SourceError(
            f"{path} cannot be read as tar: {error or type(error).__name__}; write the shard anew"
        ) from error


def _samples(path: Path, shard: tarfile.TarFile, unused: Counter[str]) -> Iterator[_Sample]:
    sample: _Sample | None = None
    seen: set[str] = set()
    end, before = path.stat().st_size, -1
    for member in shard:
        # tarfile would go back by a negative size, and read the same headers for ever.
        if member.size < 0 or member.offset <= before:
            raise SourceError(f"{path}: {short(member.name)} has {member.size:,} bytes; write the shard anew")
        before = member.offset
        name = PurePosixPath(member.name)
        if not member.isreg() or name.name.startswith("."):
            if not member.isdir():
                unused["links, folders and hidden files in shards"] += 1
            continue
        if member.sparse is not None or member.offset_data + member.size > end:
            raise SourceError(f"{path}: {short(member.name)} is cut off, or has holes; write the shard anew")
        base, _, extension = name.name.partition(".")
        key = str(name.with_name(base)) if base else member.name
        if sample is None or key != sample.key:
            if sample is not None:
                yield sample
            if key in seen:
                raise SourceError(
                    f"{path}: the files of sample {short(key)} are not next to one another; sort the shard by name "
                    "(tar --sort=name)"
                )
            seen.add(key)
            sample = _Sample(key)
        if extension.lower() in sample.fields:
            raise SourceError(f"{path}: {short(member.name)} is there twice; write the shard anew")
        sample.fields[extension.lower()] = member
    _check_end(path, shard.offset)
    if sample is not None:
        yield sample


def _check_end(path: Path, at: int) -> None:
    """Check that an archive ends where no further header was found, since tarfile also stops at damage.

    Args:
        path: of the shard.
        at: byte at which the two blocks of zeros of the end are expected.

    Raises:
        SourceError: a damaged header, another archive, or nothing is there.
    """
    with path.open("rb") as file:
        file.seek(at)
        block = file.read(tarfile.BLOCKSIZE)
        if len(block) < tarfile.BLOCKSIZE:
            raise SourceError(
                f"{path} is cut off at byte {at:,}: it has no end of the archive, as where its writer was killed; "
                "write the shard anew, or append the end if nothing is missing (truncate -s +1024 FILE)"
            )
        if any(block):
            raise SourceError(f"{path} is damaged at byte {at:,}, where the header of a file should be; write it anew")
        while rest := file.read(1 << 20):
            if rest.strip(b"\0"):
                raise SourceError(
                    f"{path}: more follows the end of the archive at byte {at:,}, as where shards were joined by cat; "
                    "join them by tar --concatenate, or give each by itself"
                )


def _record(path: Path, sample: _Sample, options: WebDatasetOptions, unused: Counter[str]) -> Record:
    where = f"{path}: sample {sample.key}"
    images = [extension for extension in _IMAGES if extension in sample.fields]
    if len(images) != 1:
        held = ", ".join(map(short, sample.fields))
        what = "no image" if not images else f"{len(images)} images"
        raise SourceError(f"{where} has {what} ({held}), expected one of {', '.join(_IMAGES)}; write the shard anew")
    member = sample.fields[images[0]]
    image = TarImage(path, member.name, member.offset_data, member.size)
    labels = _LABELS if options.label is None else ("json", *_LABELS)
    given = next((name for name in labels if name in sample.fields), None)
    others = set(sample.fields) - {images[0], given}
    unused.update(f"fields .{extension} of samples" for extension in others)
    if given is None:
        return Record(image)
    content = _text(path, where, sample.fields[given])
    if given == "json":
        return _of_json(image, where, content, options)
    return Record(image, _of_cls(where, content) if given == "cls" else label_of(where, content.strip()))


def _of_cls(where: str, content: str) -> Label | None:
    try:
        return label_of(where, int(content))
    except ValueError as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(f"{where}: .cls is {short(content)}, expected a whole number; correct the sample") from None


def _of_json(image: TarImage, where: str, content: str, options: WebDatasetOptions) -> Record:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{where}: .json cannot be read: {error}; correct the sample") from None
    if isinstance(found, int):
        return Record(image, label_of(where, found))
    keys = (options.label,) if options.label is not None else _KEYS
    key = next((key for key in keys if isinstance(found, Mapping) and key in found), None)
    if key is None:
        held = ", ".join(map(short, found)) if isinstance(found, Mapping) else short(found)
        raise SourceError(
            f"{where}: .json holds {held}, expected {' or '.join(keys)}; name the key with option label=KEY"
        )
    value: Any = found[key]
    if not isinstance(value, list | Mapping):
        return Record(image, label_of(where, value))
    boxes, labels = objects_of(where, value, options.boxes == "xyxy")
    return Record(image, None, boxes, labels)


def _text(path: Path, where: str, member: tarfile.TarInfo) -> str:
    if member.size > _MAX_LABEL_BYTES:
        raise SourceError(
            f"{where}: {short(member.name)} has {member.size:,} bytes, expected at most {_MAX_LABEL_BYTES:,}"
        )
    try:
        return _bytes_at(path, member.offset_data, member.size).decode()
    except ValueError as error:
        raise SourceError(f"{where}: {short(member.name)} cannot be read: {error}; write the shard anew") from None


def _bytes_at(path: Path, offset: int, size: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            content = file.read(size)
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from None
    if len(content) < size:
        raise ValueError(f"the shard ends after {len(content):,} of its {size:,} bytes")
    return content
