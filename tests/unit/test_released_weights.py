"""Released SpikeYOLO weights: names and nesting as published come through; whatever does not fit is listed at once."""

import re
import warnings

import pytest
import torch
from torch import Tensor

from spikefleet_models import build_model, model_config
from spikefleet_models.spike_yolo.network import LAYERS
from spikefleet_models.spike_yolo.released_weights import convert_released

# Names of modules inside a layer: ours -> as the authors' network may call them.
INSIDE = [
    (r"sep_conv\.expand\.conv", "Conv.pwconv1"),
    (r"sep_conv\.depthwise\.conv", "Conv.dwconv2"),
    (r"sep_conv\.project\.conv\.pad_bn\.bn", "Conv.pwconv3.body.0.bn"),
    (r"sep_conv\.project\.conv\.pointwise", "Conv.pwconv3.body.1.0"),
    (r"sep_conv\.project\.conv\.depthwise", "Conv.pwconv3.body.1.1"),
    (r"sep_conv\.expand\.bn", "Conv.bn1"),
    (r"sep_conv\.depthwise\.bn", "Conv.bn2"),
    (r"sep_conv\.project\.bn", "Conv.bn3"),
    (r"(expand|project)\.conv\.first", r"<\1>.body.0"),
    (r"(expand|project)\.conv\.pad_bn\.bn", r"<\1>.body.1.bn"),
    (r"(expand|project)\.conv\.depthwise", r"<\1>.body.2.0"),
    (r"(expand|project)\.conv\.last", r"<\1>.body.2.1"),
    (r"(expand|project)\.conv\.bn", r"<\1>.body.2.2"),
]
BLOCK1, BLOCK2 = (2, 4, 16, 19), (6, 8, 12, 22, 25)


def released_name(key: str) -> str:
    number, layer = next((n, name) for n, name in LAYERS.items() if key.startswith(name + "."))
    inside = key.removeprefix(layer + ".")
    if key.startswith("stages.") and not any(other.startswith(f"{layer}.1.") for other in KEYS):
        inside = inside.removeprefix("0.")  # a stage of one block is the block
    for pattern, name in INSIDE:
        inside = re.sub(pattern, name, inside)
    if number in BLOCK1:
        inside = inside.replace("expand.", "conv1.").replace("project.", "conv2.")
    if number in BLOCK2:
        inside = inside.replace("<expand>", "conv1").replace("<project>", "conv2")
        inside = inside.replace("expand.bn", "bn1").replace("project.bn", "bn2")
    if number in (1, 3, 5, 7):
        inside = "encode_" + inside
    inside = re.sub(r"^reduce\b", "cv1", re.sub(r"^merge\b", "cv2", inside))
    inside = re.sub(r"^box\b", "cv2", re.sub(r"^classes\b", "cv3", re.sub(r"^bins$", "dfl.conv.weight", inside)))
    inside = re.sub(r"(cv[23]\.[012]\.2)\.conv", r"\1", inside)  # the head's last convolutions are bare
    return f"model.{number}.{inside}"


KEYS: list[str] = []


def ours(name: str, num_classes: int = 80) -> dict[str, Tensor]:
    """A state dict whose values tell every number apart."""
    torch.manual_seed(0)
    state = build_model(model_config(name, num_classes=num_classes)).state_dict()
    KEYS[:] = state
    return {
        key: torch.rand(value.shape) if value.is_floating_point() and key != "head.bins" else value
        for key, value in state.items()
    }


def released(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        released_name(key): value.reshape(1, 16, 1, 1) if key == "head.bins" else value for key, value in state.items()
    }


def sep_conv_last(names: list[str]) -> list[str]:
    return [name for name in names if ".Conv." not in name] + [name for name in names if ".Conv." in name]


def test_names_of_the_test_are_the_published_structure() -> None:
    names = released(ours("spike_yolo_s"))
    assert len(names) == len(KEYS)
    for name in (
        "model.1.encode_conv.bias",
        "model.2.Conv.pwconv3.body.1.1.weight",
        "model.4.1.conv2.bn.running_var",
        "model.6.2.conv1.body.2.2.weight",
        "model.25.bn2.bias",
        "model.9.cv2.conv.weight",
        "model.26.cv3.2.1.bn.weight",
        "model.26.cv2.0.2.bias",
        "model.26.dfl.conv.weight",
    ):
        assert name in names, name


@pytest.mark.parametrize(
    ("name", "order"), [("spike_yolo_n", list), ("spike_yolo_s", sorted), ("spike_yolo_s", sep_conv_last)]
)
def test_every_value_arrives_whatever_the_order_of_kinds(name: str, order: type[list]) -> None:  # type: ignore[type-arg]
    expected = ours(name)
    theirs = released(expected)
    config = model_config(name)
    converted = convert_released({key: theirs[key] for key in order(list(theirs))}, config)
    assert list(converted) == list(expected)
    assert all(torch.equal(converted[key], value) for key, value in expected.items())
    build_model(config).load_state_dict(converted, strict=True)


