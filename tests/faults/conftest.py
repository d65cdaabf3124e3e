"""The fault suite's option, its processes, and the table that it prints."""

import os
import random
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from enum import Enum
from typing import Any

import pytest

from tests.faults.ledger import Tally
from tests.faults.site import Clients, Site

COLUMNS = ("#", "fault", "acknowledged", "terminal", "lost", "run twice", "s to recover", "s in all")

#: The seconds that a row may take in the form with a budget.
SECONDS = pytest.StashKey[float]()


class Form(Enum):
    """How much of the suite runs: each fault once; all but what takes very long; or all, as often as the table says."""

    SHORT = "short"
    BUDGET = "budget"
    LONG = "long"


def form_of(config: pytest.Config) -> Form:
    """The form that the command line asks for."""
    if config.getoption("--long"):
        return Form.LONG
    return Form.SHORT if config.getoption("--budget") is None else Form.BUDGET


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--long", action="store_true", help="each fault as often as the table says; takes more than an hour"
    )
    parser.addoption(
        "--budget",
        type=float,
        metavar="SECONDS",
        help="the faults that are repeated share so many seconds; the others are as with --long",
    )
    parser.addoption("--seed", default=os.urandom(4).hex(), help="a text that the random moments are made of")
    parser.addoption("--stock", action="store_true", help="with RQ's own workers, to see what they lose")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "fault(number, text, timeout, share=0, takes=10, long_only=False): a row of the fault table. timeout: the "
        "seconds after which its long form hangs. share: its part of --budget, for a fault that is repeated. takes: "
        "the seconds of its long form, about, for one that is not. long_only: it runs with --long only",
    )


def pytest_report_header(config: pytest.Config) -> str:
    return f"faults: {form_of(config).value} form; the same moments again with --seed {config.getoption('--seed')}"


def seconds_of(marks: list[pytest.Mark], budget: float) -> list[float]:
    """The seconds that each of these rows may take, about, where the repeated ones share a budget."""
    shares = sum(mark.kwargs.get("share", 0) for mark in marks)
    return [
        budget * mark.kwargs["share"] / shares if mark.kwargs.get("share") else mark.kwargs.get("takes", 10)
        for mark in marks
    ]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    form = form_of(config)
    for item in items:
        if (fault := item.get_closest_marker("fault")) and form is not Form.SHORT:
            item.add_marker(pytest.mark.timeout(fault.kwargs["timeout"]))
    if form is not Form.BUDGET:
        return
    rows = {item: fault for item in items if (fault := item.get_closest_marker("fault"))}
    left_out = [item for item, fault in rows.items() if fault.kwargs.get("long_only")]
    config.hook.pytest_deselected(items=left_out)
    for item in left_out:
        del rows[item]
    for item, seconds in zip(rows, seconds_of(list(rows.values()), config.getoption("--budget")), strict=True):
        item.stash[SECONDS] = seconds
    items[:] = sorted((item for item in items if item not in left_out), key=seconds_planned, reverse=True)
    sites = min(int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")), len(items) // 2)
    # Those that take longest begin first, so that all sites end together. pytest-xdist hands each process two tests at
    # once: behind a long one it is a short one.
    pairs = zip(items[:sites], items[len(items) - sites :], strict=True)
    items[:] = [item for pair in pairs for item in pair] + items[sites : len(items) - sites]


def seconds_planned(item: pytest.Item) -> float:
    """The seconds that a row may take; 0 for a test that is none."""
    return item.stash.get(SECONDS, 0.0)


def _print_row(cells: list[str]) -> str:
    number, fault, *counts = cells
    return f"{number:>4}  {fault:<90}" + "".join(f"{count:>13}" for count in counts)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = [
        [*value, f"{report.duration:.0f}"]
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", "") == "call"
        for name, value in report.user_properties
        if name == "fault"
    ]
    terminalreporter.section(f"faults, {form_of(config).value} form, seed {config.getoption('--seed')}")
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
def form(request: pytest.FixtureRequest) -> Form:
    """How much of the suite runs."""
    return form_of(request.config)


@pytest.fixture(scope="session")
def long(form: Form) -> bool:
    """Whether a fault that is not repeated is to be as long, and as large, as the table says."""
    return form is not Form.SHORT


class Rounds:
    """How often a fault is repeated: as the form says, and with a budget until the row's share of it is spent."""

    def __init__(self, form: Form, seconds: float) -> None:
        self._form, self._seconds = form, seconds
        #: How many have begun.
        self.begun = 0

    def __call__(self, long: int, short: int = 1) -> Iterator[int]:
        """The number of each round: so many as the table says, so many in the short form and at the least."""
        end = time.monotonic() + self._seconds
        for number in range(long):
            is_enough = self._form is Form.SHORT or (self._form is Form.BUDGET and time.monotonic() > end)
            if number >= short and is_enough:
                return
            self.begun += 1
            yield number


@pytest.fixture
def rounds(request: pytest.FixtureRequest, form: Form) -> Rounds:
    """The rounds of a fault that is repeated."""
    return Rounds(form, seconds_planned(request.node))


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    """The random moments of a test are those of its name and the seed, in whichever process it runs."""
    random.seed(f"{request.config.getoption('--seed')} {request.node.nodeid}")


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
