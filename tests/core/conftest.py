"""Shared by the core tests: a fixed seed before every test, so that a failure can be repeated."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
