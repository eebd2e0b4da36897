"""The table of sources.

To add a source, write its two modules and add it to `_BUILT_IN`; other packages call `register_source`.
"""

import difflib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.sources.asl_dvs_config import ASL_DVS
from spikefleet_pipelines.sources.cifar_config import CIFAR10, CIFAR100
from spikefleet_pipelines.sources.coco_config import COCO
from spikefleet_pipelines.sources.csv_table_config import CSV
from spikefleet_pipelines.sources.digits_config import DIGITS
from spikefleet_pipelines.sources.dvs_cifar10_config import DVS_CIFAR10
from spikefleet_pipelines.sources.dvs_gesture_config import DVS_GESTURE
from spikefleet_pipelines.sources.event_folder_config import EVENT_FOLDER
from spikefleet_pipelines.sources.event_sets_config import APPARENT_MOTION, FIRST_DIGIT, SACCADE_SCENES, SACCADES
from spikefleet_pipelines.sources.fashion_mnist_config import FASHION_MNIST
from spikefleet_pipelines.sources.gen1_config import GEN1
from spikefleet_pipelines.sources.image_folder_config import IMAGE_FOLDER
from spikefleet_pipelines.sources.ncaltech101_config import NCALTECH101
from spikefleet_pipelines.sources.ncars_config import NCARS
from spikefleet_pipelines.sources.nmnist_config import NMNIST
from spikefleet_pipelines.sources.npz_arrays_config import NPZ
from spikefleet_pipelines.sources.parquet_images_config import PARQUET
from spikefleet_pipelines.sources.scenes_config import SCENES
from spikefleet_pipelines.sources.source import Source, SourceOptions
from spikefleet_pipelines.sources.tonic_config import TONIC
from spikefleet_pipelines.sources.voc_config import VOC
from spikefleet_pipelines.sources.webdataset_config import WEBDATASET
from spikefleet_pipelines.sources.yolo_config import YOLO

_BUILT_IN = (
    DIGITS,
    FASHION_MNIST,
    CIFAR10,
    CIFAR100,
    IMAGE_FOLDER,
    SCENES,
    COCO,
    YOLO,
    VOC,
    CSV,
    PARQUET,
    WEBDATASET,
    NPZ,
    SACCADES,
    FIRST_DIGIT,
    APPARENT_MOTION,
    SACCADE_SCENES,
    EVENT_FOLDER,
    NMNIST,
    NCARS,
    ASL_DVS,
    DVS_CIFAR10,
    DVS_GESTURE,
    NCALTECH101,
    GEN1,
    TONIC,
)

_SOURCES: dict[str, Source] = {}


def register_source(source: Source) -> None:
    """Register a source; registering the same one again has no effect.

    Raises:
        SourceError: another source has that name.
    """
    if _SOURCES.setdefault(source.name, source) != source:
        raise SourceError(
            f"data source {source.name!r} is already registered (reader {_SOURCES[source.name].reader}); give the one "
            f"with reader {source.reader} another name"
        )


for _source in _BUILT_IN:
    register_source(_source)


def list_sources() -> dict[str, str]:
    """Return the names that `prepare` accepts, each with its description."""
    return {name: source.description for name, source in _SOURCES.items()}


def find_source(name: str) -> Source:
    """Return a source by its name.

    Raises:
        SourceError: the name is unknown; the message names the nearest one.
    """
    if name in _SOURCES:
        return _SOURCES[name]
    nearest = difflib.get_close_matches(name, _SOURCES, 1, 0.5)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else f", expected one of {', '.join(_SOURCES)}"
    raise SourceError(f"unknown data source {name!r}{hint}")


def check_options(
    source: Source, options: Mapping[str, Any], model: type[SourceOptions] | None = None
) -> SourceOptions:
    """Validate the options of a source, each of its own kind: `true` is no number, and text is neither.

    Args:
        source: whose options they are.
        options: by name.
        model: config class of the options; None for `source.options`.

    Raises:
        SourceError: an option is unknown or missing, or its value is not allowed.
    """
    model = model or source.options
    try:
        # As JSON, where strict validation takes lists for tuples and text for paths.
        return model.model_validate_json(json.dumps(dict(options), default=str), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        option = ".".join(str(part) for part in first["loc"])
        raise SourceError(f"source {source.name!r}: {_option_message(option, first, model)}") from error


def _option_message(option: str, error: Mapping[str, Any], model: type[SourceOptions]) -> str:
    if error["type"] == "missing":
        return f"option {option!r} is missing"
    if error["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(option, model.model_fields, 1, 0.5)
        known = f"expected one of {', '.join(model.model_fields)}" if model.model_fields else "it has no options"
        return f"unknown option {option!r}; {f'did you mean {nearest[0]!r}?' if nearest else known}"
    allowed = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    return f"option {option}={error['input']!r}: {allowed}"
