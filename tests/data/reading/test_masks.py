"""`K.mask.png`: read, cut and mirrored with its images, kept by what rewrites shards, refused where it does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lit_safety.core.errors import UserError
from lit_safety.data.datamodule import PreferenceDataModule
from lit_safety.data.format.writer import ShardWriter
from lit_safety.data.validate import problems
from lit_safety.objectives import prediction_error
from lit_safety.objectives.objective import masked
from tests.helpers.pair_shards import make_image, metadata, sample, write_tar


def corner(size: tuple[int, int] = (16, 16), white: tuple[int, int, int, int] = (0, 0, 8, 8)) -> Image.Image:
    mask = Image.new("L", size)
    mask.paste(255, white)
    return mask


def write(folder: Path, masks: list[Image.Image | bytes | None]) -> str:
    with ShardWriter(folder) as writer:
        for number, mask in enumerate(masks):
            writer.write(
                f"{number:03d}", metadata(number), make_image(number, 16), make_image(number + 50, 16), mask=mask
            )
    return str(folder)


def batch_of(folder: str, **settings: Any) -> Any:
    (batch,) = PreferenceDataModule(val=folder, batch_size=4, **{"masked": True, **settings}).val_dataloader()
    return batch


def test_a_mask_comes_with_its_pair_and_without_one_all_counts(tmp_path: Path) -> None:
    folder = write(tmp_path, [corner(), None])
    found = batch_of(folder).mask
    assert found.shape == (2, 16, 16)
    assert found[0].sum() == 64
    assert found[0, :8, :8].all()
    assert found[1].all()
    half = batch_of(folder, resolution=8).mask
    assert half[0].sum() == 16
    assert half[0, :4, :4].all()
    assert batch_of(folder, masked=False).mask is None
    assert batch_of(write(tmp_path / "none", [None])).mask is None
    assert problems(folder) == []


def test_it_is_cut_and_mirrored_as_its_images_are(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        for number in range(8):
            wide = [make_image(number + place, 16).resize((32, 16)) for place in (0, 50)]
            mask = corner((32, 16), (8, 0, 16, 16))  # a quarter from the left; a half of what is cut
            writer.write(f"{number:03d}", metadata(number), *wide, mask=mask)
    data = PreferenceDataModule(train=str(tmp_path), batch_size=8, resolution=16, flip=True, masked=True)
    (batch,) = (one.to("cpu") for one in data.train_dataloader())
    left = batch.mask[:, :, :8].all((1, 2)) & ~batch.mask[:, :, 8:].any((1, 2))
    right = batch.mask[:, :, 8:].all((1, 2)) & ~batch.mask[:, :, :8].any((1, 2))
    darker = batch.chosen[:, 1, :, :8].mean((1, 2)) < batch.chosen[:, 1, :, 8:].mean((1, 2))  # `make_image`'s left half
    assert torch.equal(left, darker)
    assert torch.equal(right, ~darker)
    assert 0 < left.sum() < 8


def png(image: Image.Image) -> bytes:
    import io

    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("mask", "said"),
    [(png(corner((8, 16))), "8 x 16"), (png(Image.new("L", (8, 8))), "no white"), (b"GIF89a", "mask")],
)
def test_a_mask_that_does_not_fit_is_one_line(mask: bytes, said: str, tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("x", sample(0, mask_png=mask))])
    (found,) = problems(str(tmp_path))
    with pytest.raises(UserError, match=r"mask\.png") as error:
        batch_of(str(tmp_path))
    for line in (found, str(error.value)):
        assert said in line
        assert "'x'" in line
        assert "\n" not in line
    assert batch_of(str(tmp_path), masked=False).keys == ["x"]


def test_a_mask_of_a_group_is_refused(tmp_path: Path) -> None:
    data = PreferenceDataModule(val=write(tmp_path, [corner()]), masked=True)
    with pytest.raises(UserError, match="masked"):
        data.read_groups(True)


def test_the_error_is_the_mean_over_the_mask() -> None:
    """A latent of 4 x 4 for 16 x 16 pixels: the corner's quarter, by hand; half a latent counts as half."""
    torch.manual_seed(0)
    prediction, target = torch.randn(4, 3, 4, 4), torch.randn(4, 3, 4, 4)
    mask = torch.zeros(2, 16, 16)
    mask[0, :8, :8] = 1
    mask[1] = 1
    found = prediction_error(*masked(mask, prediction, target))
    whole = prediction_error(prediction, target)
    for side in (0, 2):
        torch.testing.assert_close(found[side], (prediction - target)[side, :, :2, :2].square().mean())
        torch.testing.assert_close(found[side + 1], whole[side + 1])
    mask[0] = 0
    mask[0, :6, :4] = 1  # a whole latent and a half one
    squares = (prediction - target)[0].square().mean(0)
    found = prediction_error(*masked(mask, prediction, target))
    torch.testing.assert_close(found[0], (squares[0, 0] + 0.5 * squares[1, 0]) / 1.5)
    video = prediction_error(*masked(mask, prediction[:, :, None], target[:, :, None]))
    torch.testing.assert_close(video, found)
