"""The durable job store: states, pages, idempotency keys, retention."""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from postgres import Cluster, postgres

from ditrelay.errors import ConfigError
from ditrelay.server.job_rows import Job, JobState
from ditrelay.server.job_store import JobStore


@dataclass
class Clock:
    now: float = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with postgres() as running:
        yield running


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database of the test's own."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'jobs.sqlite'}"
    return request.getfixturevalue("cluster").create_database(f"jobs_{uuid.uuid4().hex}")


@pytest.fixture
def store(url: str, clock: Clock) -> Iterator[JobStore]:
    made = JobStore(url, clock=clock)
    yield made
    made.close()


def add(store: JobStore, job_id: str, limit: int = 100, **fields: object) -> Job | None:
    return store.add(
        Job(**{"id": job_id, "model": "tiny", "params": {"prompt": job_id}, "created": 1.5} | fields), limit=limit
    )


def finish(store: JobStore, job_id: str, nbytes: int = 10) -> None:
    add(store, job_id)
    assert store.start(job_id) and store.complete(job_id, f"{job_id}.mp4", nbytes)


def ids(jobs: list[Job]) -> list[str]:
    return [job.id for job in jobs]


def test_a_job_is_what_was_added_also_after_the_store_was_opened_again(store, url):
    params = {"prompt": "ein Schiff ⛵", "seed": 2**62, "guidance_scale": 1.5, "image": None}
    added = add(store, "a", params=params, idempotency_key="k", fingerprint="f")
    assert added is not None and (added.params, added.state, added.seq) == (params, JobState.QUEUED, 1)
    store.close()
    again = JobStore(url)
    assert again.get("a") == added
    again.close()


def test_a_job_passes_its_states_with_the_time_of_each(store, clock):
    add(store, "a")
    assert store.start("a")
    clock.now += 5
    assert store.complete("a", "a.mp4", 77)
    job = store.get("a")
    assert job is not None and job.state is JobState.COMPLETED
    assert (job.created, job.started, job.completed) == (1.5, clock.now - 5, clock.now)
    assert (job.file_name, job.nbytes, job.error) == ("a.mp4", 77, None)


@pytest.mark.parametrize(
    "end", [lambda s: s.complete("a", "a.mp4", 1), lambda s: s.fail("a", "why"), lambda s: s.cancel("a")]
)
def test_a_job_that_has_ended_never_ends_again_nor_starts(store, end):
    add(store, "a")
    store.start("a")
    assert end(store)
    ended = store.get("a")
    assert not any((store.start("a"), store.requeue("a"), store.cancel("a"), store.fail("a", "x")))
    assert not store.complete("a", "other.mp4", 2)
    assert store.get("a") == ended


def test_of_two_threads_only_one_starts_a_job(store):
    add(store, "a")
    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(store.start, ["a"] * 4)) == [False, False, False, True]


def test_pages_follow_each_other_in_both_orders(store):
    for job_id in "abcde":
        add(store, job_id)
    first = store.page(limit=2)
    assert ids(first) == ["e", "d"]
    assert ids(store.page(limit=2, after=first[-1])) == ["c", "b"]
    assert ids(store.page(limit=9, after=store.get("b"), oldest_first=True)) == ["c", "d", "e"]


def test_a_number_is_not_given_twice_so_that_pages_stay_in_order(store):
    add(store, "a")
    assert store.delete("a") and not store.delete("a")
    again = add(store, "b")
    assert again is not None and again.seq == 2


def test_the_queue_is_in_the_order_of_submission_and_what_was_interrupted_goes_back_to_its_place(store):
    for job_id in "abc":
        add(store, job_id)
    store.start("a")
    assert ids(store.queued(["tiny"], 9)) == ["b", "c"] == store.queue(["tiny"])
    assert [store.place(job, ["tiny"]) for job in store.queued(["tiny"], 9)] == [1, 2]
    assert ids(store.interrupted()) == ["a"]
    assert store.requeue("a")
    assert ids(store.queued(["tiny"], 2)) == ["a", "b"] and not store.interrupted()


def test_jobs_of_another_model_wait_for_it(store):
    add(store, "a", model="other")
    add(store, "b")
    assert ids(store.queued(["tiny"], 9)) == ["b"] and ids(store.queued(["other"], 9)) == ["a"]


def test_one_idempotency_key_is_one_job_also_from_many_threads(store):
    with ThreadPoolExecutor(4) as pool:
        jobs = list(pool.map(lambda i: add(store, f"job{i}", idempotency_key="once"), range(8)))
    assert len({job.id for job in jobs if job}) == 1 and None not in jobs
    assert len(store.page(limit=9)) == 1
    found = store.find("once")
    assert found is not None and found == jobs[0] and store.find("other") is None


def test_past_the_limit_no_job_is_added_but_an_older_one_is_found(store):
    add(store, "a", idempotency_key="k")
    assert add(store, "b", limit=1) is None
    assert store.get("b") is None
    older = add(store, "c", limit=1, idempotency_key="k")
    assert older is not None and older.id == "a"


