"""Decoding of image files to uint8 RGB."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def decode_rgb(encoded: NDArray[np.uint8]) -> Tensor:
    """Decode a JPEG, PNG, WebP or GIF (first frame) to uint8 [3, H, W], rotated by its EXIF orientation.

    Grey images are repeated to three channels, CMYK is converted, alpha channels are dropped, 16 bits are cut to 8.

    Raises:
        ValueError: the bytes are empty, truncated, or not such an image.
    """
    from torchvision.io import ImageReadMode, decode_image  # seconds to import

    if not len(encoded):
        raise ValueError("the image is empty (0 bytes)")
    try:
        # A copy, because torch takes no read-only memory: tens of kilobytes, against a millisecond of decoding.
        image = decode_image(torch.from_numpy(encoded.copy()), ImageReadMode.RGB, apply_exif_orientation=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"the image cannot be decoded ({len(encoded)} bytes): {reason}") from error
    if image.dtype == torch.uint16:
        image = (image.to(torch.int32) >> 8).to(torch.uint8)
    return image[0] if image.ndim == 4 else image
