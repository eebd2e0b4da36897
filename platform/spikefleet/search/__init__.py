"""Searches over trainings: trials, tracking, display."""
