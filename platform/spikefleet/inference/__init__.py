"""Inference with trained networks: load by reference, evaluate, predict."""
