"""The fault suite's option, its processes, and the table that it prints."""

import os
import random
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from enum import IntEnum
from typing import Any

import pytest

from tests.faults.ledger import Tally
from tests.faults.site import Clients, Site

COLUMNS = ("#", "fault", "acknowledged", "terminal", "lost", "run twice", "s to recover", "s in all")

#: The seconds that a row may take in the form with a budget.
SECONDS = pytest.StashKey[float]()


class Form(IntEnum):
    """How much of the suite runs. A row names the smallest form in which it runs."""

    #: Each fault once, except those that take a minute.
    SHORT = 1
    #: All rows except the two that take longest. The repeated ones share a budget of seconds.
    BUDGET = 2
    #: All rows, as often as the table says.
    LONG = 3


def form_of(config: pytest.Config) -> Form:
    """The form that the command line asks for."""
    if config.getoption("--long"):
        return Form.LONG
    return Form.SHORT if config.getoption("--budget") is None else Form.BUDGET


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="each fault as often as the table says")
    parser.addoption(
        "--budget",
        type=float,
        metavar="SECONDS",
        help="divide this number of seconds among the faults that are repeated; run the others at full length",
    )
    parser.addoption("--seed", help="a text from which the random delays are made")
    parser.addoption("--stock", action="store_true", help="with RQ's own workers, to see what they lose")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "fault(number, text, timeout, share=0, takes=10, form=Form.SHORT): a row of the fault table. timeout: the "
        "seconds after which its long form hangs. share: its part of --budget, for a fault that is repeated. takes: "
        "the seconds of its long form, about, for one that is not. form: the shortest form that has it",
    )
    if config.option.seed is None:
        config.option.seed = getattr(config, "workerinput", {}).get("seed") or os.urandom(4).hex()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Give the processes of pytest-xdist the seed that is printed."""
    node.workerinput["seed"] = node.config.option.seed


def pytest_report_header(config: pytest.Config) -> str:
    return f"faults: {name_of(config)}"


def name_of(config: pytest.Config) -> str:
    """The name of this run of the suite."""
    form, seed = form_of(config).name.lower(), config.getoption("--seed")
    return f"{form} form; --seed {seed} gives the same delays again (but threads and processes have their own order)"


def seconds_of(marks: list[pytest.Mark], budget: float) -> list[float]:
    """About how many seconds each of these rows may take. The repeated ones share the budget."""
    shares = sum(mark.kwargs.get("share", 0) for mark in marks)
    return [
        budget * mark.kwargs["share"] / shares if mark.kwargs.get("share") else mark.kwargs.get("takes", 10)
        for mark in marks
    ]


@pytest.hookimpl(trylast=True)  # after `-k` and the like
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    form = form_of(config)
    rows = {item: fault for item in items if (fault := item.get_closest_marker("fault"))}
    left_out = [item for item, fault in rows.items() if fault.kwargs.get("form", Form.SHORT) > form]
    config.hook.pytest_deselected(items=left_out)
    for item in left_out:
        items.remove(item)
        del rows[item]
    if form is Form.SHORT:
        return
    for item, fault in rows.items():
        item.add_marker(pytest.mark.timeout(fault.kwargs["timeout"]))
    if form is Form.LONG:
        return
    for item, seconds in zip(rows, seconds_of(list(rows.values()), config.getoption("--budget")), strict=True):
        item.stash[SECONDS] = seconds
    items.sort(key=seconds_planned, reverse=True)
    sites = min(int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")), len(items) // 2)
    # Start the longest rows first, so that all sites end together. pytest-xdist gives each process two tests at the
    # start: pair a long one with a short one.
    pairs = zip(items[:sites], items[len(items) - sites :], strict=True)
    items[:] = [item for pair in pairs for item in pair] + items[sites : len(items) - sites]


def seconds_planned(item: pytest.Item) -> float:
    """The seconds that a row may take; 0 for a test that is no row."""
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
    terminalreporter.section("faults")
    terminalreporter.write_line(name_of(config))
    terminalreporter.write_line(_print_row(list(COLUMNS)))
    for cells in sorted(rows, key=lambda cells: (int(re.findall(r"\d+", cells[0])[0]), cells)):
        terminalreporter.write_line(_print_row(cells))


class Row:
    """A row of the table. It shows question marks if its test fails before the jobs are counted."""

    def __init__(self, cells: list[str]) -> None:
        self._cells = cells

    def note(self, text: str) -> None:
        """Write a note. A row that puts no jobs of clients at risk has only this."""
        self._cells[1] += f": {text}"
        self._cells[2:] = ["–"] * 5

    def close(
        self, tally: Tally, seconds: float | None = None, note: str = "", may_run_again: dict[str, int] | None = None
    ) -> None:
        """Write down the counts, then check the suite's rule."""
        if note:
            self._cells[1] += f": {note}"
        counts = (len(tally.jobs), tally.terminal, len(tally.lost), len(tally.twice))
        self._cells[2:] = [*map(str, counts), "–" if seconds is None else f"{seconds:.1f}"]
        tally.check(may_run_again)


@pytest.fixture
def row(request: pytest.FixtureRequest) -> Row:
    """The table's row for this test. The report carries it, because the test may run in another process."""
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
    """Whether a fault that is not repeated has the full length and size of the table."""
    return form is not Form.SHORT


class Rounds:
    """How often a fault is repeated: the form decides; with a budget, until the row's share of it is spent."""

    def __init__(self, form: Form, seconds: float) -> None:
        self._form, self._seconds = form, seconds
        #: How many rounds have begun.
        self.begun = 0

    def __call__(self, long: int, short: int = 1) -> Iterator[int]:
        """Yield the number of each round: `long` rounds in the long form, at least `short` in the others."""
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
    """Make a test's random delays depend only on its name and the seed, and not on its process."""
    random.seed(f"{request.config.getoption('--seed')} {request.node.nodeid}")


@pytest.fixture(scope="session")
def stock(request: pytest.FixtureRequest) -> bool:
    """Whether to use RQ's own workers."""
    return bool(request.config.getoption("--stock", default=False))


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory, stock: bool) -> Iterator[Site]:
    """One site for all faults, because its start takes longer than most of them."""
    with ExitStack() as stack:
        yield Site(stack, tmp_path_factory.mktemp("site"), stock=stock)


@pytest.fixture
def clients(site: Site) -> Iterator[Clients]:
    """New clients with an empty ledger; the workers must survive what they do."""
    yield Clients(site)
    site.staff.check()
