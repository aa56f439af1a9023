"""Words with embeddings of their own: as diffusers reads them, without a change to tokenizer or base."""

import copy

import pytest
import torch

from lowrank_core import UsageError
from lowrank_diffusion.encoding import TextEncoders
from lowrank_diffusion.load import load_config
from lowrank_diffusion.pivotal import check_captions, new_word
from lowrank_diffusion.words import PARTS, Word

pytestmark = pytest.mark.filterwarnings("default")
PLACES = {"clip_l": ("tokenizer", "text_encoder"), "clip_g": ("tokenizer_2", "text_encoder_2")}
PROMPTS = ["a red star", "a <Pack>, and a <pack>s' house", "<pack>_1 <pack>", "red " * 28 + "<pack> star", ""]


@pytest.fixture(scope="module")
def pipeline():
    from lowrank_diffusion.tiny.pretrain import untrained

    torch.manual_seed(0)
    return untrained()


def word(vectors: int, text: str = "<pack>") -> Word:
    generator = torch.Generator().manual_seed(vectors)
    return Word(
        text, {part: torch.randn(vectors, w, generator=generator) for part, w in zip(PARTS, (48, 80), strict=True)}
    )


def with_inversion(pipeline, *words: Word):
    """A copy of the pipeline, into which diffusers has loaded the vectors."""
    theirs = copy.deepcopy(pipeline)
    theirs.tokenizer_2 = copy.deepcopy(pipeline.tokenizer_2)  # which is the first one too here
    for each in words:
        for part, (tokenizer, encoder) in PLACES.items():
            named = {"tokenizer": getattr(theirs, tokenizer), "text_encoder": getattr(theirs, encoder)}
            theirs.load_textual_inversion(each.vectors[part].detach(), token=each.text, **named)
    return theirs


def encoded(theirs, prompts):
    hidden, _, pooled, _ = theirs.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False)
    return hidden, pooled


@pytest.mark.slow
@torch.no_grad()
def test_prompts_are_embedded_as_by_diffusers_after_load_textual_inversion(pipeline):
    words = [word(3), word(1, "<other>")]
    prompts = [prompt.lower() for prompt in PROMPTS] + ["the <other> of <pack>"]
    hidden, pooled = encoded(with_inversion(pipeline, *words), prompts)
    text = TextEncoders.of(pipeline, words)(prompts)
    assert torch.equal(text.hidden, hidden)
    assert torch.equal(text.pooled, pooled)
    plain = TextEncoders.of(pipeline)(prompts)
    changed = (text.hidden != plain.hidden).flatten(1).any(dim=1)
    assert changed.tolist() == [False, True, True, True, False, True]
    # The long s, of which lower() makes no s.
    letters = [word(2, "<hus>"), word(1, "<husk>")]
    long_s = TextEncoders.of(pipeline, letters)(["a <hu\u017f> of <HU\u017fK>"])
    assert torch.equal(long_s.hidden, TextEncoders.of(pipeline, letters)(["a <hus> of <husk>"]).hidden)
    # Case is nothing to us; diffusers looks for the other vectors by the word as it is spelled.
    assert torch.equal(TextEncoders.of(pipeline, words)(PROMPTS).hidden, text.hidden[:5])


@pytest.mark.slow
@torch.no_grad()
def test_text_is_pooled_at_its_end_also_where_a_configuration_has_the_end_token_wrong(pipeline):
    prompts = ["a <pack> on a red star"]
    expected = TextEncoders.of(pipeline, [word(2)])(prompts)
    old = copy.deepcopy(pipeline)
    old.text_encoder_2.text_model.eos_token_id = 2  # as SDXL's own says
    text = TextEncoders.of(old, [word(2)])(prompts)
    assert torch.equal(text.pooled, expected.pooled)
    theirs = with_inversion(old, word(2))
    hidden, pooled = encoded(theirs, prompts)
    assert torch.equal(hidden, expected.hidden)
    assert not torch.allclose(pooled, expected.pooled, atol=1e-2)
    # What the card and the documentation say to do about it.
    theirs.text_encoder_2.text_model.eos_token_id = theirs.tokenizer_2.eos_token_id
    assert torch.equal(encoded(theirs, prompts)[1], expected.pooled)


def test_only_the_words_vectors_get_gradients_and_nothing_of_the_base_is_touched(pipeline):
    before = {name: tensor.clone() for name, tensor in pipeline.text_encoder_2.state_dict().items()}
    sizes = len(pipeline.tokenizer), len(pipeline.tokenizer_2)
    own = word(2)
    encoders = TextEncoders.of(pipeline, [own])
    for encoder in encoders.encoders:
        encoder.requires_grad_(False)
    text = encoders(["a <pack>", "a star"])
    (text.hidden.square().sum() + text.pooled.sum()).backward()
    assert all(vectors.grad.abs().sum(dim=1).min() > 0 for vectors in own.vectors.values())
    own.zero_grad(set_to_none=True)
    encoders(["a star"]).hidden.sum().backward()
    assert all(torch.equal(vectors.grad, torch.zeros_like(vectors)) for vectors in own.vectors.values())
    assert all(parameter.grad is None for encoder in encoders.encoders for parameter in encoder.parameters())
    assert (len(pipeline.tokenizer), len(pipeline.tokenizer_2)) == sizes
    after = pipeline.text_encoder_2.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@torch.no_grad()
