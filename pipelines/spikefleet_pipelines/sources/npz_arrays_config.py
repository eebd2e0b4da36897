"""Images and classes as arrays in .npz files; `npz_arrays.py` reads them."""

from pydantic import Field

from spikefleet_pipelines.sources.own_splits_config import DEFAULT_HOLDOUT, is_absent
from spikefleet_pipelines.sources.source import Source, SourceOptions


class NpzOptions(SourceOptions):
    """What the arrays do not say."""

    file: str | None = Field(
        default=None,
        exclude_if=is_absent,
        description="file below the root; none: train.npz, val.npz and test.npz, or the only .npz file",
    )
    holdout: float | None = Field(
        default=None,
        ge=0.0,
        lt=1.0,
        exclude_if=is_absent,
        description="fraction of the training images of each class that becomes val; none: "
        f"{DEFAULT_HOLDOUT:g} without a val split, else 0; with a val split that one is then test",
    )


NPZ = Source(
    name="npz",
    description="images and classes as arrays of an .npz file: x_train, y_train, x_test, y_test (Keras), train_images, "
    "train_labels, ... (MedMNIST), images and labels, or data and labels",
    reader="spikefleet_pipelines.sources.npz_arrays:read_npz",
    options=NpzOptions,
    files="an .npz file with arrays of images and labels, or train.npz, val.npz and test.npz",
)
