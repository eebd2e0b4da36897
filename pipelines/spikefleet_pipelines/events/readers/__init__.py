"""Readers of recordings, one module for each family of formats; `finding.read_recording` chooses one by the file."""
