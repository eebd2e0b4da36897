"""The verdicts of the spike check: whether binary inference provably equals the trained network."""

PROVED = "proved"
REFUTED = "refuted"
NOT_SHOWN = "not shown"
"""The forms are equal, but no two images have different outputs, so that nothing is shown of the network."""
NOT_SPIKING = "not spiking"
