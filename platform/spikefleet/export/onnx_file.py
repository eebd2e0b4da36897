"""A network as one ONNX file: uint8 images in, logits or a detector's raw outputs out.

The scaling of pixels is the first thing in the graph, so a deployer gives images as they are decoded. T is unrolled,
the batch is free, height and width are fixed. Batch norms are not folded: folded in fp32, their rounding would move
membranes across thresholds, and the file in fp64 would no longer be the network in fp64 (`in_fp64`).
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from spikefleet.errors import RunError, UserError
from spikefleet.export.pixels import Scaling
from spikefleet_models.low_precision import PackedWeight
from spikefleet_models.traceable import traceable

if TYPE_CHECKING:
    import onnx

OPSET = 20
INPUT = "images"
_PREFIX = "spikefleet."
_LARGEST = 2_000_000_000
"""Bytes: a protobuf file cannot have more."""


class _Whole(nn.Module):
    """Pixels uint8 [B, C, H, W] -> scaling -> network."""

    def __init__(self, scaling: Scaling, network: nn.Module) -> None:
        super().__init__()
        self.scaling = scaling
        self.network = network

    def forward(self, pixels: Tensor) -> Any:
        return self.network(self.scaling(pixels))


def onnx_of(
    network: nn.Module,
    scaling: Scaling,
    shape: tuple[int, int, int],
    metadata: Mapping[str, Any],
    packed: Mapping[str, PackedWeight] = MappingProxyType({}),
) -> bytes:
    """Exports a network.

    Args:
        network: in evaluation mode, on the CPU; not changed.
        scaling: of pixels to its input.
        shape: (C, H, W) of the images.
        metadata: plain data by name, kept in the file as JSON.
        packed: weights of layers that the file holds in int8, behind a DequantizeLinear, or in bf16, behind a Cast; the
            network has the same numbers in its own type.

    Returns:
        The content of the file.

    Raises:
        UserError: the network is too large for one file.
    """
    from onnx_ir.passes import common
    from onnxscript.optimizer import fold_constants
    from torch.export import Dim

    pixels = torch.zeros((2, *shape), dtype=torch.uint8)
    whole = _Whole(scaling, traceable(network)).eval()
    outputs = whole(pixels)
    names = ["logits"] if isinstance(outputs, Tensor) else [f"level{index}" for index in range(len(outputs))]
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            whole,
            (pixels,),
            dynamo=True,
            dynamic_shapes=({0: Dim("batch", min=2)},),
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=names,
            verbose=False,
            optimize=False,
        )
    assert program is not None
    fold_constants(program.model)
    for tidy in (
        common.CommonSubexpressionEliminationPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.RemoveUnusedNodesPass(),
        common.ClearMetadataAndDocStringPass(),  # stack traces, with paths of this machine
    ):
        tidy(program.model)
    model: onnx.ModelProto = program.model_proto
    _pack(model, network, packed)
    for key, value in metadata.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = f"{_PREFIX}{key}", json.dumps(value)
    if (size := model.ByteSize()) > _LARGEST:
        raise UserError(
            f"the network takes {size:,} bytes as ONNX, and one file holds {_LARGEST:,}; export a smaller one"
        )
    return model.SerializeToString()


def _pack(model: onnx.ModelProto, network: nn.Module, packed: Mapping[str, PackedWeight]) -> None:
    """Keeps weights in their small types, in place; they become fp32 in the graph, to the bit.

    Raises:
        RunError: the graph does not hold a weight as it is, so that it cannot be kept small.
    """
    from onnx import TensorProto, helper, numpy_helper

    by_value = {network.get_parameter(f"{name}.weight").numpy().tobytes(): kept for name, kept in packed.items()}
    missing, nodes = set(by_value), []
    for initializer in list(model.graph.initializer):
        value = numpy_helper.to_array(initializer).tobytes() if initializer.data_type == TensorProto.FLOAT else b""
        if value not in by_value:
            continue
        missing.discard(value)
        weight, name = by_value[value], initializer.name
        small = f"{name}.small"
        if weight.scale is None:
            bits = weight.values.view(torch.int16).numpy().tobytes()
            tensor = helper.make_tensor(small, TensorProto.BFLOAT16, weight.values.shape, bits, raw=True)
            nodes.append(helper.make_node("Cast", [small], [name], to=TensorProto.FLOAT))
        else:
            tensor = numpy_helper.from_array(weight.values.numpy(), small)
            scale = numpy_helper.from_array(weight.scale.numpy(), f"{name}.scale")
            model.graph.initializer.append(scale)
            nodes.append(helper.make_node("DequantizeLinear", [small, scale.name], [name], axis=0))
        model.graph.initializer.remove(initializer)
        model.graph.initializer.append(tensor)
    if missing:
        raise RunError(f"{len(missing)} rounded weights are not in the graph as they are; export with --precision fp32")
    rest = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *rest])


def read_metadata(model: onnx.ModelProto) -> dict[str, Any]:
    """What `onnx_of` was given as metadata."""
    return {
        entry.key.removeprefix(_PREFIX): json.loads(entry.value)
        for entry in model.metadata_props
        if entry.key.startswith(_PREFIX)
    }


class OnnxFile:
    """An ONNX file as onnxruntime runs it, on the CPU.

    Args:
        path: of the file.
        threads: of onnxruntime; 0: as many as torch has.
    """

    def __init__(self, path: Path, threads: int = 0) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(self, pixels: NDArray[np.uint8]) -> list[Tensor]:
        """All outputs for images uint8 [B, C, H, W]."""
        return [torch.from_numpy(output) for output in self._session.run(None, {INPUT: pixels})]


class Fp64File:
    """An ONNX file whose numbers are all fp64, as ONNX's own reference evaluates it: slow, and next to exact."""

    def __init__(self, path: Path) -> None:
        import onnx
        from onnx.reference import ReferenceEvaluator

        self._evaluator = ReferenceEvaluator(_in_fp64(onnx.load(path)))

    def run(self, pixels: NDArray[np.uint8]) -> list[Tensor]:
        """All outputs, fp64, for images uint8 [B, C, H, W]."""
        return [torch.from_numpy(np.asarray(output)) for output in self._evaluator.run(None, {INPUT: pixels})]


def _in_fp64(model: onnx.ModelProto) -> onnx.ModelProto:
    """Makes every fp32 number and every cast to fp32 one of fp64, in place."""
    from onnx import AttributeProto, TensorProto

    for tensor in model.graph.initializer:
        _widen(tensor)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                _widen(attribute.t)
            if (node.op_type, attribute.name, attribute.i) == ("Cast", "to", TensorProto.FLOAT):
                attribute.i = TensorProto.DOUBLE
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.DOUBLE
    return model


def _widen(tensor: onnx.TensorProto) -> None:
    from onnx import TensorProto, numpy_helper

    if tensor.data_type == TensorProto.FLOAT:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on opsets and on what it optimises, which no user can act on."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
