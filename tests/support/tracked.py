"""What the tests of tracking log, and what they read back from MLflow."""

from __future__ import annotations

import time

from mlflow import MlflowClient

from spikefleet.tracking.tracker import Tracker

BLOCKED_S = 0.5  # a call that logs is never to keep the training waiting for as long as this


def history(client: MlflowClient, run_id: str | None, key: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in client.get_metric_history(run_id, key)]


def loss(step: int) -> float:
    return 2.0 / (step + 3)


def losses(steps: int) -> list[tuple[int, float]]:
    return [(step, loss(step)) for step in range(steps)]


def log_losses(tracker: Tracker, steps: range) -> float:
    """Logs a loss a step and returns the longest time that one call took, in seconds."""
    longest = 0.0
    for step in steps:
        begin = time.perf_counter()
        tracker.log_metrics({"train/loss": loss(step)}, step)
        longest = max(longest, time.perf_counter() - begin)
    return longest
