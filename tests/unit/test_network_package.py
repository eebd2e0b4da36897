"""A network package gives back the same network, or a sentence: never code, never other files than the card lists."""

import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from spikefleet.errors import UserError
from spikefleet.files import sha256_of
from spikefleet.registry.package import (
    CARD,
    CONFIG,
    WEIGHTS,
    load_network,
    verify_package,
    write_package,
)
from spikefleet_models.families import build_model, model_config
from spikefleet_pipelines.transforms.classification_config import TransformConfig

MODEL = model_config("sg_resnet_tiny", stages=(1, 1))
CONFIGURATION: dict[str, Any] = {
    "task": "classification",
    "model": MODEL.model_dump(mode="json"),
    "data": {"source": "digits", "transform": TransformConfig(normalise="digits").model_dump(mode="json")},
}


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return build_model(MODEL).eval()


@pytest.fixture
def package(network: torch.nn.Module, tmp_path: Path) -> Path:
    save_file(network.state_dict(), tmp_path / "trained.safetensors")
    (tmp_path / "package").mkdir()
    write_package(
        tmp_path / "package", tmp_path / "trained.safetensors", CONFIGURATION, {}, {"metrics": {"val/top1": 1}}
    )
    return tmp_path / "package"


def test_a_package_gives_back_the_same_bits(network: torch.nn.Module, package: Path) -> None:
    loaded, config = load_network(package)
    images = torch.rand(3, 1, 8, 8)
    assert torch.equal(loaded(images), network(images))
    assert not loaded.training
    assert config == CONFIGURATION


def test_the_content_hash_covers_every_file_and_the_metadata(package: Path, tmp_path: Path) -> None:
    card = verify_package(package)
    assert set(card.sha256) == {WEIGHTS, CONFIG}
    hashes = set()
    for number, (config, extra) in enumerate(
        [(CONFIGURATION, "a"), (CONFIGURATION, "b"), ({**CONFIGURATION, "x": 1}, "a")]
    ):
        (tmp_path / "extra").write_text(extra)
        (tmp_path / str(number)).mkdir()
        extra_files = {"energy.json": tmp_path / "extra"}
        hashes.add(write_package(tmp_path / str(number), package / WEIGHTS, config, extra_files, {}).content_hash)
    assert len(hashes) == 3
    assert card.content_hash not in hashes
    (tmp_path / "again").mkdir()
    again = write_package(tmp_path / "again", package / WEIGHTS, CONFIGURATION, {}, card.metadata)
    assert again.content_hash == card.content_hash
    shutil.rmtree(tmp_path / "again")
    (tmp_path / "again").mkdir()
    other = write_package(tmp_path / "again", package / WEIGHTS, CONFIGURATION, {}, {"metrics": {"val/top1": 0.9}})
    assert other.content_hash != card.content_hash


@pytest.mark.parametrize("change", [{"facts": {"metrics": {"val/top1": 2}}}, {"format": 1}, {"facts": {}}])
def test_a_metric_that_was_edited_is_refused(package: Path, change: dict[str, Any]) -> None:
    expected = verify_package(package).content_hash
    assert load_network(package, expected)
    card = json.loads((package / CARD).read_text())
    (package / CARD).write_text(json.dumps({**card, **change}))
    with pytest.raises(UserError, match="is not the registered card: expected content hash"):
        load_network(package, expected)


def test_cards_of_format_1_keep_their_hash(package: Path) -> None:
    card = json.loads((package / CARD).read_text())
    files = hashlib.sha256(json.dumps(card["sha256"], sort_keys=True).encode()).hexdigest()
    (package / CARD).write_text(json.dumps({**card, "format": 1, "facts": {"metrics": {"val/top1": 0.5}}}))
    assert verify_package(package, files).content_hash == files


@pytest.mark.parametrize("name", ["../energy.json", WEIGHTS, CONFIG, CARD, "a/b", "", "a\0", ".hidden"])
def test_extra_files_have_plain_names(package: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="plain file name"):
        write_package(tmp_path, package / WEIGHTS, CONFIGURATION, {name: package / CARD}, {})


