"""The metrics for Prometheus: jobs, queues and workers, from Redis; and the requests of all web processes."""

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

#: The metrics of this process. With PROMETHEUS_MULTIPROC_DIR, each process writes them to files in that folder.
_PROCESS_METRICS = CollectorRegistry()

_DURATION = Histogram(
    "http_request_duration_seconds",
    "How long requests took, by route; one that waits for a job's end (`waits`) takes as long as the job",
    ["method", "route", "status", "waits"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5),
    registry=_PROCESS_METRICS,
)
_WAITING = Gauge(
    "http_waiting_requests",
    "Requests that wait for a job's end",
    registry=_PROCESS_METRICS,
    multiprocess_mode="livesum",
)
_LISTENERS = Gauge("http_listeners", "Clients of /events", registry=_PROCESS_METRICS, multiprocess_mode="livesum")
#: A request that waits for a job's end has this key in its WSGI environ.
_WAITS_KEY = "app.waits"
_METHODS = {"GET", "HEAD", "POST", "OPTIONS", "PUT", "PATCH", "DELETE"}

#: The histogram of each combination of labels. prometheus_client's own look-up (`labels`) is slow.
_durations: dict[tuple[str, str, int, bool], Histogram] = {}


def observe_request(request: Request, status: int, seconds: float) -> None:
    """Count a request and its time.

    Args:
        request: one that has been answered.
        status: the HTTP status of its response.
        seconds: how long the response took.
    """
    waits = _WAITS_KEY in request.environ
    if waits:
        _WAITING.dec()
    # A client can make up methods and paths. They must not become labels, which are kept for ever.
    method = request.method if request.method in _METHODS else "other"
    labels = method, request.url_rule.rule if request.url_rule else "none", status, waits
    if labels not in _durations:
        _durations[labels] = _DURATION.labels(*labels[:3], "yes" if waits else "no")
    _durations[labels].observe(seconds)


def count_wait(request: Request) -> None:
    """Count a request that waits for a job's end, until it is answered."""
    request.environ[_WAITS_KEY] = True
    _WAITING.inc()


def count_listener(messages: Iterator[Message]) -> Iterator[Message]:
    """Yield the messages to a listener of /events, and count it until they end."""
    with _LISTENERS.track_inprogress():
        yield from messages


class _RedisCollector(Collector):
    """The metrics that are read from Redis. A scrape is one PING and one script, however many jobs there are."""

    def __init__(self, settings: Settings, connection: Redis) -> None:
        self._settings, self._connection = settings, connection

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics. If Redis does not answer, the only one is `redis_up`, which is 0."""
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
        yield from _overview_metrics(overview, self._settings.max_queue_length)


def _overview_metrics(overview: Overview, max_queue_length: int) -> Iterator[Metric]:
    current = GaugeMetricFamily(
        "jobs", "Jobs in Redis; `failed` includes those that were stopped", labels=["queue", "status"]
    )
    oldest = GaugeMetricFamily("jobs_oldest_waiting_seconds", "Age of the oldest waiting job", labels=["queue"])
    limits = GaugeMetricFamily("queue_limit", "Jobs that may wait in a queue (MAX_QUEUE_LENGTH)", labels=["queue"])
    listening = GaugeMetricFamily("queue_workers", "Live workers of a queue", labels=["queue"])
    for queue in overview.queues:
        for status, number in queue.jobs.items():
            current.add_metric([queue.name, status], number)
        oldest.add_metric([queue.name], queue.oldest or 0)
        limits.add_metric([queue.name], max_queue_length)
        listening.add_metric([queue.name], sum(queue.name in worker.queues for worker in overview.workers))
    yield from (current, oldest, limits, listening)

    states = GaugeMetricFamily("workers", "Live workers", labels=["state"])
    busy = sum(worker.state == "busy" for worker in overview.workers)
    states.add_metric(["busy"], busy)
    states.add_metric(["idle"], len(overview.workers) - busy)
    yield states

    labels = ["queue", "function"]
    enqueued = CounterMetricFamily("jobs_enqueued", "Jobs that were enqueued", labels=labels)
    retried = CounterMetricFamily("jobs_retried", "Retries of jobs, after a failure or by POST /retry", labels=labels)
    crashed = CounterMetricFamily("jobs_crashed", "Runs whose process died", labels=labels)
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


def _histogram(name: str, documentation: str, times: list[Times], what: str) -> Metric:
    family = HistogramMetricFamily(name, documentation, labels=["function"])
    bounds = [*(str(float(bound)) for bound in TIME_BOUNDS), "+Inf"]
    for each in times:
        if each.what == what:
            family.add_metric([each.function], list(zip(bounds, each.counts, strict=True)), sum_value=each.total)
    return family


def render_metrics(settings: Settings, connection: Redis) -> bytes:
    """Render all metrics in Prometheus' text format 0.0.4."""
    requests, redis = _PROCESS_METRICS, CollectorRegistry()
    if folder := settings.prometheus_multiproc_dir:
        requests = CollectorRegistry()
        MultiProcessCollector(requests, path=str(folder))  # type: ignore[no-untyped-call]  # it has no annotations
    redis.register(_RedisCollector(settings, connection))
    return generate_latest(requests) + generate_latest(redis)
