"""Costs of a trial: metrics that are better the smaller they are. Known without torch, for the command line."""

from __future__ import annotations

COSTS = ("energy_mj", "latency_ms", "parameters")
