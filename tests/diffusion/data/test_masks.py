"""Masks are cut as their pictures are, and weigh the loss place by place."""

import numpy as np
import pytest
import torch
from PIL import Image

from lowrank_core import LowrankError
from lowrank_diffusion.config import DataConfig, LossConfig
from lowrank_diffusion.data.masks import Masks
from lowrank_diffusion.data.opening import check_pictures
from lowrank_diffusion.data.sources import find_pictures
from lowrank_diffusion.data.views import Views, pixels_of
from lowrank_diffusion.noise import TrainingNoise


def data(folder, **values) -> DataConfig:
    return DataConfig(**({"path": str(folder), "caption": "a dog", "resolution": 64, "bucket_step": 16} | values))


def found(config: DataConfig):
    return check_pictures(find_pictures(config, 0, print), 0.0, print)


def shape(height=64, width=96) -> np.ndarray:
    """A bright rectangle off the middle."""
    values = np.zeros((height, width), np.uint8)
    values[8:32, 16:40] = 255
    return values


@pytest.fixture(params=["alpha", "file"])
def masked(request, tmp_path):
    """One picture that shows its own mask in grey, so that it can be cut and compared."""
    grey = Image.merge("RGB", [Image.fromarray(shape())] * 3)
    if request.param == "alpha":
        grey.putalpha(Image.fromarray(shape()))
    else:
        Image.fromarray(shape()).save(tmp_path / "a-masklabel.png")
    grey.save(tmp_path / "a.png")
    return data(tmp_path, mask=request.param, flip=0.5)


def test_masks_are_cut_and_mirrored_as_pictures_are(masked):
    pictures, sizes = found(masked)
    assert [picture.name for picture in pictures] == ["a.png"]
    views = Views(sizes, masked, 0)
    masks = Masks(masked, pictures, sizes)
    for view in (views.centred(0), views.centred(0, flipped=True)):
        size = view.height // 8, view.width // 8
        grey = (pixels_of(pictures[0], view, (0, 0, 0))[0] + 1) / 2
        expected = grey.reshape(size[0], 8, size[1], 8).mean(dim=(1, 3))
        for _ in range(2):  # computed, then kept
            assert torch.allclose(masks([view], size)[0, 0], expected, atol=2e-3)
        assert 0.05 < expected.mean() < 0.3


def test_the_rest_counts_as_much_as_is_said(masked):
    config = masked.model_copy(update={"unmasked_weight": 0.25})
    pictures, sizes = found(config)
    view = Views(sizes, config, 0).centred(0)
    whole, some = (Masks(each, pictures, sizes)([view], (8, 8)) for each in (masked, config))
    assert torch.allclose(some, 0.25 + 0.75 * whole)
    assert (some.min(), whole.min()) == (0.25, 0)


def test_without_masks_all_counts(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (64, 64)).save(tmp_path / name)
    Image.new("L", (64, 64)).save(tmp_path / "a-masklabel.png")
    plain, some = data(tmp_path), data(tmp_path, mask="file")
    pictures, sizes = found(plain)
    assert [picture.name for picture in pictures] == ["a.png", "b.png"]
    views = [Views(sizes, plain, 0).centred(number) for number in range(2)]
    assert Masks(plain, pictures, sizes)(views, (8, 8)) is None
    assert Masks(some, pictures, sizes)(views, (8, 8)).mean(dim=(1, 2, 3)).tolist() == [0, 1]


def test_the_loss_is_weighed_by_hand():
    process = TrainingNoise(torch.tensor([0.5]), "epsilon", 0, LossConfig())
    predicted = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).expand(1, 2, 2, 2)
    mask = torch.tensor([[[[1.0, 0.5], [0.0, 0.25]]]])
    loss = process.loss(predicted, torch.zeros_like(predicted), torch.tensor([0]), mask)
    assert loss.item() == pytest.approx((1 + 2 + 0 + 4) / 4)


def test_what_a_user_can_mend(tmp_path):
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    pictures, sizes = found(data(tmp_path))
    with pytest.raises(LowrankError, match=r"no picture in .* has an alpha channel; save them with one, or set"):
        Masks(data(tmp_path, mask="alpha"), pictures, sizes)
    with pytest.raises(LowrankError, match=r"has a mask beside it; name the mask of a.jpg a-masklabel.png"):
        Masks(data(tmp_path, mask="file"), pictures, sizes)
    Image.new("L", (48, 64)).save(tmp_path / "a-masklabel.png")
    with pytest.raises(LowrankError, match=r"1 of 1 masks have another size than their pictures: a-masklabel.png"):
        Masks(data(tmp_path, mask="file"), found(data(tmp_path))[0], sizes)
    (tmp_path / "a-masklabel.png").write_text("no picture")
    with pytest.raises(LowrankError, match=r"1 of 1 pictures cannot be read: a-masklabel.png"):
        Masks(data(tmp_path, mask="file"), found(data(tmp_path))[0], sizes)
