"""Registered models: their versions with tags, metrics and aliases."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from spikefleet.errors import UserError
from spikefleet.registry.query import MetadataValue
from spikefleet_tune.expressions import spelled_number
from spikefleet_tune.messages import one_of

CHAMPION: Final = "champion"
CHALLENGER: Final = "challenger"
CONTENT_HASH = "spikefleet.content_hash"

SERVING_FILES = "spikefleet.serving_files"
"""Tag with the SHA-256 of each file of MLflow's model directory beside the package: MLmodel, loader, requirements."""

SPIKE_DRIVEN = "spike_driven"
"""Tag with the verdict of `certificates.spike_check`."""

LATENCY_DEVICE: Final = "latency_device"
"""Tag with the device of `latency_ms`; in earlier versions with the number of repeats behind a semicolon."""

PARAMS_M: Final = "params_m"
"""Unit alias in `where`: the tag `parameters` in millions."""

T_X_D: Final = "t_x_d"
"""Key of `where`: time steps times the bound of an I-LIF neuron, the binary steps of the spike-driven form."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class RegisteredVersion:
    """One version of a registered model."""

    name: str
    version: int
    run_id: str
    created: datetime
    tags: Mapping[str, str]
    metrics: Mapping[str, float]
    aliases: tuple[str, ...] = ()

    @property
    def uri(self) -> str:
        """`models:/NAME/VERSION`."""
        return f"models:/{self.name}/{self.version}"

    @property
    def content_hash(self) -> str:
        """SHA-256 over the names and hashes of all files and the metadata in the card."""
        return self.tags[CONTENT_HASH]

    def metric(self, name: str) -> float | None:
        """A metric by its full name, or by its name on the validation split; None if it was not measured."""
        return self.metrics.get(name, self.metrics.get(f"val/{name}"))

    def metadata(self) -> dict[str, MetadataValue]:
        """The keys of `where`: tags, and metrics by full name and, on the validation split, by short name.

        `params_m` is the tag `parameters` in millions, and `t_x_d` the product of `timesteps` and `bound`.
        """
        short = {name.removeprefix("val/"): value for name, value in self.metrics.items() if name.startswith("val/")}
        tags = {key: value for key, value in self.tags.items() if not key.startswith(("spikefleet.", "mlflow."))}
        return {**self.derived(), **short, **self.metrics, **tags}

    def derived(self) -> dict[str, float]:
        """Keys of `where` that follow from tags; a tag or a metric of the same name takes precedence."""
        parameters, timesteps, bound = (
            spelled_number(self.tags.get(key, "")) for key in ("parameters", "timesteps", "bound")
        )
        found = {} if parameters is None else {PARAMS_M: parameters / 1e6}
        if timesteps is not None and bound is not None:
            found[T_X_D] = timesteps * bound
        return found


@dataclass(frozen=True)
class RegisteredModel:
    """A registered model; its versions, the newest first."""

    name: str
    versions: tuple[RegisteredVersion, ...]

    def pick(self, number: int) -> RegisteredVersion:
        """A version by its number. Raises UserError for an unknown one."""
        for version in self.versions:
            if version.version == number:
                return version
        known = one_of(str(version.version) for version in reversed(self.versions))
        raise UserError(f"model {self.name} has no version {number}; {known}")

    def pick_alias(self, alias: str) -> RegisteredVersion:
        """The version with an alias. Raises UserError for an unknown one."""
        for version in self.versions:
            if alias in version.aliases:
                return version
        known = sorted(alias for version in self.versions for alias in version.aliases)
        remedy = one_of(known)
        if self.versions and not known:
            remedy = f"none of its versions has one; name the version, for example {self.versions[0].uri}"
        raise UserError(f"model {self.name} has no alias {alias!r}; {remedy}")

    @property
    def champion(self) -> RegisteredVersion | None:
        """The version with the alias `champion`."""
        return next((version for version in self.versions if CHAMPION in version.aliases), None)


def latency_remark(versions: Sequence[RegisteredVersion]) -> str | None:
    """A sentence where latencies of versions are of several devices, and so cannot be compared; None if they can."""
    found = [one.tags.get(LATENCY_DEVICE, "an unknown device") for one in versions if "latency_ms" in one.metrics]
    devices = list(dict.fromkeys(device.partition(";")[0] for device in found))
    if len(devices) < 2:
        return None
    return f"latency_ms is of {len(devices)} devices, and cannot be compared between them: {', '.join(devices)}"


def check_model_name(name: str) -> str:
    """Returns the name. Raises UserError unless it is a plain name, since it becomes part of paths and URIs."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise UserError(
            f"model name {name[:100]!r} must have 1 to 100 letters, digits, '.', '_' or '-', "
            "and start with a letter or digit"
        )
    return name
