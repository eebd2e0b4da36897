"""The verdicts of the spike check: whether binary inference was shown to equal the trained network."""

PROVED = "proved"
REFUTED = "refuted"
NOT_SPIKING = "not spiking"
