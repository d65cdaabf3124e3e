"""Requests that schemathesis makes from the OpenAPI document. The document must have each answer.

They run apart from the suite (`pipenv run fuzz`), because the plugin and the making of the cases would cost
each process of the suite seconds.
"""

from typing import Any

import fakeredis
import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from app.config import Settings
from app.main import create_app
from tests.processes import STATES, job_in_state

app_redis = fakeredis.FakeRedis(server=fakeredis.FakeServer())
app_redis.hset("rq:worker:w", "birth", "now")
app_redis.sadd("rq:workers:default", "rq:worker:w")
# Allow no waits: no worker runs the jobs, so a correct wait would take 60 s.
schema = schemathesis.openapi.from_wsgi("/openapi.json", create_app(Settings(max_wait=0), app_redis))


@pytest.fixture(scope="module")
def job_ids() -> list[str]:
    """The ids of jobs in every state and of an expired one, which schemathesis cannot invent."""
    app_redis.delete("rq:queue:default")
    client = create_app(Settings(), app_redis).test_client()
    made = []
    for state in STATES:
        made.append(job_in_state(client, app_redis, state, {"a": 1}))
        app_redis.delete("rq:queue:default")
    expired = job_in_state(client, app_redis, "finished", 1)
    app_redis.delete(f"rq:job:{expired}", f"rq:results:{expired}")
    return [*made, expired]


CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


# Leave out the job functions of the tests, except the one with a strict model: they double the time for nothing new.
@schema.exclude(path_regex="^/enqueue/(?!count_words|estimate_pi|use_types)").parametrize()
@hypothesis.settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_openapi_documents_what_is_answered(case: Any) -> None:
    case.call_and_validate(checks=CHECKS)


@schema.include(path=["/check_status", "/get_result"]).parametrize()
@hypothesis.settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_openapi_documents_what_is_answered_for_jobs(case: Any, job_ids: list[str]) -> None:
    for job_id in job_ids:
        case.query = {**(case.query or {}), "job_id": job_id}
        case.call_and_validate(checks=CHECKS)
