"""ONNX files: every connection and decoder as onnxruntime runs it; a wrong file is refused, rounding is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

onnx = pytest.importorskip("onnx", reason="spikefleet[export] is not installed")

from spikefleet.errors import RunError  # noqa: E402
from spikefleet.export.comparison import LIMIT, compare_outputs  # noqa: E402
from spikefleet.export.onnx_file import Fp64File, OnnxFile, onnx_of, read_metadata  # noqa: E402
from spikefleet.export.pixels import Scaling  # noqa: E402
from spikefleet_models.families import build_model, list_models, model_config  # noqa: E402
from spikefleet_models.low_precision import packed_weights, rounded  # noqa: E402
from spikefleet_models.neurons import spiking_nodes  # noqa: E402
from spikefleet_models.reparam import deploy  # noqa: E402
from spikefleet_pipelines.transforms.normalise_config import NORMALISATIONS  # noqa: E402
from support.exported import Pixels, lively  # noqa: E402

SCALING = Scaling(NORMALISATIONS["digits"])
NARROW: dict[str, Any] = {"stages": (1,), "width": 0.125, "timesteps": 2, "asd_channel_reduction": 4}


def narrow(**fields: Any) -> nn.Module:
    torch.manual_seed(0)
    return lively(build_model(model_config("sg_resnet_tiny", **{**NARROW, **fields})))


def narrow_iand() -> nn.Module:
    return narrow(connection="iand", decoder="rate")


def exported(network: nn.Module, path: Path, shape: tuple[int, int, int] = (1, 8, 8)) -> Path:
    path.write_bytes(onnx_of(network, SCALING, shape, {"classes": ["a", "b"], "timesteps": 2}))
    return path


def run_of(network: nn.Module) -> Any:
    dtype = next(network.parameters()).dtype

    def run(pixels: NDArray[np.uint8]) -> list[Tensor]:
        outputs = network(SCALING(torch.from_numpy(pixels)).to(dtype))
        return [outputs] if isinstance(outputs, Tensor) else list(outputs)

    return run


def never() -> Any:
    raise AssertionError("nothing differs in fp32")


@pytest.mark.parametrize(
    ("connection", "decoder"),
    [
        ("bsg", "asd"),  # with a second stage, whose shortcut has a neuron
        ("bsg_star", "rate"),
        ("add", "rate"),
        ("and", "rate"),
        ("post_add", "rate"),
        ("ann", "rate"),
    ],
)
def test_onnxruntime_computes_the_network(connection: str, decoder: str, tmp_path: Path) -> None:
    stages = (1, 1) if connection in ("bsg", "post_add") else (1,)
    network = narrow(connection=connection, decoder=decoder, stages=stages)
    assert_equal(network, exported(network, tmp_path / "a.onnx"))


def assert_equal(network: nn.Module, path: Path) -> None:
    file = OnnxFile(path)
    found = compare_outputs(file.run, run_of(network), Pixels(40), never)
    assert found.images == found.same_class == 40
    assert found.max_difference <= 1e-5
    logits = run_of(network)(Pixels(40).all())[0]
    assert logits.std(0).min() > 100 * found.max_difference  # images are told apart
    one = Pixels(1).all()
    assert torch.allclose(file.run(one)[0], run_of(network)(one)[0], atol=LIMIT)  # the batch is free


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    network = narrow_iand()
    return network, exported(network, tmp_path_factory.mktemp("onnx") / "small.onnx")


def test_onnxruntime_computes_iand(small: tuple[nn.Module, Path]) -> None:
    assert_equal(*small)


def test_a_file_says_what_it_is_and_nothing_of_this_machine(small: tuple[nn.Module, Path]) -> None:
    model = onnx.load(small[1])
    onnx.checker.check_model(model, full_check=True)
    assert read_metadata(model) == {"classes": ["a", "b"], "timesteps": 2}
    assert [opset.version for opset in model.opset_import if not opset.domain] == [20]
    taken = model.graph.input[0].type.tensor_type
    assert taken.elem_type == onnx.TensorProto.UINT8
    assert [side.dim_value for side in taken.shape.dim][1:] == [1, 8, 8]
    assert taken.shape.dim[0].dim_param
    assert str(Path(__file__).parents[2]).encode() not in small[1].read_bytes()


@pytest.mark.parametrize(("precision", "bytes_of_weight"), [("bf16", 2), ("int8", 1)])
def test_rounded_weights_are_kept_in_their_type(precision: Any, bytes_of_weight: int, tmp_path: Path) -> None:
    deployed = deploy(narrow_iand())
    network, packed = rounded(deployed, precision), packed_weights(deployed, precision)
    path = tmp_path / "small.onnx"
    path.write_bytes(onnx_of(network, SCALING, (1, 8, 8), {}, packed))
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    kept = {tensor.name: tensor for tensor in model.graph.initializer if tensor.name.endswith(".small")}
    assert len(kept) == len(packed) > 1
    assert sum(len(tensor.raw_data) for tensor in kept.values()) == bytes_of_weight * sum(
        weight.values.numel() for weight in packed.values()
    )
    assert_equal(network, path)
    pixels = Pixels(4).all()
    for one, other in zip(Fp64File(path).run(pixels), run_of(network.double())(pixels), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-6)


def test_a_changed_weight_is_refused(small: tuple[nn.Module, Path], tmp_path: Path) -> None:
    network, path = small
    model = onnx.load(path)
    (weight,) = (tensor for tensor in model.graph.initializer if tensor.name.endswith("stages.0.0.convs.1.weight"))
    values = onnx.numpy_helper.to_array(weight).copy()
    values[0, 0] += 0.5
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    wrong = tmp_path / "wrong.onnx"
    onnx.save(model, wrong)

    def exact() -> tuple[Any, Any]:
        return Fp64File(wrong).run, run_of(narrow_iand().double())

    with pytest.raises(RunError, match=r"does not compute what the network does: .* rounding is not the reason"):
        compare_outputs(OnnxFile(wrong).run, run_of(network), Pixels(40), exact)


def test_in_fp64_a_file_is_the_network_to_the_last_bits(small: tuple[nn.Module, Path]) -> None:
    network = narrow_iand().double()
    found, expected = Fp64File(small[1]).run(Pixels(4).all())[0], run_of(network)(Pixels(4).all())[0]
    assert found.dtype == torch.float64
    assert (found - expected).abs().max() < 1e-12
    assert not torch.equal(found.float(), run_of(small[0])(Pixels(4).all())[0])  # fp32 rounds


def test_a_spike_that_rounding_flips_is_counted_and_compared_in_fp64(small: tuple[nn.Module, Path]) -> None:
    network, path = small
    threshold = narrow_iand()
    for node in spiking_nodes(threshold).values():
        node.v_threshold *= 1.02  # as if membranes were rounded coarsely
    coarse, exact_network = run_of(threshold), run_of(narrow_iand().double())
    found = compare_outputs(coarse, run_of(network), Pixels(20), lambda: (Fp64File(path).run, exact_network))
    assert found.flipped_images > 0
    assert 0 < found.flipped_in_fp64 <= found.flipped_images
    assert found.max_difference_of_flipped > LIMIT >= found.max_difference
    assert found.max_difference_in_fp64 < 1e-9
    assert f"rounding flips a spike on {found.flipped_images} of them" in found.sentence


def test_what_is_no_number_is_refused() -> None:
    def nothing(pixels: NDArray[np.uint8]) -> list[Tensor]:
        return [torch.full((len(pixels), 3), torch.nan)]

    with pytest.raises(RunError, match="does not compute"):
        compare_outputs(nothing, nothing, Pixels(2), lambda: (nothing, nothing))


@pytest.mark.slow  # 5 to 110 s each
@pytest.mark.parametrize("name", [name for name in list_models() if model_config(name).task == "classification"])
def test_full_size_classifiers(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = build_model(model_config(name))
    if not name.startswith("resnet"):  # without spikes the drawn weights would let values grow beyond any logit
        network = lively(network)
    network.eval()
    channels = model_config(name).in_channels
    scaling_of = run_of(network)
    file = OnnxFile(exported(network, tmp_path / "a.onnx", (channels, 32, 32)))
    path = tmp_path / "a.onnx"
    images = Pixels(2, (channels, 32, 32))

    def exact() -> tuple[Any, Any]:
        return Fp64File(path).run, run_of(network.double())

    assert compare_outputs(file.run, scaling_of, images, exact).images == 2


@pytest.mark.slow  # 10 to 120 s each
@pytest.mark.parametrize(
    ("name", "fields", "side"),
    [
        ("spike_yolo_n", {"depth": 0.1, "width": 0.0625}, 64),
        ("spike_yolo_n", {}, 128),
        ("retinanet_tiny", {}, 96),
        ("retinanet_sg_resnet18", {}, 128),
        ("spike_yolo_ann_tiny", {}, 64),
    ],
)
def test_raw_outputs_of_detectors(name: str, fields: dict[str, Any], side: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = lively(build_model(model_config(name, **fields)))
    path = exported(network, tmp_path / "a.onnx", (3, side, side))

    def exact() -> tuple[Any, Any]:
        return Fp64File(path).run, run_of(network.double())

    found = compare_outputs(OnnxFile(path).run, run_of(network), Pixels(3, (3, side, side)), exact)
    assert found.images == 3
    assert found.same_class is None
