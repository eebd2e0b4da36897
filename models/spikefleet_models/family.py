"""What a family of networks answers through its configuration; README.md says how to add one.

Importing a configuration imports no torch: listing, checking and completing configurations are for programs that never
build a network. So whatever needs torch is imported by the method that needs it.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict

from spikefleet_models.shortcut_config import ShortcutConfig

if TYPE_CHECKING:
    from torch import nn

    from spikefleet_models.detection import DetectionCriterion


class ModelConfig(BaseModel):
    """The configuration of one network; each subclass with a `family` of its own is a family.

    A subclass declares `family` as a Literal with a default, `task`, its `presets`, and `timesteps`, `in_channels` and
    `num_classes` as fields or properties. It overrides of the methods below what differs for its networks.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: ClassVar[str]
    """What the networks are trained for: classification or detection; or the word of a task from outside."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Fields of the family's named members, by name."""

    family: str

    if TYPE_CHECKING:
        # At run time pydantic warns of a field that takes the place of an inherited property.
        @property
        @abstractmethod
        def timesteps(self) -> int:
            """T as configured."""

        @property
        @abstractmethod
        def in_channels(self) -> int:
            """Channels of the images or event frames."""

        @property
        @abstractmethod
        def num_classes(self) -> int:
            """Size of the logits, or classes of objects."""

    @property
    def is_spiking(self) -> bool:
        """Whether the network has spiking neurons; an ANN twin has none."""
        return True

    @property
    def simulated_timesteps(self) -> int:
        """T that really runs: 1 for an ANN twin, whatever `timesteps` says."""
        return self.timesteps if self.is_spiking else 1

    @property
    def input_multiple(self) -> int:
        """The sides of an input image must be multiples of this many pixels."""
        return 1

    @abstractmethod
    def build(self) -> "nn.Module":
        """The network, freshly initialised from torch's global generator."""

    def build_criterion(self) -> "DetectionCriterion":
        """What turns a detector's outputs into a loss and into detections.

        Raises:
            ValueError: the family or this member of it has none.
        """
        if self.task == "classification":
            raise ValueError(f"family={self.family} classifies pictures; only detectors have a detection criterion")
        raise ValueError(f"family={self.family} has no detection criterion; its task is {self.task}")

    def twin(self) -> Self | None:
        """The configuration of the ANN twin: same topology, ReLU for every neuron, one step. None: there is none."""
        return None

    def branch_channels(self, shortcut: ShortcutConfig) -> list[int]:
        """Channels that each side branch of shortcut back-propagation sees, first to last.

        Raises:
            ValueError: networks of this family have no place for side branches; or as `ShortcutConfig.check_branches`.
        """
        raise ValueError(f"side branches classify the stages of an SGResNet; family={self.family} is none")

    def tags(self) -> dict[str, object]:
        """What a deployer asks a registry for and the configuration knows."""
        return {"task": self.task, "family": self.family, "timesteps": self.timesteps}
