"""Data for spikefleet: raw files -> Arrow store -> batches; independent of the models."""
