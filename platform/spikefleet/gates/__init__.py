"""What a candidate must show before it replaces a champion."""
