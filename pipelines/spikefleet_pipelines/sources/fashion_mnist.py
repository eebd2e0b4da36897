"""Fashion-MNIST: 70,000 grey images of 28x28 pixels in four IDX files (Xiao, Rasul and Vollgraf, 2017)."""

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.sources.contents import ArrayContents, hold_out_validation
from spikefleet_pipelines.sources.fashion_mnist_config import FASHION_MNIST, FashionMnistOptions

CLASS_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip

# The largest accepted size in a header, so that a damaged one does not exhaust memory.
_MOST_VALUES = 1 << 28


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes, gzipped or plain.

    Raises:
        SourceError: the file is not an IDX file, or its size differs from its header.
    """
    with path.open("rb") as raw:
        compressed = raw.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path) if compressed else path.open("rb") as stream:
            magic = stream.read(4)
            if len(magic) < 4 or magic[:3] != b"\0\0\x08" or not 1 <= magic[3] <= 4:
                raise SourceError(
                    f"{path} is not an IDX file of unsigned bytes: it starts with {magic.hex() or 'nothing'}, expected "
                    "000008; download it again"
                )
            header = stream.read(4 * magic[3])
            if len(header) < 4 * magic[3]:
                raise SourceError(
                    f"{path} is truncated: the header has {4 + len(header)} bytes, expected {4 + 4 * magic[3]}; "
                    "download it again"
                )
            shape = struct.unpack(f">{magic[3]}I", header)
            size = int(np.prod(shape, dtype=object))
            if not 1 <= size <= _MOST_VALUES:
                raise SourceError(
                    f"{path}: the header declares the shape {list(shape)} of {size:,} values, expected 1 to "
                    f"{_MOST_VALUES:,}; download it again"
                )
            values = stream.read(size + 1)
    except (EOFError, OSError, struct.error, zlib.error) as error:
        raise SourceError(
            f"{path} is truncated or damaged ({path.stat().st_size:,} bytes): {error}; download it again"
        ) from error
    if len(values) != size:
        found = "more" if len(values) > size else f"{len(values):,}"
        raise SourceError(f"{path}: found {found} values, expected {size:,} for shape {list(shape)}; download it again")
    return np.frombuffer(values, np.uint8).reshape(shape)


def read_fashion_mnist(root: Path, options: FashionMnistOptions, seed: int) -> ArrayContents:
    """Read Fashion-MNIST; by default 5,000 of the 60,000 training images, a twelfth of each class, are held out.

    Raises:
        SourceError: a file is missing or damaged.
    """
    images, labels = _read_part(root, "train")
    test_images, test_labels = _read_part(root, "t10k")
    splits = hold_out_validation(images, labels, options.holdout, seed, options.train_images)
    return ArrayContents(CLASS_NAMES, {**splits, "test": (test_images, test_labels)})


def _read_part(root: Path, part: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    image_file, label_file = _find(root, f"{part}-images-idx3-ubyte"), _find(root, f"{part}-labels-idx1-ubyte")
    images, labels = read_idx(image_file), read_idx(label_file)
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise SourceError(
            f"{image_file} has shape {list(images.shape)} and {label_file} {list(labels.shape)}, expected "
            "[n, height, width] and [n]; download them again"
        )
    return images[:, None], labels.astype(np.int64)


def _find(root: Path, name: str) -> Path:
    for path in (root / name, root / f"{name}.gz"):
        if path.is_file():
            return path
    raise FASHION_MNIST.missing(root / f"{name}[.gz]")
