"""Job ids that contain a proof that this service made them, so that no record of old ids is needed.

Once its TTL has passed, the hash of a job is gone. Then `/get_result` must answer `410` for a job that existed, and
`404` for an id that was never given out. A mark in Redis for each job would take some 130 bytes for as long as this
must work. Instead, an id is 10 random bytes and a tag of 6 bytes. The tag is a keyed hash (RFC 2104) of these bytes and
the job's owner, under a secret in Redis. It takes no memory per job, and it works for as long as Redis keeps its data.
With an idempotency key, the 10 bytes are a keyed hash of owner and key instead, so that every process gives the same id
to the same request.
"""

import hashlib
import hmac
import os
import uuid

from redis import Redis

from app.core.scripts import SECRET_KEY


class JobIds:
    """Makes job ids, and recognises them. It reads the secret at its first use."""

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
        """The id that belongs to these names of this owner: the same names always give the same id."""
        self._load()  # as in `is_ours`: a process with another secret would derive another id
        assert self._secret
        return self._make(hmac.digest(self._secret, "\0".join((owner, *names)).encode(), hashlib.sha256)[:10], owner)

    def _make(self, body: bytes, owner: str) -> str:
        text = (body + self._tag(body, owner)).hex()
        return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"

    def is_ours(self, job_id: str, owner: str = "") -> bool:
        """Whether `new` or `derive` once made this id for this owner."""
        try:
            raw = uuid.UUID(job_id).bytes
        except ValueError:
            return False
        self._load()  # if Redis lost its data, it has a new secret; all processes must use the same one
        return str(uuid.UUID(bytes=raw)) == job_id and hmac.compare_digest(raw[10:], self._tag(raw[:10], owner))
