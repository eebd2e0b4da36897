"""What is left of a module that the serving code of early versions imports: the sentence that says what to do.

MLflow keeps a copy of that code with each version, so it cannot follow when modules move. `registry.load` and
all commands load such versions as before.
"""

raise ImportError(
    "this version was registered by an earlier spikefleet, whose serving code does not fit this one; register it again "
    "with `spikefleet registry renew models:/NAME/VERSION`"
)
