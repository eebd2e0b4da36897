"""Hyperparameter search for spiking networks on Ray Tune; the caller provides the trainable."""
