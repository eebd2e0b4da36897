"""What is known and measured of a trained network, on one page."""
