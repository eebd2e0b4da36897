"""Compiles native_unit.cpp and its headers with the C++ compiler of this machine on first use, and loads the library.

The library is kept in `$XDG_CACHE_HOME/spikefleet/native` (by default `~/.cache/spikefleet/native`), or, where there
is no such place or it cannot be written, in `spikefleet-UID/native` in the directory for temporary files. Its name is a
hash of the source, the flags, the compiler's version and the processor's features, so that hosts which share a home
directory do not share it unless they are alike. Processes that need it at once wait for the one that compiles.

The sources are read by the loader of this module, as bytes: in a registered version they lie in the archive of its
code. Those that are hashed are those that are compiled.

`$CXX` names another compiler.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import torch

SOURCES = ("native_unit.cpp", "native_elements.h", "native_integers.h", "native_statistics.h", "native_steps.h")
"""Beside this file; the first one includes the others."""
FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-ffp-contract=off",  # the reference rounds each operation
    "-fopenmp-simd",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
    "-shared",
)
_COMPILERS = ("c++", "g++", "clang++")
_MOST_SECONDS = 300


class NativeUnavailableError(RuntimeError):
    """The library cannot be built or loaded here; the message says why."""


@cache
def load_library() -> ctypes.CDLL:
    """The library, built if it is not in the cache.

    Raises:
        NativeUnavailableError: there is no C++ compiler, it fails, or torch lacks the function that shares its threads.
    """
    parallel_for = _parallel_for()
    compiler, sources = _compiler(), _read_sources()
    file = _library_file(compiler, sources)
    try:
        if not file.exists():
            with _lock(file.with_suffix(".lock")):
                if not file.exists():
                    _build(compiler, sources, file)
        _refuse_files_of_others(file)
    except OSError as error:
        raise NativeUnavailableError(f"{file} cannot be built: {error}") from error
    try:
        library = ctypes.CDLL(str(file))
    except OSError as error:
        raise NativeUnavailableError(f"{file} cannot be loaded: {error}") from error
    for direction in ("forward", "backward"):
        for name, arguments in ((f"spikefleet_{direction}", 2), (f"spikefleet_integers_{direction}", 1)):
            function = getattr(library, name)
            function.argtypes, function.restype = [ctypes.c_void_p] * arguments, ctypes.c_int32
    library.spikefleet_init.argtypes, library.spikefleet_init.restype = [ctypes.c_void_p], None
    library.spikefleet_init(parallel_for)
    return library


def needs_compiling() -> bool:
    """Whether the library can be built and is not in the cache yet: its first use will take seconds."""
    try:
        _parallel_for()
        return not _library_file(_compiler(), _read_sources()).exists()
    except (NativeUnavailableError, OSError):
        return False


def _read_sources() -> dict[str, bytes]:
    """The sources by their names."""
    read = getattr(globals().get("__loader__"), "get_data", None)
    if read is None:
        raise NativeUnavailableError("its source is not installed")
    try:
        return {name: read(str(Path(__file__).with_name(name))) for name in SOURCES}
    except OSError as error:
        raise NativeUnavailableError(f"its source cannot be read: {error}") from error


def _library_file(compiler: list[str], sources: Mapping[str, bytes]) -> Path:
    version = _run([*compiler, "--version"])
    key = hashlib.sha256()
    for part in (*sources.values(), repr((compiler, FLAGS)).encode(), version.encode(), _processor().encode()):
        key.update(hashlib.sha256(part).digest())
    return _folder() / f"{key.hexdigest()[:32]}.so"


def _parallel_for() -> int:
    """The address of the function by which torch's own operators use its threads; torch has it since 2.10."""
    folder = Path(torch.__file__).with_name("lib")
    suffix = "dylib" if platform.system() == "Darwin" else "so"
    try:
        function = ctypes.CDLL(str(folder / f"libtorch_cpu.{suffix}")).torch_parallel_for
    except (OSError, AttributeError) as error:
        raise NativeUnavailableError(f"torch {torch.__version__} has no torch_parallel_for") from error
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    return address


def _compiler() -> list[str]:
    try:
        named = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise NativeUnavailableError(f"CXX={os.environ['CXX']} is not a command: {error}") from error
    if named and shutil.which(named[0]) is None:
        raise NativeUnavailableError(f"CXX={named[0]} is not a program")
    if named:
        return named
    for name in _COMPILERS:
        if shutil.which(name) is not None:
            return [name]
    raise NativeUnavailableError("no C++ compiler")


def _processor() -> str:
    """What `-march=native` depends on."""
    try:
        with Path("/proc/cpuinfo").open(errors="replace") as lines:
            names = ("vendor_id", "model name", "flags", "Features", "CPU implementer", "CPU part")
            first = [line for line in _until_blank(lines) if line.startswith(names)]
    except OSError:
        first = [platform.processor(), platform.mac_ver()[0]]
    return "\n".join([platform.machine(), *first])


def _until_blank(lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        if not line.strip():
            return
        yield line


def _folder() -> Path:
    """A directory of this user alone that can be written, for libraries."""
    flaws = []
    for find in (_cache, _temporary):
        try:
            place = find()
            place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            place.mkdir(mode=0o700, exist_ok=True)
            _refuse_files_of_others(place.parent)
            _refuse_files_of_others(place)
            if os.access(place, os.W_OK | os.X_OK):
                return place
            flaws.append(f"{place} cannot be written")
        except (OSError, RuntimeError) as error:
            flaws.append(str(error))
    raise NativeUnavailableError(f"no place for the library: {'; '.join(flaws)}")


def _cache() -> Path:
    """The user's cache.

    Raises:
        RuntimeError: the user has no home directory.
    """
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # By its specification a relative path is none.
    return (named if named.is_absolute() else Path("~/.cache").expanduser()) / "spikefleet/native"


def _temporary() -> Path:
    return Path(tempfile.gettempdir()) / f"spikefleet-{os.getuid()}/native"


def _refuse_files_of_others(path: Path) -> None:
    """A library is code: one that another user could have written is not loaded."""
    found = path.stat()
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise NativeUnavailableError(f"{path} can be written by other users")


@contextmanager
def _lock(file: Path) -> Iterator[None]:
    """Held by one process at a time; where the file system has no locks, each process builds for itself."""
    import fcntl

    with file.open("a") as handle:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _build(compiler: list[str], sources: Mapping[str, bytes], file: Path) -> None:
    """Compile in a directory of its own, then rename: a file of the final name is complete."""
    with tempfile.TemporaryDirectory(dir=file.parent, prefix="partial-") as name:
        for source, text in sources.items():
            (Path(name) / source).write_bytes(text)
        partial = Path(name) / file.name
        _run([*compiler, *FLAGS, str(Path(name) / SOURCES[0]), "-o", str(partial)])
        partial.chmod(0o700)
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(file)


def _run(command: list[str]) -> str:
    environment = os.environ | {"LC_ALL": "C"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_MOST_SECONDS, env=environment
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailableError(f"{command[0]} failed: {error}") from error
    if done.returncode:
        lines = done.stderr.splitlines()
        shown = next((line for line in lines if "error" in line), lines[0] if lines else f"status {done.returncode}")
        raise NativeUnavailableError(f"{command[0]} failed: {shown.strip()[:200]}")
    return done.stdout
