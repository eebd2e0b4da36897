"""Tracking of runs in MLflow: a write-ahead journal and its delivery."""
