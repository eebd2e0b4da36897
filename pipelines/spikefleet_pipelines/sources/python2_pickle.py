"""Reading the pickles of CIFAR without executing anything that a pickle names.

A pickle is a program that can call any function it names. This reader resolves the few names that CIFAR's files contain
(numpy's array and dtype, and the codec with which Python 3 writes bytes) to its own substitutes and refuses every other
name. Arrays are built from a checked dtype, shape and bytes: the file calls no function of numpy or of any other
package. Its opcodes are walked first, because the memo of Python's reader grows to whatever index a file names.
"""

import io
import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from spikefleet_pipelines.errors import SourceError

_DTYPES = {
    "u1": np.uint8, "i1": np.int8, "i2": np.int16, "u2": np.uint16, "i4": np.int32, "u4": np.uint32, "i8": np.int64,
    "u8": np.uint64,
}  # fmt: skip
_MOST_BYTES = 1 << 29
"""Largest file that is read: the largest official one has 156 MB."""
_LONGEST_INTEGER = 16  # in bytes
_PUTS = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
_LONG_INTEGERS = frozenset({"INT", "LONG", "LONG1", "LONG4"})


class ForbiddenPickleError(SourceError):
    """A pickle names something other than plain data."""


class DamagedPickleError(SourceError):
    """A file is not a pickle, or is truncated.

    Args:
        path: of the file.
        reason: what is wrong.
        expected: what the official file has, for the message.
    """

    def __init__(self, path: Path, reason: str, expected: str = "") -> None:
        size = f"{path.stat().st_size:,} bytes" if path.is_file() else "no bytes"
        super().__init__(f"{path} is truncated or damaged: it has {size}{expected} ({reason}); download it again")


class _PickledArray:
    """Substitute for numpy's `_reconstruct`; its state is (version, shape, dtype, is_fortran, bytes)."""

    value: np.ndarray[Any, Any] | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, raw = state
        if is_fortran not in (0, 1):
            raise ForbiddenPickleError(_NOT_PLAIN)
        self.value = _numbers(raw, dtype).reshape(shape, order="F" if is_fortran else "C")


class _PickledDtype:
    def __init__(self, name: Any) -> None:
        if name not in _DTYPES:
            raise ForbiddenPickleError(f"an array of dtype {name!r}")
        self.value = np.dtype(_DTYPES[name])

    def __setstate__(self, state: Any) -> None:
        byte_order = state[1]
        if byte_order not in ("|", "<", "="):
            raise ForbiddenPickleError(f"an array of byte order {byte_order!r}")


_NOT_PLAIN = "an array that is not of plain numbers in row- or column-major order"


def _numbers(raw: Any, dtype: Any) -> np.ndarray[Any, Any]:
    if not isinstance(dtype, _PickledDtype) or not isinstance(raw, bytes | bytearray | str):
        raise ForbiddenPickleError(_NOT_PLAIN)
    # Python 2 wrote bytes where Python 3 has str; latin1 maps the 256 values one to one.
    return np.frombuffer(raw.encode("latin1") if isinstance(raw, str) else raw, dtype.value)


def _from_buffer(raw: Any, dtype: Any, shape: Any, order: Any) -> _PickledArray:
    """What protocol 5 writes for an array."""
    if order not in ("C", "F"):
        raise ForbiddenPickleError(_NOT_PLAIN)
    array = _PickledArray()
    array.value = _numbers(raw, dtype).reshape(shape, order=order)
    return array


def _scalar(dtype: Any, raw: Any = None) -> int:
    """A number of numpy, as an int."""
    (value,) = _numbers(raw, dtype).tolist()
    return int(value)


def _encode(text: Any, encoding: Any) -> bytes:
    if encoding != "latin1" or not isinstance(text, str):
        raise ForbiddenPickleError(f"text encoded as {encoding!r}")
    return text.encode("latin1")


# Each name resolves to a new function object, so that a pickle that sets attributes on it changes nothing here.
_STAND_INS: dict[tuple[str, str], Callable[[], Any]] = {
    ("multiarray", "_reconstruct"): lambda: lambda *_: _PickledArray(),
    ("multiarray", "scalar"): lambda: lambda *arguments: _scalar(*arguments),
    ("numeric", "_frombuffer"): lambda: lambda *arguments: _from_buffer(*arguments),
    ("numpy", "ndarray"): lambda: "numpy.ndarray",
    ("numpy", "dtype"): lambda: lambda name, *_: _PickledDtype(name),
    ("_codecs", "encode"): lambda: lambda text, encoding="": _encode(text, encoding),
}
_MODULES = {
    f"numpy.{package}.{module}": module for package in ("core", "_core") for module in ("multiarray", "numeric")
}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        stand_in = _STAND_INS.get((_MODULES.get(module, module), name))
        if stand_in is None:
            raise ForbiddenPickleError(f"{module}.{name}")
        return stand_in()


def read_plain_pickle(path: Path, expected: str = "") -> Any:
    """Read a pickle of dicts, lists, numbers, text, bytes and numeric arrays.

    Args:
        path: of the file.
        expected: what the official file has, for the message about a damaged one, such as ", expected 9 images".

    Returns:
        Its content; of a dict, keys are str and arrays are numpy's.

    Raises:
        ForbiddenPickleError: it contains anything else, named in the message; nothing of it was executed.
        DamagedPickleError: it cannot be read to its end.
    """
    try:
        size = path.stat().st_size
        if size > _MOST_BYTES:
            raise ValueError(f"it has {size:,} bytes, expected at most {_MOST_BYTES:,}")
        raw = path.read_bytes()
        _check_opcodes(raw)
        return _plain(_PlainUnpickler(io.BytesIO(raw), encoding="latin1").load())
    except ForbiddenPickleError as error:
        raise ForbiddenPickleError(
            f"{path} is refused: the pickle contains {error}, expected plain data; download the official file"
        ) from error
    except Exception as error:  # a damaged pickle can fail in any way
        raise DamagedPickleError(path, str(error)[:200] or type(error).__name__, expected) from error


def _check_opcodes(raw: bytes) -> None:
    """Walk the opcodes of a pickle without executing them.

    Raises:
        ValueError: one is damaged, or names a place in the memo or an integer that no official file has.
    """
    memoised = 0
    for opcode, argument, position in pickletools.genops(raw):
        if opcode.name == "MEMOIZE":
            memoised += 1
        elif opcode.name in _PUTS and argument is not None:
            memoised += 1
            if argument > memoised:
                raise ValueError(f"opcode {opcode.name} at byte {position} names place {argument} of the memo")
        elif opcode.name in _LONG_INTEGERS and argument is not None and abs(argument) >> 8 * _LONGEST_INTEGER:
            raise ValueError(f"the integer at byte {position} has more than {_LONGEST_INTEGER} bytes")


def _plain(content: Any) -> Any:
    if isinstance(content, dict):
        return {
            key.decode("latin1") if isinstance(key, bytes) else key: _array(value) for key, value in content.items()
        }
    return _array(content)


def _array(value: Any) -> Any:
    return value.value if isinstance(value, _PickledArray) else value
