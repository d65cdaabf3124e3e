"""What Prometheus is told: jobs, queues and workers as Redis has them, and the requests of all web processes."""

import time
from collections.abc import Iterator
from typing import TypeVar

from flask import Request
from prometheus_client import CollectorRegistry, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector
from redis import Redis
from redis.exceptions import RedisError

from app.config import Settings
from app.core.queries import Overview, Times, read_overview
from app.core.scripts import TIME_BOUNDS

Message = TypeVar("Message")

#: What this process measures itself; where PROMETHEUS_MULTIPROC_DIR is set, each process's numbers are in files there.
_OWN = CollectorRegistry()

_DURATION = Histogram(
    "http_request_duration_seconds",
    "How long requests took, by route; those that wait for a job's end (`waits`) take as long as the job",
    ["method", "route", "status", "waits"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5),
    registry=_OWN,
)
_WAITING = Gauge(
    "http_waiting_requests", "Requests that wait for a job's end", registry=_OWN, multiprocess_mode="livesum"
)
_LISTENERS = Gauge("http_listeners", "Clients of /events", registry=_OWN, multiprocess_mode="livesum")
_WAITS_KEY = "app.waits"  # in the WSGI environ of a request that does
_METHODS = {"GET", "HEAD", "POST", "OPTIONS", "PUT", "PATCH", "DELETE"}


#: The histogram of each combination of labels, once it is looked up: prometheus_client's `labels` takes 4 µs.
_durations: dict[tuple[str, str, int, bool], Histogram] = {}


def observe_request(request: Request, status: int, seconds: float) -> None:
    """Count a request, which was answered with this status after so long."""
    waits = _WAITS_KEY in request.environ
    if waits:
        _WAITING.dec()
    # What a client makes up, a method or a path, is no label: each would be kept for ever.
    method = request.method if request.method in _METHODS else "other"
    labels = method, request.url_rule.rule if request.url_rule else "none", status, waits
    if labels not in _durations:
        _durations[labels] = _DURATION.labels(*labels[:3], "yes" if waits else "no")
    _durations[labels].observe(seconds)


def count_wait(request: Request) -> None:
    """Say that a request waits for a job's end."""
    request.environ[_WAITS_KEY] = True
    _WAITING.inc()


def count_listener(found: Iterator[Message]) -> Iterator[Message]:
    """Count one, for as long as it is told something."""
    with _LISTENERS.track_inprogress():
        yield from found


class _OfRedis(Collector):
    """What Redis knows: one PING and one script a scrape, however many jobs there are."""

    def __init__(self, settings: Settings, connection: Redis) -> None:
        self._settings, self._connection = settings, connection

    def collect(self) -> Iterator[Metric]:
        """All of it; a Redis that does not answer is told, too."""
        try:
            start = time.perf_counter()
            self._connection.ping()
            round_trip = time.perf_counter() - start
            overview = read_overview(self._connection, self._settings.all_queues)
        except RedisError:
            yield GaugeMetricFamily("redis_up", "Whether Redis answers", 0)
            return
        yield GaugeMetricFamily("redis_up", "Whether Redis answers", 1)
        yield GaugeMetricFamily("redis_round_trip_seconds", "How long Redis took to answer a PING just now", round_trip)
        yield from _families(overview, self._settings.max_queue_length)


def _families(overview: Overview, limit: int) -> Iterator[Metric]:
    current = GaugeMetricFamily(
        "jobs", "Jobs that there are; `failed` has the stopped ones", labels=["queue", "status"]
    )
    oldest = GaugeMetricFamily("jobs_oldest_waiting_seconds", "Age of the oldest waiting job", labels=["queue"])
    limits = GaugeMetricFamily("queue_limit", "Jobs that may wait in a queue (MAX_QUEUE_LENGTH)", labels=["queue"])
    listening = GaugeMetricFamily("queue_workers", "Live workers of a queue", labels=["queue"])
    for queue in overview.queues:
        for status, number in queue.jobs.items():
            current.add_metric([queue.name, status], number)
        oldest.add_metric([queue.name], queue.oldest or 0)
        limits.add_metric([queue.name], limit)
        listening.add_metric([queue.name], sum(queue.name in worker.queues for worker in overview.workers))
    yield from (current, oldest, limits, listening)

    states = GaugeMetricFamily("workers", "Live workers", labels=["state"])
    busy = sum(worker.state == "busy" for worker in overview.workers)
    states.add_metric(["busy"], busy)
    states.add_metric(["idle"], len(overview.workers) - busy)
    yield states

    labels = ["queue", "function"]
    enqueued = CounterMetricFamily("jobs_enqueued", "Jobs that were enqueued", labels=labels)
    retried = CounterMetricFamily("jobs_retried", "Times that a job that had failed was to run again", labels=labels)
    crashed = CounterMetricFamily("jobs_crashed", "Times that a process died with a job", labels=labels)
    ended = CounterMetricFamily("jobs_ended", "Jobs that ended", labels=[*labels, "status"])
    for event, queue_name, function, number in overview.counts:
        match event:
            case "enqueued" | "retried" | "crashed":
                family = {"enqueued": enqueued, "retried": retried, "crashed": crashed}[event]
                family.add_metric([queue_name, function], number)
            case "finished" | "failed" | "stopped" | "canceled":
                ended.add_metric([queue_name, function, event], number)
    yield from (enqueued, retried, crashed, ended)

    yield _histogram("jobs_wait_seconds", "How long jobs waited for a worker", overview.times, "wait")
    yield _histogram("jobs_run_seconds", "How long runs of jobs took", overview.times, "run")


def _histogram(name: str, text: str, times: list[Times], what: str) -> Metric:
    family = HistogramMetricFamily(name, text, labels=["function"])
    bounds = [*(str(float(bound)) for bound in TIME_BOUNDS), "+Inf"]
    for each in times:
        if each.what == what:
            family.add_metric([each.function], list(zip(bounds, each.counts, strict=True)), sum_value=each.total)
    return family


def render_metrics(settings: Settings, connection: Redis) -> bytes:
    """All metrics in Prometheus' text format 0.0.4."""
    own, shared = _OWN, CollectorRegistry()
    if folder := settings.prometheus_multiproc_dir:
        own = CollectorRegistry()
        MultiProcessCollector(own, path=str(folder))  # type: ignore[no-untyped-call]  # it has no annotations
    shared.register(_OfRedis(settings, connection))
    return generate_latest(own) + generate_latest(shared)
