"""A Redis client whose callers share round trips: what several requests ask for at one moment goes as one pipeline."""

import threading
import time
from typing import Any

from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

#: Commands that may go together: what each request sends, with short answers.
SHARED = frozenset({"EVALSHA", "HMGET"})
#: Bytes of an argument, and arguments, from which on a command goes alone: the others do not wait until it is sent.
LARGE = 16 * 1024
MANY = 200


class _Call(threading.Event):
    """A command and, once the event is set, its answer, or the exception instead of one."""

    def __init__(self, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        super().__init__()
        self.args = args
        self.options = options
        self.answer: Any = RedisConnectionError("Whoever was to ask for it ended.")


class PipelinedRedis(Redis):
    """Redis for many requests in one gevent process.

    A call is sent at once if nothing is awaited. Otherwise it lets the others of this round of gevent's loop come, and
    is sent with them, on another connection: so nobody waits for answers but those of the same moment. A round trip
    alone costs a web process 110 µs of processor; shared by 16 clients, some 30.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._calls: list[_Call] = []
        self._awaited = 0
        self._lock = threading.Lock()  # for servers with threads

    def execute_command(self, *args: Any, **options: Any) -> Any:
        """As redis-py's."""
        if args[0] not in SHARED or len(args) > MANY or any(type(arg) is bytes and len(arg) > LARGE for arg in args):
            return super().execute_command(*args, **options)  # type: ignore[no-untyped-call]  # it has no annotations
        call = _Call(args, options)
        with self._lock:
            self._calls.append(call)
            is_first = len(self._calls) == 1
        if is_first:
            self._send_all()
        else:
            call.wait()
        if isinstance(call.answer, BaseException):
            raise call.answer
        return call.answer

    def _send_all(self) -> None:
        try:
            if self._awaited:
                time.sleep(0)
        finally:  # whatever ends this caller, its time-out for example, the others are not to wait for ever
            with self._lock:
                calls, self._calls = self._calls, []
                self._awaited += 1
            try:
                self._send(calls)
            finally:
                with self._lock:
                    self._awaited -= 1
                for call in calls:
                    call.set()

    def _send(self, calls: list[_Call]) -> None:
        if len(calls) == 1:
            calls[0].answer = super().execute_command(*calls[0].args, **calls[0].options)  # type: ignore[no-untyped-call]  # nor here
            return
        try:
            with self.pipeline(transaction=False) as pipeline:
                for call in calls:
                    pipeline.execute_command(*call.args, **call.options)  # type: ignore[no-untyped-call]  # nor here
                answers = pipeline.execute(raise_on_error=False)
        except RedisError as error:
            answers = [error] * len(calls)
        for call, answer in zip(calls, answers, strict=True):
            call.answer = answer
