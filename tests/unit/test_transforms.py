"""Transforms: right pictures and statistics, the same draws in any batch, and no touch on global random state."""

import io
import random

import numpy as np
import PIL.Image
import pytest
import torch
import torchvision.transforms.v2 as v2
from numpy.typing import NDArray
from pydantic import ValidationError

from spikefleet_pipelines.store.decode import decode_rgb
from spikefleet_pipelines.store.manifest import ImageFormat
from spikefleet_pipelines.store.reader import Split, Store
from spikefleet_pipelines.store.shards import write_shard
from spikefleet_pipelines.store.writer import StoreWriter, content_digests
from spikefleet_pipelines.transforms.auto_augment import CIFAR10_POLICIES, apply_operation, auto_augment
from spikefleet_pipelines.transforms.classification import ImageTransform, resized_crop_box, shifted_crop
from spikefleet_pipelines.transforms.classification_config import TransformConfig
from spikefleet_pipelines.transforms.normalise_config import NORMALISATIONS

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding")

COUNT = 400


def picture(height: int, width: int, seed: int) -> NDArray[np.uint8]:
    """A smooth colour picture with some texture, [H, W, 3]."""
    rng = np.random.default_rng(seed)
    coarse = PIL.Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8)).resize((width, height), PIL.Image.BICUBIC)  # type: ignore[attr-defined]
    return np.clip(np.asarray(coarse) + rng.normal(0, 6, (height, width, 3)), 0, 255).astype(np.uint8)


def encode(image: NDArray[np.uint8], kind: str = "JPEG", **options: object) -> bytes:
    stream = io.BytesIO()
    PIL.Image.fromarray(image).save(stream, kind, **options)
    return stream.getvalue()


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Split:
    images = np.stack([picture(32, 32, seed).transpose(2, 0, 1) for seed in range(COUNT)])
    image = ImageFormat(encoding="raw", shape=(3, 32, 32))
    out = tmp_path_factory.mktemp("raw") / "store"
    with StoreWriter(out, source="test", class_names="ab", image=image, options={}) as writer:
        writer.write_images("train", images, np.arange(COUNT) % 2)
        writer.commit()
    return Store.open(out).split("train")


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Split:
    shapes = [(40, 60), (60, 40), (33, 90), (48, 48)]
    files = [encode(picture(*shapes[number % 4], number), quality=95) for number in range(24)]
    image, labels = ImageFormat(encoding="encoded"), np.arange(24) % 2
    out = tmp_path_factory.mktemp("encoded") / "store"
    with StoreWriter(out, source="test", class_names="ab", image=image, options={}) as writer:
        shard = write_shard(writer.directory / "train-00000.arrow", files, labels, image)
        writer.add_shard("train", shard, labels, content_digests(files))
        writer.commit()
    return Store.open(out).split("train")


def rows(count: int = COUNT) -> NDArray[np.int64]:
    return np.arange(count)


