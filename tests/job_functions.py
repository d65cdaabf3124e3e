"""Job functions that only tests run: FUNCTION_MODULES names this module beside app.functions."""

import datetime
import logging
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field
from rq import get_current_job

from app import job_function as runs
from app.job_function import GiveUp, TryAgain, job_function, report_progress


@job_function()
def echo(payload: Any) -> Any:
    """Return the payload."""
    return payload


@job_function()
def sleep_for(seconds: Annotated[float, Field(ge=0, le=60)]) -> float:
    """Sleep for this number of seconds, in small steps, and return the number."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(min(0.02, seconds))
    return seconds


@job_function()
def wait_for_file(path: str) -> None:
    """Wait until this file exists."""
    while not Path(path).exists():
        time.sleep(0.02)


@job_function()
def append_line(payload: dict[str, str]) -> None:
    """Append a line to a file, so that a test sees which jobs ran and how often."""
    with open(payload["path"], "a") as file:  # noqa: PTH123  # appends
        file.write(payload["line"] + "\n")
    time.sleep(float(payload.get("seconds", "0")))


@job_function()
def fail(message: str) -> None:
    """Raise ValueError."""
    raise ValueError(message)


@job_function(retries=2)
def fail_with_retries(message: str) -> None:
    """Raise ValueError. The service retries the job."""
    raise ValueError(message)


@job_function()
def die(payload: dict[str, Any]) -> None:
    """End the process in the way that `how` names."""
    how = payload["how"]
    if "path" in payload:
        append_line({"path": payload["path"], "line": how})
    match how:
        case "exit":
            os._exit(0)
        case "sys.exit":
            raise SystemExit(3)
        case "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "real-time":
            os.kill(os.getpid(), 40)


@job_function(max_crashes=0)
def die_once(payload: dict[str, Any]) -> None:
    """End the process, or wait to be killed. The job must not run twice."""
    die(payload)
    time.sleep(60)


@job_function(max_crashes=0)
def größe(payload: dict[str, Any]) -> None:
    """Its name has letters that JSON escapes."""
    die(payload)


@job_function()
def leave_child(payload: dict[str, Any]) -> None:
    """Start a process, write its id to a file, and wait."""
    child = subprocess.Popen(["sleep", "60"])
    append_line({"path": payload["path"], "line": str(child.pid), "seconds": "60"})


_leaked: list[bytes] = []


@job_function()
def eat_memory(payload: dict[str, Any]) -> None:
    """Use this amount of memory for a while, in this process or in a child process."""
    code = f"import time; eaten = b'x' * {payload['bytes']}; time.sleep({30 if payload['bytes'] > 2**24 else 0})"
    if payload["where"] == "child":
        subprocess.run([sys.executable, "-c", code], check=True)
    else:
        exec(code, {})


@job_function()
def leak_memory(payload: dict[str, Any]) -> None:
    """Keep this amount of memory for ever, and write the process id to a file."""
    _leaked.append(b"x" * payload["bytes"])
    append_line({"path": payload["path"], "line": str(os.getpid())})


@job_function()
def swallow_timeout(seconds: float) -> str:
    """Catch every exception, also the timeout, and go on."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            time.sleep(0.05)
        except Exception:  # noqa: BLE001  # the test is about this bad habit
            continue
    return "done"


_UNJSONABLE: dict[str, Any] = {
    "nan": {"a": [1, math.nan]},
    "infinity": math.inf,
    "datetime": {"when": datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)},
    "bytes": b"x",
    "set": {"a": {1}},
    "int key": {"a": {1: 2}},
    "surrogate": ["\ud800"],
    "surrogate key": {"\ud800": 1},
    "object": object(),
    "huge integer": 10**5000,
}


@job_function()
def return_unjsonable(kind: str) -> Any:
    """Return a value that JSON cannot express."""
    if kind == "cycle":
        cycle: list[Any] = []
        cycle.append(cycle)
        return cycle
    return _UNJSONABLE[kind]


@job_function()
def return_bytes_of(size: int) -> str:
    """Return a string of this length."""
    return "x" * size


@job_function()
def report(payload: dict[str, Any]) -> str:
    """Report the progress in the payload, then wait for a while or for a file."""
    report_progress(payload["done"], payload["total"], payload.get("message", ""))
    time.sleep(payload.get("seconds", 0))
    if "until" in payload:
        wait_for_file(payload["until"])
    return "reported"


@job_function()
def report_too_late(payload: Any) -> None:
    """Leave a thread behind that waits for the end of this job and reports in the next one."""
    send = runs._send_progress
    assert send

    def report() -> None:
        while runs._send_progress in (send, None):
            time.sleep(0.001)
        send(runs.Progress(done=1, total=2, message="late"))

    threading.Thread(target=report, daemon=True).start()


