"""gunicorn's settings: `gunicorn app.main:app` reads this file by itself."""

from gevent import monkey

# Before anything else is imported: many clients wait in one process, each in a greenlet.
monkey.patch_all()

from app.config import get_settings  # noqa: E402  # see above

_settings = get_settings()

bind = _settings.address
workers = _settings.web_concurrency
worker_class = "gevent"
# Room for all that may wait, and for those who do not.
worker_connections = _settings.max_waiting + 1000
# A request in flight has this long to end on a shutdown: a little more than the longest wait.
graceful_timeout = _settings.max_wait + 5
keepalive = 5
# gunicorn 25's control socket is one file per user: a second instance on the machine would take it from the first.
control_socket_disable = True
