"""Event cameras: recordings as arrays and as words of four bytes, and their frames."""
