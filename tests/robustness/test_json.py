"""Random damage of the JSON that is read back, and of requests to a served version: an answer or a sentence."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robustness.damage import damaged, seeds, write_new
from spikefleet.config.recipes import check_uses, load_config, parse_config, parse_model
from spikefleet.config.renamed import with_current_keys
from spikefleet.data_summary import DATA_SUMMARY, DataSummary
from spikefleet.errors import UserError
from spikefleet.files import read_json_object, sha256_of
from spikefleet.registry.package import CARD, CONFIG, WEIGHTS, read_card, read_config
from spikefleet.registry.served_input import batches

CONFIG_TEXT = json.dumps(load_config("digits").dump(), indent=1)
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1.5, 10**30, 1e308, "", "text", "\ud800", "\x1b[31m", [], [1], [[]], {}, {"a": 1}, [None],
    ["a", 2], {"family": "x"}, [[1, 2], [3]], "a" * 3000,
)  # fmt: skip


def other_shape(text: str, seed: int) -> str:
    """JSON with another value, a missing key or a key more, somewhere."""
    rng, tree = np.random.default_rng(seed), json.loads(text)
    for _ in range(int(rng.integers(1, 3))):
        node = tree
        while isinstance(node, dict | list) and node:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            key = keys[int(rng.integers(len(keys)))]
            if rng.random() < 0.4 or not isinstance(node[key], dict | list) or not node[key]:
                kind = rng.integers(0, 4)
                if kind == 0:
                    del node[key]
                elif kind == 1 and isinstance(node, dict):
                    node[str(rng.choice(["x", "model", "\ud800"]))] = 1
                else:
                    node[key] = copy.deepcopy(_VALUES[int(rng.integers(len(_VALUES)))])
                break
            node = node[key]
        if rng.random() < 0.02:
            tree = copy.deepcopy(_VALUES[int(rng.integers(len(_VALUES)))])
    return json.dumps(tree)


def try_all(text: str, read: Callable[[bytes], object], count: int) -> None:
    read(text.encode())  # the intact one is read
    refused = 0
    for seed in seeds(count):
        content = damaged(text.encode(), seed) if seed % 3 == 0 else other_shape(text, seed).encode()
        error = error_of(read, content)
        if error is not None:
            assert isinstance(error, UserError), f"seed {seed} is a traceback: {error!r}\n{content[:3000]!r}"
            assert str(error).strip(), f"seed {seed} has no message"
            refused += 1
    assert refused


def error_of(read: Callable[[bytes], object], content: bytes) -> Exception | None:
    try:
        read(content)
    except Exception as error:
        return error
    return None


def test_fuzz_stored_configurations(tmp_path: Path) -> None:
    path = tmp_path / "config.json"

    def read(content: bytes) -> None:
        write_new(path, content)
        parse_config(with_current_keys(read_json_object(path)), "config.json")

    try_all(CONFIG_TEXT, read, 300)


def test_fuzz_configurations_of_packages(tmp_path: Path) -> None:
    def read(content: bytes) -> None:
        write_new(tmp_path / CONFIG, content)
        config = read_config(tmp_path)
        check_uses(config, "config.json")
        parse_model(config["model"], "config.json")

    try_all(CONFIG_TEXT, read, 300)


def test_fuzz_cards(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text(CONFIG_TEXT)
    (tmp_path / WEIGHTS).write_bytes(b"weights")
    card = {
        "format": 1,
        "sha256": {name: sha256_of(tmp_path / name) for name in (CONFIG, WEIGHTS)},
        "facts": {"run_id": "1", "tags": {"a": "b"}, "metrics": {"val/top1": 0.5}, "plugins": []},
    }

    def read(content: bytes) -> None:
        write_new(tmp_path / CARD, content)
        assert len(read_card(tmp_path).content_hash) == 64

    try_all(json.dumps(card), read, 300)


def test_fuzz_summaries_of_data(tmp_path: Path) -> None:
    DataSummary("digits", "a" * 64, ("0", "1"), (3, 7), (1, 8, 8)).write(tmp_path)

    def read(content: bytes) -> None:
        write_new(tmp_path / DATA_SUMMARY, content)
        summary = DataSummary.read(tmp_path)
        assert isinstance(summary.class_names, tuple)

    try_all((tmp_path / DATA_SUMMARY).read_text(), read, 300)


def test_fuzz_requests_to_a_served_version() -> None:
    whole = json.dumps([[[[1, 2, 3], [4, 5, 255]]], [[[0, 0, 0], [9, 9, 9]]]])

    def read(content: bytes) -> None:
        try:
            given = json.loads(content)
        except (ValueError, RecursionError):
            return  # MLflow's server refuses it
        if not isinstance(given, list):
            return
        try:
            array = np.array(given, dtype=object)  # as MLflow makes one of it
        except ValueError:
            return
        for images in batches(array, 1, (4, 4)):
            assert images.dtype == np.uint8
            assert images.shape[1:] == (1, 4, 4)

    for seed in seeds(300):
        content = damaged(whole.encode(), seed) if seed % 3 == 0 else other_shape(whole, seed).encode()
        error = error_of(read, content)
        assert error is None or isinstance(error, UserError), f"seed {seed}: {error!r}: {content!r}"
    assert len(list(batches(np.array(json.loads(whole), dtype=object), 1, (4, 4)))) == 1


def test_lists_of_images_of_different_sizes_are_served() -> None:
    images = [[[[1, 2]]], [[[1, 2, 3]]]]
    assert [batch.shape for batch in batches(images, 1, None)] == [(1, 1, 1, 2), (1, 1, 1, 3)]
    assert [batch.shape for batch in batches(images, 1, (4, 4))] == [(2, 1, 4, 4)]
    nothings: list[Any] = [[], np.zeros((0, 1, 4, 4)), 3, np.array(3), None]
    for nothing in nothings:
        with pytest.raises(UserError, match="expected images"):
            list(batches(nothing, 1, None))


def test_the_fuzzer_sees_a_traceback() -> None:
    """The negative control."""

    def read(content: bytes) -> None:
        json.loads(content)["a"]

    with pytest.raises(AssertionError, match="is a traceback"):
        try_all('{"a": {"b": 1}}', read, 20)
