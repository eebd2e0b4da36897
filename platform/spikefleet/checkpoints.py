"""A stub for the serving code of early registered versions, which imports this module: it says what to do.

MLflow stores a copy of the serving code with each version, so that code cannot follow when modules move.
`registry.load` and all commands still load such versions.
"""

raise ImportError(
    "the serving code of this version is from an earlier spikefleet and does not work with this one; register it again "
    "with `spikefleet registry renew models:/NAME/VERSION`"
)
