"""How things are measured: in turns, so that whatever else the machine does hits all alike, and told as ratios."""

import statistics
from collections.abc import Callable, Mapping, Sequence

Figures = dict[str, list[float]]


def take_turns(contestants: Mapping[str, Callable[[], float]], rounds: int) -> Figures:
    """Call each contestant once a round, every other round in the opposite order.

    Args:
        contestants: by name, what runs once and returns its figure.
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
    """The median and, in brackets, the least and the most."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
