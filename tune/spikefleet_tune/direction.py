"""Which end of an objective is the better one."""

from __future__ import annotations

from typing import Literal

Direction = Literal["max", "min"]
