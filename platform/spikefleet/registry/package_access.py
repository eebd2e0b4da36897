"""Opens the files of a package: a registered version's, downloaded, or those of a pulled directory."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spikefleet.errors import UserError
from spikefleet.registry.mlflow_store import connect, download, resolve
from spikefleet.tracking.mlflow_client import resolve_tracking_uri


def registry_uri(tracking_uri: str | None) -> str:
    """The URI of the registry: the given one, else MLFLOW_TRACKING_URI, else SQLite in ./runs."""
    return tracking_uri or resolve_tracking_uri(Path("runs"))


def is_registered(uri: str | Path) -> bool:
    """Whether a reference is that of a registered version, not of a directory."""
    return isinstance(uri, str) and uri.startswith("models:")


@contextmanager
def scratch_directory() -> Iterator[Path]:
    """Yields a temporary directory."""
    with tempfile.TemporaryDirectory(prefix="spikefleet-") as directory:
        yield Path(directory)


@contextmanager
def package_files(uri: str | Path, tracking_uri: str | None) -> Iterator[tuple[Path, str | None]]:
    """Yields a directory with a package's files, not yet verified, and their expected content hash.

    Args:
        uri: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, or a pulled directory.
        tracking_uri: of the registry.

    Raises:
        UserError: the version does not exist, or its files cannot be downloaded.
    """
    if not is_registered(uri):
        yield Path(uri), None
        return
    with connect(registry_uri(tracking_uri)) as client, scratch_directory() as scratch:
        version = resolve(client, str(uri))
        download(client, version, "", scratch)
        try:
            yield scratch, version.content_hash
        except UserError as error:
            if str(scratch) not in str(error):
                raise
            # The directory is gone when the message is read, and is nothing that a user could mend.
            raise UserError(f"{version.uri}: {str(error).replace(f'{scratch}/', '')}") from error
