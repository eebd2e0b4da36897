"""DVS-CIFAR10 (Li et al., 2017; also CIFAR10-DVS); `dvs_cifar10.py` reads it."""

from typing import Literal

from pydantic import Field

from spikefleet_pipelines.sources.source import Source, SourceOptions, recordings_holdout_field


class DvsCifar10Options(SourceOptions):
    """The split, which the data set does not have: papers use different ones, and their results differ by them."""

    split_rule: Literal["sew", "first_hundred", "random"] = Field(
        default="sew",
        description="test is: sew: the last tenth of each class by file name as text (SEW ResNet); first_hundred: "
        "numbers 0 to 99 of each class; random: a tenth of each class, chosen by the seed",
    )
    holdout: float = recordings_holdout_field(0.1)


DVS_CIFAR10 = Source(
    name="dvs_cifar10",
    description="DVS-CIFAR10: CIFAR-10's images that move before a DVS128, 128x128, 10,000 recordings",
    reader="spikefleet_pipelines.sources.dvs_cifar10:read_dvs_cifar10",
    options=DvsCifar10Options,
    files="airplane/ to truck/ with *.aedat as published or *.aedat4 (or CIFAR10DVS/ with them, as tonic has it)",
    events=True,
)
