"""Ray sessions, and the training core on Ray Train workers."""
