"""spikefleet: distributed training of spiking neural networks for vision."""

__version__ = "0.1.0"
