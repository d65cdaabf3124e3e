"""One line an event: text for people, JSON for machines, with the job and the request that it is about."""

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
    """How a process ended, by the return code that `subprocess` gives."""
    if code >= 0:
        return f"exit code {code}"
    name = f" ({signal.Signals(-code).name})" if -code in set(signal.Signals) else ""  # not so for real-time signals
    return f"signal {-code}{name}"


#: What all lines of the present request have: its id.
request_members: ContextVar[Mapping[str, Any]] = ContextVar("request_members", default=MappingProxyType({}))
#: What all lines of this process have, from whichever thread: the job that it runs.
process_members: dict[str, Any] = {}

#: What would let a text in a line pass for another line, or paint the terminal; a traceback's ends of lines stay.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")


def _members(record: logging.LogRecord) -> dict[str, Any]:
    members = {**process_members, **request_members.get(), **getattr(record, "members", {})}
    if isinstance(record.args, tuple):
        for argument in record.args:
            if hasattr(argument, "log_members"):  # a run
                members |= argument.log_members()
    return {name: value for name, value in members.items() if value not in (None, "")}


def _trace(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    if record.exc_info:
        return formatter.formatException(record.exc_info)
    return getattr(record, "trace", "").rstrip()


class JsonLines(logging.Formatter):
    """A JSON object a line: time (RFC 3339), level, logger, message; what it is about; and `exception`, a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
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
    """Time, message, and what it is about where the message does not say so; a traceback's lines are indented."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, or the lines."""
        text = record.getMessage()
        about = [f"{name}={value}" for name, value in _members(record).items() if str(value) not in text]
        text = " ".join((text, *about))
        if trace := _trace(self, record):
            text = f"{text}\n{trace}"
        text = _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text).replace("\n", "\n    ")
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        return f"{clock} {level}{text}"


def configure_logs(*own_handlers: str) -> None:
    """Have all loggers of this process write in this way, to stderr.

    Args:
        own_handlers: names of loggers that others gave handlers of their own, which they lose.
    """
    settings = get_settings()
    level = settings.log_level.upper()
    handler = logging.StreamHandler()
    handler.setLevel(level)  # RQ's command sets levels of its own loggers
    handler.setFormatter(JsonLines() if settings.log_format == "json" else TextLines())
    logging.captureWarnings(True)
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in own_handlers:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True


def start_sentry(settings: Settings) -> None:
    """Tell Sentry of errors, if SENTRY_DSN is set; sentry_sdk reads its own environment variables."""
    if not settings.sentry_dsn:
        return
    try:
        import sentry_sdk
    except ImportError:
        logging.getLogger(__name__).warning("SENTRY_DSN is set, but the package sentry-sdk is not installed")
        return
    sentry_sdk.init()


def tell_sentry(error: BaseException) -> None:
    """Tell Sentry of an exception that is handled otherwise, if it is to be told."""
    if sentry_sdk := sys.modules.get("sentry_sdk"):
        sentry_sdk.capture_exception(error)
