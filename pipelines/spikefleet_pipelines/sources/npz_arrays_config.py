"""Images and classes as arrays in .npz files; `npz_arrays.py` reads them."""

from pydantic import Field

from spikefleet_pipelines.sources.own_splits_config import is_absent, own_holdout_field
from spikefleet_pipelines.sources.source import Source, SourceOptions


class NpzOptions(SourceOptions):
    """What the arrays do not say."""

    file: str | None = Field(
        default=None,
        exclude_if=is_absent,
        description="file below the root; none: train.npz, val.npz and test.npz, or the only .npz file",
    )
    holdout: float | None = own_holdout_field()


NPZ = Source(
    name="npz",
    description="images and classes as arrays of an .npz file: x_train, y_train, x_test, y_test (Keras), train_images, "
    "train_labels, ... (MedMNIST), images and labels, or data and labels",
    reader="spikefleet_pipelines.sources.npz_arrays:read_npz",
    options=NpzOptions,
    files="an .npz file with arrays of images and labels, or train.npz, val.npz and test.npz",
)
