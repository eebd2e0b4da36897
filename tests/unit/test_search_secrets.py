"""What Ray Tune sends of its environment with each trial, which everybody with the cluster's token can read."""

from __future__ import annotations

import pytest
from ray.tune.execution.class_cache import _ActorClassCache

from spikefleet_tune.on_tune import _tune_environment

KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


class Trainable:
    """Stands for that of a search."""


def sent() -> dict[str, str]:
    """Variables in the runtime environment of a trial's actor."""
    return dict(_ActorClassCache().get(Trainable)._default_options["runtime_env"]["env_vars"])


def test_no_key_of_a_bucket_is_sent_with_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KEYS:
        monkeypatch.setenv(name, f"secret of {name}")
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    assert set(KEYS) <= sent().keys(), "Ray Tune by itself sends them"
    with _tune_environment(None):
        found = sent()
        assert not set(KEYS) & found.keys()
        assert found["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] == "0.2", "what is no secret is still sent"
    assert set(KEYS) <= sent().keys(), "for other searches of this process it is as before"
