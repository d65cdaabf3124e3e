"""The log: a line for each event, as text or as JSON, with the ids of its job and its request; and Sentry."""

import json
import logging
import re
import signal
import sys
import time
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

from app.config import Settings, get_settings


def describe_exit(code: int) -> str:
    """Say how a process ended, from its return code as `subprocess` gives it."""
    if code >= 0:
        return f"exit code {code}"
    name = f" ({signal.Signals(-code).name})" if -code in set(signal.Signals) else ""  # real-time signals have no name
    return f"signal {-code}{name}"


#: The members of all log lines of the present request: its id.
request_members: ContextVar[Mapping[str, Any]] = ContextVar("request_members", default=MappingProxyType({}))
#: The members of all log lines of this process, from any thread: the job that it runs.
process_members: dict[str, Any] = {}

#: Characters that could make a text look like another log line, or control the terminal. The line ends of a traceback
#: are allowed.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")


def _members(record: logging.LogRecord) -> dict[str, Any]:
    members = {**process_members, **request_members.get(), **getattr(record, "members", {})}
    if isinstance(record.args, tuple):
        for argument in record.args:
            if hasattr(argument, "log_members"):  # app.core.transitions.Run
                members |= argument.log_members()
    return {name: value for name, value in members.items() if value not in (None, "")}


def _trace(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    if record.exc_info:
        return formatter.formatException(record.exc_info)
    return getattr(record, "trace", "").rstrip()


class JsonLines(logging.Formatter):
    """JSON lines: time (RFC 3339), level, logger, message, the members of the line, and a traceback as `exception`."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record as one line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_members(record),
        }
        if trace := _trace(self, record):
            line["exception"] = trace
        return json.dumps(line, default=str)


class TextLines(logging.Formatter):
    """Text lines: time, message, and the members that the message does not name; a traceback is indented."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record as one line, and more lines for a traceback."""
        text = record.getMessage()
        others = [f"{name}={value}" for name, value in _members(record).items() if str(value) not in text]
        text = " ".join((text, *others))
        if trace := _trace(self, record):
            text = f"{text}\n{trace}"
        text = _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text).replace("\n", "\n    ")
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        return f"{clock} {level}{text}"


def configure_logs(*own_handlers: str) -> None:
    """Let all loggers of this process write these lines to stderr.

    Args:
        own_handlers: names of loggers that have handlers of their own; they lose these.
    """
    settings = get_settings()
    level = settings.log_level.upper()
    handler = logging.StreamHandler()
    handler.setLevel(level)  # RQ's command changes the levels of its loggers
    handler.setFormatter(JsonLines() if settings.log_format == "json" else TextLines())
    logging.captureWarnings(True)
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in own_handlers:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True


def start_sentry(settings: Settings) -> None:
    """Report errors to Sentry, if SENTRY_DSN is set. sentry_sdk reads its environment variables itself."""
    if not settings.sentry_dsn:
        return
    try:
        import sentry_sdk
    except ImportError:
        logging.getLogger(__name__).warning("SENTRY_DSN is set, but the package sentry-sdk is not installed")
        return
    sentry_sdk.init()


def report_to_sentry(error: BaseException) -> None:
    """Report an exception that our code handles, if Sentry is in use."""
    if sentry_sdk := sys.modules.get("sentry_sdk"):
        sentry_sdk.capture_exception(error)
