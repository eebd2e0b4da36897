"""N-MNIST (Orchard et al., 2015); `nmnist.py` reads it."""

from spikefleet_pipelines.sources.source import Source, SourceOptions, recordings_holdout_field


class NMnistOptions(SourceOptions):
    """Validation recordings; train and test are the data set's own."""

    holdout: float = recordings_holdout_field(0.1)


NMNIST = Source(
    name="nmnist",
    description="N-MNIST: MNIST's digits before a camera that makes three saccades, 34x34, 70,000 recordings",
    reader="spikefleet_pipelines.sources.nmnist:read_nmnist",
    options=NMnistOptions,
    files="Train/0/*.bin to Train/9/*.bin and Test/0/*.bin to Test/9/*.bin (or NMNIST/ with both, as tonic has it)",
    events=True,
)
