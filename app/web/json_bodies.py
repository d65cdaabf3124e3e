"""Strict checks of JSON bodies, so that other programs can read what the service accepts.

Return values have checks of their own: app/worker/results.py.
"""

import re
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import chain
from typing import Any

from pydantic_core import from_json

from app.jobs import problems

#: Levels of arrays and objects that a payload may have.
MAX_DEPTH = 100

#: A number over 1.8e308, the largest double, has an exponent of three digits, or 200 digits in a row.
_HUGE_EXPONENT = re.compile(rb"[eE]\+?+0*+[1-9]\d\d")
_DIGITS_AS_ZEROS = bytes.maketrans(b"123456789", b"0" * 9)
_LARGEST_DOUBLE = 1.7976931348623157e308


@cache
def _many_values_pattern(count: int) -> re.Pattern[bytes]:
    """A pattern for the beginning of a JSON text with more than `count` values.

    It finds `count` commas and opening brackets outside of strings. All its quantifiers are possessive: it reads a text
    once and never goes back in it.
    """
    return re.compile(rb'(?:[^",\[{]*+(?:"[^"\\]*+(?:\\.[^"\\]*+)*+"?+[^",\[{]*+)*+[,\[{]){%d}+' % count, re.DOTALL)


def has_more_values(text: bytes, limit: int) -> bool:
    """Whether a JSON text has more values than the limit. An empty array or object counts as two.

    This looks at the text before it is parsed: a value takes far longer to make than a byte takes to read.
    """
    # The count includes the commas and brackets in strings. Most texts are below the limit all the same.
    return sum(map(text.count, (b",", b"[", b"{"))) >= limit and _many_values_pattern(limit).match(text) is not None


def check_json(body: bytes) -> None:
    """Check that a body is JSON by RFC 8259 and RFC 7493 (I-JSON). Only a repeated member name is allowed.

    Raises:
        InvalidJson: it is not JSON or not UTF-8, or it has NaN, Infinity, a number too big for a double, a lone
            surrogate, or more than 100 levels.
    """
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        place = re.search(r" at line (\d+) column (\d+)$", str(error))
        where = {"line": int(place[1]), "column": int(place[2])} if place else {}
        raise problems.InvalidJson(f"The body is not valid JSON: {error}.", **where) from None
    # Two cheap looks at the text show that most bodies are neither too deep nor have huge numbers.
    if body.count(b"[") + body.count(b"{") > MAX_DEPTH:
        _check_depth(value)
    # Two conditions: one expression for both would read a run of digits again from each of its digits.
    if _HUGE_EXPONENT.search(body) or b"0" * 200 in body.translate(_DIGITS_AS_ZEROS):
        _check_numbers(value)


def _children(parents: Iterable[Any]) -> Iterator[Any]:
    return chain.from_iterable(parent.values() if type(parent) is dict else parent for parent in parents)


def _check_depth(value: Any) -> None:
    depth, level = 0, [value]
    while level := [item for item in level if type(item) is list or type(item) is dict]:
        depth += 1
        if depth > MAX_DEPTH:
            raise problems.InvalidJson(f"The body is nested deeper than {MAX_DEPTH} levels.")
        level = list(_children(level))


def _check_numbers(value: Any) -> None:
    level = [value]
    while level:
        if any(isinstance(item, int | float) and abs(item) > _LARGEST_DOUBLE for item in level):
            raise problems.InvalidJson("The body has a number too big for a double.")
        level = list(_children(item for item in level if isinstance(item, list | dict)))
