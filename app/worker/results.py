"""Return values as strict JSON, which any client can read back."""

import json
import math
from typing import Any


class ResultNotJSON(ValueError):
    """The return value has something that JSON has not."""


class ResultTooLarge(ValueError):
    """The return value has more bytes as JSON than MAX_RESULT_BYTES."""


def find_fault(value: Any, place: str = "$") -> str | None:
    """Where and why a value is not strict JSON, in words; None if it is."""
    if value is None or isinstance(value, int):
        return None
    if isinstance(value, float):
        return None if math.isfinite(value) else f"{place} is {value}"
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return f"{place} has a lone surrogate"
        return None
    if isinstance(value, list | tuple):
        faults = (find_fault(item, f"{place}[{index}]") for index, item in enumerate(value))
        return next(filter(None, faults), None)
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                return f"{place} has the key {key!r}, which is not a string"
            if fault := find_fault(key, f"a key of {place}") or find_fault(item, f"{place}.{key}"):
                return fault
        return None
    return f"{place} is a {type(value).__qualname__}"


def dump_result(value: Any, limit: int) -> bytes:
    """The return value as JSON text, in UTF-8.

    Raises:
        ResultNotJSON: it has NaN, a datetime, bytes, a set, a key that is not a string, …; the message says where.
        ResultTooLarge: it has more than `limit` bytes.
    """
    try:
        fault = find_fault(value)
        text = b"" if fault else json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    except RecursionError:
        fault = "it is nested too deeply, or contains itself"
    except ValueError as error:  # an integer of more digits than Python prints
        fault = str(error)
    if fault:
        raise ResultNotJSON(f"The return value is not JSON: {fault}.")
    if len(text) > limit:
        raise ResultTooLarge(f"The return value has {len(text)} bytes as JSON; {limit} are allowed.")
    return text
