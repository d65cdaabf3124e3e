"""Connections that ask Redis Sentinel where Redis is, whenever they connect.

redis-py's own (8.1.0) do so only when its pool hands them out, and leave a connection whose read was cut short, by a
time-out or a signal, with an answer in it that the next command takes for its own (`read_response` of
SentinelManagedConnection turns `disconnect_on_error` off). Its `Sentinel.discover_master` forgets a Sentinel when two
connections reorder the list of them at the same time.
"""

import socket
from collections.abc import Callable
from typing import Any

from redis import ConnectionPool, Redis
from redis.backoff import NoBackoff
from redis.connection import Connection, SSLConnection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ReadOnlyError, RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from app.config import Settings

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
