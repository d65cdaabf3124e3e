"""The fault suite's option, its processes, and the table that it prints."""

import re
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.faults.ledger import Tally
from tests.faults.site import Clients, Site

COLUMNS = ("#", "fault", "acknowledged", "terminal", "lost", "run twice", "s to recover")


def _is_long(config: pytest.Config) -> bool:
    # Known only where this folder stands on the command line.
    return bool(config.getoption("--long", default=False))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="the fault suite as often as its table says, with a report")
    parser.addoption("--stock", action="store_true", help="with RQ's own workers, to see what they lose")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "fault(number, text, timeout): a row of the fault table, and the seconds that its long form may take"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if _is_long(config) and (fault := item.get_closest_marker("fault")):
            item.add_marker(pytest.mark.timeout(fault.kwargs["timeout"]))


def _print_row(cells: list[str]) -> str:
    number, fault, *counts = cells
    return f"{number:>4}  {fault:<90}" + "".join(f"{count:>13}" for count in counts)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not _is_long(config):
        return
    rows = [
        value
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", "") == "call"
        for name, value in report.user_properties
        if name == "fault"
    ]
    terminalreporter.section("faults")
    terminalreporter.write_line(_print_row(list(COLUMNS)))
    for cells in sorted(rows, key=lambda cells: (int(re.findall(r"\d+", cells[0])[0]), cells)):
        terminalreporter.write_line(_print_row(cells))


class Row:
    """A row of the table. It stands there with question marks if its test fails before the jobs are counted."""

    def __init__(self, cells: list[str]) -> None:
        self._cells = cells

    def note(self, text: str) -> None:
        """Write down what there is to say of a row that puts no jobs of clients at risk."""
        self._cells[1] += f": {text}"
        self._cells[2:] = ["–"] * 5

    def close(
        self, tally: Tally, seconds: float | None = None, note: str = "", may_run_again: dict[str, int] | None = None
    ) -> None:
        """Write down what was counted, then hold the suite's rule against it."""
        if note:
            self._cells[1] += f": {note}"
        counts = (len(tally.jobs), tally.terminal, len(tally.lost), len(tally.twice))
        self._cells[2:] = [*map(str, counts), "–" if seconds is None else f"{seconds:.1f}"]
        tally.check(may_run_again)


@pytest.fixture
def row(request: pytest.FixtureRequest) -> Row:
    """The table's row for this test; it travels in the report, from whichever process the test runs in."""
    number, text = request.node.get_closest_marker("fault").args
    cells = [number, text, *"?????"]
    request.node.user_properties.append(("fault", cells))
    return Row(cells)


@pytest.fixture(scope="session")
def long(request: pytest.FixtureRequest) -> bool:
    """Whether the faults are to be as many as the table says, or only a few."""
    return _is_long(request.config)


@pytest.fixture(scope="session")
def stock(request: pytest.FixtureRequest) -> bool:
    """Whether the workers are to be RQ's own."""
    return bool(request.config.getoption("--stock", default=False))


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory, stock: bool) -> Iterator[Site]:
    """One for all faults, since its start takes longer than most of them."""
    with ExitStack() as stack:
        yield Site(stack, tmp_path_factory.mktemp("site"), stock=stock)


@pytest.fixture
def clients(site: Site) -> Iterator[Clients]:
    """New clients with an empty ledger; the workers must survive what they do."""
    yield Clients(site)
    site.staff.check()
