"""JSON and YAML of files that nobody vouches for: what cannot be read raises a ValueError, and nothing else.

Python's parsers leave it to their callers that values may be nested deeper than its stack, and that whole numbers may
have more digits than any size or count. YAML's aliases, by which a few lines stand for billions of values, are
refused.
PyYAML and pydantic come with `lowrank-core[config]`.
"""

# What a file holds may be of any type until somebody has looked at it, and PyYAML's classes have no types.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false, reportUnknownMemberType=false

import json
from typing import Any, TypeVar

_DEEPEST = 100
_BITS = 64
T = TypeVar("T")


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is not JSON, or nested too deep, or holds a whole number that needs more than 64 bits.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    _check(value)
    return value


def parse_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        ValueError: it is not YAML, it has aliases, or what `parse_json` refuses.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                event = self.peek_event()
                raise yaml.MarkedYAMLError(None, None, "aliases are not read, write the value out", event.start_mark)
            return super().compose_node(parent, index)

    try:
        value = yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    # PyYAML's own constructors stumble over values that do not fit their tags, such as a thirteenth month.
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"it has a value that does not fit its type ({error})") from None
    _check(value)
    return value


def record_of(shape: type[T], tree: Any) -> T:
    """The dataclass that parsed JSON describes; keys of another version are left out.

    Raises:
        ValueError: it is no object, a key is missing, or a value is of the wrong type.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(shape).validate_python(tree)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc'])) or 'the whole'}: {first['msg'].lower()}") from None


def _check(value: Any) -> None:
    """Raise a ValueError for what is nested too deep, or a number that is too large."""
    level = [value]
    for _ in range(_DEEPEST):
        for one in level:
            if isinstance(one, int) and one.bit_length() > _BITS:
                raise ValueError(f"it has a whole number of {one.bit_length()} bits, more than {_BITS}")
        containers = [one for one in level if isinstance(one, dict | list | tuple | set)]
        if not containers:
            return
        level = [inner for one in containers for inner in ([*one, *one.values()] if isinstance(one, dict) else one)]
    raise ValueError("it is nested too deep")
