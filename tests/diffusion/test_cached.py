"""Text and latents through a cache are those without one; everything that changes them changes their key."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from lowrank_core import LowrankError
from lowrank_diffusion.cached import CachedLatents, CachedText
from lowrank_diffusion.caches import DiskCache, MemoryCache
from lowrank_diffusion.data.picture import Picture
from lowrank_diffusion.data.views import View
from lowrank_diffusion.encoding import PictureEncoder, TextEncoders

pytestmark = pytest.mark.filterwarnings("default")
CAPTIONS = ["a red star", "a blue moon", "", "a cross"]
SOURCE = {"hub": "owner/name", "commit": "a"}
VIEW = View(0, 48, 64, (60, 80), 0, 0)


@pytest.fixture(scope="module")
def pipeline():
    from lowrank_diffusion.tiny.pretrain import untrained

    torch.manual_seed(0)
    return untrained()


@pytest.fixture
def counted(pipeline, monkeypatch):
    """The encoders, and the sizes of the batches that they were given."""
    encoders, batches = TextEncoders.of(pipeline), []
    plain = TextEncoders.__call__

    def counting(self, captions):
        batches.append(len(captions))
        return plain(self, captions)

    monkeypatch.setattr(TextEncoders, "__call__", counting)
    return encoders, batches


def silent(done: int, total: int) -> None:
    pass


def same(first, second) -> bool:
    return torch.equal(first.hidden, second.hidden) and torch.equal(first.pooled, second.pooled)


def pictures() -> list[Picture]:
    def gradient() -> Image.Image:
        return Image.merge("RGB", [Image.linear_gradient("L").resize((80, 60))] * 3)

    return [Picture("a.png", "", gradient), Picture("b.png", "", lambda: gradient().rotate(180))]


@torch.no_grad()
def test_cached_text_is_the_encoders(counted, tmp_path):
    encoders, batches = counted
    text = CachedText(encoders, DiskCache(tmp_path, pytest.fail), SOURCE, torch.float32)
    told = []
    assert text.fill(CAPTIONS, lambda done, total: told.append((done, total)), batch_size=3) == 4
    assert told == [(3, 4), (4, 4)]
    assert batches == [3, 1]
    cached = text([CAPTIONS[3], CAPTIONS[0]])
    assert batches == [3, 1]
    plain = CachedText(encoders, None, SOURCE, torch.float32)([CAPTIONS[3], CAPTIONS[0]])
    assert torch.allclose(cached.hidden, plain.hidden, atol=1e-5)
    assert torch.allclose(cached.pooled, plain.pooled, atol=1e-5)
    again = CachedText(encoders, DiskCache(tmp_path, pytest.fail), SOURCE, torch.float32)
    assert again.fill(CAPTIONS, silent, batch_size=3) == 0
    assert same(again([CAPTIONS[3], CAPTIONS[0]]), cached)


@torch.no_grad()
def test_an_interrupted_fill_goes_on_with_the_same_bits(counted, tmp_path):
    encoders, batches = counted
    whole = CachedText(encoders, MemoryCache(), SOURCE, torch.float32)
    whole.fill(CAPTIONS, silent)
    text = CachedText(encoders, DiskCache(tmp_path, lambda _: None), SOURCE, torch.float32)
    text.fill(CAPTIONS, silent)
    path = min(tmp_path.rglob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-3])
    assert text.fill(CAPTIONS, silent) == 1
    assert batches == [4, 4, 4]
    assert same(text(CAPTIONS), whole(CAPTIONS))


@torch.no_grad()
def test_processes_share_the_work_where_they_share_the_cache(counted, tmp_path):
    encoders, _ = counted
    made = [
        CachedText(encoders, DiskCache(tmp_path, pytest.fail), SOURCE, torch.float32).fill(
            CAPTIONS, silent, batch_size=1, process=process, processes=3
        )
        for process in range(3)
    ]
    assert made == [2, 1, 1]
    alone = CachedText(encoders, MemoryCache(), SOURCE, torch.float32)
    assert alone.fill(CAPTIONS, silent, process=1, processes=3) == 4


@pytest.mark.parametrize("cache", [None, MemoryCache()], ids=["none", "memory"])
def test_a_dropped_caption_is_zeros_or_the_empty_text(pipeline, cache):
    encoders = TextEncoders.of(pipeline)
    with torch.no_grad():
        plain = encoders(["a red star", ""])
        zeros = CachedText(encoders, cache, SOURCE, torch.float32)(["a red star", None, ""])
        empty = CachedText(encoders, cache, SOURCE, torch.float32, "empty")(["a red star", None])
    assert not zeros.hidden[1].any()
    assert not zeros.pooled[1].any()
    assert torch.allclose(zeros.hidden[[0, 2]], plain.hidden, atol=1e-5)
    assert torch.allclose(empty.hidden, plain.hidden, atol=1e-5)
    assert torch.allclose(empty.pooled, plain.pooled, atol=1e-5)


def test_without_a_cache_text_encoders_can_be_trained(pipeline):
    text = CachedText(TextEncoders.of(pipeline), None, SOURCE, torch.float32)(["a red star", None])
    assert text.hidden.requires_grad
    assert CachedText(TextEncoders.of(pipeline), None, SOURCE, torch.float32).fill(CAPTIONS, silent) == 0


@torch.no_grad()
def test_each_part_of_a_texts_key_counts(counted):
    encoders, batches = counted
    cache = MemoryCache()

    def computed(caption="a red star", source=SOURCE, dtype=torch.float32) -> bool:
        before = len(batches)
        text = CachedText(encoders, cache, source, dtype)([caption])
        assert text.hidden.dtype == text.pooled.dtype == dtype
        return len(batches) > before

    assert computed()
    assert not computed()
    assert computed(caption="a red star ")
    assert computed(source=SOURCE | {"commit": "b"})
    assert computed(dtype=torch.bfloat16)
    encoders.encoders[0].to(torch.float64)
    try:
        assert computed(dtype=torch.float64)
        assert computed()
    finally:
        encoders.encoders[0].to(torch.float32)


def test_cached_latents_are_the_encoders(pipeline, tmp_path):
    encoder = PictureEncoder(pipeline.vae)
    views = [VIEW, replace(VIEW, picture=1), VIEW]
    plain = CachedLatents(encoder, None, SOURCE, pictures(), (255, 255, 255))
    assert plain.fill(views, pytest.fail) == 0
    cached = CachedLatents(encoder, DiskCache(tmp_path, pytest.fail), SOURCE, pictures(), (255, 255, 255))
    told = []
    assert cached.fill(views, lambda *now: told.append(now)) == 2
    assert told == [(1, 2), (2, 2)]
    again = CachedLatents(encoder, DiskCache(tmp_path, pytest.fail), SOURCE, pictures(), (255, 255, 255))
    assert again.fill(views, silent) == 0
    for expected, *found in zip(plain(views), cached(views), again(views), strict=True):
        assert all(torch.equal(each.mean, expected.mean) and torch.equal(each.std, expected.std) for each in found)


def test_each_part_of_a_latents_key_counts(pipeline):
    cache = MemoryCache()

    def made(view=VIEW, source=SOURCE, background=(255, 255, 255), shown=None) -> int:
        latents = CachedLatents(PictureEncoder(pipeline.vae), cache, source, shown or pictures(), background)
        return latents.fill([view], silent)

    assert made() == 1
    assert made() == 0
    # The same pictures at other places, under other names, are the same.
    assert made(replace(VIEW, picture=1), shown=[pictures()[1], replace(pictures()[0], name="c.png")]) == 0
    assert made(replace(VIEW, picture=1)) == 1
    assert made(replace(VIEW, height=32)) == 1
    assert made(replace(VIEW, width=48)) == 1
    assert made(replace(VIEW, height=48, width=48, left=8)) == 1
    assert made(replace(VIEW, height=32, top=8)) == 1
    assert made(replace(VIEW, flipped=True)) == 1
    assert made(background=(0, 0, 0)) == 1
    assert made(source=SOURCE | {"commit": "b"}) == 1
    pipeline.vae.to(torch.bfloat16)
    try:
        assert made() == 1
    finally:
        pipeline.vae.to(torch.float32)


def test_a_picture_that_breaks_the_vae_is_named_and_not_kept(pipeline, monkeypatch):
    cache = MemoryCache()
    latents = CachedLatents(PictureEncoder(pipeline.vae), cache, SOURCE, pictures(), (255, 255, 255))
    monkeypatch.setattr(
        "lowrank_diffusion.cached.pixels_of", lambda picture, view, background: torch.full((3, 48, 64), float("nan"))
    )
    with pytest.raises(LowrankError, match=r"makes NaN of b.png"):
        latents.fill([replace(VIEW, picture=1)], silent)
    monkeypatch.undo()
    assert latents.fill([replace(VIEW, picture=1)], silent) == 1