CIFAR = TransformConfig(crop_padding=4, horizontal_flip=0.5, auto_augment="cifar10", cutout=16, normalise="cifar10")
IMAGENET = TransformConfig(random_resized_crop=32, horizontal_flip=0.5, resize=36, center_crop=32, normalise="imagenet")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"crop_padding": 4, "random_resized_crop": 32, "resize": 36, "center_crop": 32},
            "crop_padding is 4 and random_resized_crop is 32; set only one",
        ),
        ({"resize": 256}, "resize is 256 and center_crop is None"),
        ({"resize": 200, "center_crop": 224}, "center_crop is 224, expected at most resize=200"),
        ({"random_resized_crop": 224}, "random_resized_crop is 224, but evaluation also needs resize and center_crop"),
        ({"random_resized_crop_scale": (0.5, 0.2)}, r"random_resized_crop_scale is \(0.5, 0.2\)"),
        ({"random_resized_crop_scale": (0.0, 1.0)}, "random_resized_crop_scale"),
        ({"normalise": "cifar"}, "unknown normalisation 'cifar'.*cifar10"),
        ({"normalise": {"mean": [0.5], "std": [0.0]}}, "std is"),
        ({"normalise": {"mean": [0.5, 0.5], "std": [1.0]}}, "mean has 2 values and std has 1"),
        ({"horizontal_flip": 1.5}, "horizontal_flip"),
        ({"auto_augment": "imagenet"}, "auto_augment"),
        ({"crop_pading": 4}, "crop_pading"),
    ],
)
def test_bad_configs_are_refused_by_field(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TransformConfig(**fields)  # type: ignore[arg-type]


def test_config_that_does_not_suit_the_images_is_refused(raw: Split, encoded: Split) -> None:
    with pytest.raises(ValueError, match=r"set data\.transform\.random_resized_crop, data\.transform\.resize"):
        ImageTransform(encoded, TransformConfig(), True, 0)
    grey = (1, 8, 8)
    with pytest.raises(ValueError, match=r"normalise.mean has 3 values, but the images have 1 channels"):
        TransformConfig(normalise="cifar10").check_images(grey)
    with pytest.raises(ValueError, match="auto_augment 'cifar10' needs 3 channels"):
        TransformConfig(auto_augment="cifar10").check_images(grey)


@pytest.mark.parametrize("name", NORMALISATIONS)
def test_config_round_trips_through_json(name: str) -> None:
    config = TransformConfig(normalise=name)  # type: ignore[arg-type]
    assert TransformConfig.model_validate_json(config.model_dump_json()) == config


def test_evaluation_is_torchvisions_normalise(raw: Split) -> None:
    found = ImageTransform(raw, CIFAR, False, 0)(rows(), 0)
    images = torch.from_numpy(raw.gather(rows()))
    statistics = NORMALISATIONS["cifar10"]
    expected = v2.functional.normalize(images / 255, list(statistics.mean), list(statistics.std))
    assert torch.allclose(found, expected, atol=1e-5)
    assert found.dtype == torch.float32


def test_crops_and_flips_are_those_of_the_image(raw: Split) -> None:
    config = TransformConfig(crop_padding=4, horizontal_flip=0.5)
    found = (ImageTransform(raw, config, True, 5)(rows(), 2) * 255).round().to(torch.uint8)
    seen = set()
    for row in range(60):
        padded = torch.nn.functional.pad(raw.image(row), (4, 4, 4, 4))
        matches = [
            (top, left, flipped)
            for top in range(9)
            for left in range(9)
            for flipped in (False, True)
            if torch.equal(found[row].flip(-1) if flipped else found[row], padded[:, top : top + 32, left : left + 32])
        ]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) > 40


def test_shifted_crop_at_its_limits() -> None:
    image = np.arange(1, 10, dtype=np.uint8).reshape(1, 3, 3)
    crops = np.full((9, 1, 3, 3), 99, np.uint8)
    for crop, shift in zip(crops, (-1, 0, 1, 3, 4, 5, -3, -4, -5), strict=True):
        shifted_crop(image, shift, shift, crop)
    assert crops[0, 0].tolist() == [[0, 0, 0], [0, 1, 2], [0, 4, 5]]
    assert np.array_equal(crops[1], image)
    assert crops[2, 0].tolist() == [[5, 6, 0], [8, 9, 0], [0, 0, 0]]
    assert not crops[3:].any()


def test_flip_probability(raw: Split) -> None:
    for probability in (0.0, 0.25, 1.0):
        transform = ImageTransform(raw, TransformConfig(horizontal_flip=probability), True, 0)
        found = transform(rows(), 0)
        flipped = sum(not torch.allclose(found[row] * 255, raw.image(row).float()) for row in range(COUNT))
        assert abs(flipped / COUNT - probability) < 0.07


