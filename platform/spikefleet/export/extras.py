"""The optional libraries that a format needs."""

from __future__ import annotations

from importlib.util import find_spec

from spikefleet.errors import UserError

NEEDED = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "nir": ("nir",), "spikes": ()}
"""Format -> modules of the extra `spikefleet[export]`."""


def check_extras(form: str) -> None:
    """Raises UserError if a library that a format needs is not installed."""
    if missing := [name for name in NEEDED[form] if find_spec(name) is None]:
        raise UserError(
            f"--format {form} needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed; "
            "install spikefleet[export]"
        )
