"""Where fuzzing keeps its examples: Hypothesis' database, in a folder or shared through Redis."""

from __future__ import annotations

import contextlib
import hashlib
import json
import urllib.parse
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from hypothesis.database import (
    DirectoryBasedExampleDatabase,
    ExampleDatabase,
    MultiplexedDatabase,
)

from nsa_ref.testing.findings import Finding
from nsa_ref.testing.loading import CannotRun

#: Seconds that a shared database has for an answer: the port is judged meanwhile by nobody.
ANSWER_TIMEOUT = 5.0


class Unreliable(ExampleDatabase):
    """A database somewhere else: what it does not answer is lost, and nothing else.

    why : what it said when it failed last; empty as long as it answers
    """

    def __init__(self, wrapped: ExampleDatabase, errors: tuple[type[Exception], ...]) -> None:
        super().__init__()
        self._wrapped, self._errors = wrapped, errors
        self.why = ""

    @contextlib.contextmanager
    def _tried(self) -> Iterator[None]:
        try:
            yield
        except self._errors as error:
            self.why = str(error) or type(error).__name__
        else:
            self.why = ""

    def save(self, key: bytes, value: bytes) -> None:
        """As Hypothesis says."""
        with self._tried():
            self._wrapped.save(key, value)

    def fetch(self, key: bytes) -> Iterable[bytes]:
        """As Hypothesis says; nothing, if there is no answer."""
        found: list[bytes] = []
        with self._tried():
            found = list(self._wrapped.fetch(key))
        return found

    def delete(self, key: bytes, value: bytes) -> None:
        """As Hypothesis says."""
        with self._tried():
            self._wrapped.delete(key, value)


def is_shared(where: str) -> bool:
    """Whether this names a Redis server, and no folder."""
    return where.startswith(("redis://", "rediss://"))


def check_where(where: str) -> None:
    """Raise CannotRun for another server's address, which is no folder's name."""
    scheme, found, _ = where.partition("://")
    if found and not is_shared(where):
        raise CannotRun(
            f"--database {where}: {scheme}:// is neither a folder nor a Redis server. "
            "Try redis://localhost:6379/0, or a folder"
        )


def shared_database(url: str) -> Unreliable:
    """The examples that several machines keep together.

    Raises
    ------
    CannotRun : redis is not installed, or `url` is none of its
    """
    try:
        import redis
        from hypothesis.extra.redis import RedisExampleDatabase
    except ImportError:
        raise CannotRun("--database redis:// needs redis: pip install 'nsa-ref[fuzz]'") from None
    patience: dict[str, Any] = {
        "socket_timeout": ANSWER_TIMEOUT,
        "socket_connect_timeout": ANSWER_TIMEOUT,
    }
    try:
        number = urllib.parse.unquote(urllib.parse.urlsplit(url).path).strip("/")
        if number and not number.isdecimal():  # redis would take database 0
            raise ValueError(f"{number!r} must be the number of a database")
        server = redis.Redis.from_url(url, **patience)
    except ValueError as error:
        raise CannotRun(f"--database {url}: {error}. Try redis://localhost:6379/0") from None
    return Unreliable(RedisExampleDatabase(server), (redis.RedisError, OSError))


def open_database(folder: str, url: str = "") -> ExampleDatabase:
    """The examples of a folder, and those that are shared, if there is a `url`."""
    own = DirectoryBasedExampleDatabase(folder)
    return MultiplexedDatabase(own, shared_database(url)) if url else own


class SharedFindings:
    """What others found: every machine writes its findings down here and reads those of all.

    implementation : its name; findings of others are none of its
    """

    def __init__(self, database: ExampleDatabase, implementation: str) -> None:
        self.database = database
        self._key = f"nsa-ref finding: {implementation}".encode()

    def add(self, finding: Finding) -> None:
        """Write a finding down, once: where it lies is of no use to another machine."""
        self.database.save(self._key, _said(finding))

    def unseen(self, seen: Collection[str]) -> Iterator[tuple[str, Finding]]:
        """Those that were not read yet, each with its digest; what is no finding is passed over.

        seen : digests of those that were
        """
        for value in self.database.fetch(self._key):
            digest = hashlib.sha256(value).hexdigest()[:16]
            if digest in seen:
                continue
            with contextlib.suppress(ValueError):
                finding = json.loads(value)
                if isinstance(finding, dict):
                    yield digest, finding


def digest_of(finding: Finding) -> str:
    """What `SharedFindings.unseen` calls it."""
    return hashlib.sha256(_said(finding)).hexdigest()[:16]


def _said(finding: Finding) -> bytes:
    own = ("file", "replay", "cause", "gone")
    return json.dumps({n: v for n, v in finding.items() if n not in own}, sort_keys=True).encode()
