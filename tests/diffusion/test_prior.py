"""Which class pictures are still to be drawn, and what is trained on them."""

import pytest
from PIL import Image

from lowrank_core import UsageError
from lowrank_diffusion.load import load_config
from lowrank_diffusion.prior import missing_pictures, prior_config


def config(folder, *overrides: str):
    given = ["prior.caption=a photo of a dog", f"prior.path={folder}", "prior.images=4", *overrides]
    return load_config("sdxl-dreambooth", given)


def test_pictures_of_ones_own_count_and_drawn_ones_are_not_drawn_again(tmp_path):
    assert missing_pictures(config(tmp_path / "new")) == [1, 2, 3, 4]
    for name in ("class-00002.png", "mine/rex.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "mine" / "rex.txt").write_text("rex")
    assert missing_pictures(config(tmp_path)) == [1, 3]
    assert missing_pictures(config(tmp_path, "prior.images=1")) == []


def test_the_run_beside_differs_in_pictures_captions_and_draws(tmp_path):
    own = config(tmp_path, "data.trigger=sks", "data.resolution=512", "data.flip=0.5", "data.held_out=0.2")
    beside = prior_config(own)
    assert (beside.data.path, beside.data.caption) == (str(tmp_path), "a photo of a dog")
    assert (beside.data.trigger, beside.data.held_out) == (None, 0)
    assert (beside.data.resolution, beside.data.flip) == (512, 0.5)
    assert beside.seed != own.seed
    assert (beside.train, beside.adapter) == (own.train, own.adapter)


def test_what_a_user_can_mend(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"prior.path is .*file, a file; it takes a folder for pictures of the class"):
        missing_pictures(config(tmp_path / "file"))
    with pytest.raises(UsageError, match="caption is given, but no path; name a folder for pictures of the class"):
        load_config(None, ["prior.caption=a dog"])
