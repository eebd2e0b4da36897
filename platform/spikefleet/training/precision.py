"""The floating-point type of forward passes, in training and in inference."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch

Precision = Literal["fp32", "bf16", "fp16"]

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: Precision, device: torch.device, cached: bool = True) -> AbstractContextManager[Any]:
    """Torch's autocast context for a device; a null context for fp32.

    Without `cached`, weights are cast at each use.
    """
    dtype = _AUTOCAST.get(precision)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype, cache_enabled=cached)
