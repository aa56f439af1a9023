"""Roles as clients, windows of 80 characters as examples."""

import json

import numpy as np
import pytest
import torch

from lowrank_core.errors import LowrankError, UsageError
from lowrank_fl.data.shakespeare import ALPHABET, STRIDE, WINDOW, encode


def text_of(symbols) -> str:
    return "".join(ALPHABET[number] for number in symbols)


@pytest.fixture
def plays(tmp_path):
    """Two roles of 500 characters and one too short."""
    numbers = " ".join(str(number) for number in range(1000))
    roles = [
        {"play": "hamlet", "role": "HAMLET", "text": numbers[:500]},
        {"play": "hamlet", "role": "OSRIC", "text": numbers[:400]},
        {"play": "lear", "role": "FOOL", "text": numbers[1000:1500]},
    ]
    file = tmp_path / "by_role.jsonl"
    file.write_text("\n".join(map(json.dumps, roles)) + "\n")
    return file


def test_the_alphabet_has_80_symbols():
    assert len(ALPHABET) == len(set(ALPHABET)) == 80


def test_white_space_becomes_one_space_and_strange_symbols_a_space():
    assert text_of(encode("To be,\n\tor not £ é to_be!")) == "To be, or not     to be!"


def test_windows_are_80_characters_and_labels_the_next_one(load, plays):
    examples = load(name="shakespeare", path=plays)
    text = json.loads(plays.read_text().splitlines()[0])["text"]
    assert examples.inputs.shape[1] == WINDOW
    assert examples.inputs.dtype == torch.uint8
    assert examples.labels.dtype == torch.int64
    assert text_of(examples.inputs[0]) == text[:80]
    assert text_of(examples.labels[:1]) == text[80]
    assert text_of(examples.inputs[1]) == text[STRIDE : STRIDE + 80]
    assert len(examples.classes) == 80
    assert examples.is_text


def test_the_last_fifth_of_a_role_is_for_testing_and_no_window_reaches_across(load, plays):
    examples = load(name="shakespeare", path=plays)
    text = json.loads(plays.read_text().splitlines()[0])["text"]
    # 400 characters give windows at 0, 5, ... 315; 100 give windows at 0, 5, 10, 15.
    assert len(examples.inputs) == 2 * 64
    assert len(examples.test_inputs) == 2 * 4
    assert text_of(examples.test_inputs[0]) == text[400:480]


def test_clients_are_roles_and_short_roles_are_left_out(load, plays):
    groups = load(name="shakespeare", path=plays).groups
    assert groups.tolist() == ["hamlet/HAMLET"] * 64 + ["lear/FOOL"] * 64


def test_clients_can_be_plays(load, plays):
    assert set(load(name="shakespeare", path=plays, natural="play").groups) == {"hamlet", "lear"}


def test_a_folder_with_one_file_serves_as_path(load, plays):
    assert len(load(name="shakespeare", path=plays.parent).inputs) == 128


def test_max_examples_keeps_a_part_of_the_windows_and_their_roles(load, plays):
    few = load(name="shakespeare", path=plays, max_examples=10)
    assert len(few.inputs) == len(few.labels) == len(few.groups) == 10
    assert len(few.test_inputs) == 8


def test_a_role_of_401_characters_is_just_long_enough(load, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"play": "p", "role": "r", "text": "a" * 401}))
    assert len(load(name="shakespeare", path=file).test_inputs) == 1
    file.write_text(json.dumps({"play": "p", "role": "r", "text": "a" * 400}))
    with pytest.raises(LowrankError, match=r"no role in .* has the 401 characters"):
        load(name="shakespeare", path=file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no role in"),
        ('{"play": "p", "role": "r", "text": "x"}\nTo be\n', "line 2 of .* is not JSON"),
        ('{"play": "p", "line": "x"}', "line 1 of .* lacks the text of role, text"),
        ('["p", "r", "x"]', "line 1 of .* lacks the text of play, role, text"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(load, tmp_path, content, message):
    file = tmp_path / "a.jsonl"
    file.write_text(content)
    with pytest.raises(LowrankError, match=message):
        load(name="shakespeare", path=file)


def test_without_a_path_the_fields_are_explained(load):
    with pytest.raises(UsageError, match=r"data\.path=FILE to JSON lines with the fields play, role and text"):
        load(name="shakespeare")


def test_a_missing_file_is_said(load, tmp_path):
    with pytest.raises(LowrankError, match="there is no such file"):
        load(name="shakespeare", path=tmp_path / "gone.jsonl")


def test_a_folder_with_several_files_needs_a_choice(load, plays):
    (plays.parent / "other.jsonl").write_text("")
    with pytest.raises(LowrankError, match=r"holds 2 files named \*\.jsonl"):
        load(name="shakespeare", path=plays.parent)


def test_another_id_column_is_refused(load, plays):
    with pytest.raises(UsageError, match="'actor', but shakespeare has the columns play and role only"):
        load(name="shakespeare", path=plays, natural="actor")


def test_real_plays_have_hundreds_of_roles(load, shared_data):
    examples = load(name="shakespeare", path=shared_data / "shakespeare" / "by_role.jsonl")
    assert len(np.unique(examples.groups.astype(str))) > 800
    assert examples.inputs.numel() < 100e6
    assert int(examples.labels.max()) < 80
