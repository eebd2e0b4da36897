"""registry export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from spikefleet.cli.completion import version_names
from spikefleet.cli.output import loading, print_json, say, stderr
from spikefleet.cli.parameters import (
    AsJson,
    Force,
    OtherData,
    RunsDir,
    SplitName,
    StoresDir,
    Weights,
)
from spikefleet.cli.registry import registry_app

Exportable = Annotated[
    str,
    typer.Argument(
        help="NAME@champion, NAME/3, a pulled directory, a run's name or a checkpoint.", autocompletion=version_names
    ),
]


@registry_app.command("export")
def export_registered(
    network: Exportable,
    out: Annotated[Path, typer.Option(help="The file; F.json beside it says what it is.")],
    form: Annotated[
        Literal["onnx", "nir", "spikes"],
        typer.Option(
            "--format", help="ONNX; NIR, for spiking ResNets; or the binary form on T x D steps with its program."
        ),
    ] = "onnx",
    split: Annotated[SplitName, typer.Option(help="Part of the data on which the file is compared.")] = "test",
    images: Annotated[int | None, typer.Option(min=1, help="Images to compare, at most; all if not given.")] = None,
    precision: Weights = "fp32",
    data: OtherData = None,
    force: Force = False,
    as_json: AsJson = False,
    runs_dir: RunsDir = Path("runs"),
    stores_dir: StoresDir = Path("stores"),
) -> None:
    r"""Write a network for other programs, and compare the file with it on real images.

    A file that differs is refused, and nothing is left. Hash and comparison are kept with a registered version. ONNX
    and NIR need spikefleet\[export]. With --precision bf16 or int8 batch norms are folded, ONNX holds the weights in
    that type, and the comparison is with the network of these weights.
    """
    from spikefleet.export.extras import check_extras

    check_extras(form)
    with loading("torch", stderr):
        from spikefleet.export.run_export import export_network

    exported = export_network(
        network,
        form,
        out,
        runs_dir=runs_dir,
        stores_dir=stores_dir,
        console=stderr,
        split=split,
        data=data,
        images=images,
        precision=precision,
        force=force,
    )
    if as_json:
        print_json(exported.to_dict())
        return
    weights = "" if precision == "fp32" else f", weights in {precision}"
    say(f"{exported.uri} as {form}{weights}: {exported.size:,} bytes, SHA-256 {exported.sha256}")
    say(exported.comparison.sentence)
    for path in exported.files:
        say(str(path))
