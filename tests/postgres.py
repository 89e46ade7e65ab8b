"""A PostgreSQL server of the test's own: a new cluster, on a Unix socket only, run by an unprivileged user."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

SECONDS = 60.0
USERS = ("postgres", "nobody")  # PostgreSQL refuses to run as root


@dataclass
class Cluster:
    """A running server; ``url`` names its database ``name``."""

    folder: Path
    programs: Path
    user: str | None

    def url(self, name: str = "postgres", *, scheme: str = "postgresql+psycopg") -> str:
        return f"{scheme}://ditrelay@/{name}?host={self.folder}"

    def start(self) -> None:
        options = f"-k {self.folder} -c listen_addresses='' -c fsync=off -c max_connections=30"
        data = str(self.folder / "data")
        self.run("pg_ctl", "start", "-w", "-s", "-D", data, "-o", options, "-l", str(self.folder / "log"))

    def stop(self) -> None:
        """At once, as in a crash: open connections are cut."""
        self.run("pg_ctl", "stop", "-w", "-s", "-m", "immediate", "-D", str(self.folder / "data"))

    def create_database(self, name: str) -> str:
        """Its URL."""
        self.run("createdb", "-h", str(self.folder), "-U", "ditrelay", name)
        return self.url(name)

    def run(self, program: str, *words: str) -> None:
        command = [str(self.programs / program), *words]
        done = subprocess.run(
            command,
            user=self.user,
            cwd=self.folder,
            env={"PATH": os.defpath, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # what it starts keeps the descriptor
            stderr=subprocess.PIPE if program != "pg_ctl" else subprocess.DEVNULL,
            timeout=SECONDS,
        )
        log = self.folder / "log"
        said = (done.stderr or b"").decode() + (log.read_text() if log.exists() else "")
        assert done.returncode == 0, f"{program} ended with {done.returncode}: {said[-2000:]}"


@contextmanager
def postgres() -> Iterator[Cluster]:
    """Skips where PostgreSQL is not installed, or no user may run it."""
    programs = _programs()
    user = _unprivileged()
    with tempfile.TemporaryDirectory(prefix="pg-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        if user is not None:
            shutil.chown(folder, user)
        cluster = Cluster(folder, programs, user)
        cluster.run("initdb", "-D", str(folder / "data"), "-U", "ditrelay", "-A", "trust", "--no-sync", "-E", "UTF8")
        cluster.start()
        try:
            yield cluster
        finally:
            cluster.stop()


def _programs() -> Path:
    """The folder of the newest version's programs; Debian keeps them out of the path."""
    found = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    if there := shutil.which("initdb"):
        found.append(Path(there).parent)
    if not found:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    return max(found, key=lambda path: (len(path.parts), path.parts))


def _unprivileged() -> str | None:
    """Who runs it where we are root; else we do."""
    if os.geteuid() != 0:
        return None
    for user in USERS:
        try:
            pwd.getpwnam(user)
        except KeyError:
            continue
        return user
    return pytest.skip(f"PostgreSQL does not run as root, and there is none of the users {', '.join(USERS)}")
