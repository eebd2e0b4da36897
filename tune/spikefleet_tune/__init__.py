"""Searches over the choices that are special to spiking networks, on Ray Tune. Is handed a trainable."""