@job_function(retries=3)
def foresee(payload: dict[str, Any]) -> None:
    """Fail as the payload says: for good, or with a pause before the retry."""
    if payload["how"] == "give up":
        raise GiveUp("no such user")
    raise TryAgain("busy", after=payload.get("after"))


@job_function()
def close_stdout(payload: Any) -> None:
    """Close stdout, as a careless library does."""
    sys.stdout.close()


@job_function()
def report_slowly(seconds: Annotated[float, Field(ge=0, le=600)]) -> None:
    """Report twenty times a second how much of the time is over."""
    steps = round(seconds * 20)
    for step in range(1, steps + 1):
        time.sleep(0.05)
        report_progress(step, steps, f"step {step}")


class Place(BaseModel):
    """The place of an order."""

    city: str
    height: float | None = None


class Order(BaseModel):
    """A payload with each kind of value that a form has a field for."""

    paper: Literal["A4", "A5"]
    copies: Annotated[int, Field(ge=1, le=99)] = 1
    color: bool = False
    stapled: bool | None = None
    day: Annotated[datetime.date | None, Field(description="not before then")] = None
    place: Place
    tags: list[str] = []
    more: dict[str, Any] | None = None


@job_function()
def order(payload: Order) -> dict[str, Any]:
    """Return the order with all its parts."""
    found: dict[str, Any] = payload.model_dump(mode="json")
    return found


@cache
def _load_model() -> int:
    time.sleep(0.1)
    return os.getpid()


@job_function()
def use_model(payload: Any) -> dict[str, Any]:
    """Use a model that is loaded once, and return which process loaded it."""
    return {"loaded_in": _load_model(), "pid": os.getpid(), "loads": _load_model.cache_info().misses}


@job_function(fresh_process=True)
def use_fresh_process(payload: Any) -> int:
    """Return the process id."""
    return os.getpid()


@job_function()
async def sleep_async(payload: Any) -> Any:
    """Return the payload, from a coroutine."""
    return payload


@job_function()
def current_job(payload: Any) -> dict[str, Any]:
    """Return attributes of rq.get_current_job()."""
    job = get_current_job()
    assert job
    return {"id": job.id, "origin": job.origin, "timeout": job.timeout, "args": list(job.args), "func": job.func_name}


@job_function()
def current_job_reads_redis(payload: Any) -> bool:
    """Read the current job from Redis, over the connection that is opened for it."""
    job = get_current_job()
    assert job
    return job.is_started


class StrictPayload(BaseModel, strict=True):
    """A strict model. Its date is a string in the payload, because JSON has no dates."""

    day: datetime.date
    tags: frozenset[str] = frozenset()


@job_function()
def use_types(payload: StrictPayload) -> dict[str, Any]:
    """Show that the function gets the type in its hint."""
    return {"type": type(payload.day).__name__, "year": payload.day.year, "tags": sorted(payload.tags)}


@job_function()
def write_pid(payload: dict[str, Any]) -> None:
    """Write the process id to a file, and wait a while."""
    append_line({"path": payload["path"], "line": str(os.getpid()), "seconds": str(payload.get("seconds", 0))})


@job_function()
def hold_the_interpreter(payload: dict[str, str]) -> None:
    """Write the process id to a file, then run C code that holds the GIL for hours, so that no thread runs."""
    append_line({"path": payload["path"], "line": str(os.getpid())})
    re.match("(a+)+$", "a" * 60 + "b")


@job_function()
def die_beside_a_child(payload: Any) -> None:
    """Fork a child that keeps all open files for a minute, and end the parent at once."""
    if os.fork() == 0:
        time.sleep(60)
        os._exit(0)
    os._exit(7)


@job_function()
def fork(how: str) -> list[int]:
    """Fork a child that also returns from here, before its parent does.

    Return the id of the first process, the id of this one, and the child's exit code.
    """
    pid = os.getpid()
    child = os.fork()
    if child == 0 and how == "raise":
        raise ValueError(how)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) if child else -1
    return [pid, os.getpid(), code]


@job_function()
def fail_once(payload: dict[str, str]) -> str:
    """Raise in the first run, which creates a file. Later runs find the file and return."""
    path = Path(payload["path"])
    if path.exists():
        return "second"
    path.write_text("first")
    raise ValueError("first")


@job_function()
def log_something(text: str) -> None:
    """Write to the log, also from another thread, and print."""
    logging.getLogger("mine").warning("from the function: %s", text)
    thread = threading.Thread(target=logging.getLogger("mine.too").info, args=("from its thread",))
    thread.start()
    thread.join()
    print("printed")


@job_function()
def write_pid_and_wait(payload: dict[str, str]) -> None:
    """Write the process id to a file, and wait until another file exists."""
    append_line({"path": payload["path"], "line": str(os.getpid())})
    wait_for_file(payload["until"])
