"""What makes a plain callable a job function: its name, the type of its payload, its defaults; and its progress."""

import asyncio
import importlib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypedDict, TypeVar, Unpack, get_type_hints

from pydantic import TypeAdapter

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)

AnyCallable = TypeVar("AnyCallable", bound=Callable[..., Any])


class Defaults(TypedDict, total=False):
    """The options that a job function may declare; a request overrides them within the configured limits."""

    queue: str
    at_front: bool
    timeout: int
    result_ttl: int
    failure_ttl: int
    ttl: int
    retries: int
    delay: float


class Progress(TypedDict):
    """How far a job is, as its status shows it."""

    done: float
    total: float
    message: str


class ForeseenFailure(Exception):
    """A failure that the job function foresaw: a line in the log, without a traceback, and Sentry is not told."""


class TryAgain(ForeseenFailure):
    """Raised by a job function that failed, and knows when it is worth another try.

    The job is run again if it has `retries` left, not before so many seconds; with None after its own pause.
    """

    def __init__(self, message: str, after: float | None = None) -> None:
        super().__init__(message)
        self.after = after


class GiveUp(ForeseenFailure):
    """Raised by a job function that failed for good: the job is not run again, whatever retries it has."""


@dataclass(frozen=True)
class JobFunction:
    """A callable that jobs may run, with what the API needs to know of it."""

    name: str
    call: Callable[..., Any]
    #: None where any JSON is welcome (no type hint, `dict` or `Any`).
    payload: TypeAdapter[Any] | None
    defaults: Defaults
    signature: inspect.Signature
    #: How often a job is run again after its process died; None for MAX_CRASHES.
    max_crashes: int | None = None
    #: Whether each job gets a process in which no other job runs.
    fresh_process: bool = False

    @property
    def path(self) -> str:
        """The name under which RQ stores the function in a job."""
        return f"{self.call.__module__}.{self.call.__qualname__}"

    @property
    def description(self) -> str:
        """The function's docstring."""
        return inspect.getdoc(self.call) or ""

    @property
    def payload_schema(self) -> dict[str, Any]:
        """The JSON Schema of the payload; an empty one allows any JSON."""
        return self.payload.json_schema() if self.payload else {}

    def validate_json(self, text: bytes | str) -> Any:
        """Turn a payload as JSON text into what the function receives; None where any JSON is welcome.

        Not as Python objects, so that a strict model takes a date or a UUID from a string.

        Raises:
            pydantic.ValidationError: the payload does not fit the type hint.
        """
        return self.payload.validate_json(text) if self.payload else None

    def validate(self, payload: object) -> Any:
        """Turn a payload as JSON data into what the function receives.

        Raises:
            pydantic.ValidationError: the payload does not fit the type hint.
        """
        return self.validate_json(json.dumps(payload)) if self.payload else payload

    def run(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Call the function as RQ would, with the payload validated; an async function is run to its end.

        Raises:
            pydantic.ValidationError: the payload does not fit the type hint.
            TypeError: the job has other arguments than the one payload.
        """
        payloads = args if len(args) == 1 and not kwargs else self.signature.bind(*args, **kwargs).args
        value = self.call(*map(self.validate, payloads))
        return asyncio.run(value) if inspect.iscoroutine(value) else value


#: The job functions by name. Filled by `@job_function` as the modules of FUNCTION_MODULES are imported.
FUNCTIONS: dict[str, JobFunction] = {}


def job_function(
    *, max_crashes: int | None = None, fresh_process: bool = False, **defaults: Unpack[Defaults]
) -> Callable[[AnyCallable], AnyCallable]:
    """Let jobs run the decorated callable, which stays the plain callable it is.

    The callable takes one argument, the payload. Its type hint, any type that pydantic can validate, says what
    payloads are accepted at enqueue and what the function receives; `dict` or no hint mean any JSON. It returns JSON
    data, and raises on failure.

    Args:
        max_crashes: how often a job is run again after the process that ran it died, instead of MAX_CRASHES; 0 for
            work that must not be done twice.
        fresh_process: run each job in a process in which no other one runs, as with WORKER_FRESH_PROCESS for all: for
            code that leaves something behind.
        defaults: for the options of `/enqueue`, of the same names and meanings; a request overrides them, within
            the configured limits, which are not for the defaults themselves.

    Raises:
        TypeError: the callable does not take exactly one argument, or there is no option of such a name.
        ValueError: another job function has the same name, or `max_crashes` is no integer from 0 on.
    """
    if max_crashes is not None and (type(max_crashes) is not int or max_crashes < 0):
        raise ValueError(f"max_crashes is an integer from 0 on, not {max_crashes!r}.")
    if unknown := defaults.keys() - Defaults.__annotations__.keys():
        raise TypeError(f"A job function has no default for {', '.join(sorted(unknown))}.")

    def register(call: AnyCallable) -> AnyCallable:
        name = call.__name__
        signature = inspect.signature(call)
        parameters = list(signature.parameters)
        if len(parameters) != 1 or signature.parameters[parameters[0]].kind not in _POSITIONAL:
            raise TypeError(f"The job function {name} must take one argument, the payload; it takes {len(parameters)}.")
        hint = get_type_hints(call, include_extras=True).get(parameters[0], Any)
        payload = None if hint in (Any, object, dict) else TypeAdapter(hint)
        function = JobFunction(name, call, payload, defaults, signature, max_crashes, fresh_process)
        if name in FUNCTIONS and FUNCTIONS[name].path != function.path:
            raise ValueError(f"Two job functions are named {name}: {FUNCTIONS[name].path} and {function.path}.")
        FUNCTIONS[name] = function
        return call

    return register


def load_functions(modules: Iterable[str]) -> dict[str, JobFunction]:
    """Import the modules that hold job functions; the result is `FUNCTIONS`.

    Raises:
        SystemExit: there is no such module.
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise  # something that the module itself imports
            raise SystemExit(f"Bad setting FUNCTION_MODULES: there is no module {module!r}.") from None
    return FUNCTIONS


_send_progress: Callable[[Progress], None] | None = None


def report_progress(done: float, total: float, message: str = "") -> None:
    """Say how far the running job is; whoever looks at its status sees it. Outside of a job it does nothing.

    Cheap enough for a loop of a few hundred steps: only the latest of several reports in quick succession is kept.

    Args:
        done: how much is done, in the unit of `total`.
        total: how much there is to do.
        message: a few words for people.
    """
    if _send_progress:
        _send_progress(Progress(done=done, total=total, message=message))


@contextmanager
def progress_goes_to(send: Callable[[Progress], None]) -> Iterator[None]:
    """Hand the reports of the job that runs inside to `send`, from whichever thread they come."""
    global _send_progress
    _send_progress = send
    try:
        yield
    finally:
        _send_progress = None
