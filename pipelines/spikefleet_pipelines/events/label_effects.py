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


FREE = LabelEffects(mirror="free", reversal="free")
"""What is assumed of a source that declares nothing: labels do not depend on directions."""

_DIGITS = LabelEffects(mirror="forbidden", reversal="free")

_OF_SOURCES: dict[str, LabelEffects] = {
    "saccades": _DIGITS,
    "nmnist": _DIGITS,
    "first_digit": LabelEffects(mirror="forbidden", reversal="forbidden"),
    "saccade_scenes": LabelEffects(mirror="forbidden", reversal="forbidden"),
    # Directions at k times 45 degrees from right towards down.
    "apparent_motion": LabelEffects(
        mirror={k: (4 - k) % 8 for k in range(8)}, reversal={k: (k + 4) % 8 for k in range(8)}
    ),
    # A mirror exchanges the right and the left arm (1, 2), and with them the sense of rotation (3 to 6).
    "dvs_gesture": LabelEffects(mirror={1: 2, 2: 1, 3: 6, 6: 3, 4: 5, 5: 4}, reversal={3: 4, 4: 3, 5: 6, 6: 5}),
}


def declare_label_effects(source: str, effects: LabelEffects) -> None:
    """Declare what augmentations do to the labels of a source of a plugin; the same again has no effect.

    Raises:
        SourceError: another one was declared for the source.
    """
    if _OF_SOURCES.setdefault(source, effects) != effects:
        raise SourceError(f"data source {source!r} has declared other effects on labels; declare them once")


def label_effects_of(source: str) -> LabelEffects:
    """Return the effects on the labels of a source by its name; those of `FREE` where it declares none."""
    return _OF_SOURCES.get(source, FREE)
