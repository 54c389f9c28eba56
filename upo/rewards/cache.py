"""Scores of texts, remembered between runs: one small database per scorer, version and options."""

from __future__ import annotations

import fcntl
import hashlib
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

from upo.cache import cache_dir
from upo.training.reporter import Reporter


class RewardCache:
    """Score by content hash. SQLite, so that several processes may share it and a crash leaves it whole.

    A cache that cannot be used costs time, never a result: it is set aside with a warning. A damaged one is made anew.
    """

    def __init__(self, name: str, identity: str, reporter: Reporter) -> None:
        self.reporter = reporter
        self.path: Path | None = None
        try:
            self.path = cache_dir("rewards") / f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.sqlite"
        except OSError as error:
            self._without(error)

    def read(self, keys: Iterable[bytes]) -> dict[bytes, float]:
        """The scores that are known among these keys."""
        if self.path is None:
            return {}
        try:
            with closing(self._open(self.path)) as database:
                rows = ((key, database.execute("SELECT score FROM scores WHERE key = ?", (key,)).fetchone()) for key in keys)
                return {key: float(row[0]) for key, row in rows if row is not None}
        except sqlite3.OperationalError as error:  # locked, read-only, disk full
            self._without(error)
        except (sqlite3.DatabaseError, TypeError, ValueError):  # not a database, or not ours
            self.path.unlink(missing_ok=True)
        return {}

    def write(self, scores: Mapping[bytes, float]) -> None:
        """Remember scores, all or none."""
        if self.path is None or not scores:
            return
        try:
            with closing(self._open(self.path)) as database, database:
                database.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?)", scores.items())
        except sqlite3.Error as error:
            self._without(error)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While this lasts no other process on this machine scores for this cache; waits for one that does."""
        if self.path is None:
            yield
            return
        try:
            lock = self.path.with_suffix(".lock").open("a")
        except OSError as error:
            self._without(error)
            yield
            return
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.reporter.info("Waiting for another process that is scoring with the same scorer.")
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError:  # a file system without locks: at worst something is scored twice
                pass
            yield

    @staticmethod
    def _open(path: Path) -> sqlite3.Connection:
        database = sqlite3.connect(path, timeout=30)
        try:
            database.execute("CREATE TABLE IF NOT EXISTS scores (key BLOB PRIMARY KEY, score REAL NOT NULL) WITHOUT ROWID")
        except sqlite3.Error:
            database.close()
            raise
        return database

    def _without(self, error: Exception) -> None:
        self.path = None
        self.reporter.warn(
            f"The reward cache cannot be used ({error}); scores are computed anew. Set UPO_CACHE to a folder that can be written."
        )
