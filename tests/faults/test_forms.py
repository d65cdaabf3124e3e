"""The forms of the suite: how often each repeats a fault, and how the rows share a budget."""

import re
import subprocess
import time

import pytest

from tests.faults.conftest import Form, Rounds, seconds_of
from tests.processes import ROOT, python


def fault(**kwargs: float) -> pytest.Mark:
    return pytest.mark.fault("0", "a fault", **kwargs).mark


def test_budget_is_shared_by_the_rows_that_are_repeated(request: pytest.FixtureRequest) -> None:
    print(f"this process has the seed {request.config.getoption('--seed')}")
    marks = [fault(share=1), fault(takes=120), fault(share=3), fault()]
    assert seconds_of(marks, 100) == [25, 120, 75, 10]


@pytest.mark.parametrize(("form", "rounds"), [(Form.LONG, 7), (Form.SHORT, 2), (Form.BUDGET, 2)])
def test_rounds_are_as_many_as_the_form_says(form: Form, rounds: int) -> None:
    spent = Rounds(form, seconds=-1)
    assert (list(spent(7, 2)), spent.begun) == (list(range(rounds)), rounds)


def test_rounds_end_when_the_budget_is_spent_and_never_go_beyond_the_table() -> None:
    rich = Rounds(Form.BUDGET, seconds=1e9)
    assert (list(rich(7, 2)), rich.begun) == (list(range(7)), 7)
    poor = Rounds(Form.BUDGET, seconds=0.2)
    for _ in poor(1000):
        time.sleep(0.1)
    assert 0 < poor.begun < 1000


def test_processes_of_one_run_have_the_seed_that_is_printed() -> None:
    """pytest-xdist gives the processes the arguments of the command line, which have no seed here."""
    command = python("pytest", "tests/faults/test_forms.py", "-n", "2", "-k", "share", "-rP")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    (printed,) = set(re.findall(r"--seed (\w+)", done.stdout))
    assert re.findall(r"this process has the seed (\w+)", done.stdout) == [printed]
