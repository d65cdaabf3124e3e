"""Scripts on a Redis without free memory. It is a real Redis, because a fake one has no limit."""

from typing import Any

import pytest
from redis.exceptions import OutOfMemoryError

from app.core import transitions
from tests.test_transitions import finish, start


def test_renew_and_finish_need_no_free_memory(real_redis: Any) -> None:
    run = start(real_redis)
    real_redis.config_set("maxmemory", 1)
    try:
        with pytest.raises(OutOfMemoryError):
            real_redis.set("x", "y")
        assert transitions.renew(real_redis, run, 30) == "held"
        assert finish(real_redis, run) == "finished"
    finally:
        real_redis.config_set("maxmemory", 0)