def rewrite_card(package: Path, **names: str) -> None:
    """What an attacker does who can also change the card."""
    card = json.loads((package / CARD).read_text())
    card["sha256"] |= {name: sha256_of(package / name) for name in card["sha256"]} | names
    (package / CARD).write_text(json.dumps(card))


def oversize_header(path: Path) -> None:
    path.write_bytes((1 << 40).to_bytes(8, "little") + b"{}")


def too_many_tensors(path: Path) -> None:
    names = {f"t{n}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for n in range(100_000)}
    header = json.dumps(names).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def with_header(path: Path, header: dict[str, Any] | bytes, body: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def overlapping_tensors(path: Path) -> None:
    header, body = header_of(path)
    same = [key for key, entry in header.items() if entry["shape"] == [32] and entry["dtype"] == "F32"]
    header[same[0]]["data_offsets"] = header[same[1]]["data_offsets"]
    with_header(path, header, body)


def hole(path: Path) -> None:
    header, body = header_of(path)
    with_header(path, header, body + bytes(64))


def duplicate_key(path: Path) -> None:
    header, body = header_of(path)
    name, entry = next(iter(header.items()))
    twice = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}}}"
    with_header(path, twice.encode(), body + bytes(4096))


def half_precision(path: Path) -> None:
    save_file(
        {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in load_file(path).items()},
        path,
    )


def a_tensor_less(path: Path) -> None:
    tensors = load_file(path)
    tensors.popitem()
    save_file(tensors, path)


def a_tensor_more(path: Path) -> None:
    save_file({**load_file(path), "x" * 500: torch.zeros(1)}, path)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("abuse", "sentence"),
    [
        (oversize_header, "not a valid safetensors file"),
        (too_many_tensors, "100000 tensors"),
        (overlapping_tensors, "not a valid safetensors file"),
        (hole, "not a valid safetensors file"),
        (duplicate_key, "not a valid safetensors file"),
        (half_precision, "found torch.float16"),
        (a_tensor_less, "is missing"),
        (a_tensor_more, "not one of the network's tensors"),
        (empty, "not a valid safetensors file"),
    ],
)
def test_hostile_safetensors_cost_a_sentence(package: Path, abuse: Any, sentence: str) -> None:
    abuse(package / WEIGHTS)
    rewrite_card(package)
    begin = time.perf_counter()
    with pytest.raises(UserError, match=sentence):
        load_network(package)
    assert time.perf_counter() - begin < 10


@pytest.mark.parametrize("name", ["../evil.json", "/etc/hostname", "a/b", "..", "a\\b", "x" * 200])
def test_a_card_cannot_name_files_outside_of_its_directory(package: Path, name: str) -> None:
    rewrite_card(package, **{name: "0" * 64})
    with pytest.raises(UserError, match="is not a plain file name"):
        load_network(package)


def test_a_damaged_configuration_is_named(package: Path) -> None:
    for content in ("", "[]", "[" * 100_000, '{"model": {}}', '{"model": 1, "data": {}, "task": "classification"}'):
        (package / CONFIG).write_text(content)
        rewrite_card(package)
        with pytest.raises(UserError, match=r"config\.json"):
            load_network(package)


@pytest.mark.parametrize(
    "content", ["", "[]", '{"format": 1}', '{"sha256": [], "facts": {}, "format": 1}', "[" * 100_000]
)
def test_a_damaged_card_is_named(package: Path, content: str) -> None:
    (package / CARD).write_text(content)
    with pytest.raises(UserError, match=r"card\.json (is damaged|cannot be read as JSON)"):
        load_network(package)


def test_missing_files_and_other_formats_are_named(package: Path) -> None:
    card = json.loads((package / CARD).read_text())
    (package / CARD).write_text(json.dumps({**card, "format": 9}))
    with pytest.raises(UserError, match="expected format 1 or 2, found 9"):
        load_network(package)
    (package / CARD).write_text(json.dumps(card))
    (package / WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"weights\.safetensors is missing"):
        load_network(package)
