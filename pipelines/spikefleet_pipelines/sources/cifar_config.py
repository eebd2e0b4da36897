"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009): the files of the official Python version. `cifar.py` reads them."""

from dataclasses import dataclass

from spikefleet_pipelines.sources.source import Source, SourceOptions, holdout_field, train_images_field


@dataclass(frozen=True)
class CifarLayout:
    """File names and keys inside one of the two archives."""

    folder: str
    train_files: tuple[str, ...]
    train_images: int
    """Number of images in each training file."""
    test_file: str
    meta_file: str
    names_key: str
    labels_key: str

    @property
    def files(self) -> tuple[str, ...]:
        """Names of all files that are needed."""
        return (self.meta_file, *self.train_files, self.test_file)


class CifarOptions(SourceOptions):
    """Validation images."""

    holdout: float = holdout_field(0.1)
    train_images: int | None = train_images_field()


CIFAR10_LAYOUT = CifarLayout(
    "cifar-10-batches-py",
    tuple(f"data_batch_{number}" for number in range(1, 6)),
    10_000,
    "test_batch",
    "batches.meta",
    "label_names",
    "labels",
)
CIFAR100_LAYOUT = CifarLayout("cifar-100-python", ("train",), 50_000, "test", "meta", "fine_label_names", "fine_labels")

CIFAR10 = Source(
    name="cifar10",
    description="CIFAR-10, 60,000 images of 32x32 pixels, the official Python version",
    reader="spikefleet_pipelines.sources.cifar:read_cifar10",
    options=CifarOptions,
    files=f"the unpacked cifar-10-python.tar.gz ({', '.join(CIFAR10_LAYOUT.files)})",
)
CIFAR100 = Source(
    name="cifar100",
    description="CIFAR-100, 60,000 images of 32x32 pixels, the official Python version",
    reader="spikefleet_pipelines.sources.cifar:read_cifar100",
    options=CifarOptions,
    files=f"the unpacked cifar-100-python.tar.gz ({', '.join(CIFAR100_LAYOUT.files)})",
)
