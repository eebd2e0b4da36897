"""The base configuration of a family of networks; README.md shows how to add one.

Importing a configuration does not import torch, because programs that never build a network list, check and complete
configurations. A method that needs torch imports it.
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
    """The configuration of one network; each subclass with its own `family` is a family.

    A subclass declares `family` as a Literal with a default, `task`, its `presets`, and `timesteps`, `in_channels` and
    `num_classes` as fields or properties. It overrides those of the methods below that differ for its networks.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: ClassVar[str]
    """The task that the networks are trained for: classification, detection, or the name of a plugin's task."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Fields of the family's named members, by name."""
    trunk: ClassVar[tuple[str, ...]] = ("",)
    """Prefixes of the names of the layers that every output depends on, whose gradients `gradient_flow` compares."""

    family: str

    if TYPE_CHECKING:
        # At run time pydantic warns about a field that shadows an inherited property.
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
            """Number of classes: size of the logits, or classes of objects."""

    @property
    def is_spiking(self) -> bool:
        """Whether the network has spiking neurons; False for an ANN twin."""
        return True

    @property
    def simulated_timesteps(self) -> int:
        """Number of time steps that really run: 1 for an ANN twin, whatever `timesteps` says."""
        return self.timesteps if self.is_spiking else 1

    @property
    def needs_all_timesteps(self) -> bool:
        """Whether the network has weights over T, so that frames must be exactly `timesteps`; else any number runs."""
        return False

    @property
    def stage_count(self) -> int:
        """Stages whose activations the backward pass can compute again (recomputation.py)."""
        return 0

    @property
    def input_multiple(self) -> int:
        """The sides of an input image must be multiples of this many pixels."""
        return 1

    @abstractmethod
    def build(self) -> "nn.Module":
        """Build the network, initialised from torch's global generator."""

    def build_criterion(self) -> "DetectionCriterion":
        """Build the criterion that turns a detector's outputs into a loss and into detections.

        Raises:
            ValueError: the family or this member of it has no criterion.
        """
        if self.task == "classification":
            raise ValueError(f"family={self.family} classifies images; only detectors have a detection criterion")
        raise ValueError(f"family={self.family} has no detection criterion; its task is {self.task}")

    def twin(self) -> Self | None:
        """The configuration of the ANN twin: same topology, ReLU for every neuron, one step. None if there is none."""
        return None

    def branch_channels(self, shortcut: ShortcutConfig) -> list[int]:
        """Channels that each side branch of shortcut back-propagation sees, first to last.

        Raises:
            ValueError: the family supports no side branches, or `ShortcutConfig.check_branches` refuses them.
        """
        raise ValueError(
            f"side branches attach to the stages of an SGResNet; family={self.family} is not one, set "
            "shortcut.where=none"
        )

    def tags(self) -> dict[str, object]:
        """Tags of a registered version that follow from the configuration."""
        return {"task": self.task, "family": self.family, "timesteps": self.timesteps}
