"""Certificates of a trained network: the spike check and the energy card."""
