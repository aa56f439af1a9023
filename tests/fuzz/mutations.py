"""Files that are damaged a little, or made to do harm: strategies that start from a whole one.

`LOWRANK_FUZZ_CASES` says how many files each reader is given; the few of an ordinary test run are always the same.
"""

import copy
import json
import os
import struct
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

_FEW = 25
CASES = int(os.environ.get("LOWRANK_FUZZ_CASES", _FEW))

fuzzed = settings(
    max_examples=CASES,
    derandomize="LOWRANK_FUZZ_CASES" not in os.environ,
    deadline=None,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)

# What no serialiser would write is put in as text, in place of these strings.
_DEEP, _DIGITS = "<deep>", "<digits>"
_DEPTH = 50_000
_AS_TEXT = {f'"{_DEEP}"': "[" * _DEPTH + "]" * _DEPTH, f'"{_DIGITS}"': "9" * 5_000}

NASTY: list[Any] = [
    None, True, False, -1, 0, 1, 2, 2**31, 2**63, 10**30, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", "1", "x", "../../x", "..", "/x", "a/b", "\x00", "\ud800", "é", "x" * 5_000, "all-linear",
    "(((", "(" * 5_000 + ")" * 5_000, "(a+)+$", "a{99999999999}", "(x)",
    [], {}, [[[]]], ["x"], [1, 2], [None], {"x": 1}, {"../../x": 1}, {"": None}, _DEEP, _DIGITS,
    "F32", "F16", "I64", "BOOL", "F8_E4M3", "F4", "LORA", "LOHA", "LOKR", "ADALORA", [0, 0], [0, 4], [2**62, 2**62],
]  # fmt: skip


def damaged(content: bytes) -> st.SearchStrategy[bytes]:
    """The bytes with one to three of them changed, cut out, put in or written twice, or cut off."""

    @st.composite
    def draw_one(draw: st.DrawFn) -> bytes:
        data = bytearray(content)
        for _ in range(draw(st.integers(1, 3))):
            at = draw(st.integers(0, len(data)))
            length = draw(st.sampled_from([1, 2, 8, 40]))
            way = draw(st.sampled_from(["change", "cut", "insert", "repeat", "truncate"]))
            if way == "change" and at < len(data):
                data[at] = draw(st.integers(0, 255))
            elif way == "cut":
                del data[at : at + length]
            elif way == "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=length))
            elif way == "repeat":
                data[at:at] = data[at : at + length]
            else:
                del data[at:]
        return bytes(data)

    return draw_one()


def changed(tree: Any) -> st.SearchStrategy[Any]:
    """JSON with one to three values replaced, taken out or put under another name."""

    @st.composite
    def draw_one(draw: st.DrawFn) -> Any:
        result = [copy.deepcopy(tree)]
        for _ in range(draw(st.integers(1, 3))):
            holder, key = draw(st.sampled_from(list(_places(result))))
            way = draw(st.sampled_from(["replace", "replace", "replace", "swap", "remove", "rename", "nudge"]))
            if way == "replace":
                holder[key] = copy.deepcopy(draw(st.sampled_from(NASTY)))
            elif way == "swap":
                other, place = draw(st.sampled_from(list(_places(result))))
                holder[key] = copy.deepcopy(other[place])
            elif way == "nudge" and isinstance(holder[key], int | float) and abs(holder[key]) < 2**64:
                holder[key] += draw(st.sampled_from([-1, 1, 4, -0.5]))
            elif holder is not result and way == "remove":
                del holder[key]
            elif isinstance(holder, dict):
                name = draw(st.sampled_from(["x", "../../x", "", f"{key}.x", "\ud800", *map(str, holder)]))
                holder[name] = holder.pop(key)
        return result[0]

    return draw_one()


def _places(tree: Any) -> Any:
    """Every list or dict in it with each index or key of its own."""
    if isinstance(tree, list | dict):
        for key in range(len(tree)) if isinstance(tree, list) else list(tree):
            yield tree, key
            yield from _places(tree[key])


def text_of(tree: Any) -> str:
    """JSON, with a few things in it that nobody writes."""
    text = json.dumps(tree)
    for mark, wild in _AS_TEXT.items():
        text = text.replace(mark, wild)
    return text


def json_files(tree: Any) -> st.SearchStrategy[bytes]:
    """A file of this JSON, with its values changed, or else its bytes."""
    return st.one_of(changed(tree).map(lambda made: text_of(made).encode()), damaged(json.dumps(tree).encode()))


