"""Make plain callables job functions, and report the progress of a job. app/functions.py imports this."""

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
    """The options that a job function may set. A request overrides them, within the limits of the settings."""

    queue: str
    at_front: bool
    timeout: int
    result_ttl: int
    failure_ttl: int
    ttl: int
    retries: int
    delay: float


class Progress(TypedDict):
    """The progress of a job, as its status shows it."""

    done: float
    total: float
    message: str


class ForeseenFailure(Exception):
    """A failure that the job function expects. The log has a line without a traceback, and Sentry gets no report."""


class TryAgain(ForeseenFailure):
    """A job function raises this if it failed, and another try may succeed.

    If the job has `retries` left, it runs again after at least `after` seconds; with None after its usual pause.
    """

    def __init__(self, message: str, after: float | None = None) -> None:
        super().__init__(message)
        self.after = after


class GiveUp(ForeseenFailure):
    """A job function raises this if it failed for good: the job is not run again, even if it has retries left."""


@dataclass(frozen=True)
class JobFunction:
    """A callable that jobs may run, and what the API knows about it."""

    name: str
    call: Callable[..., Any]
    #: Validates the payload; None if any JSON is allowed (no type hint, `dict` or `Any`).
    payload: TypeAdapter[Any] | None
    defaults: Defaults
    signature: inspect.Signature
    #: How often a job is run again after its process died; None: MAX_CRASHES.
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
        """The JSON Schema of the payload. An empty schema allows any JSON."""
        return self.payload.json_schema() if self.payload else {}

    def validate_json(self, text: bytes | str) -> Any:
        """Validate a payload that is JSON text, and return the function's argument; None if any JSON is allowed.

        It reads JSON text, because a strict pydantic model then accepts a string as a date or a UUID.

        Raises:
            pydantic.ValidationError: the payload does not fit the type hint.
        """
        return self.payload.validate_json(text) if self.payload else None

    def validate(self, payload: object) -> Any:
        """Validate a payload that is JSON data, and return the function's argument.

        Raises:
            pydantic.ValidationError: the payload does not fit the type hint.
        """
        return self.validate_json(json.dumps(payload)) if self.payload else payload

    def run(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Call the function as RQ would, with the payload validated. An async function runs to its end.

        Raises:
            pydantic.ValidationError: the payload does not fit the type hint.
            TypeError: the job has no single argument that is the payload.
        """
        payloads = args if len(args) == 1 and not kwargs else self.signature.bind(*args, **kwargs).args
        value = self.call(*map(self.validate, payloads))
        return asyncio.run(value) if inspect.iscoroutine(value) else value


#: The job functions by name. `@job_function` fills it when the modules of FUNCTION_MODULES are imported.
FUNCTIONS: dict[str, JobFunction] = {}


def job_function(
    *, max_crashes: int | None = None, fresh_process: bool = False, **defaults: Unpack[Defaults]
) -> Callable[[AnyCallable], AnyCallable]:
    """Let jobs run the decorated callable. The decorator does not change the callable.

    The callable takes one argument, the payload. The type hint of this argument may be any type that pydantic can
    validate: a payload that does not fit is refused at enqueue, and the function receives the validated value. Without
    a hint, or with `dict`, any JSON is allowed. The callable returns JSON data. If it fails, it raises.

    Args:
        max_crashes: how often a job is run again after its process died, instead of MAX_CRASHES. Use 0 for work that
            must not be done twice.
        fresh_process: run each job in a process of its own, because the code leaves something behind.
            WORKER_FRESH_PROCESS does this for all job functions.
        defaults: defaults for options of `/enqueue`, with the same names and meanings. A request overrides them within
            the limits of the settings. The defaults themselves may exceed these limits.

    Raises:
        TypeError: the callable does not take exactly one argument, or there is no such option.
        ValueError: another job function has the same name, or `max_crashes` is not an integer of 0 or more.
    """
    if max_crashes is not None and (type(max_crashes) is not int or max_crashes < 0):
        raise ValueError(f"max_crashes must be an integer of 0 or more, not {max_crashes!r}.")
    if unknown := defaults.keys() - Defaults.__annotations__.keys():
        raise TypeError(f"There is no option {', '.join(sorted(unknown))} that a job function could set.")

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
    """Import the modules that hold job functions, and return `FUNCTIONS`.

    Raises:
        SystemExit: there is no such module.
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise  # the module exists, but it imports something that does not
            raise SystemExit(f"Bad setting FUNCTION_MODULES: there is no module {module!r}.") from None
    return FUNCTIONS


_send_progress: Callable[[Progress], None] | None = None


def report_progress(done: float, total: float, message: str = "") -> None:
    """Report how far the running job is. Its status shows the progress. Outside of a job, this does nothing.

    You may call it in a loop of a few hundred steps: of several reports in quick succession only the last is kept.

    Args:
        done: how much is done, in the unit of `total`.
        total: how much there is to do in all.
        message: a few words for people.
    """
    if _send_progress:
        _send_progress(Progress(done=done, total=total, message=message))


@contextmanager
def send_progress_to(send: Callable[[Progress], None]) -> Iterator[None]:
    """Pass the reports of the job that runs in the `with` block to `send`, from any of its threads."""
    global _send_progress
    _send_progress = send
    try:
        yield
    finally:
        _send_progress = None
