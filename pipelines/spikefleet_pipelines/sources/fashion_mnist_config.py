"""Files of Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017) and their default location; `fashion_mnist.py` reads them."""

from pathlib import Path

from spikefleet_pipelines.sources.source import Source, SourceOptions, holdout_field, train_images_field


class FashionMnistOptions(SourceOptions):
    """Validation images."""

    holdout: float = holdout_field(1 / 12)
    train_images: int | None = train_images_field()


FASHION_MNIST = Source(
    name="fashion_mnist",
    description="Fashion-MNIST, 70,000 grey images of 28x28 pixels in four IDX files",
    reader="spikefleet_pipelines.sources.fashion_mnist:read_fashion_mnist",
    options=FashionMnistOptions,
    files="train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte "
    "(plain or .gz; Debian's package dataset-fashion-mnist has them)",
    default_root=Path("/usr/share/datasets/fashion-mnist"),
)