def jsonl_files(rows: list[Any]) -> st.SearchStrategy[bytes]:
    """Lines of JSON."""

    def lines(trees: Any) -> bytes:
        trees = trees if isinstance(trees, list) else [trees]
        return "".join(f"{text_of(tree)}\n" for tree in trees).encode()

    return st.one_of(changed(rows).map(lines), damaged(lines(rows)))


_YAML = [
    "{key}: &a [*a]", "{key}: *nobody", "{key}: !!python/object/apply:os.system [x]", "{key}: !!bool x",
    "{key}: !!timestamp x", "{key}: !!int ''", "{key}: 2026-13-45", "{key}: 0x" + "f" * 5_000, "? [a]\n: b", "1: 2",
    "null: 2", "2026-01-01: 2", "? {{a: b}}\n: c", "<<: 1", "<<: [1]", "{key}: !!set x", "{key}: !!omap [a, b]",
    "{key}: !!binary x", "{key}: " + "[" * _DEPTH, "{key}: .nan", "{key}: 1:2:3", "---\n---\n", "%YAML 9.9",
    "\t", "{key}: =",
    # A few lines that stand for billions of values.
    "x0: &x0 [1, 1]\n" + "\n".join(f"x{n}: &x{n} [*x{n - 1}, *x{n - 1}]" for n in range(1, 60)),
    "y0: &y0 {{a: 1}}\n" + "\n".join(f"y{n}: &y{n} {{{{<<: [*y{n - 1}, *y{n - 1}]}}}}" for n in range(1, 30)),
]  # fmt: skip


def yaml_files(tree: dict[str, Any]) -> st.SearchStrategy[bytes]:
    """A YAML file of these keys, with its values changed, its bytes, or lines of YAML's own put in."""
    text = json.dumps(tree)
    lines = "".join(f"{key}: {json.dumps(value)}\n" for key, value in tree.items())

    def spoiled(drawn: tuple[str, str]) -> bytes:
        line, key = drawn
        kept = "".join(f"{k}: {json.dumps(v)}\n" for k, v in tree.items() if k != key)
        return (kept + line.format(key=key) + "\n").encode()

    return st.one_of(
        changed(tree).map(lambda made: text_of(made).encode()),
        damaged(lines.encode()),
        damaged(text.encode()),
        st.tuples(st.sampled_from(_YAML), st.sampled_from(list(tree))).map(spoiled),
    )


def safetensors_files(content: bytes) -> st.SearchStrategy[bytes]:
    """A safetensors file with its header changed (names, dtypes, shapes, offsets, metadata) or its bytes."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]

    def whole(made: Any) -> bytes:
        text = text_of(made).encode()
        return struct.pack("<Q", len(text)) + text + data

    # Where JSON stands as text in the metadata, that JSON is changed too.
    inner = {key: json.loads(text) for key, text in header.get("__metadata__", {}).items() if text[:1] in ("{", "[")}

    def with_inner(made: Any) -> bytes:
        held = made if isinstance(made, dict) else {"x": made}
        texts = {key: value if isinstance(value, str) else text_of(value) for key, value in held.items()}
        return whole({**header, "__metadata__": {**header.get("__metadata__", {}), **texts}})

    kinds = [
        changed(header).map(whole),
        damaged(content),
        renamed(header).map(whole),
        filled(data).map(lambda d: content[: 8 + length] + d),
    ]
    return st.one_of(*kinds, *([changed(inner).map(with_inner)] if inner else []))


def renamed(header: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """The header with a tensor under another name that may be one of an adapter's, or may lead out of a folder."""
    names = [name for name in header if name != "__metadata__"]

    def put(drawn: tuple[str, str]) -> dict[str, Any]:
        name, new = drawn
        module, dot, leaf = name.partition(".")
        new = {"up": f"../../{name}", "module": f"../../x{dot}{leaf}", "leaf": f"{module}.alpha"}.get(new, new)
        return {new if key == name else key: value for key, value in header.items()}

    ways = [
        "up",
        "module",
        "leaf",
        "",
        ".",
        "..",
        "/x",
        "lora_unet_../../x.lora_up.weight",
        "unet...lora_A.weight",
        "a\x00b",
        "\ud800",
    ]
    return st.tuples(st.sampled_from(names), st.sampled_from(ways)).map(put)


def filled(data: bytes) -> st.SearchStrategy[bytes]:
    """The numbers of all tensors replaced by others: none that is finite, zeros, huge ones."""
    patterns = [
        b"\x00",
        b"\xff",
        struct.pack("<f", float("inf")),
        struct.pack("<f", 3e38),
        struct.pack("<f", 1e-40),
        b"\x00\x7e",
    ]
    return st.sampled_from(patterns).map(lambda pattern: (pattern * len(data))[: len(data)])
