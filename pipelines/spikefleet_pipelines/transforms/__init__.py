"""Transforms of stored images to normalised batches, and their configurations."""
