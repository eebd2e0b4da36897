"""The verdicts of the spike check: whether binary inference provably equals the trained network."""

PROVED = "proved"
REFUTED = "refuted"
NOT_SHOWN = "not shown"
"""The forms are equal, but the output is the same for every image, so that nothing is shown of the network."""
NOT_SPIKING = "not spiking"
