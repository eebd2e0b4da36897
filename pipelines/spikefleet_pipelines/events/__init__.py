"""Event cameras: recordings, their formats, and what is made of them."""
