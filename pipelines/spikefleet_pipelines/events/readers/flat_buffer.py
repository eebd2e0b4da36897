"""Reading flatbuffers, Google's format of tables in bytes: as much of it as AEDAT 4 has."""

import struct


class FlatTable:
    """The root table of a flatbuffer that its size and an identifier of four letters precede.

    Args:
        raw: size of the rest (u32), place of the root, identifier, tables.
        identifier: the letters.

    Raises:
        ValueError: it is no such flatbuffer. `struct.error`, which all methods raise too: it ends too early.
    """

    def __init__(self, raw: bytes, identifier: bytes) -> None:
        size, root = struct.unpack_from("<II", raw)
        if size + 4 > len(raw) or raw[8:12] != identifier:
            raise ValueError(f"expected {identifier!r} of {size:,} bytes, found {raw[8:12]!r} of {len(raw) - 4:,}")
        self._raw = raw
        self._table = 4 + root
        self._fields = self._table - int(struct.unpack_from("<i", raw, self._table)[0])
        if self._fields < 0:
            raise ValueError("a table has no list of fields")
        self._end: int = struct.unpack_from("<H", raw, self._fields)[0]

    def integer(self, field: int, kind: str, default: int) -> int:
        """Return an integer field, of a kind of `struct`."""
        place = self._place(field)
        return default if place is None else int(struct.unpack_from("<" + kind, self._raw, place)[0])

    def vector(self, field: int) -> tuple[int, int]:
        """Return (place of the first item, number of items) of a vector or a string; (0, 0) where it is missing."""
        place = self._place(field)
        if place is None:
            return 0, 0
        start = place + int(struct.unpack_from("<I", self._raw, place)[0])
        return start + 4, int(struct.unpack_from("<I", self._raw, start)[0])

    def text(self, field: int) -> bytes:
        """Return the bytes of a string."""
        start, number = self.vector(field)
        if start + number > len(self._raw):
            raise ValueError("a string is longer than the table's bytes")
        return self._raw[start : start + number]

    def _place(self, field: int) -> int | None:
        at = 4 + 2 * field
        offset = int(struct.unpack_from("<H", self._raw, self._fields + at)[0]) if at < self._end else 0
        return self._table + offset if offset else None
