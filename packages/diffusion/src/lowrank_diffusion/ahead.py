"""What is computed before the first step, so that most of the base can leave the device."""

from collections.abc import Sequence
from typing import Any

from lowrank_diffusion.base import DTYPES
from lowrank_diffusion.base_files import identity_of
from lowrank_diffusion.cached import CachedLatents, CachedText
from lowrank_diffusion.caches import open_cache
from lowrank_diffusion.config import DiffusionConfig
from lowrank_diffusion.data.captions import Captions
from lowrank_diffusion.data.opening import colour_of
from lowrank_diffusion.encoding import PictureEncoder, TextEncoders
from lowrank_diffusion.families import SDXL, family_of
from lowrank_diffusion.material import Material
from lowrank_diffusion.results import Observer
from lowrank_diffusion.samples import Sampler
from lowrank_diffusion.words import Word


def encoded_ahead(
    config: DiffusionConfig,
    pipeline: Any,
    accelerator: Any,
    runs: Sequence[tuple[DiffusionConfig, Material]],
    words: Sequence[Word],
    observer: Observer,
) -> tuple[list[CachedLatents], CachedText]:
    """Latents of each of `runs` and the text of all, computed where they are cached.

    Networks whose answers are cached then leave the device; the others stay on it, as `words`, which captions may have,
    do.

    Raises:
        LowrankError: a picture cannot be read, or its latents are not finite.
    """
    share = {"process": accelerator.process_index, "processes": accelerator.num_processes}
    encoders = TextEncoders.of(pipeline, words)
    for network in (*encoders.encoders, *encoders.words):
        network.to(accelerator.device)
    captions = [
        caption for each, material in runs for caption in Captions(each.data, each.seed).all_of(material.captions)
    ]
    captions += Sampler.captions(config)
    if long := encoders.too_long(list(dict.fromkeys(captions))):
        observer.note(f"{len(long)} captions are too long, and only their beginning is read, such as: {long[0]}")
    cache = open_cache(config.cache.text, config.cache.folder, observer.note)
    family = family_of(pipeline)
    source = identity_of(config.base, [*family.encoders, *family.tokenizers])
    # Stable Diffusion 1 has never seen zeros for text.
    dropped = config.data.dropped_caption if family is SDXL else "empty"
    text = CachedText(encoders, cache, source, DTYPES[config.train.precision], dropped)
    text.fill(captions, lambda done, total: observer.stage("embedding captions", done, total), **share)
    if cache is not None:
        for encoder in encoders.encoders:
            encoder.to("cpu")

    vae = pipeline.vae.to(accelerator.device)
    cache = open_cache(config.cache.latents, config.cache.folder, observer.note)
    background = colour_of(config.data.background)
    encoder, source = PictureEncoder(vae), identity_of(config.base, ["vae"])
    latents = [CachedLatents(encoder, cache, source, material.pictures, background) for _, material in runs]
    if cache is not None:
        for (_, material), each in zip(runs, latents, strict=True):
            views = material.cached_views
            each.fill(views, lambda done, total: observer.stage("encoding pictures", done, total), **share)
        vae.to("cpu")
    accelerator.wait_for_everyone()
    return latents, text
