"""The connection pool of the API and the worker."""

import pytest
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from app.config import Settings
from app.core.connections import Pool, connect


def test_pool_replaces_a_connection_that_redis_closed(real_redis: Redis, redis_url: str) -> None:
    client = connect(Settings(redis_url=redis_url))
    assert real_redis.client_kill_filter(_id=str(client.client_id())) == 1
    assert client.ping()
    with client.pipeline() as pipeline:
        pipeline.ping()
        assert pipeline.execute() == [True]


def test_pool_raises_after_a_long_wait_for_a_connection(redis_url: str) -> None:
    pool = Pool.from_url(redis_url, max_connections=1, timeout=0.05)
    client = Redis(connection_pool=pool)
    taken = pool.get_connection()
    with pytest.raises(RedisConnectionError, match="No connection is free"):
        client.ping()
    pool.release(taken)  # type: ignore[no-untyped-call]  # redis-py has no annotation there
    assert client.ping()
