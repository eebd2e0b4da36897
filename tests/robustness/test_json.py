"""Random damage of the JSON that is read back, and of requests to a served version: an answer or a sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spikefleet.config.recipes import check_uses, load_config, parse_config, parse_model
from spikefleet.config.renamed import with_current_keys
from spikefleet.data_summary import DATA_SUMMARY, DataSummary
from spikefleet.errors import UserError
from spikefleet.files import read_json_object, sha256_of
from spikefleet.registry.package import CARD, CONFIG, WEIGHTS, read_card, read_config
from spikefleet.registry.served_input import batches
from support.damage import damage_text, write_new
from support.damage import try_all as fuzz

CONFIG_TEXT = json.dumps(load_config("digits").dump(), indent=1)


def try_all(text: str, read: Callable[[bytes], object], count: int) -> None:
    assert fuzz(text.encode(), read, count, damage_text, (UserError,), one_line=False)


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


def test_a_summary_with_an_infinite_number_is_refused(tmp_path: Path) -> None:
    """Found by fuzzing."""
    DataSummary("digits", "a" * 64, ("0", "1"), (3, 7), (1, 8, 8)).write(tmp_path)
    whole = (tmp_path / DATA_SUMMARY).read_text()
    for number in ("1e999", "-1e999", "NaN"):
        (tmp_path / DATA_SUMMARY).write_text(whole.replace("    7", f"    {number}"))
        with pytest.raises(UserError, match="is damaged"):
            DataSummary.read(tmp_path)


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

    try_all(whole, read, 300)
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
