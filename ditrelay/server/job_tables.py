"""The tables of the database of jobs, and the way to them from the tables of every older version."""

from __future__ import annotations

import base64
import binascii
import logging
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.mysql import LONGBLOB

from ditrelay.errors import ConfigError

logger = logging.getLogger(__name__)

TABLES = sa.MetaData()
JOBS = sa.Table(
    "ditrelay_jobs",
    TABLES,
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("id", sa.String(64), unique=True, nullable=False),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("params", sa.JSON, nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("created", sa.Float(53), nullable=False),
    sa.Column("started", sa.Float(53)),
    sa.Column("completed", sa.Float(53)),
    sa.Column("idempotency_key", sa.String(255), unique=True),
    sa.Column("fingerprint", sa.String(64), nullable=False),
    sa.Column("error", sa.Text),
    sa.Column("file_name", sa.String(128), nullable=False),
    sa.Column("nbytes", sa.BigInteger, nullable=False),
    sa.Index("ditrelay_jobs_queue", "state", "model", "seq"),
    sqlite_autoincrement=True,  # a number is not given again after a deletion: pages stay in order
)
# Apart from the rows, which are read at every poll: only whoever starts a job reads its picture.
PICTURES = sa.Table(
    "ditrelay_pictures",
    TABLES,
    sa.Column("job", sa.String(64), primary_key=True),
    sa.Column("content", sa.LargeBinary().with_variant(LONGBLOB(), "mysql", "mariadb"), nullable=False),
)
SCHEMA = sa.Table("ditrelay_schema", TABLES, sa.Column("version", sa.Integer, nullable=False))


def bring_up_to_date(engine: sa.Engine) -> None:
    """Make the tables, or bring those of an older version forward, all of it or nothing where the database can.

    Raises:
        ConfigError: the tables are a newer version's.
        SQLAlchemyError: the database refuses.
    """
    with engine.begin() as connection:
        version = _version(connection)
        if version > VERSION:
            raise ConfigError(
                "--job-store",
                f"the database was written by a newer ditrelay (its schema is {version}, this one knows {VERSION}); "
                "allowed: that version of ditrelay, or another database",
            )
        TABLES.create_all(connection)
        if version:
            for number in range(version, VERSION):
                _STEPS[number - 1](connection)
                logger.info("--job-store: brought from schema %d to %d", number, number + 1)
            _add_missing_columns(connection)
        connection.execute(SCHEMA.delete())
        connection.execute(SCHEMA.insert().values(version=VERSION))


def _version(connection: sa.Connection) -> int:
    """The version of the tables that are there; 0 where there are none."""
    there = sa.inspect(connection)
    if there.has_table(SCHEMA.name):
        return connection.execute(sa.select(SCHEMA.c.version)).scalar() or VERSION
    if not there.has_table(JOBS.name):
        return 0
    # Before there was a version in the database.
    if there.has_table(PICTURES.name):
        return 3
    return 2 if "ditrelay_jobs_queue" in _indexes(connection) else 1


def _indexes(connection: sa.Connection) -> set[str | None]:
    return {index["name"] for index in sa.inspect(connection).get_indexes(JOBS.name)}


def _index_the_queue(connection: sa.Connection) -> None:
    """1 to 2: the queue is read by state, model and number."""
    for index in sa.Table(JOBS.name, sa.MetaData(), autoload_with=connection).indexes:
        if index.name == f"ix_{JOBS.name}_state":
            index.drop(connection)
    for index in JOBS.indexes:
        index.create(connection, checkfirst=True)


def _move_pictures(connection: sa.Connection) -> None:
    """2 to 3: pictures leave the parameters."""
    with_pictures = sa.select(JOBS.c.seq, JOBS.c.id, JOBS.c.params)
    for row in connection.execute(with_pictures.where(JOBS.c.state.in_(("queued", "in_progress")))).all():
        params: dict[str, Any] | Any = row.params
        if not isinstance(params, dict) or not isinstance(picture := params.pop("image", None), str):
            continue
        try:
            content = base64.b64decode(picture)
        except binascii.Error:
            continue  # a job that fails for it when it is started
        connection.execute(PICTURES.insert().values(job=row.id, content=content))
        connection.execute(JOBS.update().where(JOBS.c.seq == row.seq).values(params=params))


def _count_versions(connection: sa.Connection) -> None:
    """3 to 4: the version is in the database."""


_STEPS: tuple[Callable[[sa.Connection], None], ...] = (_index_the_queue, _move_pictures, _count_versions)
VERSION = len(_STEPS) + 1


def _add_missing_columns(connection: sa.Connection) -> None:
    """A file that lacks a column, whoever left it out, gets it: empty, or 0."""
    there = {column["name"] for column in sa.inspect(connection).get_columns(JOBS.name)}
    for column in JOBS.c:
        if column.name in there:
            continue
        kind = column.type.compile(connection.dialect)
        default = "" if column.nullable else " NOT NULL DEFAULT " + ("0" if _is_number(column.type) else "''")
        quoted = connection.dialect.identifier_preparer.quote(column.name)
        connection.exec_driver_sql(f"ALTER TABLE {JOBS.name} ADD COLUMN {quoted} {kind}{default}")
        logger.warning("--job-store: the table of jobs had no column %s; it has one now", column.name)


def _is_number(kind: sa.types.TypeEngine[Any]) -> bool:
    return isinstance(kind, sa.Numeric | sa.Integer)


