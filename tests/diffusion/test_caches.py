"""The stores: bits come back, damaged files are made again, a full disk says so; and what entries are keyed by."""

import errno
import io
import os

import pytest
import torch
from PIL import Image

from lowrank_core import LowrankError
from lowrank_diffusion.caches import DiskCache, MemoryCache, key_of, open_cache
from lowrank_diffusion.data.picture import Picture, PictureFile
from lowrank_diffusion.identity import content_digest, source_identity

KEY = key_of(kind="test")
TENSORS = {"mean": torch.randn(4, 3, 2), "std": torch.rand(5).bfloat16()}


@pytest.fixture(params=["memory", "disk"])
def cache(request, tmp_path):
    return open_cache(request.param, str(tmp_path), pytest.fail)


def test_hits_return_the_bits(cache):
    assert not cache.has(KEY)
    assert cache.get(KEY) is None
    cache.put(KEY, TENSORS)
    assert cache.has(KEY)
    found = cache.get(KEY)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name]) and found[name].dtype == TENSORS[name].dtype for name in found)
    assert not cache.has(key_of(kind="other"))


def test_memory_keeps_a_copy():
    cache, tensor = MemoryCache(), torch.zeros(2)
    cache.put(KEY, {"a": tensor})
    tensor += 1
    assert cache.get(KEY)["a"].tolist() == [0, 0]


def test_another_process_sees_what_is_on_disk(tmp_path):
    DiskCache(tmp_path, pytest.fail).put(KEY, TENSORS)
    assert torch.equal(DiskCache(tmp_path, pytest.fail).get(KEY)["mean"], TENSORS["mean"])
    assert [path.name for path in tmp_path.rglob("*.*")] == [f"{KEY}.safetensors"]


@pytest.mark.parametrize("kept", [0, 5, 40, -1])
def test_a_file_that_is_cut_off_counts_as_missing_and_is_noted(tmp_path, kept):
    notes = []
    cache = DiskCache(tmp_path, notes.append)
    cache.put(KEY, TENSORS)
    (path,) = tmp_path.rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:kept])
    assert not cache.has(KEY)
    assert cache.get(KEY) is None
    assert len(notes) == 2
    assert notes[0].startswith(f"A file of the cache is made again: {path} ")
    cache.put(KEY, TENSORS)
    assert torch.equal(cache.get(KEY)["mean"], TENSORS["mean"])


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(LowrankError, match=r"No space left on device; .*cache.folder names another folder, .*memory"):
        DiskCache(tmp_path, pytest.fail).put(KEY, TENSORS)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_configured_folder_or_lowranks_own(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path))
    assert open_cache("none", None, pytest.fail) is None
    assert isinstance(open_cache("memory", None, pytest.fail), MemoryCache)
    assert open_cache("disk", None, pytest.fail).folder == tmp_path / "diffusion"
    assert open_cache("disk", str(tmp_path / "own"), pytest.fail).folder == tmp_path / "own"


def test_keys_do_not_depend_on_the_order_of_parts():
    assert key_of(a=1, b=[2, 3]) == key_of(b=(2, 3), a=1)
    assert len({key_of(a=1), key_of(a=2), key_of(b=1), key_of(a="1")}) == 4


@pytest.fixture
def model(tmp_path):
    for file, content in {
        "unet/weights.safetensors": b"unet",
        "vae/config.json": b"{}",
        "vae/diffusion_pytorch_model.safetensors": b"weights",
    }.items():
        (tmp_path / "model" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / file).write_bytes(content)
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("vae/config.json", b"[]"),
        ("vae/diffusion_pytorch_model.safetensors", b"heights"),  # as long as before, but later
        ("vae/diffusion_pytorch_model.safetensors", b"longer weights"),
        ("vae/new.json", b""),
    ],
)
def test_a_folder_is_another_when_a_part_that_counts_changes(model, file, content):
    before = source_identity(str(model), parts=["vae"])
    (model / "unet" / "weights.safetensors").write_bytes(b"other")
    assert source_identity(str(model), parts=["vae"]) == before
    assert source_identity(str(model)) != before
    (model / file).write_bytes(content)
    if content == b"heights":
        os.utime(model / file, (1, 1))
    assert source_identity(str(model), parts=["vae"]) != before


def test_a_copied_folder_is_another(model):
    before = source_identity(str(model), parts=["vae"])
    assert source_identity(str(model.rename(model.with_name("moved"))), parts=["vae"]) != before


def test_a_folder_without_the_parts(model):
    with pytest.raises(LowrankError, match=r"holds no tokenizer or text_encoder; give the folder of a saved model"):
        source_identity(str(model), parts=["tokenizer", "text_encoder"])


def test_a_hub_id_stands_with_its_commit(tmp_path, monkeypatch):
    import huggingface_hub.constants
    import huggingface_hub.file_download

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(LowrankError, match=r"owner/name is no folder, and the hub's cache does not hold it at .* main"):
        source_identity("owner/name")
    stored = tmp_path / "models--owner--name"
    for commit, revision in (("a" * 40, "main"), ("b" * 40, "v2")):
        (stored / "snapshots" / commit).mkdir(parents=True)
        (stored / "snapshots" / commit / "model_index.json").touch()
        (stored / "refs").mkdir(exist_ok=True)
        (stored / "refs" / revision).write_text(commit)
    assert source_identity("owner/name", parts=["vae"]) == {"hub": "owner/name", "commit": "a" * 40, "parts": ["vae"]}
    assert source_identity("owner/name", "v2")["commit"] == "b" * 40


def drawn(colour: str) -> Image.Image:
    return Image.new("RGB", (20, 10), colour)


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "gif", "tiff", "bmp"])
def test_a_files_digest_is_that_of_its_bytes(tmp_path, ending):
    from hashlib import sha256

    path = tmp_path / f"a.{ending}"
    drawn("red").save(path)
    assert content_digest(Picture("a", "", PictureFile(path))) == sha256(path.read_bytes()).hexdigest()
    stream = path.read_bytes()
    assert content_digest(Picture("b", "", lambda: Image.open(io.BytesIO(stream)))) == sha256(stream).hexdigest()


def test_drawn_pictures_are_told_apart_by_their_pixels():
    digests = [content_digest(Picture("a", "", lambda c=c: drawn(c))) for c in ("red", "red", "blue")]
    assert digests[0] == digests[1] != digests[2]
    assert content_digest(Picture("a", "", lambda: drawn("red").resize((10, 20)))) != digests[0]


def test_a_picture_that_is_gone_is_named(tmp_path):
    with pytest.raises(LowrankError, match=r"row 3 cannot be opened .*; mend it or take it out"):
        content_digest(Picture("row 3", "", PictureFile(tmp_path / "gone.png")))
