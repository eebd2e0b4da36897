"""The small finished run of which tests of robustness break copies."""

SMALL = (
    "model.width=0.125",
    "train.epochs=2",
    "checkpoint.every_steps=8",
    "cluster.workers=0",
    "train.global_batch=64",  # with 128 it stays at chance, and gets no alias
)
"""Overrides of the recipe `digits`."""
NAME = "small"
"""Name of the run."""
