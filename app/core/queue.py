"""The `rq.Queue` of this service: `redis_queue.enqueue(…)` from Python makes the same jobs as the API."""

from typing import Any

import rq
from rq.exceptions import DuplicateJobError
from rq.job import Job
from rq.serializers import JSONSerializer

from app.config import get_settings
from app.core import transitions
from app.core.job_ids import JobIds


class Queue(rq.Queue):
    """An `rq.Queue` that stores JSON only, and enqueues with one atomic script instead of two round trips.

    `queue.enqueue(function, payload)` works as in any RQ tutorial. RQ's own code enqueues the jobs that the script
    cannot: those with dependencies, a rate limit, the caller's pipeline, or a job id that may exist already.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # RQ's default is pickle: anybody who can write to Redis could run code in every reader.
        super().__init__(*args, **{**kwargs, "serializer": JSONSerializer})
        self.ids = JobIds(self.connection)

    def enqueue_job(self, job: Job, pipeline: Any = None, at_front: bool = False, unique: bool = False) -> Job:
        """Enqueue the job.

        Raises:
            DuplicateJobError: `unique` is set, and a job with this id exists.
            RuntimeError: the queue is full (MAX_QUEUE_LENGTH).
        """
        has_own_id = job._id is not None
        if pipeline is not None or not self._is_async or job._dependency_ids or job.has_rate_limit:
            return super().enqueue_job(job, pipeline=pipeline, at_front=at_front, unique=unique)
        if has_own_id and not unique:  # in RQ, such a job replaces the one with the same id
            return super().enqueue_job(job, at_front=at_front)
        if not has_own_id:
            job.id = self.ids.new()
        self._prepare_for_queue(job)
        fields = {**job.to_dict(), "function": (job.func_name or "").rpartition(".")[2]}
        limit = get_settings().max_queue_length
        enqueued = transitions.enqueue(
            self.connection, self.name, {job.id: {}}, fields, limit=limit, at_front=at_front, ttl=job.ttl
        )
        if isinstance(enqueued, transitions.Full):
            raise RuntimeError(f"The queue {self.name} is full.")
        if isinstance(enqueued, transitions.Exists) and unique:
            raise DuplicateJobError(f"A job with the id {job.id} exists.")
        return job

    def get_redis_server_version(self) -> tuple[int, int, int]:
        """The oldest version that has all we use. RQ would need a round trip for the real version."""
        return (6, 2, 0)
