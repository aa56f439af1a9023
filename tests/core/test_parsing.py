"""JSON and YAML that would overrun the stack, the memory or the patience of whoever reads them."""

from dataclasses import dataclass

import pytest

from lowrank_core.parsing import parse_json, parse_yaml, record_of

LAUGHS = "a: &a [1, 1]\n" + "\n".join(f"b{n}: &b{n} [*{'a' if n == 0 else f'b{n - 1}'}, *a]" for n in range(40))


@pytest.mark.parametrize("parse", [parse_json, parse_yaml])
def test_plain_values_come_through(parse):
    assert parse('{"a": [1, 2.5, "x", null, true], "b": {"c": 18446744073709551615}}') == {
        "a": [1, 2.5, "x", None, True],
        "b": {"c": 2**64 - 1},
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "it is nested too deep"),
        ("[" * 200 + "]" * 200, "it is nested too deep"),
        ('{"a": 1' + "0" * 30 + "}", "a whole number of 100 bits, more than 64"),
        ("9" * 5000, "4300 digits"),
    ],
)
@pytest.mark.parametrize("parse", [parse_json, parse_yaml])
def test_too_deep_and_too_large(parse, text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "aliases are not read"),
        ("a: &a [*a]", "aliases are not read"),
        ("a: 2026-13-45", "a value that does not fit its type"),
        ("a: !!bool x", "a value that does not fit its type"),
        ("a: !!timestamp x", "a value that does not fit its type"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a: 0x" + "f" * 100, "a whole number of 400 bits"),
    ],
)
def test_what_yaml_alone_has(text, message):
    with pytest.raises(ValueError, match=message):
        parse_yaml(text)


@dataclass(frozen=True)
class Row:
    step: int
    loss: float | None = None


def test_a_record_leaves_out_the_keys_of_another_version():
    assert record_of(Row, {"step": 3, "loss": 0.5, "later": "x"}) == Row(3, 0.5)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({}, "step: field required"),
        ({"step": "x"}, "step: input should be"),
        ([], "the whole: "),
        (None, "the whole: "),
    ],
)
def test_a_record_of_something_else(tree, message):
    with pytest.raises(ValueError, match=message):
        record_of(Row, tree)
