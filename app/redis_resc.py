"""The Redis connection and the queues, for the app and for RQ's command `rq`. To import it does no I/O."""

from app.config import get_settings
from app.core.connections import connect, sentinel_addresses, sentinel_options
from app.core.queue import Queue

settings = get_settings()
redis_conn = connect(settings)
queues = {name: Queue(name, connection=redis_conn) for name in settings.queues}
#: The queue of jobs that name no other.
redis_queue = queues[settings.queues[0]]

# RQ's commands (`rq worker`, `rq info`, …) read these, because RQ_CONFIG=app.redis_resc: they use the Redis and the
# queues of the API.
REDIS_URL = None if settings.redis_sentinels else settings.redis_address
SENTINEL = {
    "INSTANCES": sentinel_addresses(settings),
    "MASTER_NAME": settings.redis_sentinel_service,
    "SENTINEL_KWARGS": sentinel_options(settings),
    "SSL": settings.redis_ssl,
    "DB": settings.redis_db,
    "USERNAME": settings.redis_username,
    "PASSWORD": settings.redis_password,
}
QUEUES = list(settings.all_queues)
