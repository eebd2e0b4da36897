"""The scales at which a table can be reproduced."""

from __future__ import annotations

from typing import Literal

Scale = Literal["digits", "fashion_mnist", "full"]
"""full: the paper's networks and data. The others run on two CPU cores: narrow networks on small real data."""
