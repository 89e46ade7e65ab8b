"""A database of jobs that is not as it should be: rows, files and disks that fail, and tables of other versions."""

from __future__ import annotations

import asyncio
import base64
import os
import shutil
import sqlite3
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from test_job_store import add
from test_server_videos import create, engine_jobs, serving, until

from ditrelay.errors import ConfigError
from ditrelay.server import job_tables
from ditrelay.server.clock_watch import ClockWatch
from ditrelay.server.job_rows import JobState
from ditrelay.server.job_store import JobStore

# As they were released, before a version was in the database.
FIRST = """
CREATE TABLE ditrelay_jobs (
    seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, id VARCHAR(64) NOT NULL UNIQUE, model TEXT NOT NULL,
    params JSON NOT NULL, state VARCHAR(16) NOT NULL, created FLOAT NOT NULL, started FLOAT, completed FLOAT,
    idempotency_key VARCHAR(255) UNIQUE, fingerprint VARCHAR(64) NOT NULL, error TEXT,
    file_name VARCHAR(128) NOT NULL, nbytes BIGINT NOT NULL
);
CREATE INDEX ix_ditrelay_jobs_state ON ditrelay_jobs (state);
"""
SECOND = FIRST.replace(
    "CREATE INDEX ix_ditrelay_jobs_state ON ditrelay_jobs (state);",
    "CREATE INDEX ditrelay_jobs_queue ON ditrelay_jobs (state, model, seq);",
)
THIRD = SECOND + "CREATE TABLE ditrelay_pictures (job VARCHAR(64) NOT NULL PRIMARY KEY, content BLOB NOT NULL);"
PICTURE = base64.b64encode(b"a picture").decode()


def store_at(folder: Path) -> JobStore:
    return JobStore(f"sqlite:///{folder / 'jobs.sqlite'}")


def sql(folder: Path, script: str) -> None:
    with sqlite3.connect(folder / "jobs.sqlite") as connection:
        connection.executescript(script)
    connection.close()


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize(
    "change",
    [
        "params = 'no JSON'",
        "params = '[1]'",
        "params = '{}'",
        "params = x'ff00'",
        """params = '{"prompt": 7}'""",
        "state = 'lost'",
        "state = 7",
        "created = 'yesterday'",
        "created = 9e999",
        "completed = 'soon'",
        "nbytes = 'many'",
        "nbytes = -1",
        "id = '../../etc/passwd'",
        "id = x'00ff'",
        "file_name = '../jobs.sqlite'",
        "model = x'ff'",
        "fingerprint = x'ff'",
    ],
)
def test_a_row_that_cannot_be_read_is_a_failed_job_and_stops_nothing_else(tmp_path: Path, change: str) -> None:
    store = store_at(tmp_path)
    for job_id in "abc":
        add(store, job_id)
    sql(tmp_path, f"UPDATE ditrelay_jobs SET {change} WHERE id = 'b'")
    (bad,) = [job for job in store.page(limit=9) if job.seq == 2]
    assert bad.state is JobState.FAILED and "its row in the database cannot be read" in (bad.error or "")
    assert [job.id for job in store.page(limit=9) if not job.damage] == ["c", "a"]
    store.close()
    store = store_at(tmp_path)  # a start is not stopped either, and puts the row right as far as it can be
    (bad,) = [job for job in store.page(limit=9) if job.seq == 2]
    assert bad.state is JobState.FAILED and bad.completed is not None and bad.error
    assert [job.id for job in store.queued(["tiny"], 9)] == ["a", "c"]
    assert store.expired(lifetime=1e9, max_bytes=0) == []
    assert store.delete(bad.id) and len(store.page(limit=9)) == 2
    store.close()


def test_the_queue_goes_on_behind_a_row_that_cannot_be_read(tmp_path: Path) -> None:
    async def main() -> None:
        async with asyncio.timeout(60), serving(tmp_path) as (client, _):
            running = [(await create(client, "[slow] a cat"))["id"] for _ in range(6)]
            later = [(await create(client, "a dog"))["id"] for _ in range(2)]
            sql(tmp_path, f"UPDATE ditrelay_jobs SET params = 'no JSON' WHERE id = '{later[0]}'")
            for job_id in running:
                await client.post(f"/v1/videos/{job_id}/cancel")
            failed = await until(client, later[0], status="failed")
            assert "cannot be read" in failed["error"]["message"]
            await until(client, later[1], status="completed")
            assert (await client.get("/v1/videos")).status_code == 200
            assert (await client.get("/v1/jobs")).status_code == 200

    asyncio.run(main())