@pytest.mark.parametrize("config", [CIFAR, IMAGENET])
def test_a_sample_does_not_depend_on_its_batch(config: TransformConfig, raw: Split, encoded: Split) -> None:
    for split in (raw, encoded):
        if split is encoded and config is CIFAR:
            continue
        transform = ImageTransform(split, config, True, 9)
        whole = transform(rows(24), 4)
        shuffled = np.random.default_rng(0).permutation(24)
        assert torch.equal(transform(shuffled, 4), whole[shuffled])
        assert torch.equal(torch.cat([transform(shuffled[i : i + 5], 4) for i in range(0, 24, 5)]), whole[shuffled])
        assert not torch.equal(transform(rows(24), 5), whole)
        assert not torch.equal(ImageTransform(split, config, True, 10)(rows(24), 4), whole)
        assert torch.equal(
            ImageTransform(split, config, False, 9)(rows(24), 4), ImageTransform(split, config, False, 10)(rows(24), 5)
        )


def test_global_random_state_is_left_alone(raw: Split, encoded: Split) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[index, union-attr]
    ImageTransform(raw, CIFAR, True, 0)(rows(64), 0)
    ImageTransform(encoded, IMAGENET, True, 0)(rows(8), 0)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # type: ignore[index]
    assert before[2] == random.getstate()


def test_cutout_is_a_square_clipped_at_the_border(raw: Split) -> None:
    plain = ImageTransform(raw, TransformConfig(normalise="cifar10"), True, 0)(rows(), 0)
    cut = ImageTransform(raw, TransformConfig(normalise="cifar10", cutout=16), True, 0)(rows(), 0)
    centres = set()
    for row in range(COUNT):
        hole = (cut[row] != plain[row]).any(0)
        assert (cut[row][:, hole] == 0).all()
        down, across = hole.any(1).nonzero().flatten(), hole.any(0).nonzero().flatten()
        height, width = int(down[-1] - down[0] + 1), int(across[-1] - across[0] + 1)
        assert 8 <= height <= 16
        assert 8 <= width <= 16
        assert hole.sum() >= height * width * 0.95  # a pixel that is 0 anyway does not count as changed
        centres.add((int(down[0]), int(across[0])))
    assert len(centres) > 200


def test_auto_augment_policies_are_torchvisions() -> None:
    assert list(CIFAR10_POLICIES) == v2.AutoAugment()._get_policies(v2.AutoAugmentPolicy.CIFAR10)


@pytest.mark.parametrize("operation", sorted({op[::2] for policy in CIFAR10_POLICIES for op in policy}, key=str))
@pytest.mark.parametrize("negative", [False, True])
def test_auto_augment_operations_are_torchvisions(
    raw: Split, operation: tuple[str, int | None], negative: bool
) -> None:
    name, magnitude = operation
    reference = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)
    values, signed = v2.AutoAugment._AUGMENTATION_SPACE[name]
    amounts = values(10, 32, 32)
    amount = 0.0 if amounts is None else float(amounts[magnitude])
    if signed and negative:
        amount = -amount
    images = raw.gather(rows(8))
    found = apply_operation(images.copy(), name, magnitude, negative)
    for image, ours in zip(images, found, strict=True):
        expected = reference._apply_image_or_video_transform(
            torch.from_numpy(image), name, amount, interpolation=v2.InterpolationMode.NEAREST, fill={}
        )
        if name in ("Color", "Contrast", "Sharpness"):
            # Sums of floats, cut to whole numbers: a last bit may send a value to its neighbour.
            difference = np.abs(expected.numpy().astype(int) - ours)
            assert difference.max() <= 1
            assert (difference > 0).mean() < 0.1
        else:
            assert np.array_equal(expected.numpy(), ours)


def test_auto_augment_changes_most_images(raw: Split) -> None:
    images = raw.gather(rows())
    found = auto_augment(images.copy(), 0, 0, rows())
    changed = (found != images).any((1, 2, 3)).mean()
    assert 0.6 < changed < 0.95


