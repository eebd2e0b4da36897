"""The verdicts of the spike check: whether binary inference provably equals the trained network."""

PROVED = "proved"
REFUTED = "refuted"
NOT_SPIKING = "not spiking"