def test_a_silenced_word_is_what_the_base_reads_and_its_vectors_take_room(pipeline):
    own = word(3)
    encoders, plain = TextEncoders.of(pipeline, [own]), TextEncoders.of(pipeline)
    with own.silenced():
        assert torch.equal(encoders(PROMPTS).hidden, plain(PROMPTS).hidden)
    assert not torch.equal(encoders(PROMPTS).hidden, plain(PROMPTS).hidden)
    # Of 32 tokens two are start and end.
    full = "red " * 27 + "<pack>"
    assert encoders.too_long([full, f"red {full}"]) == [f"red {full}"]


def configured(*overrides: str):
    return load_config(None, ["pivotal.token=<Pack>", "cache.text=none", "train.steps=10", *overrides])


def test_vectors_start_from_a_word_or_with_the_spread_of_the_base(pipeline):
    drawn = new_word(configured("pivotal.vectors=64"), pipeline)
    again = new_word(configured("pivotal.vectors=64"), pipeline)
    for part, (_, encoder) in PLACES.items():
        table = getattr(pipeline, encoder).get_input_embeddings().weight
        assert drawn.vectors[part].std().item() == pytest.approx(table.std().item(), rel=0.05)
        assert torch.equal(drawn.vectors[part], again.vectors[part])
    assert drawn.tokens[:2] == ["<pack>", "<pack>_1"]
    assert (drawn.pivot, new_word(configured("pivotal.until=0.01"), pipeline).pivot) == (5, 1)
    star = new_word(configured("pivotal.init=star"), pipeline)
    with torch.no_grad():
        pair = TextEncoders.of(pipeline, [star])(["a <pack> on red"])
        assert torch.equal(pair.hidden, TextEncoders.of(pipeline)(["a star star on red"]).hidden)
    assert new_word(load_config(None), pipeline) is None


def test_the_spread_is_held_by_a_power_until_the_pivot(pipeline):
    own = new_word(configured("pivotal.hold_spread=0.25", "pivotal.vectors=3"), pipeline)
    with torch.no_grad():
        for part, vectors in own.vectors.items():
            vectors *= 16 * own.spreads[part] / vectors.std(correction=0)
    own.begin(4)
    own.end()
    found = {part: vectors.std(correction=0).item() / own.spreads[part] for part, vectors in own.vectors.items()}
    assert found == pytest.approx({"clip_l": 8, "clip_g": 8}, rel=1e-4)  # 16 / 16^(1/4)
    held = {part: vectors.detach().clone() for part, vectors in own.vectors.items()}
    own.begin(5)
    own.end()
    assert not any(vectors.requires_grad for vectors in own.vectors.values())
    assert all(torch.equal(held[part], vectors) for part, vectors in own.vectors.items())


def test_words_that_cannot_be_learned_are_refused(pipeline):
    with pytest.raises(UsageError, match=r"token is red, a word that the base's tokenizer knows already; .* as <red>"):
        new_word(configured("pivotal.token=red"), pipeline)
    with pytest.raises(UsageError, match="init is 'backpack', which the base's tokenizer reads as 5 tokens; give a"):
        new_word(configured("pivotal.init=backpack"), pipeline)
    captions = ["a house", "[trigger] at the top"]
    with pytest.raises(UsageError, match=r"token is <Pack>, which stands in no caption, .* set data.trigger: <Pack>"):
        check_captions(configured(), captions, print)
    told = []
    shown = "sample.prompts=['a <PACK>', 'a house']"
    check_captions(configured("data.trigger='a <pack> house'", shown), captions, told.append)
    check_captions(configured("sample.prompts=[]"), [*captions, "A <PACK>"], told.append)
    assert told == []
    check_captions(configured("sample.prompts=[a house]"), [*captions, "A <PACK>"], told.append)
    assert told == ["pivotal.token <Pack> stands in none of sample.prompts, so the grids will not show what it learns"]
    with pytest.raises(UsageError, match=r"trains what cache.text would keep; set cache.text: none"):
        load_config(None, ["pivotal.token=<pack>"])
    with pytest.raises(UsageError, match=r"which pivotal.hold_spread cannot reach; set pivotal.hold_spread: 0"):
        configured("train.optimizer=schedulefree", "train.schedule=constant")
    with pytest.raises(UsageError, match=r"pivotal.token"):
        configured("pivotal.token='two words'")
