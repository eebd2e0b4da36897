"""What every network asks of its input: images [B, C, H, W], or frames [T, B, C, H, W] of events or of a video."""

from torch import Tensor


def check_images(images: Tensor, in_channels: int, timesteps: int | None = None) -> None:
    """Check that images or frames fit a network.

    Args:
        images: images [B, C, H, W] or frames [T, B, C, H, W].
        in_channels: C of the network.
        timesteps: the only T of frames that the network takes; None for one that takes any number from 1.

    Raises:
        ValueError: number of dimensions, type, C or T of `images` do not fit.
    """
    shape = tuple(images.shape)
    if images.ndim not in (4, 5):
        raise ValueError(f"images: shape is {shape}, expected [B, C, H, W] or [T, B, C, H, W]")
    if not images.is_floating_point():
        raise ValueError(f"images: type is {images.dtype}, expected floating point; convert and normalise them first")
    if images.shape[-3] != in_channels:
        raise ValueError(
            f"images: shape is {shape}, expected C={in_channels}; give images with that many channels or set "
            "in_channels"
        )
    if images.ndim == 4:
        return
    if not images.shape[0]:
        raise ValueError(f"images: shape is {shape}, so T=0, expected at least 1; give at least one frame")
    if timesteps is not None and images.shape[0] != timesteps:
        raise ValueError(
            f"images: shape is {shape}, so T={shape[0]}, expected T={timesteps} of timesteps={timesteps}, for which "
            f"the decoder has weights; give {timesteps} frames, set timesteps={shape[0]}, or decoder=rate for any T"
        )
