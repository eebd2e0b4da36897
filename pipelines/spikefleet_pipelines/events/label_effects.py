"""What augmentations do to labels: each data set declares it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from spikefleet_pipelines.errors import SourceError

Effect = Literal["free", "forbidden"] | Mapping[int, int]
"""Labels stay ("free"), lose their meaning ("forbidden"), or change as the mapping says; others stay."""


@dataclass(frozen=True)
class LabelEffects:
    """Effect on the labels of a data set.

    Attributes:
        mirror: of exchanging left and right.
        reversal: of running time backwards.
    """

    mirror: Effect
    reversal: Effect

    def mirrored(self, label: int) -> int:
        """Return the label of the mirrored sample; see `changed`."""
        return changed(label, self.mirror, "a horizontal flip")

    def reversed(self, label: int) -> int:
        """Return the label of the sample whose time runs backwards; see `changed`."""
        return changed(label, self.reversal, "a time reversal")


def changed(label: int, effect: Effect, what: str) -> int:
    """Return a label after an augmentation.

    Args:
        label: before it.
        effect: of the augmentation, as the data set declares it.
        what: names the augmentation in messages.

    Raises:
        SourceError: the data set forbids the augmentation.
    """
    if effect == "forbidden":
        raise SourceError(f"{what} changes what the labels of this data set mean; set its probability to 0")
    return label if isinstance(effect, str) else effect.get(label, label)
