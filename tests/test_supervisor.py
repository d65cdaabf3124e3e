import io
import signal
import sys
import threading
from collections.abc import Iterator

import pytest

from app.start.supervisor import Supervisor
from tests.processes import wait_until

#: Prints 3000 lines when it gets SIGTERM.
TALKATIVE = """
import signal, sys, time
def end(*_):
    for number in range(3000):
        print("line", number)
    print("the last")
    sys.exit()
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
time.sleep(60)
"""
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"
)
QUICK = "print('→', flush=True); raise SystemExit(3)"


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Restore the signal handlers, which the supervisor replaces in its process."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait longer for the last lines: 3000 of them take long on a busy machine that measures coverage."""
    monkeypatch.setattr("app.start.supervisor.LAST_LINES_WITHIN", 20)


def run(
    supervisor: Supervisor, output: io.StringIO | io.TextIOWrapper, code: str, until: str, look: object = None
) -> str:
    """Let the supervisor run this program until the log has this text; returns the log."""
    supervisor.add("child", [sys.executable, "-c", code])

    def text() -> str:
        if isinstance(output, io.StringIO):
            return output.getvalue()
        output.flush()
        assert isinstance(output.buffer, io.BytesIO)
        return output.buffer.getvalue().decode("latin-1")

    def end() -> None:
        try:
            wait_until(lambda: until in text(), 20, until)
        finally:
            supervisor.end()

    ender = threading.Thread(target=end)
    ender.start()
    supervisor.run({}, look if callable(look) else lambda: None)
    ender.join()
    return text()


def test_supervisor_loses_no_line_that_is_printed_at_the_end() -> None:
    output = io.StringIO()
    log = run(Supervisor(output, kill_after=30), output, TALKATIVE, "ready")
    assert log.count("| line ") == 3000
    assert log.endswith("| the last\n")


def test_supervisor_restarts_a_process_and_logs_how_it_ended() -> None:
    output = io.StringIO()
    supervisor = Supervisor(output, kill_after=1)
    supervisor.restarts = True
    log = run(supervisor, output, QUICK, "started again in 2 s")
    assert "ended by itself: exit code 3; it is started again in 1 s" in log
    assert log.count("→") == 2


def test_supervisor_without_restarts_ends_all_when_one_process_ends() -> None:
    output = io.StringIO()
    supervisor = Supervisor(output, kill_after=1)
    supervisor.add("child", [sys.executable, "-c", QUICK])
    supervisor.run({}, lambda: None)
    assert supervisor.failure == "A process ended by itself (child: exit code 3); all others were stopped."


def test_supervisor_kills_a_stubborn_process_even_if_valkey_cannot_be_restarted() -> None:
    output = io.StringIO()
    supervisor = Supervisor(output, kill_after=0.5)

    def look() -> None:
        if supervisor._is_ending:
            raise SystemExit("Valkey cannot be started")

    log = run(supervisor, output, STUBBORN, "ready", look)
    assert "Valkey cannot be started" in log
    popen = supervisor._children[0].popen
    assert popen
    assert popen.returncode == -signal.SIGKILL


def test_supervisor_escapes_characters_that_the_terminal_cannot_show() -> None:
    output = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    assert "child | \\u2192" in run(Supervisor(output, kill_after=1), output, QUICK, "\\u2192")


def test_supervisor_keeps_ignoring_the_signal_that_nohup_ignores() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    output = io.StringIO()
    run(Supervisor(output, kill_after=1), output, TALKATIVE, "ready")
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
