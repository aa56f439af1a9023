"""Fewer bytes for the same arrays: half precision, eight bits or the largest entries alone, in both directions."""

from lowrank_fl.flower.codecs.mod import Mod, codec_mod

__all__ = ["Mod", "codec_mod"]