def test_resized_crop_box_has_torchvisions_distribution() -> None:
    draws = np.random.default_rng(0).random((4000, 10, 4))
    ours = np.array([resized_crop_box(d, 375, 500, (0.08, 1.0)) for d in draws])
    torch.manual_seed(0)
    transform = v2.RandomResizedCrop(224)
    image = torch.zeros(3, 375, 500)
    theirs = np.array(
        [
            [p[k] for k in ("top", "left", "height", "width")]
            for p in (transform.make_params([image]) for _ in range(4000))
        ]
    )
    assert (ours[:, 0] + ours[:, 2] <= 375).all()
    assert (ours[:, 1] + ours[:, 3] <= 500).all()
    for column in range(4):
        for quantile in (0.1, 0.5, 0.9):
            assert abs(np.quantile(ours[:, column], quantile) - np.quantile(theirs[:, column], quantile)) < 14
    assert resized_crop_box(np.full((10, 4), 0.5), 10, 1000, (0.9, 1.0)) == (0, 493, 10, 13)  # none fits: the centre


def test_whole_image_crop_equals_plain_resize(encoded: Split) -> None:
    config = TransformConfig(random_resized_crop=32, random_resized_crop_scale=(1.0, 1.0), resize=32, center_crop=32)
    found = ImageTransform(encoded, config, True, 0)(np.array([3, 7]), 0)  # 48 x 48; only the aspect ratio varies
    for image, row in zip(found, (3, 7), strict=True):
        whole = v2.functional.resize(encoded.image(row), [32, 32], antialias=True)
        assert (image * 255 - whole).abs().mean() < 25
        assert image.shape == (3, 32, 32)


def test_evaluation_of_encoded_images_is_torchvisions_resize_and_centre_crop(encoded: Split) -> None:
    found = ImageTransform(encoded, IMAGENET, False, 0)(rows(8), 0)
    statistics = NORMALISATIONS["imagenet"]
    expected = v2.Compose(
        [
            v2.Resize(36, antialias=True),
            v2.CenterCrop(32),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(statistics.mean), list(statistics.std)),
        ]
    )
    for row in range(8):
        assert torch.allclose(found[row], expected(encoded.image(row)), atol=1e-5)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_decoding_matches_pillow(kind: str) -> None:
    content = encode(picture(50, 70, 1), kind)
    with PIL.Image.open(io.BytesIO(content)) as opened:
        expected = np.asarray(opened.convert("RGB")).transpose(2, 0, 1).astype(int)
    found = decode_rgb(np.frombuffer(content, np.uint8)).numpy().astype(int)
    assert found.shape == (3, 50, 70)
    assert abs(found - expected).max() <= 3


def test_unusual_images_become_rgb() -> None:
    image = picture(20, 30, 2)

    def decoded(pillow: PIL.Image.Image, kind: str, **options: object) -> NDArray[np.uint8]:
        stream = io.BytesIO()
        pillow.save(stream, kind, **options)
        found = decode_rgb(np.frombuffer(stream.getvalue(), np.uint8))
        assert found.dtype == torch.uint8
        assert found.shape[0] == 3
        return found.numpy()

    colour = PIL.Image.fromarray(image)
    assert abs(decoded(colour.convert("CMYK"), "JPEG", quality=100).astype(int) - image.transpose(2, 0, 1)).mean() < 8
    grey = decoded(colour.convert("L"), "JPEG")
    assert np.array_equal(grey[0], grey[1])
    assert decoded(colour.convert("RGBA"), "PNG").shape == (3, 20, 30)
    assert decoded(colour.convert("P"), "PNG").shape == (3, 20, 30)
    assert np.array_equal(
        decoded(PIL.Image.fromarray(np.full((4, 4), 0x80FF, np.uint16)), "PNG"), np.full((3, 4, 4), 128)
    )
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    assert decoded(colour, "JPEG", exif=exif).shape == (3, 30, 20)


@pytest.mark.parametrize("content", [b"", b"not an image", encode(picture(50, 70, 1))[:-900]])
def test_damaged_images_are_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match=rf"\({len(content)} bytes\)"):
        decode_rgb(np.frombuffer(content, np.uint8))
