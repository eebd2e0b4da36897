"""The table of sources: every built-in one can be read, and one from outside is like them."""

import dataclasses
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from pydantic import Field

from spikefleet_pipelines.data_config import DataConfig
from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.opening import open_or_prepare
from spikefleet_pipelines.sources import (
    Source,
    SourceOptions,
    check_options,
    find_source,
    list_sources,
    prepare,
    register_source,
    registry,
)
from spikefleet_pipelines.sources.contents import ArrayContents


class StripesOptions(SourceOptions):
    """An option that the built-in sources do not have."""

    width: int = Field(default=2, ge=1, le=4)


STRIPES = Source(
    name="stripes", description="grey stripes of two widths", reader="outside_stripes:read", options=StripesOptions
)


def read_stripes(root: Path, options: StripesOptions, seed: int) -> ArrayContents:
    images = np.zeros((6, 1, 8, 8), np.uint8)
    images[:, :, :: options.width] = np.arange(100, 106)[:, None, None, None]
    labels = np.arange(6) % 2
    return ArrayContents(("one", "two"), dict.fromkeys(("train", "val", "test"), (images, labels)))


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> Source:
    """A source whose reader is in a module of somebody else."""
    monkeypatch.setattr(registry, "_SOURCES", dict(registry._SOURCES))
    module = ModuleType("outside_stripes")
    module.read = read_stripes  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "outside_stripes", module)
    register_source(STRIPES)
    return STRIPES


def test_sources_of_images_and_of_events() -> None:
    images = [
        "digits",
        "fashion_mnist",
        "cifar10",
        "cifar100",
        "image_folder",
        "scenes",
        "coco",
        "yolo",
        "voc",
        "csv",
        "parquet",
        "webdataset",
        "npz",
    ]
    events = [
        "saccades",
        "first_digit",
        "apparent_motion",
        "saccade_scenes",
        "event_folder",
        "nmnist",
        "ncars",
        "asl_dvs",
    ]
    events += ["dvs_cifar10", "dvs_gesture", "ncaltech101", "gen1", "tonic"]
    assert list(list_sources()) == images + events
    assert [name for name in list_sources() if find_source(name).events] == events


def test_every_built_in_source_says_what_it_is_and_can_be_read() -> None:
    for name, description in list_sources().items():
        source = find_source(name)
        assert (source.name, source.description) == (name, description)
        assert callable(source.load_reader())
        writer = source.load_split_writer()
        assert callable(writer) == (source.split_options is not None)
        assert source.default_root is None or source.files is not None


def test_a_source_from_outside_is_like_the_built_in_ones(outside: Source, tmp_path: Path) -> None:
    assert list_sources()["stripes"] == "grey stripes of two widths"
    with pytest.raises(SourceError, match="did you mean 'stripes'"):
        find_source("stripe")
    with pytest.raises(SourceError, match="source 'stripes': option width=9: must be less than or equal to"):
        check_options(outside, {"width": 9})
    with pytest.raises(SourceError, match="source 'stripes': unknown option 'widht'; did you mean 'width'"):
        check_options(outside, {"widht": 2})
    with pytest.raises(SourceError, match="source 'digits': unknown option 'size'; expected one of upsample"):
        check_options(find_source("digits"), {"size": 8})
    with pytest.raises(SourceError, match="source 'stripes': unknown option 'size'; it has no options"):
        check_options(outside, {"size": 8}, SourceOptions)
    for other in (True, "2"):
        with pytest.raises(SourceError, match="source 'stripes': option width="):
            check_options(outside, {"width": other})
    config = DataConfig(source="stripes", options={"width": 4})
    store = open_or_prepare(config, tmp_path)
    assert store.manifest.source == "stripes"
    assert store.split("val").gather(np.array([3]))[0, 0, :, 0].tolist() == [103, 0, 0, 0, 103, 0, 0, 0]
    assert prepare("stripes", None, tmp_path / "other").manifest.options["width"] == 2


def test_registering_again_is_harmless_and_another_one_of_that_name_is_refused(outside: Source) -> None:
    before = list_sources()
    register_source(outside)
    register_source(dataclasses.replace(outside))
    register_source(find_source("digits"))
    assert list_sources() == before
    for other in (
        dataclasses.replace(outside, description="other stripes"),
        dataclasses.replace(outside, name="digits"),
    ):
        with pytest.raises(SourceError, match=f"'{other.name}' is already registered .*give the one with reader"):
            register_source(other)
    assert list_sources() == before


def test_without_registration_the_name_is_unknown() -> None:
    with pytest.raises(SourceError, match="unknown data source 'stripes'"):
        find_source("stripes")


def test_a_reader_that_is_not_there_fails_when_data_is_prepared(outside: Source, tmp_path: Path) -> None:
    register_source(dataclasses.replace(outside, name="absent", reader="no_such_module:read"))
    assert "absent" in list_sources()
    with pytest.raises(ImportError, match="no_such_module"):
        prepare("absent", None, tmp_path / "store")
    assert not any(tmp_path.iterdir())
