"""Runs in MLflow: a journal that is written first, and its delivery."""
