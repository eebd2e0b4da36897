"""The format of a network package. A version's serving code asks an installed spikefleet for it before all else."""

FORMAT = 2
"""Changed where an older spikefleet could not read, or would serve otherwise, what a newer one writes.

1: the content hash covers the files. 2: also the metadata in the card; the code that serves travels.
"""

READABLE = (1, FORMAT)
"""The formats of all releases."""
