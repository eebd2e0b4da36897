"""What Ray says of a failed worker, in one line."""

from __future__ import annotations

import re

# What Ray's memory monitor says; the last line, which other errors are known by, has no figure.
_MEMORY = re.compile(r"was ([\d.]+ ?[kKMGT]i?B)(?: used)? ?/ ?([\d.]+ ?[kKMGT]i?B)")
_LIMIT = re.compile(r"\(([\d.]+%) of \d+B limit\)")


def cause_of(error: BaseException) -> BaseException:
    """The first exception of a worker, without Ray's wrappers."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        error = next(iter(failures.values()))
    inner = getattr(error, "cause", None)
    return inner if isinstance(inner, BaseException) else error


def headline(error: BaseException) -> str:
    """An error of a worker in one line; a machine without memory in a sentence with its remedy."""
    used = _MEMORY.search(text := str(error))
    if used is not None and ("low on memory" in text or "OOM" in text):
        limit = _LIMIT.search(text)
        share = f", and Ray ends workers from {limit[1]} on" if limit else ""
        return (
            f"a worker was ended because the machine ran out of memory: {used[1]} of {used[2]} in use{share}; lower "
            "train.global_batch, raise train.accumulate, or lower data.loader_processes and --workers"
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
