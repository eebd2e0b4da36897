"""A training run, from its directory to its registration."""
