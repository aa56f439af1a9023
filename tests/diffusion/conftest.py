"""What tests of fine-tuning share."""

import pytest
import torch


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A folder as diffusers saves an SDXL, of the tiny one's sizes and not trained."""
    from lowrank_diffusion.tiny.pretrain import untrained

    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    untrained().save_pretrained(folder)
    return folder
