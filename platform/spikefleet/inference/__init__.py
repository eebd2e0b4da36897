"""Trained networks in use: opened by a reference, evaluated, asked."""