# ---------------------------------------------------------------- files


def test_a_damaged_file_is_set_aside_and_a_new_one_is_begun(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "jobs.sqlite").write_bytes(b"no database at all" * 1000)
    store = store_at(tmp_path)
    assert add(store, "a") and [job.id for job in store.page(limit=9)] == ["a"]
    store.close()
    (aside,) = tmp_path.glob("jobs.sqlite.damaged-*")
    assert aside.read_bytes().startswith(b"no database") and aside.name in caplog.text
    with (tmp_path / "jobs.sqlite").open("r+b") as file:  # one that has a head, and pages that are not right
        file.seek(4096)
        file.write(b"\xff" * 8192)
    store = store_at(tmp_path)
    assert not store.page(limit=9)
    store.close()


def test_a_file_that_is_removed_while_the_server_runs_is_told_and_nothing_is_answered_and_lost(tmp_path: Path) -> None:
    async def main() -> None:
        async with asyncio.timeout(60), serving(tmp_path) as (client, _):
            await create(client, "a cat")
            kept = tmp_path / "elsewhere"
            (tmp_path / "jobs.sqlite").rename(kept)
            answer = await client.post("/v1/videos", json={"prompt": "a dog"})
            assert answer.status_code == 503 and "removed or replaced" in answer.json()["error"]["message"]
            ready = await client.get("/ready")
            assert ready.status_code == 503 and "removed or replaced" in ready.text
            kept.rename(tmp_path / "jobs.sqlite")
            while (await client.get("/ready")).status_code != 200:
                await asyncio.sleep(0.1)
            await create(client, "a dog")

    asyncio.run(main())


def test_what_people_asked_for_is_their_owners_alone(tmp_path: Path) -> None:
    async def main() -> None:
        async with asyncio.timeout(60), serving(tmp_path / "made") as (client, _):
            made = await create(client, "a cat")
            await until(client, made["id"], status="completed")
            files = [path for path in (tmp_path / "made").iterdir()]
            assert {path.name for path in files} >= {"jobs.sqlite", "jobs.sqlite-wal", f"{made['id']}.mp4"}
            assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
            assert stat.S_IMODE((tmp_path / "made").stat().st_mode) == 0o700

    before = os.umask(0o022)
    try:
        asyncio.run(main())
    finally:
        os.umask(before)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(folder)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk of its own needs the right to mount one")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_told_and_room_can_be_made(small_disk: Path) -> None:
    async def main() -> None:
        async with asyncio.timeout(60), serving(small_disk) as (client, _):
            old = [(await create(client, "a cat"))["id"] for _ in range(2)]
            for job_id in old:
                await until(client, job_id, status="completed")
            for job_id in old:  # clips of a usual size
                with (small_disk / f"{job_id}.mp4").open("ab") as file:
                    file.write(bytes(600_000))
            filler = small_disk / "filler"
            with filler.open("wb", buffering=0) as file:
                try:
                    while file.write(bytes(4096)) == 4096:
                        pass
                except OSError:
                    pass
            while (refused := await client.post("/v1/videos", json={"prompt": "x" * 3000})).status_code == 200:
                pass
            assert refused.status_code == 507, refused.text
            assert "no space is left" in refused.json()["error"]["message"]
            ready = await client.get("/ready")
            assert ready.status_code == 503 and "no space is left" in ready.text
            for job_id in old:
                assert (await client.delete(f"/v1/videos/{job_id}")).status_code == 200
            while (await client.get("/ready")).status_code != 200:
                await asyncio.sleep(0.1)
            await create(client, "a dog")

    asyncio.run(main())


# ---------------------------------------------------------------- versions


