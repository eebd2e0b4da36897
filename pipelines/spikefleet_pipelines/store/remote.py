"""Location of a store's files: a local directory, or any `pyarrow.fs` file system behind a local cache.

Remote shards are fetched once into a directory where each file is named by its SHA-256, so that stores share shards and
a changed shard is never confused with the old one. A file enters the cache under a temporary name and is renamed after
its hash was verified: readers never see a partial file.
"""

import hashlib
import os
import secrets
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlparse

import pyarrow as pa
import pyarrow.fs

from spikefleet_pipelines.errors import StoreError
from spikefleet_pipelines.store.manifest import MANIFEST_NAME, Shard

_CHUNK = 1 << 22


class RemoteStore(NamedTuple):
    """A store directory on a `pyarrow.fs` file system."""

    filesystem: Any
    path: str
    uri: str

    def read_manifest(self) -> bytes:
        """Read the bytes of the manifest.

        Raises:
            StoreError: there is no manifest, or it cannot be read.
        """
        try:
            with self.filesystem.open_input_stream(f"{self.path}/{MANIFEST_NAME}") as stream:
                return stream.read()
        except FileNotFoundError as error:
            raise StoreError(f"{self.uri} is not a store: it has no {MANIFEST_NAME}; check the URI") from error
        except OSError as error:
            raise StoreError(
                f"{self.uri}/{MANIFEST_NAME} cannot be read: {error}; check the network and the credentials"
            ) from error

    def fetch(self, shard: Shard, cache: Path, verify: bool) -> Path:
        """Return the local copy of a shard, fetched unless the cache contains all of it.

        Raises:
            StoreError: the shard cannot be read, or its hash differs from the manifest's.
        """
        cached = cache / f"{shard.sha256}.arrow"
        intact = cached.is_file() and cached.stat().st_size == shard.bytes
        if intact and (not verify or file_sha256(cached) == shard.sha256):
            return cached
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        part = cache / f"{shard.sha256}.{secrets.token_hex(8)}.part"
        digest = hashlib.sha256()
        try:
            with self.filesystem.open_input_stream(f"{self.path}/{shard.file}") as source, part.open("wb") as target:
                while chunk := source.read(_CHUNK):
                    digest.update(chunk)
                    target.write(chunk)
            check_hash(f"{self.uri}/{shard.file}", shard.sha256, digest.hexdigest())
            part.replace(cached)
        except StoreError:
            raise
        except OSError as error:
            raise StoreError(
                f"{self.uri}/{shard.file} cannot be fetched into {cache}: {error}; check the network and the free space"
            ) from error
        finally:
            part.unlink(missing_ok=True)
        return cached


def locate(store: str | os.PathLike[str], filesystem: Any = None) -> Path | RemoteStore:
    """Resolve a local store (a path or a file:// URI, read in place) or a remote one (any other `pyarrow.fs` URI).

    Raises:
        StoreError: `pyarrow.fs` cannot open the URI.
    """
    text = os.fspath(store)
    if filesystem is not None:
        return RemoteStore(filesystem, text.rstrip("/"), text.rstrip("/"))
    if "://" not in text:
        return Path(text)
    if text.startswith("file://"):
        return Path(unquote(urlparse(text).path))
    try:
        found, path = pyarrow.fs.FileSystem.from_uri(text)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise StoreError(f"store {text!r} cannot be opened: {error}; check the URI") from error
    return RemoteStore(found, path.rstrip("/"), text.rstrip("/"))


def default_cache_dir() -> Path:
    """Return `$XDG_CACHE_HOME/spikefleet/shards`, by default below `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spikefleet" / "shards"


def file_sha256(path: Path) -> str:
    """Compute the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_hash(where: str, expected: str, found: str) -> None:
    """Check the hash of a shard.

    Raises:
        StoreError: the hashes differ; the message names the file and both.
    """
    if expected != found:
        raise StoreError(
            f"shard {where} is corrupt: SHA-256 is {found}, expected {expected}; copy it again, or prepare the store "
            "again with --overwrite"
        )
