"""How gunicorn logs, and how it reads from its clients: its logger class and two hooks, for gunicorn.conf.py.

One thread of a gevent worker serves all of its clients. gunicorn reads from a fast client without a pause, so these
hooks pause for it: other requests can go on meanwhile.
"""

import sys
from collections.abc import Iterator
from typing import Any

import gevent
from gunicorn.glogging import Logger
from gunicorn.http.body import ChunkedReader
from gunicorn.http.errors import InvalidChunkSize, ParseException

from app.logs import configure_logs

#: Seconds that a client may be silent in the middle of a request, or may take to read one part of its response.
#: app/web/limits.py allows more for large responses.
MAX_SILENCE = 30
#: A chunked body may have this many pieces of any size. If it has more, their mean size must be MIN_MEAN_PIECE bytes.
MAX_TINY_PIECES = 20_000
MIN_MEAN_PIECE = 16
#: Seconds of a pause: one whole round of gevent's loop. `sleep(0)` would be less than one.
_PAUSE = 0.001


class GunicornLogger(Logger):  # type: ignore[misc]  # gunicorn has no types
    """gunicorn's logger, with lines like those of all other loggers.

    gunicorn's setting `logconfig_dict` could format them, too, but it turns on a line for each request.
    """

    def setup(self, cfg: Any) -> None:
        """Set up gunicorn's logger, then replace its handlers."""
        super().setup(cfg)
        configure_logs("gunicorn.error")

    def exception(self, msg: Any, *args: Any, **kwargs: Any) -> None:
        """Log an exception. The silence of a client is no error of the service: it is logged as `debug`."""
        log = self.debug if isinstance(sys.exc_info()[1], TimeoutError) else super().exception
        log(msg, *args, **kwargs)


def pre_request(worker: Any, req: Any) -> None:
    """Limit the silence of a client, and pause while a chunked body arrives."""
    req.unreader.sock.settimeout(MAX_SILENCE)
    if isinstance(req.body.reader, ChunkedReader):
        req.body.reader.parser = _pause_between(req.body.reader.parser)


def _pause_between(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the pieces of a chunked body, with a pause now and then.

    Raises:
        InvalidChunkSize: there are too many tiny pieces.
    """
    count = size = 0
    for piece in pieces:
        if piece:
            count, size = count + 1, size + len(piece)
        if count % 100 == 99:
            if count > MAX_TINY_PIECES and size < count * MIN_MEAN_PIECE:
                raise InvalidChunkSize(b"chunks of few bytes each")
            gevent.sleep(_PAUSE)
        yield piece


def post_request(worker: Any, req: Any, environ: Any, resp: Any) -> None:
    """Read the rest of a refused body, with pauses, so that its client comes to read the response.

    It reads for as long as gunicorn keeps an idle connection open (`keepalive`), then it closes the connection.
    """
    has_body = environ.get("CONTENT_LENGTH", "0") != "0" or "HTTP_TRANSFER_ENCODING" in environ
    if not has_body or resp is None or not resp.headers_sent or resp.should_close():
        return
    with gevent.Timeout(worker.cfg.keepalive, False):  # type: ignore[arg-type]  # False: the block ends without an error
        try:
            while req.body.read(2**16):
                gevent.sleep(_PAUSE)
        except (OSError, ParseException):
            req.force_close()
        return
    req.force_close()
