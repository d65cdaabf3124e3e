"""Job ids that prove themselves: whether an id was ever given out can be told without keeping anything for it.

A job's hash is gone once its TTL has passed, and then `/get_result` answers `410` for a job that existed but `404` for
an id that never did. A mark in Redis for each job would cost some 130 bytes for as long as that is to hold. Instead, an
id is 10 random bytes and a 6-byte tag, the keyed hash (RFC 2104) of these bytes and the job's owner, under a secret
that Redis keeps: no bytes per job, and it holds for as long as Redis does. With an idempotency key the 10 bytes are not
random but a keyed hash of owner and key, so that every process gives the same id to the same request.
"""

import hashlib
import hmac
import os
import uuid

from redis import Redis

from app.core.scripts import SECRET_KEY


class JobIds:
    """Makes job ids, and knows its own again. Reads the secret at first use."""

    def __init__(self, connection: Redis) -> None:
        self._connection = connection
        self._secret: bytes | None = None

    def _load(self) -> None:
        with self._connection.pipeline() as pipeline:
            pipeline.set(SECRET_KEY, self._secret or os.urandom(32), nx=True)
            pipeline.get(SECRET_KEY)
            self._secret = pipeline.execute()[1]

    def _tag(self, body: bytes, owner: str) -> bytes:
        if self._secret is None:
            self._load()
        assert self._secret
        return hmac.digest(self._secret, body + owner.encode(), hashlib.sha256)[:6]

    def new(self, owner: str = "") -> str:
        """A new id for this owner, in the form of a UUID."""
        return self._make(os.urandom(10), owner)

    def derive(self, owner: str, *names: str) -> str:
        """The id that this owner's things of these names have: always the same one."""
        self._load()  # as below: whoever has another secret would give another id
        assert self._secret
        return self._make(hmac.digest(self._secret, "\0".join((owner, *names)).encode(), hashlib.sha256)[:10], owner)

    def _make(self, body: bytes, owner: str) -> str:
        text = (body + self._tag(body, owner)).hex()
        return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"

    def is_ours(self, job_id: str, owner: str = "") -> bool:
        """Whether `new` once gave this id to this owner."""
        try:
            raw = uuid.UUID(job_id).bytes
        except ValueError:
            return False
        self._load()  # a Redis that lost its data has another secret now, and all processes are to agree
        return str(uuid.UUID(bytes=raw)) == job_id and hmac.compare_digest(raw[10:], self._tag(raw[:10], owner))
