"""SpikeYOLO and Spiking YOLOv8: configurations, blocks, networks, loss, decoding, released weights."""
