"""Text and latents through a cache: computed once, then read."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal, TypeVar

import torch

from lowrank_diffusion.caches import Cache, key_of
from lowrank_diffusion.data.opening import Colour
from lowrank_diffusion.data.picture import Picture
from lowrank_diffusion.data.views import View, pixels_of
from lowrank_diffusion.encoding import Latents, PictureEncoder, Text, TextEncoders
from lowrank_diffusion.identity import content_digest

T = TypeVar("T")
Progress = Callable[[int, int], None]
"""Is told how many entries are done, and of how many."""


class CachedText:
    """Embedded captions; a caption of None is one left out, and stands for zeros or for the empty text.

    Entries are keyed when the object is made, by the dtype and the device that the encoders have then. After `fill` the
    encoders may move to another device.
    """

    def __init__(
        self,
        encoders: TextEncoders,
        cache: Cache | None,
        source: Mapping[str, Any],
        dtype: torch.dtype,
        dropped: Literal["zeros", "empty"] = "zeros",
    ) -> None:
        """Put a cache, or none, before the encoders.

        Args:
            encoders: computes what the cache lacks; without a cache, everything, with gradients where they are enabled.
            cache: see `open_cache`.
            source: JSON that tells encoders and tokenizers from all others, as `source_identity` gives.
            dtype: of what is returned and stored.
            dropped: `data.dropped_caption`.
        """
        self._encoders, self._cache, self._dtype, self._dropped = encoders, cache, dtype, dropped
        self._parts = {"source": dict(source), "encoders": _placed(encoders.encoders), "dtype": str(dtype)}

    def __call__(self, captions: Sequence[str | None]) -> Text:
        """A batch of text: on the encoders' device without a cache, else on the CPU."""
        texts = [caption or "" for caption in captions]
        if self._cache:
            batch = Text.stacked([self._entry(text, self._cache) for text in texts])
        else:
            batch = self._encoders(texts).to(dtype=self._dtype)
        if self._dropped == "empty" or None not in captions:
            return batch
        kept = torch.tensor([caption is not None for caption in captions], device=batch.pooled.device)
        return Text(batch.hidden * kept[:, None, None], batch.pooled * kept[:, None])

    @torch.no_grad()
    def fill(
        self,
        captions: Sequence[str],
        progress: Progress,
        *,
        batch_size: int = 16,
        process: int = 0,
        processes: int = 1,
    ) -> int:
        """Embed what the cache lacks of these captions and the empty one, and say how many that were.

        Several processes share the work where they share the cache; let them wait for each other afterwards. Batches
        depend on the captions alone and are computed whole, so that an interrupted fill goes on with the same bits.
        """
        if not self._cache:
            return 0
        texts = list(dict.fromkeys(["", *captions]))
        batches = [texts[start : start + batch_size] for start in range(0, len(texts), batch_size)]
        batches = _share(batches, self._cache, process, processes)
        made, done, total = 0, 0, sum(map(len, batches))
        for batch in batches:
            missing = [text for text in batch if not self._cache.has(self._key(text))]
            if missing:
                embedded = dict(zip(batch, self._encoders(batch).to("cpu", self._dtype).unstacked(), strict=True))
                for text in missing:
                    self._cache.put(self._key(text), {"hidden": embedded[text].hidden, "pooled": embedded[text].pooled})
            made, done = made + len(missing), done + len(batch)
            progress(done, total)
        return made

    @torch.no_grad()
    def _entry(self, caption: str, cache: Cache) -> Text:
        found = cache.get(self._key(caption))
        if found:
            return Text(**found)
        text = self._encoders([caption]).to("cpu", self._dtype).unstacked()[0]
        cache.put(self._key(caption), {"hidden": text.hidden, "pooled": text.pooled})
        return text

    def _key(self, caption: str) -> str:
        return key_of(kind="text", **self._parts, caption=caption)


class CachedLatents:
    """Latents of views. The VAE gets one at a time, so an entry's bits do not depend on its neighbours.

    Entries are keyed when the object is made, as those of `CachedText`.
    """

    def __init__(
        self,
        encoder: PictureEncoder,
        cache: Cache | None,
        source: Mapping[str, Any],
        pictures: Sequence[Picture],
        background: Colour,
    ) -> None:
        """Put a cache, or none, before the VAE.

        Args:
            encoder: computes what the cache lacks; without a cache, everything.
            cache: see `open_cache`.
            source: JSON that tells the VAE from all others, as `source_identity` gives.
            pictures: those that views name by their places.
            background: what lies behind transparent ones.
        """
        self._encoder, self._cache, self._pictures, self._background = encoder, cache, pictures, background
        self._parts = {"source": dict(source), "vae": _placed([encoder.vae]), "background": background}
        self._contents: dict[int, str] = {}

    def __call__(self, views: Sequence[View]) -> list[Latents]:
        """On the VAE's device without a cache, else on the CPU."""
        return [self._entry(view) for view in views]

    def fill(self, views: Sequence[View], progress: Progress, *, process: int = 0, processes: int = 1) -> int:
        """Encode what the cache lacks of these, and say how many that were; see `CachedText.fill`."""
        if not self._cache:
            return 0
        views = _share(list(dict.fromkeys(views)), self._cache, process, processes)
        made = 0
        for number, view in enumerate(views, 1):
            if not self._cache.has(self._key(view)):
                self._entry(view)
                made += 1
            progress(number, len(views))
        return made

    def _entry(self, view: View) -> Latents:
        if not self._cache:
            return self._encoded(view)
        key = self._key(view)
        found = self._cache.get(key)
        if found:
            return Latents(**found)
        latents = self._encoded(view)
        latents = Latents(latents.mean.cpu(), latents.std.cpu())
        self._cache.put(key, {"mean": latents.mean, "std": latents.std})
        return latents

    def _encoded(self, view: View) -> Latents:
        picture = self._pictures[view.picture]
        return self._encoder(pixels_of(picture, view, self._background)[None], [picture.name])[0]

    def _key(self, view: View) -> str:
        if view.picture not in self._contents:
            self._contents[view.picture] = content_digest(self._pictures[view.picture])
        cut = asdict(view) | {"picture": self._contents[view.picture]}
        return key_of(kind="latents", **self._parts, **cut)


def _placed(networks: Sequence[Any]) -> list[list[str]]:
    """Where and in which dtype networks compute, which changes the last bits of what they give."""
    first = [next(network.parameters()) for network in networks]
    return [[parameter.device.type, str(parameter.dtype)] for parameter in first]


def _share(work: list[T], cache: Cache, process: int, processes: int) -> list[T]:
    return work[process::processes] if cache.shared else work
