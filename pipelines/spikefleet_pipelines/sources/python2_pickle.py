"""Reading the pickles of CIFAR without executing anything that a pickle names.

A pickle is a program that can call any function it names. This reader resolves the few names that CIFAR's files contain
(numpy's array and dtype, and the codec with which Python 3 writes bytes) to its own substitutes and refuses every other
name. Arrays are built from a checked dtype, shape and bytes: the file calls no function of numpy or of any other
package.
"""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

_DTYPES = {"u1": np.uint8, "i1": np.int8, "i4": np.int32, "i8": np.int64}


class ForbiddenPickleError(ValueError):
    """A pickle names something other than plain data."""


class DamagedPickleError(ValueError):
    """A file is not a pickle, or is truncated."""


class _PickledArray:
    """Substitute for numpy's `_reconstruct`; its state is (version, shape, dtype, is_fortran, bytes)."""

    value: np.ndarray[Any, Any] | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, raw = state
        if not isinstance(dtype, _PickledDtype) or not isinstance(raw, bytes | str) or is_fortran not in (0, 1):
            raise ForbiddenPickleError("an array that is not of plain numbers in row- or column-major order")
        # Python 2 wrote bytes where Python 3 has str; latin1 maps the 256 values one to one.
        data = np.frombuffer(raw.encode("latin1") if isinstance(raw, str) else raw, dtype.value)
        self.value = data.reshape(shape, order="F" if is_fortran else "C")


class _PickledDtype:
    def __init__(self, name: Any) -> None:
        if name not in _DTYPES:
            raise ForbiddenPickleError(f"an array of dtype {name!r}")
        self.value = np.dtype(_DTYPES[name])

    def __setstate__(self, state: Any) -> None:
        byte_order = state[1]
        if byte_order not in ("|", "<", "="):
            raise ForbiddenPickleError(f"an array of byte order {byte_order!r}")


def _encode(text: Any, encoding: Any) -> bytes:
    if encoding != "latin1" or not isinstance(text, str):
        raise ForbiddenPickleError(f"text encoded as {encoding!r}")
    return text.encode("latin1")


# Each name resolves to a new function object, so that a pickle that sets attributes on it changes nothing here.
_STAND_INS: dict[tuple[str, str], Callable[[], Any]] = {
    ("multiarray", "_reconstruct"): lambda: lambda *_: _PickledArray(),
    ("numpy", "ndarray"): lambda: "numpy.ndarray",
    ("numpy", "dtype"): lambda: lambda name, *_: _PickledDtype(name),
    ("_codecs", "encode"): lambda: lambda text, encoding="": _encode(text, encoding),
}
_MULTIARRAY = {"numpy.core.multiarray", "numpy._core.multiarray"}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        stand_in = _STAND_INS.get(("multiarray" if module in _MULTIARRAY else module, name))
        if stand_in is None:
            raise ForbiddenPickleError(f"{module}.{name}")
        return stand_in()


def read_plain_pickle(path: Path) -> Any:
    """Read a pickle of dicts, lists, numbers, text, bytes and numeric arrays; keys of dicts become str.

    Raises:
        ForbiddenPickleError: it contains anything else, named in the message; nothing of it was executed.
        DamagedPickleError: it cannot be read to its end.
    """
    with path.open("rb") as stream:
        try:
            content = _PlainUnpickler(stream, encoding="latin1").load()
        except ForbiddenPickleError as error:
            raise ForbiddenPickleError(
                f"{path} is refused: the pickle contains {error}, expected plain data; download the official file"
            ) from error
        except Exception as error:  # a damaged pickle can fail in any way
            raise DamagedPickleError(f"{path}: {error}") from error
    return _plain(content)


def _plain(content: Any) -> Any:
    if isinstance(content, _PickledArray):
        return content.value
    if isinstance(content, dict):
        return {
            key.decode("latin1") if isinstance(key, bytes) else key: _plain(value) for key, value in content.items()
        }
    return content
