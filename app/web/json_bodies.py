"""JSON as others can read it back, in both directions: payloads that come in, return values that go out."""

import re
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import chain
from typing import Any

from pydantic_core import from_json

from app.jobs import problems

#: Levels of arrays and objects that a payload may have.
MAX_DEPTH = 100

#: What may hold a number over 1.8e308, the largest double: an exponent of three digits, or 200 digits in a row.
_HUGE_EXPONENT = re.compile(rb"[eE]\+?+0*+[1-9]\d\d")
_DIGITS_AS_ZEROS = bytes.maketrans(b"123456789", b"0" * 9)
_LARGEST_DOUBLE = 1.7976931348623157e308


@cache
def _so_many_values(count: int) -> re.Pattern[bytes]:
    """What a JSON text begins with that has more values than that: so many commas and opening brackets, out of strings.

    Possessive throughout, so that a text of 16 MiB takes half a second at most.
    """
    return re.compile(rb'(?:[^",\[{]*+(?:"[^"\\]*+(?:\\.[^"\\]*+)*+"?+[^",\[{]*+)*+[,\[{]){%d}+' % count, re.DOTALL)


def has_more_values(text: bytes, most: int) -> bool:
    """Whether a text has many tiny values, each of which takes a hundred times as long as a byte, before they are made.

    An empty array or object counts for two.
    """
    # Commas in strings are counted here, too: most texts need no closer look.
    return sum(map(text.count, (b",", b"[", b"{"))) >= most and _so_many_values(most).match(text) is not None


def check_json(body: bytes) -> None:
    """Refuse what is no JSON text as strict as RFC 8259 and RFC 7493 ask, but for names that are there twice.

    Raises:
        InvalidJson: not JSON, not UTF-8, NaN or Infinity, a number too big for a double, a lone surrogate, or more
            than 100 levels.
    """
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        place = re.search(r" at line (\d+) column (\d+)$", str(error))
        where = {"line": int(place[1]), "column": int(place[2])} if place else {}
        raise problems.InvalidJson(f"The body is not valid JSON: {error}.", **where) from None
    # Only few bodies can be too deep or have huge numbers; the others need no second look.
    if body.count(b"[") + body.count(b"{") > MAX_DEPTH:
        _check_depth(value)
    # Not by one expression, which would look at a run of digits again from each of them.
    if _HUGE_EXPONENT.search(body) or b"0" * 200 in body.translate(_DIGITS_AS_ZEROS):
        _check_numbers(value)


def _items(parents: Iterable[Any]) -> Iterator[Any]:
    return chain.from_iterable(parent.values() if type(parent) is dict else parent for parent in parents)


def _check_depth(value: Any) -> None:
    depth, level = 0, [value]
    while level := [item for item in level if type(item) is list or type(item) is dict]:
        depth += 1
        if depth > MAX_DEPTH:
            raise problems.InvalidJson(f"The body is nested deeper than {MAX_DEPTH} levels.")
        level = list(_items(level))


def _check_numbers(value: Any) -> None:
    level = [value]
    while level:
        if any(isinstance(item, int | float) and abs(item) > _LARGEST_DOUBLE for item in level):
            raise problems.InvalidJson("The body has a number too big for a double.")
        level = list(_items(item for item in level if isinstance(item, list | dict)))
