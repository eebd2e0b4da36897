"""Data for spikefleet: sources -> Arrow store -> batches. No models here."""
