"""What the registry knows about a network: models, their versions, tags, metrics and aliases."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from spikefleet.errors import UserError
from spikefleet.registry.query import Fact

CHAMPION = "champion"
CHALLENGER = "challenger"
CONTENT_HASH = "spikefleet.content_hash"

SPIKE_DRIVEN = "spike_driven"
"""Tag: whether binary inference was shown to equal the trained network; see `certificates.spike_check`."""

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
        return f"models:/{self.name}/{self.version}"

    @property
    def content_hash(self) -> str:
        """SHA-256 over the hashes of all files."""
        return self.tags[CONTENT_HASH]

    def metric(self, name: str) -> float | None:
        """A metric by its full name; a name without a split means the validation split."""
        return self.metrics.get(name, self.metrics.get(f"val/{name}"))

    def facts(self) -> dict[str, Fact]:
        """What the `where` language can ask for: tags, and metrics by their full and (validation) short names."""
        short = {name.removeprefix("val/"): value for name, value in self.metrics.items() if name.startswith("val/")}
        tags = {key: value for key, value in self.tags.items() if not key.startswith(("spikefleet.", "mlflow."))}
        return {**short, **self.metrics, **tags}


@dataclass(frozen=True)
class RegisteredModel:
    """A registered model; its versions, the newest first."""

    name: str
    versions: tuple[RegisteredVersion, ...]

    def pick(self, number: int) -> RegisteredVersion:
        """A version by its number. Raises UserError naming those that exist."""
        for version in self.versions:
            if version.version == number:
                return version
        known = ", ".join(str(version.version) for version in reversed(self.versions))
        raise UserError(f"model {self.name} has no version {number}; it has {known}")

    def pick_alias(self, alias: str) -> RegisteredVersion:
        """The version that holds an alias. Raises UserError naming the aliases that exist."""
        for version in self.versions:
            if alias in version.aliases:
                return version
        known = ", ".join(sorted(alias for version in self.versions for alias in version.aliases))
        raise UserError(f"model {self.name} has no alias {alias!r}; it has {known or 'none'}")

    @property
    def champion(self) -> RegisteredVersion | None:
        return next((version for version in self.versions if CHAMPION in version.aliases), None)


def check_model_name(name: str) -> str:
    """Raises UserError unless the name is plain: it becomes part of paths and URIs."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise UserError(
            f"model name {name[:100]!r} must be 1 to 100 letters, digits, '.', '_' or '-', beginning with a letter or "
            f"digit"
        )
    return name