def test_other_inner_names_prefix_type_and_classes() -> None:
    expected = ours("spike_yolo_n", num_classes=2)
    theirs = {
        "model." + key.replace("body", "layers").replace("pwconv", "p").replace("encode_", ""): value.half()
        for key, value in released(expected).items()
        if not key.endswith("num_batches_tracked")
    }
    converted = convert_released(theirs, model_config("spike_yolo_n", num_classes=2))
    assert all(value.dtype == expected[key].dtype for key, value in converted.items())
    assert all(torch.equal(converted[key], v.half().float()) for key, v in expected.items() if v.is_floating_point())


def test_weights_of_64_bits_stay_so_with_a_warning() -> None:
    """Also where only some are: nothing is rounded."""
    config = model_config("spike_yolo_n", num_classes=2)
    expected = {
        key: value.double() + 2**-40 if value.is_floating_point() and key != "head.bins" else value
        for key, value in ours("spike_yolo_n", num_classes=2).items()
    }
    with pytest.warns(UserWarning, match=r"fp64 and stay fp64; load them into build_model\(config\)\.double\(\)"):
        converted = convert_released(released(expected), config)
    assert {value.dtype for value in converted.values()} == {torch.float64, torch.int64}
    assert all(torch.equal(converted[key], value.to(converted[key].dtype)) for key, value in expected.items())
    network = build_model(config).double()
    network.load_state_dict(converted, strict=True)
    assert torch.equal(network.state_dict()["stem.conv.weight"], expected["stem.conv.weight"])
    mixed = {key: value.float() for key, value in expected.items()}
    mixed["stem.conv.weight"] = expected["stem.conv.weight"]
    with pytest.warns(UserWarning, match="stay fp64"):
        assert torch.equal(convert_released(released(mixed), config)["stem.conv.weight"], expected["stem.conv.weight"])
    # Negative control: fp32 is silent.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        in_fp32 = convert_released(released({key: value.float() for key, value in expected.items()}), config)
    assert {value.dtype for value in in_fp32.values()} == {torch.float32, torch.int64}


def test_integer_weights_are_refused_by_name() -> None:
    theirs = released(ours("spike_yolo_n"))
    theirs["model.14.conv.weight"] = theirs["model.14.conv.weight"].mul(100).to(torch.int8)
    with pytest.raises(
        ValueError, match=r"floating-point bits: model\.14\.conv\.weight torch\.int8 for lateral4\.conv\.weight$"
    ):
        convert_released(theirs, model_config("spike_yolo_n"))


def test_all_that_does_not_fit_is_in_one_error() -> None:
    theirs = released(ours("spike_yolo_n"))
    del theirs["model.6.1.conv2.body.1.bn.running_var"]
    del theirs["model.4.0.Conv.dwconv2.weight"]
    theirs["model.2.extra.weight"] = torch.zeros(7, 7, 1, 1)
    theirs["model.11.conv.weight"] = torch.zeros(1)
    theirs["ema.decay"] = torch.zeros(1)
    theirs["model.14.conv.weight"] = torch.zeros(3, 4, 1, 1)
    with pytest.raises(ValueError, match="does not fit the configuration") as caught:
        convert_released(theirs, model_config("spike_yolo_n"))
    message = str(caught.value)
    missing, rest = message.split("unexpected: ")
    unexpected, reshaped = rest.split("of another shape: ")
    assert "layer 6: model.6.1.conv2.body.1.bn.running_var for stages.2.1.project.conv.pad_bn.bn.running_var" in missing
    assert "layer 4: stages.1.0.sep_conv.depthwise.conv.weight" in missing
    assert missing.count("layer ") == 2
    assert unexpected.strip(". ") == "model.11.conv.weight; ema.decay; model.2.extra.weight"
    assert reshaped == "model.14.conv.weight (3, 4, 1, 1) for lateral4.conv.weight (96, 384, 1, 1)"


def test_another_size_and_another_variant_are_refused() -> None:
    theirs = released(ours("spike_yolo_n"))
    with pytest.raises(ValueError, match=r"model\.1\.encode_conv\.weight \(48, 3, 7, 7\) for stem\.conv\.weight"):
        convert_released(theirs, model_config("spike_yolo_s"))
    with pytest.raises(ValueError, match="no weights of this variant were released \\(reparameterise=False\\)"):
        convert_released(theirs, model_config("spike_yolo_s_no_rep"))
    with pytest.raises(ValueError, match=r"missing: layer 1: stem\.conv\.weight"):
        convert_released({}, model_config("spike_yolo_n"))


def test_other_bins_of_the_box_distribution_are_refused() -> None:
    theirs = released(ours("spike_yolo_n"))
    theirs["model.26.dfl.conv.weight"] = theirs["model.26.dfl.conv.weight"] * 2
    with pytest.raises(ValueError, match="the DFL's weights are not 0 to 15"):
        convert_released(theirs, model_config("spike_yolo_n"))
