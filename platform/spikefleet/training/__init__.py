"""The training core: one loop, its state, checkpoints and events."""
