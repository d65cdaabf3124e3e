"""Connections that ask Redis Sentinel where Redis is, whenever they connect.

redis-py's own (8.1.0) do so only when its pool hands them out, and leave a connection whose read was cut short, by a
time-out or a signal, with an answer in it that the next command takes for its own (`read_response` of
SentinelManagedConnection turns `disconnect_on_error` off). Its `Sentinel.discover_master` forgets a Sentinel when two
connections reorder the list of them at the same time.
"""

import socket
from collections.abc import Callable
from functools import partial
from queue import Empty
from typing import Any

from redis import BlockingConnectionPool, ConnectionPool, Redis
from redis.backoff import NoBackoff
from redis.connection import Connection, SSLConnection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ReadOnlyError, RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.maint_notifications import MaintNotificationsConfig
from redis.retry import Retry

from app.config import Settings

#: Seconds that one command may take. With the one reconnection below, a request on a stalled Redis is answered in 3 s.
SOCKET_TIMEOUT = 1.25
#: Connections that one process opens at most.
MAX_CONNECTIONS = 100


class Pool(BlockingConnectionPool):
    """A pool that takes its connections for good until a command shows otherwise.

    redis-py polls each connection before each command: 50 µs of a request's 500. What it would find, a connection that
    Redis closed, the client's retry finds too. Over TLS 1.3 it takes the tickets that a server sends after a handshake
    for leftovers, and refuses the connection unless a greeting was read before.
    """

    def get_connection(self, command_name: Any = None, *_: Any, **__: Any) -> Any:
        """A connection of this caller's own; it connects at its first command.

        Raises:
            redis.exceptions.ConnectionError: all are in use, for longer than the pool's time-out.
        """
        self._checkpid()
        try:
            return self.pool.get(timeout=self.timeout) or self.make_connection()
        except Empty:
            raise RedisConnectionError("No connection is free.") from None


def connect(settings: Settings, socket_timeout: float = SOCKET_TIMEOUT) -> Redis:
    """Make a client; it connects at its first command.

    A connection that turns out to be broken is replaced once, at once. A command that timed out is not sent again:
    the caller would wait twice as long for a server that is stalled.
    """
    options: dict[str, Any] = {
        # A burst of requests waits for a connection a little; redis-py's other pool refuses the 101st.
        "max_connections": MAX_CONNECTIONS,
        "timeout": SOCKET_TIMEOUT,
        "socket_timeout": socket_timeout,
        "socket_connect_timeout": SOCKET_TIMEOUT,
        # No greetings before the first command: each would be waited for on a Redis that is stalled.
        "protocol": 2,
        "driver_info": None,
        "maint_notifications_config": MaintNotificationsConfig(enabled=False),
        "retry": Retry(NoBackoff(), 1, supported_errors=(RedisConnectionError,)),
    }
    if settings.redis_sentinels:
        pool = partial(Pool, **options)
        return Redis(connection_pool=pool(**following_connection(settings, pool)))
    return Redis(connection_pool=Pool.from_url(settings.redis_address, **options))


#: Seconds that a Sentinel may take. They are asked one after the other, and a request is answered within 3 s.
SENTINEL_TIMEOUT = 0.4


def sentinel_addresses(settings: Settings) -> list[tuple[str, int]]:
    """Host and port of each."""
    return [(host, int(port)) for host, _, port in (each.rpartition(":") for each in settings.redis_sentinels)]


def sentinel_options(settings: Settings) -> dict[str, Any]:
    """How they are spoken to: with TLS if Redis is, as Redis' `tls-replication` makes them."""
    timeouts = {"socket_timeout": SENTINEL_TIMEOUT, "socket_connect_timeout": SENTINEL_TIMEOUT}
    return {**timeouts, "password": settings.redis_sentinel_password, "ssl": settings.redis_ssl}


class _Follows(Connection):
    def __init__(self, *, sentinels: list[Redis], service: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._sentinels, self._service = sentinels, service

    def _connect(self) -> socket.socket:
        self.host, self.port = self._find_master()
        connected: socket.socket = super()._connect()
        return connected

    def _find_master(self) -> tuple[str, int]:
        reasons = []
        for sentinel in tuple(self._sentinels):
            try:
                masters: Any = sentinel.sentinel_masters()
            except RedisError as error:
                reason = f"{error}"
            else:
                state = masters.get(self._service)
                if state and state["is_master"] and not (state["is_sdown"] or state["is_odown"]):
                    # The first one to be asked from now on, by all connections.
                    self._sentinels[:] = [sentinel, *(each for each in self._sentinels if each is not sentinel)]
                    return state["ip"], state["port"]
                reason = "Redis is down" if state else "it knows no such service"
            where = sentinel.get_connection_kwargs()
            reasons.append(f"{where['host']}:{where['port']}: {reason}")
        # Not an error of connection: with that the client would ask all of them once more.
        raise RedisTimeoutError(f"No Sentinel tells where {self._service!r} is. {'; '.join(reasons)}")

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        """As redis-py's; what was the master and is a replica now is left."""
        try:
            return super().read_response(*args, **kwargs)
        except ReadOnlyError:
            self.disconnect()
            raise RedisConnectionError("Another Redis has taken over.") from None


class _FollowsWithTls(_Follows, SSLConnection):
    pass


def following_connection(settings: Settings, pool: Callable[..., ConnectionPool]) -> dict[str, Any]:
    """A pool's options for connections that follow; the pools of those to the Sentinels are made with `pool`."""
    options = sentinel_options(settings)
    kind = SSLConnection if options.pop("ssl") else Connection
    options |= {"connection_class": kind, "timeout": SENTINEL_TIMEOUT, "retry": Retry(NoBackoff(), 0)}
    return {
        "connection_class": _FollowsWithTls if settings.redis_ssl else _Follows,
        "sentinels": [
            Redis(connection_pool=pool(host=host, port=port, **options)) for host, port in sentinel_addresses(settings)
        ],
        "service": settings.redis_sentinel_service,
        "db": settings.redis_db,
        "username": settings.redis_username,
        "password": settings.redis_password,
    }
