"""`K.mask.png`: white where chosen and rejected differ, so that a loss can use only this part."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lit_safety.core.errors import UserError
from lit_safety.core.images import decode_image


def read_mask(data: bytes, crops: Tensor, mirror: bool, where: str) -> Tensor:
    """A mask (H, W) in [0, 1], cropped and mirrored like its images. Before scaling, half white or more counts as 1.

    Args:
        data: the bytes of the PNG.
        crops: (2, 6), how chosen and rejected were cropped (`PairBatch.crops`).
        mirror: whether they are mirrored.
        where: the sample and the member, for messages.

    Raises:
        UserError: it is not an image, has another size than the images, or has no white in the crop.
    """
    mask = decode_image(data, where).convert("L")
    for height, width, *_ in crops.tolist():
        if mask.size != (int(width), int(height)):
            raise UserError(
                f"{where}: is {mask.width} x {mask.height}, but an image of the pair is {width:g} x {height:g}"
            )
    size = int(crops[0, 5]), int(crops[0, 4])
    mask = mask.point([0] * 128 + [255] * 128)
    if mask.size != size:
        mask = ImageOps.fit(mask, size, Image.Resampling.BOX)
    if mirror:
        mask = ImageOps.mirror(mask)
    found = torch.from_numpy(np.array(mask, dtype=np.float32)).div_(255.0)
    if not found.any():
        raise UserError(f"{where}: has no white in the crop, so nothing would be learned from the pair")
    return found
