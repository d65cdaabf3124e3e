"""The Redis connection and the queues, as the rest of the app and `rq` itself use them. Importing it does no I/O."""

from app.config import get_settings
from app.core.connections import connect, sentinel_addresses, sentinel_options
from app.core.queue import Queue

settings = get_settings()
redis_conn = connect(settings)
queues = {name: Queue(name, connection=redis_conn) for name in settings.queues}
#: Where jobs go unless told otherwise.
redis_queue = queues[settings.queues[0]]

# `rq worker`, `rq info` and the rest read these (RQ_CONFIG=app.redis_resc): the same Redis and queues as the API.
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
