"""Connections that ask Redis Sentinel where Redis is, whenever they connect.

redis-py's own (8.1.0) do so only when its pool hands them out, and leave a connection whose read was cut short, by a
time-out or a signal, with an answer in it that the next command takes for its own (`read_response` of
SentinelManagedConnection turns `disconnect_on_error` off).
"""

import socket
from typing import Any

from redis.backoff import NoBackoff
from redis.connection import Connection, SSLConnection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ReadOnlyError
from redis.retry import Retry
from redis.sentinel import Sentinel

from app.config import Settings

#: Seconds that a Sentinel may take. They are asked one after the other, and a request is answered within 3 s.
SENTINEL_TIMEOUT = 0.4


def sentinel_addresses(settings: Settings) -> list[tuple[str, int]]:
    """Host and port of each."""
    return [(host, int(port)) for host, _, port in (each.rpartition(":") for each in settings.redis_sentinels)]


def sentinel_options(settings: Settings) -> dict[str, Any]:
    """How they are spoken to."""
    timeouts = {"socket_timeout": SENTINEL_TIMEOUT, "socket_connect_timeout": SENTINEL_TIMEOUT}
    return {**timeouts, "retry": Retry(NoBackoff(), 0), "password": settings.redis_sentinel_password}


class _Follows(Connection):
    def __init__(self, *, sentinel: Sentinel, service: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._sentinel, self._service = sentinel, service

    def _connect(self) -> socket.socket:
        self.host, self.port = self._sentinel.discover_master(self._service)
        connected: socket.socket = super()._connect()
        return connected

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        """As redis-py's; what was the master and is a replica now is left."""
        try:
            return super().read_response(*args, **kwargs)
        except ReadOnlyError:
            self.disconnect()
            raise RedisConnectionError("Another Redis has taken over.") from None


class _FollowsWithTls(_Follows, SSLConnection):
    pass


def following_connection(settings: Settings) -> dict[str, Any]:
    """A pool's options for connections that follow."""
    return {
        "connection_class": _FollowsWithTls if settings.redis_ssl else _Follows,
        "sentinel": Sentinel(sentinel_addresses(settings), sentinel_kwargs=sentinel_options(settings)),
        "service": settings.redis_sentinel_service,
        "db": settings.redis_db,
        "username": settings.redis_username,
        "password": settings.redis_password,
    }