def test_jobs_expire_by_age_and_by_bytes_with_the_oldest_first_and_never_open_ones(store, clock):
    add(store, "waits")
    for job_id in "abc":
        clock.now += 10
        finish(store, job_id)
    assert store.expired(lifetime=100, max_bytes=30) == []
    assert store.expired(lifetime=20, max_bytes=30) == ["a"]
    assert store.expired(lifetime=100, max_bytes=20) == ["a"]
    assert store.expired(lifetime=100, max_bytes=1) == ["b", "a"]  # the newest stays


def test_a_picture_is_kept_apart_from_the_rows_until_its_job_ends(store: JobStore) -> None:
    picture = bytes(range(256)) * 400
    for job_id in ("done", "failed", "cancelled", "deleted", "waits"):
        added = store.add(Job(id=job_id, model="tiny", params={"prompt": "a"}, created=1.5), limit=9, picture=picture)
        assert added is not None and added.params == {"prompt": "a"}
        assert store.picture(job_id) == picture
        store.start(job_id)
    assert store.requeue("waits") and not store.complete("waits", "x.mp4", 1)
    assert store.complete("done", "x.mp4", 1) and store.fail("failed", "why") and store.cancel("cancelled")
    assert store.delete("deleted")
    kept = {job_id: store.picture(job_id) for job_id in ("done", "failed", "cancelled", "deleted", "waits", "other")}
    assert kept == dict.fromkeys(kept) | {"waits": picture}


def test_past_their_bytes_no_picture_is_added_until_a_job_that_has_one_ends(store: JobStore) -> None:
    def queued(job_id: str, nbytes: int) -> bool:
        job = Job(id=job_id, model="tiny", params={"prompt": "a"}, created=1.5)
        return store.add(job, limit=9, picture=bytes(nbytes) or None, max_bytes=100) is not None

    assert queued("large", 101)  # the only one
    assert not queued("second", 1) and store.get("second") is None
    assert queued("without", 0)
    store.cancel("large")
    assert queued("half", 60) and queued("rest", 40) and not queued("more", 1)


@pytest.mark.parametrize("url", ["nonsense", "nodatabase://x", "sqlite:////nowhere/at/all/jobs.sqlite"])
def test_a_database_that_cannot_be_opened_is_an_error_of_its_flag(url):
    with pytest.raises(ConfigError, match="--job-store: "):
        JobStore(url)


def test_a_password_is_not_in_the_error():
    with pytest.raises(ConfigError) as caught:
        JobStore("nodatabase://me:secret@host/x")
    assert "secret" not in str(caught.value)


def test_it_needs_no_torch():
    code = "import sys, ditrelay.server.job_store; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_an_sqlite_file_is_one_database_by_whichever_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = JobStore(f"sqlite:///file:{tmp_path / 'jobs.sqlite'}?uri=true")
    with pytest.raises(ConfigError, match="in use by another server"):
        JobStore("sqlite:///jobs.sqlite")
    first.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["jobs.sqlite", "jobs.sqlite.lock"]


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:"])
def test_a_database_in_memory_is_refused_since_each_thread_would_have_its_own(url: str) -> None:
    with pytest.raises(ConfigError, match="--job-store: a database in memory forgets its jobs"):
        JobStore(url)


def test_a_database_has_one_server_at_a_time(url: str) -> None:
    first = JobStore(url)
    with pytest.raises(ConfigError, match="--job-store: the database is in use by another server"):
        JobStore(url, claim_seconds=0.2)
    first.close()
    JobStore(url, claim_seconds=0.0).close()


def test_a_database_is_free_again_when_its_server_was_killed(url: str) -> None:
    code = f"from ditrelay.server.job_store import JobStore; store = JobStore({url!r})"
    words = [sys.executable, "-c", code + "; import time; print('up', flush=True); time.sleep(99)"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"up\n"
    with pytest.raises(ConfigError):
        JobStore(url, claim_seconds=0.0)
    process.kill()
    process.wait(10)
    process.stdout.close()
    JobStore(url).close()


# ---------------------------------------------------------------- PostgreSQL


def test_the_store_goes_on_when_the_database_was_restarted(cluster: Cluster) -> None:
    store = JobStore(cluster.create_database("restarted"))
    add(store, "a")
    cluster.stop()
    cluster.start()
    assert store.start("a") and ids(store.page(limit=9)) == ["a"]
    store.close()


@pytest.mark.parametrize("scheme", ["postgresql", "postgres"])
def test_postgresql_is_found_under_its_usual_names(cluster: Cluster, scheme: str) -> None:
    JobStore(cluster.url(scheme=scheme)).close()


def test_characters_that_a_database_keeps_no_text_of_do_not_lose_the_job(store: JobStore) -> None:
    added = add(store, "a", params={"prompt": "a\0b"})
    assert added is not None and added.params == {"prompt": "a\0b"}
    assert store.fail("a", "why\0?")
    failed = store.get("a")
    assert failed is not None and failed.error == "why?"
    assert store.get("a\0b") is None and store.get("\ud800") is None


def test_a_missing_driver_is_named_with_its_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ConfigError, match=r"psycopg, is not installed; pip install 'ditrelay\[postgres\]'"):
        JobStore("postgresql://localhost/x")
