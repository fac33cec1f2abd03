"""Examples and findings in a database, which may be far away and fail; Redis is a real server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis.database import ExampleDatabase, InMemoryExampleDatabase

from nsa_ref.testing.loading import CannotRun
from nsa_ref.testing.sharing import (
    SharedFindings,
    Unreliable,
    digest_of,
    is_shared,
    open_database,
    shared_database,
)
from redis_server import free_port, redis_server, url_of

FINDING: dict[str, Any] = {"property": "W1", "case": {"q_len": 3}, "text": "wrong", "file": "/a/b"}


def test_a_finding_is_read_once_and_says_nothing_of_where_it_lay() -> None:
    shared = SharedFindings(InMemoryExampleDatabase(), "port")
    shared.add(FINDING)
    shared.add(FINDING | {"file": "/elsewhere", "replay": "nsa-ref replay", "cause": "/elsewhere"})
    ((digest, found),) = shared.unseen(set())
    assert found == {name: value for name, value in FINDING.items() if name != "file"}
    assert digest == digest_of(FINDING)
    assert list(shared.unseen({digest})) == []
    assert list(SharedFindings(shared.database, "another port").unseen(set())) == []


@pytest.mark.parametrize("value", [b"no JSON", b"[1, 2]", b"\xff"])
def test_what_is_no_finding_is_passed_over(value: bytes) -> None:
    database = InMemoryExampleDatabase()
    database.save(b"nsa-ref finding: port", value)
    assert list(SharedFindings(database, "port").unseen(set())) == []


class Down(ExampleDatabase):
    """It fails while it is down."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.down = InMemoryExampleDatabase(), True

    def _answer(self, name: str, *arguments: bytes) -> Any:
        if self.down:
            raise ConnectionError("nobody there")
        return getattr(self.inner, name)(*arguments)

    def save(self, key: bytes, value: bytes) -> None:
        self._answer("save", key, value)

    def fetch(self, key: bytes) -> Any:
        return self._answer("fetch", key)

    def delete(self, key: bytes, value: bytes) -> None:
        self._answer("delete", key, value)


def test_a_database_that_fails_says_why_and_raises_nothing() -> None:
    down = Down()
    database = Unreliable(down, (ConnectionError,))
    database.save(b"k", b"v")
    assert list(database.fetch(b"k")) == [] and database.why == "nobody there"
    database.delete(b"k", b"v")
    database.move(b"k", b"l", b"v")
    down.down = False
    database.save(b"k", b"v")
    assert list(database.fetch(b"k")) == [b"v"] and database.why == ""


def test_a_mistake_of_ours_is_no_failure_of_the_database() -> None:
    with pytest.raises(ConnectionError):
        Unreliable(Down(), (KeyError,)).save(b"k", b"v")


def test_a_url_is_no_folder() -> None:
    assert is_shared("redis://localhost:6379/0") and is_shared("rediss://host")
    assert not is_shared("examples") and not is_shared("/redis://x")


def test_a_url_that_names_no_server_is_refused_in_one_line() -> None:
    pytest.importorskip("redis", reason="redis is not installed")
    with pytest.raises(CannotRun, match=r"--database redis://host:port: .*Try redis://localhost"):
        shared_database("redis://host:port")


def test_machines_share_findings_and_examples_through_redis(tmp_path: Path) -> None:
    port = free_port()
    url = url_of(port)
    with redis_server(tmp_path, port) as process:
        SharedFindings(shared_database(url), "port").add(FINDING)
        ((_, found),) = SharedFindings(shared_database(url), "port").unseen(set())
        assert found["text"] == "wrong"

        one, other = (open_database(str(tmp_path / name), url) for name in ("one", "other"))
        one.save(b"key", b"example")
        assert list(other.fetch(b"key")) == [b"example"]

        process.kill()
        process.wait()
        one.save(b"key", b"second")  # nothing is raised, and the own folder has it
        assert set(one.fetch(b"key")) == {b"example", b"second"}
        lost = shared_database(url)
        lost.save(b"key", b"third")
        assert "refused" in lost.why
