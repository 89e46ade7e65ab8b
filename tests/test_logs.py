"""Log lines: plain, on stderr, one handler however often it is configured."""

from __future__ import annotations

import logging

import pytest

from ditrelay.runtime import logs


@pytest.fixture(autouse=True)
def restored_loggers(monkeypatch):
    house = logging.getLogger("ditrelay")
    monkeypatch.setattr(logging.root, "handlers", [])
    levels = logging.root.level, house.level
    yield
    logging.root.setLevel(levels[0])
    house.setLevel(levels[1])


def test_lines_are_the_level_and_the_message_on_stderr_and_never_wrapped(capsys):
    logs.configure("error")
    logs.configure("info")
    logging.getLogger("ditrelay.runtime.x").info("a %s", "b" * 500)
    logging.getLogger("ditrelay.runtime.x").debug("not shown")
    logging.getLogger("some.library").info("not shown")
    logging.getLogger("some.library").warning("shown")
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"[INFO] a {'b' * 500}\n[WARNING] shown\n"


def test_at_level_error_warnings_are_silent(capsys):
    logs.configure("error")
    logging.getLogger("ditrelay").warning("not shown")
    logging.getLogger("some.library").warning("not shown")
    logging.getLogger("ditrelay").error("shown")
    assert capsys.readouterr().err == "[ERROR] shown\n"
