"""A Redis client whose callers share round trips: it sends the commands of several requests as one pipeline."""

import threading
import time
from typing import Any

from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

#: The commands that share round trips: each request sends some of them, and their answers are short.
SHARED_COMMANDS = frozenset({"EVALSHA", "HMGET"})
#: A command with a longer argument, in bytes, or with more arguments has a round trip of its own. Other commands would
#: have to wait until it is sent.
LARGE_ARGUMENT = 16 * 1024
MANY_ARGUMENTS = 200


class _Call(threading.Event):
    """A command. Once the event is set, `answer` is Redis' answer, or the exception to raise."""

    def __init__(self, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        super().__init__()
        self.args = args
        self.options = options
        self.answer: Any = RedisConnectionError("The request that was to send this command was ended.")


class PipelinedRedis(Redis):
    """Redis for many requests in one gevent process.

    If no call is on its way, a new one is sent at once. Otherwise it waits for one round of gevent's loop, and is sent
    together with the calls of the other requests in this round, on a connection of its own. So a call waits only for
    calls of the same moment. To share a round trip saves most of the processor time of a call.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._calls: list[_Call] = []
        self._on_their_way = 0
        self._lock = threading.Lock()  # for servers with threads

    def execute_command(self, *args: Any, **options: Any) -> Any:
        """Run a command, as redis-py does, in a shared round trip if it may have one."""
        is_large = len(args) > MANY_ARGUMENTS or any(type(arg) is bytes and len(arg) > LARGE_ARGUMENT for arg in args)
        if is_large or args[0] not in SHARED_COMMANDS:
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
            if self._on_their_way:
                time.sleep(0)
        finally:  # a time-out may end this caller here, and the others must not wait for ever
            with self._lock:
                calls, self._calls = self._calls, []
                self._on_their_way += 1
            try:
                self._send(calls)
            finally:
                with self._lock:
                    self._on_their_way -= 1
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
