"""convert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spikefleet.cli.app import app
from spikefleet.cli.output import loading, print_json, say, stderr
from spikefleet.cli.parameters import AsJson, Force, Overrides
from spikefleet.errors import UserError
from spikefleet.outputs import check_outputs


@app.command("convert")
def convert(
    weights: Annotated[Path, typer.Argument(help="Weights of another program, .pt or .safetensors.")],
    model: Annotated[str, typer.Argument(help="The network that they are of, such as spike_yolo_s.")],
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="The .safetensors file.")] = Path("weights.safetensors"),
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write weights of another program as safetensors for `train ... init.from=FILE`; nothing is unpickled.

    Read are those that SpikeYOLO's authors released, and state dicts with our own names.
    """
    from spikefleet.config.messages import did_you_mean
    from spikefleet.config.recipes import override_model, parse_overrides
    from spikefleet_models.families import list_models, model_config

    if out.suffix != ".safetensors":
        raise UserError(f"--out {out} must end in .safetensors")
    if model not in list_models():
        raise UserError(f"{model!r} is not a model; {did_you_mean(model, list_models(), 'name one', most=3)}")
    config = override_model(model_config(model), parse_overrides(overrides or []), model)
    check_outputs([out], inputs=[weights], force=force)
    with loading("torch", stderr):
        from spikefleet.conversion import convert_weights
        from spikefleet.files import sha256_of

    count = convert_weights(weights, config, out)
    digest = sha256_of(out)
    if as_json:
        print_json({"out": str(out), "tensors": count, "sha256": digest})
        return
    say(f"{count} tensors: {out} (SHA-256 {digest[:12]}...); train from them with init.from={out}")
