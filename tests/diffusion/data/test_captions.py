"""What is said of a picture, by hand, and that it depends on seed, step and place alone."""

from collections import Counter

import pytest

from lowrank_core import UsageError
from lowrank_diffusion.config import DataConfig
from lowrank_diffusion.data.captions import Captions
from lowrank_diffusion.load import load_config

TAGS = "1girl,  red hair, smile,, hat"


def drawn(caption: str, count: int = 300, seed: int = 0, **data) -> list[str | None]:
    captions = Captions(DataConfig(**({"caption_dropout": 0} | data)), seed)
    return [captions.of(caption, step, 1) for step in range(count)]


def test_a_caption_is_said_as_it_is():
    assert set(drawn("a, b  c")) == {"a, b  c"}
    dropped = Counter(drawn("a", 1000, caption_dropout=0.3))
    assert dropped.keys() == {"a", None}
    assert 240 < dropped[None] < 360  # four standard deviations


def test_tags_are_shuffled_behind_those_that_are_kept():
    said = Counter(drawn(TAGS, shuffle_tags=True, keep_tags=2))
    assert said.keys() == {"1girl, red hair, smile, hat", "1girl, red hair, hat, smile"}
    assert min(said.values()) > 110
    assert len(set(drawn(TAGS, shuffle_tags=True))) == 24
    assert set(drawn(TAGS, shuffle_tags=True, keep_tags=9)) == {"1girl, red hair, smile, hat"}


def test_tags_are_left_out_and_the_others_keep_their_order():
    said = Counter(drawn(TAGS, tag_dropout=0.5, keep_tags=2))
    kept = "1girl, red hair"
    assert said.keys() == {kept, f"{kept}, smile", f"{kept}, hat", f"{kept}, smile, hat"}
    assert min(said.values()) > 45  # of 75 expected, four standard deviations


@pytest.mark.parametrize(
    ("caption", "said"),
    [
        ("a dog", "sks, a dog"),
        ("a [trigger] dog", "a sks dog"),
        ("a sks dog", "a sks dog"),
        ("", "sks"),
    ],
)
def test_a_trigger_word_goes_to_its_place_or_in_front(caption, said):
    assert set(drawn(caption, 3, trigger="sks")) == {said}


def test_templates_stand_around_the_whole():
    templates = ["a photo of {caption}", "{caption}, {caption}"]
    said = drawn("dog {x}", trigger="sks", caption_templates=templates)
    assert set(said) == {"a photo of sks, dog {x}", "sks, dog {x}, sks, dog {x}"}
    captions = Captions(DataConfig(trigger="sks", caption_templates=templates), 0)
    assert captions.all_of(["dog {x}"]) == ["a photo of sks, dog {x}", "sks, dog {x}, sks, dog {x}"]
    assert captions.plain("dog {x}") == "a photo of sks, dog {x}"


def test_the_seed_the_step_and_the_place_draw():
    captions = [Captions(DataConfig(shuffle_tags=True, caption_dropout=0), seed) for seed in (0, 0, 1)]
    tags = ", ".join("abcdefgh")
    one, again, other = ([each.of(tags, step, place) for step in range(3) for place in range(3)] for each in captions)
    assert one == again
    assert len({*one, *other}) == 18
    assert captions[0].plain(tags) == tags


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["data.shuffle_tags=true"], "make a caption new each time; set cache.text: none"),
        (["data.tag_dropout=0.1"], "make a caption new each time; set cache.text: none"),
        (["data.caption_templates=[a photo]"], "'a photo' does not say where the caption goes; add {caption}"),
        (["data.trigger=' '"], "data.trigger"),
    ],
)
def test_what_a_user_can_mend(overrides, sentence):
    with pytest.raises(UsageError, match=sentence):
        load_config(None, overrides)
