"""Scheduled retraining: the schedule, and how new data differs from what the champion was trained on."""