@pytest.mark.parametrize("tables", [FIRST, SECOND, THIRD], ids=["first", "second", "third"])
def test_every_older_version_is_brought_forward_with_its_jobs(tmp_path: Path, tables: str) -> None:
    image = "" if tables == THIRD else f', "image": "{PICTURE}"'
    sql(tmp_path, tables)
    sql(
        tmp_path,
        "INSERT INTO ditrelay_jobs (id, model, params, state, created, fingerprint, file_name, nbytes) VALUES "
        f"""('a', 'tiny', '{{"prompt": "a cat"{image}}}', 'queued', 1.0, 'f', '', 0),"""
        """('b', 'tiny', '{"prompt": "a dog"}', 'completed', 1.0, 'f', 'b.mp4', 10);""",
    )
    if tables == THIRD:
        sql(tmp_path, "INSERT INTO ditrelay_pictures VALUES ('a', CAST('a picture' AS BLOB))")
    for _ in range(2):  # the second start finds nothing to do
        store = store_at(tmp_path)
        assert [(job.id, job.state, job.damage) for job in store.page(limit=9)] == [
            ("b", JobState.COMPLETED, ""),
            ("a", JobState.QUEUED, ""),
        ]
        assert store.picture("a") == b"a picture" and store.page(limit=9)[1].params == {"prompt": "a cat"}
        store.close()
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'jobs.sqlite'}")
    assert {index["name"] for index in sa.inspect(engine).get_indexes("ditrelay_jobs")} == {"ditrelay_jobs_queue"}
    with engine.connect() as connection:
        assert connection.execute(sa.select(job_tables.SCHEMA)).scalars().all() == [job_tables.VERSION]
    engine.dispose()


@pytest.mark.parametrize("column", ["error", "nbytes", "started", "fingerprint"])
def test_a_file_that_lacks_a_column_gets_it(tmp_path: Path, column: str) -> None:
    lines = [each for each in THIRD.replace(", ", ",\n").splitlines() if not each.strip().startswith(f"{column} ")]
    sql(tmp_path, "\n".join(lines).replace("NOT NULL\n);", "NOT NULL);").replace(",\n);", "\n);"))
    store = store_at(tmp_path)
    assert add(store, "a") and store.start("a") and store.complete("a", "a.mp4", 7)
    assert store.get("a").nbytes == 7  # type: ignore[union-attr]
    store.close()


def test_a_newer_file_is_refused_by_name_and_left_as_it_is(tmp_path: Path) -> None:
    store_at(tmp_path).close()
    sql(tmp_path, "UPDATE ditrelay_schema SET version = 99; ALTER TABLE ditrelay_jobs ADD COLUMN mood TEXT")
    before = (tmp_path / "jobs.sqlite").read_bytes()
    with pytest.raises(ConfigError, match=r"newer ditrelay \(its schema is 99, this one knows 4\)"):
        store_at(tmp_path)
    assert (tmp_path / "jobs.sqlite").read_bytes() == before


# ---------------------------------------------------------------- clocks


def test_a_clock_that_is_set_ahead_is_noticed_and_not_believed_for_a_day() -> None:
    wall, steady = [1e9], [100.0]
    watch = ClockWatch(lambda: wall[0], lambda: steady[0])

    def passed(seconds: float, leap: float = 0.0) -> float:
        steady[0] += seconds
        wall[0] += seconds + leap
        return watch.leap()

    assert passed(60) == 0 and passed(86400) == 0 and passed(60, leap=-1e6) == 0 and passed(60, leap=30) == 0
    assert not watch.suspect
    assert passed(60, leap=8 * 86400) == pytest.approx(8 * 86400) and watch.suspect
    assert passed(3600) == 0 and watch.suspect
    passed(86400)
    assert not watch.suspect
    assert ClockWatch(lambda: 1e9, lambda: 5.0, last=1e9 - 8 * 86400).suspect  # while no server was at work
    assert not ClockWatch(lambda: 1e9, lambda: 5.0, last=1e9 - 7200).suspect


def test_a_clock_that_leaps_a_week_deletes_no_video_that_is_done(tmp_path: Path) -> None:
    async def main() -> None:
        async with asyncio.timeout(60), serving(tmp_path) as (client, _):
            made = await create(client, "a cat")
            await until(client, made["id"], status="completed")
            jobs = engine_jobs(client)
            now = jobs.store._clock
            jobs.store._clock = lambda: now() + 8 * 86400
            jobs._clock._wall = lambda: now() + 8 * 86400
            await jobs.sweep()
            assert (await client.get(f"/v1/videos/{made['id']}/content")).status_code == 200

    asyncio.run(main())
