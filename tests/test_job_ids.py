import uuid

import fakeredis
import pytest
from redis import Redis

from app.core.job_ids import JobIds
from app.core.scripts import SECRET_KEY


@pytest.fixture
def ids(redis: "Redis") -> JobIds:
    return JobIds(redis)


def test_job_ids_are_uuids_and_all_different(ids: JobIds) -> None:
    made = [ids.new() for _ in range(1000)]
    assert len(set(made)) == 1000
    assert all(str(uuid.UUID(job_id)) == job_id for job_id in made)


@pytest.mark.parametrize("owner", ["", "alice", "é"])
def test_job_ids_knows_its_own(ids: JobIds, owner: str) -> None:
    job_id = ids.new(owner)
    assert ids.is_ours(job_id, owner)
    assert not ids.is_ours(job_id, owner + "x")


@pytest.mark.parametrize("position", range(36))
def test_job_ids_knows_no_id_with_one_digit_changed(ids: JobIds, position: int) -> None:
    job_id = ids.new()
    other = "0" if job_id[position] != "0" else "1"
    assert not ids.is_ours(job_id[:position] + other + job_id[position + 1 :])


def test_job_ids_knows_an_id_in_its_own_form_only(ids: JobIds) -> None:
    job_id = ids.new()
    forms = [job_id.replace("-", ""), f"{{{job_id}}}", f"urn:uuid:{job_id}", f" {job_id}", f"{job_id}\n", job_id[:-1]]
    # An id may have no letters at all. Then it has no upper case either.
    forms += [job_id.upper()] if job_id.upper() != job_id else []
    assert [form for form in forms if ids.is_ours(form)] == []


@pytest.mark.parametrize("text", ["", "abc", "0" * 32, str(uuid.UUID(int=0)), "\x00", "é" * 36, "-" * 36, "٣" * 32])
def test_job_ids_knows_no_other_text(ids: JobIds, text: str) -> None:
    assert not ids.is_ours(text)


def test_job_ids_share_the_secret_of_their_redis(ids: JobIds, redis: "Redis") -> None:
    job_id, other = ids.new(), JobIds(redis)
    assert other.is_ours(job_id)
    assert ids.is_ours(other.new())
    assert not JobIds(fakeredis.FakeRedis(server=fakeredis.FakeServer())).is_ours(job_id)


def test_job_ids_keep_nothing_but_the_secret(ids: JobIds, redis: "Redis") -> None:
    for _ in range(100):
        ids.new()
    assert redis.keys() == [SECRET_KEY.encode()]
    assert redis.ttl(SECRET_KEY) == -1
    assert len(redis.get(SECRET_KEY) or b"") == 32


def test_job_ids_do_nothing_before_their_first_use(redis: "Redis") -> None:
    ids = JobIds(redis)
    assert redis.keys() == []
    assert not ids.is_ours("abc")
    assert redis.keys() == []
