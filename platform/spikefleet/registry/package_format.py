"""The format of a network package. A version's serving code asks an installed spikefleet for it before all else."""

FORMAT = 1
"""Changed where an older spikefleet could not read, or would serve otherwise, what a newer one writes."""
