"""Images that are not files of their own but lie in larger ones, such as shards of tar or Parquet."""

from pathlib import Path
from typing import Protocol, runtime_checkable

from spikefleet_pipelines.store.image_files import check_image_file, read_image_file


@runtime_checkable
class PackedImage(Protocol):
    """An image inside of a larger file; its text is its name for messages. It is sent between processes."""

    @property
    def size(self) -> int:
        """Bytes of the encoded image, about."""
        ...

    def below(self, root: Path) -> str:
        """Return its name for groups: the path of the larger file below a directory, with `/`, and its name there."""
        ...

    def read(self) -> bytes:
        """Read the encoded image. Raises ValueError with the reason if that is not possible."""
        ...


ImagePlace = Path | PackedImage
"""Where an image is: a file, or inside of one."""


def read_encoded(place: ImagePlace) -> bytes:
    """Read the bytes of an image. Raises ValueError with the reason if that is not possible."""
    return read_image_file(place) if isinstance(place, Path) else place.read()


def encoded_size(place: ImagePlace) -> int:
    """Return the size of an image, of one in a larger file about. Raises ValueError if a file cannot be an image."""
    return check_image_file(place) if isinstance(place, Path) else place.size
