"""Measure contestants in turns, so that other load of the machine affects all alike, and compare them by ratios."""

import math
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

Figures = dict[str, list[float]]

_CORES = sorted(os.sched_getaffinity(0))


def take_turns(contestants: Mapping[str, Callable[[], float]], rounds: int) -> Figures:
    """Call each contestant once a round, every other round in the opposite order.

    Args:
        contestants: by name, a function that runs once and returns its figure.
        rounds: how often.

    Returns:
        Each one's figures, in the order of the rounds.
    """
    figures: Figures = {name: [] for name in contestants}
    for number in range(rounds):
        for name in list(contestants)[:: -1 if number % 2 else 1]:
            figures[name].append(contestants[name]())
    return figures


def ratios(figures: Figures, one: str, other: str) -> list[float]:
    """One contestant's figure divided by the other's, round by round."""
    return [a / b for a, b in zip(figures[one], figures[other], strict=True)]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """The median and, in brackets, the minimum and the maximum."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def percentile(values: Sequence[float], percent: float) -> float:
    """The least value that `percent` percent of the values do not exceed."""
    return sorted(values)[math.ceil(len(values) * percent / 100) - 1]


@contextmanager
def on_core(number: int) -> Iterator[None]:
    """Run this process on this core until the block ends. Processes that it starts there stay on the core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {_CORES[number % len(_CORES)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
