"""Connections to Redis: `connect` makes a client, for one Redis or for a Redis that Sentinels watch.

With Sentinels, a connection asks them where the master is each time it connects. We do not use redis-py's own Sentinel
connections (8.1.0), for three reasons:

- They ask only when the pool hands them out.
- `read_response` of SentinelManagedConnection turns `disconnect_on_error` off. If a time-out or a signal cuts a read
  short, the answer stays in the connection, and the next command takes it for its own.
- `Sentinel.discover_master` loses a Sentinel when two connections reorder the list of Sentinels at the same time.
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
#: Seconds that one Sentinel may take. They are asked one after the other, and a request is answered within 3 s.
SENTINEL_TIMEOUT = 0.4
#: Most connections of one process.
MAX_CONNECTIONS = 100


def connect(settings: Settings, socket_timeout: float = SOCKET_TIMEOUT) -> Redis:
    """Make a client for the Redis of the settings. It connects at its first command.

    The client replaces a broken connection once, at once. It does not send a command again that timed out: the caller
    would wait twice as long for a server that is stalled.

    Args:
        settings: they say where Redis is.
        socket_timeout: seconds that one command may take.
    """
    options: dict[str, Any] = {
        # A burst of requests waits a little for a connection. redis-py's other pool refuses the 101st request.
        "max_connections": MAX_CONNECTIONS,
        "timeout": SOCKET_TIMEOUT,
        "socket_timeout": socket_timeout,
        "socket_connect_timeout": SOCKET_TIMEOUT,
        # No handshake before the first command: if Redis is stalled, each of its commands would wait.
        "protocol": 2,
        "driver_info": None,
        "maint_notifications_config": MaintNotificationsConfig(enabled=False),
        "retry": Retry(NoBackoff(), 1, supported_errors=(RedisConnectionError,)),
    }
    if settings.redis_sentinels:
        pool = partial(Pool, **options)
        return Redis(connection_pool=pool(**_find_by_sentinel(settings, pool)))
    return Redis(connection_pool=Pool.from_url(settings.redis_address, **options))


class Pool(BlockingConnectionPool):
    """A pool that does not check a connection before each command.

    redis-py's pool polls the connection each time, which costs a tenth of a request. The poll would find a connection
    that Redis has closed; the client's retry finds it, too. Over TLS 1.3 the poll also mistakes the tickets that a
    server sends after the handshake for the rest of an answer. It then refuses the connection, unless a handshake of
    Redis was read before.
    """

    def get_connection(self, command_name: Any = None, *_: Any, **__: Any) -> Any:
        """Take a connection, for this caller only. It connects at its first command.

        Raises:
            redis.exceptions.ConnectionError: all connections stayed in use until the pool's time-out.
        """
        self._checkpid()
        try:
            return self.pool.get(timeout=self.timeout) or self.make_connection()
        except Empty:
            raise RedisConnectionError("No connection is free.") from None


# Sentinel


def sentinel_addresses(settings: Settings) -> list[tuple[str, int]]:
    """Host and port of each Sentinel."""
    return [(host, int(port)) for host, _, port in (each.rpartition(":") for each in settings.redis_sentinels)]


def sentinel_options(settings: Settings) -> dict[str, Any]:
    """Options of connections to Sentinels. They use TLS if Redis does, as with Redis' own `tls-replication`."""
    timeouts = {"socket_timeout": SENTINEL_TIMEOUT, "socket_connect_timeout": SENTINEL_TIMEOUT}
    return {**timeouts, "password": settings.redis_sentinel_password, "ssl": settings.redis_ssl}


def _find_by_sentinel(settings: Settings, make_pool: Callable[..., ConnectionPool]) -> dict[str, Any]:
    """Options of a pool whose connections ask the Sentinels. `make_pool` makes the pool for each Sentinel."""
    options = sentinel_options(settings)
    kind = SSLConnection if options.pop("ssl") else Connection
    options |= {"connection_class": kind, "timeout": SENTINEL_TIMEOUT, "retry": Retry(NoBackoff(), 0)}
    return {
        "connection_class": _TlsMasterConnection if settings.redis_ssl else _MasterConnection,
        "sentinels": [
            Redis(connection_pool=make_pool(host=host, port=port, **options))
            for host, port in sentinel_addresses(settings)
        ],
        "service": settings.redis_sentinel_service,
        "db": settings.redis_db,
        "username": settings.redis_username,
        "password": settings.redis_password,
    }


class _MasterConnection(Connection):
    """A connection to the Redis that the Sentinels name as the master."""

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
                    # From now on all connections ask this Sentinel first.
                    self._sentinels[:] = [sentinel, *(each for each in self._sentinels if each is not sentinel)]
                    return state["ip"], state["port"]
                reason = "Redis is down" if state else "it does not know this service"
            where = sentinel.get_connection_kwargs()
            reasons.append(f"{where['host']}:{where['port']}: {reason}")
        # Not a ConnectionError: the client would retry, and ask all Sentinels once more.
        raise RedisTimeoutError(f"No Sentinel knows a master of {self._service!r}. {'; '.join(reasons)}")

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        """As redis-py does it, but leave a Redis that was the master and is a replica now.

        Raises:
            redis.exceptions.ConnectionError: it is a replica now.
        """
        try:
            return super().read_response(*args, **kwargs)
        except ReadOnlyError:
            self.disconnect()
            raise RedisConnectionError("Another Redis has become the master.") from None


class _TlsMasterConnection(_MasterConnection, SSLConnection):
    """The same over TLS."""
