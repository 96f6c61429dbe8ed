"""The append-only journal of one search: all durable state; everything else is rebuilt from it.

One SQLite file per restart, one writer:

    meta     name -> text: format, problem, configuration, seed, build
    journal  seq 1, 2, 3, ... | kind | ticket | seconds | timing | body | crc32 of body
             asked       what the ticket will evaluate, data horizon, state of the models, what stages kept
             evaluation  one true evaluation, written as it arrives
             told        the ticket is settled: carry, columns of the settled rows

`seconds` and `timing` are measurements; everything in `body` is logical and equal for equal seeds. Bodies are a JSON
header and raw arrays, never pickles. Costly evaluations are committed one by one; when evaluations are cheaper than a
commit, commits are grouped in time: a crash then loses the last moments, which replay recovers.

SQLite's own locks fail on network file systems, so a lock file with host, process and heartbeat guards the writer; the
rollback journal (never WAL) makes each commit atomic at any instruction.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sqlite3
import struct
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from thalweg.errors import StoreError
from thalweg.records import FAILED, Batch, Problem

__all__ = ["History", "Record", "Store", "open_runs", "read"]

FORMAT = "thalweg-1"
_BATCH_FIELDS = ("positions", "numbers", "offsets", "cells", "pbc", "fixed")


# ---- bodies ------------------------------------------------------------------------------------------------


def encode(values: Mapping[str, Any]) -> bytes:
    """A JSON header and raw little-endian arrays; values are arrays, batches, strings, numbers, lists or mappings."""
    header: dict[str, Any] = {}
    arrays: list[bytes] = []
    position = 0

    def add(array: np.ndarray) -> dict[str, Any]:
        nonlocal position
        array = np.asarray(array, order="C")  # (ascontiguousarray would turn a scalar into a vector)
        if array.dtype.kind not in "fiubU":
            raise StoreError(f"only plain arrays can be stored, not {array.dtype}")
        raw = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
        entry = {"#": array.dtype.newbyteorder("<").str, "shape": list(array.shape), "at": position}
        arrays.append(raw)
        position += len(raw)
        return entry

    def convert(value: Any) -> Any:
        if isinstance(value, Batch):
            return {
                "batch": {name: add(getattr(value, name)) for name in _BATCH_FIELDS},
                "columns": {name: add(array) for name, array in value.columns.items()},
                "atom_columns": {name: add(array) for name, array in value.atom_columns.items()},
            }
        if isinstance(value, np.ndarray):
            return add(value)
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, Mapping):
            return {"map": {str(name): convert(item) for name, item in value.items()}}
        if isinstance(value, (list, tuple)):
            return [convert(item) for item in value]
        return value

    for name, value in values.items():
        header[name] = convert(value)
    text = json.dumps(header).encode()
    return struct.pack("<I", len(text)) + text + b"".join(arrays)


def decode(body: bytes) -> dict[str, Any]:
    """The inverse of `encode`; raises StoreError on anything malformed, never runs code."""
    try:
        (length,) = struct.unpack_from("<I", body)
        header = json.loads(body[4 : 4 + length])
        start = 4 + length

        def array(entry: Mapping[str, Any]) -> np.ndarray:
            dtype = np.dtype(entry["#"])
            if dtype.kind not in "fiubU":
                raise ValueError(f"dtype {dtype}")
            shape = tuple(int(size) for size in entry["shape"])
            count = int(np.prod(shape, dtype=np.int64))
            if min(shape, default=0) < 0 or int(entry["at"]) < 0:
                raise ValueError("negative size")
            if count == 0:
                return np.zeros(shape, dtype)
            return np.frombuffer(body, dtype, count, start + int(entry["at"])).reshape(shape)

        def convert(value: Any) -> Any:
            if isinstance(value, dict):
                if "#" in value:
                    return array(value)
                if "batch" in value:
                    return Batch(
                        **{name: array(value["batch"][name]) for name in _BATCH_FIELDS},
                        columns={name: array(entry) for name, entry in value["columns"].items()},
                        atom_columns={name: array(entry) for name, entry in value["atom_columns"].items()},
                    )
                return {name: convert(item) for name, item in value["map"].items()}
            if isinstance(value, list):
                return [convert(item) for item in value]
            return value

        return {name: convert(value) for name, value in header.items()}
    except (struct.error, KeyError, TypeError, ValueError, AttributeError) as problem:
        raise StoreError(f"a record of the store is malformed ({problem})") from problem


# ---- the lock ----------------------------------------------------------------------------------------------


class _Lock:
    """A lock file that names its owner. A dead owner on this host loses it at once, one on another host after its
    heartbeat has been silent for `stale` seconds."""

    beat, stale = 5.0, 30.0

    def __init__(self, path: Path):
        self.path = path
        self.mine = f"{socket.gethostname()} {os.getpid()} {_process_start(os.getpid())}"
        deadline = time.monotonic() + self.stale + 2 * self.beat
        while not self._create():
            owner = self._owner()
            if owner is None:
                continue  # it vanished between the two calls
            host, pid, start = owner
            if host == socket.gethostname():
                alive = _process_start(pid) == start and start != ""
            else:
                alive = time.time() - self._beat_time() < self.stale
                if alive and time.monotonic() < deadline and not self._beats_on():
                    continue  # perhaps killed a moment ago: wait until its heartbeat counts as silent
            if alive:
                raise StoreError(
                    f"{path.with_suffix('')} is being written by process {pid} on {host}; wait until it ends, stop it, or "
                    f"remove {path} if you are sure that it is gone"
                )
            self._take_over(owner)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._heartbeat, daemon=True)
        self._thread.start()

    def _create(self) -> bool:
        try:
            handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        except OSError as problem:
            raise StoreError(f"cannot create the lock file {self.path}: {problem.strerror}") from problem
        try:
            os.write(handle, self.mine.encode())
        except OSError as problem:
            with contextlib.suppress(OSError):
                self.path.unlink()
            raise StoreError(f"cannot write the lock file {self.path}: {problem.strerror}") from problem
        finally:
            os.close(handle)
        return True

    def _owner(self) -> tuple[str, int, str] | None:
        for _ in range(50):
            try:
                words = self.path.read_text().split()
            except FileNotFoundError:
                return None
            if len(words) >= 2:
                return words[0], int(words[1]), words[2] if len(words) > 2 else ""
            time.sleep(0.02)  # another process is between creating and writing it
        return ("?", 0, "")  # killed in between: nobody owns it (host "?" is never this one; its beat is old or gets old)

    def _beat_time(self) -> float:
        try:
            return self.path.stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def _beats_on(self) -> bool:
        before = self._beat_time()
        time.sleep(self.beat + 1.0)
        return self._beat_time() > before

    def _take_over(self, owner: tuple[str, int, str]) -> None:
        """Renaming is atomic: of several that saw the stale lock only one moves it away."""
        aside = self.path.with_name(f"{self.path.name}.stale.{os.getpid()}")
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.path, aside)
            text = aside.read_text().split()
            if text[:2] != [owner[0], str(owner[1])] and len(text) >= 2:
                with contextlib.suppress(FileExistsError):  # somebody fresh came in between: give it back
                    os.link(aside, self.path)
            aside.unlink()

    def _heartbeat(self) -> None:
        while not self._stop.wait(self.beat):
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def release(self) -> None:
        self._stop.set()
        with contextlib.suppress(OSError):
            if self.path.read_text() == self.mine:
                self.path.unlink()


def _process_start(pid: int) -> str:
    """When the process began, in clock ticks since boot (so that a reused pid is not taken for it); "" if it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        if os.path.isdir("/proc/self"):
            return ""
        try:
            os.kill(pid, 0)
        except OSError:
            return ""
        return "alive"
    fields = text.rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else fields[19]


# ---- the store ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """One entry of the journal."""

    seq: int
    kind: str
    ticket: int
    seconds: float
    timing: Mapping[str, float]
    body: Mapping[str, Any] = field(repr=False)


class Store:
    """The writer's side.

    Parameters
    ----------
    path : str or Path, optional
        The SQLite file; None keeps the journal in memory.
    meta : mapping of str to str
        What defines the search (problem, configuration, seed, ...). Written to a new store; an existing one must agree.
    sync : "auto", "each" or "grouped"
        When to commit: after each record, or at most every `group_seconds`; "auto" groups while evaluations are cheaper
        than `cheap_seconds`.

    Raises
    ------
    StoreError
        If another process writes to it, another configuration wrote it, the file is damaged, or the disk is full.
    """

    group_seconds, cheap_seconds = 0.5, 0.005

    def __init__(self, path: str | Path | None, meta: Mapping[str, str] | None = None, *, sync: str = "auto"):
        if sync not in ("auto", "each", "grouped"):
            raise StoreError(f"sync must be 'auto', 'each' or 'grouped', but it is '{sync}'")
        self.path = Path(path) if path is not None else None
        self.sync = sync
        self._lock: _Lock | None = None
        self._uncommitted = 0
        self._last_commit = time.monotonic()
        if self.path is not None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as problem:
                raise StoreError(f"cannot create the folder {self.path.parent}: {problem.strerror}") from problem
            self._lock = _Lock(self.path.with_name(self.path.name + ".lock"))
        try:
            self._open(dict(meta or {}))
        except BaseException:
            self._release()
            raise

    def _open(self, meta: dict[str, str]) -> None:
        with _explained(self.path):
            self._db = sqlite3.connect(
                str(self.path) if self.path is not None else ":memory:", isolation_level=None, check_same_thread=False
            )
            self._db.execute("PRAGMA journal_mode = TRUNCATE")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("PRAGMA locking_mode = EXCLUSIVE" if self.path is None else "PRAGMA locking_mode = NORMAL")
            self._db.execute("BEGIN IMMEDIATE")
            self._db.execute("CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL)")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS journal (seq INTEGER PRIMARY KEY, kind TEXT NOT NULL, ticket INTEGER NOT "
                "NULL, seconds REAL NOT NULL, timing TEXT NOT NULL, body BLOB NOT NULL, crc INTEGER NOT NULL)"
            )
            found = dict(self._db.execute("SELECT name, value FROM meta").fetchall())
            if not found:
                for name, value in {"format": FORMAT, **meta}.items():
                    self._db.execute("INSERT INTO meta VALUES (?, ?)", (name, value))
                found = {"format": FORMAT, **meta}
            self._db.execute("COMMIT")
        self.meta: dict[str, str] = found
        if found.get("format") != FORMAT:
            raise StoreError(f"{self.path} has the format '{found.get('format')}', this thalweg reads '{FORMAT}'")
        for name, value in meta.items():
            if name != "build" and found.get(name) != value:
                raise StoreError(
                    f"{self.path} was written by another search: its {name} differs"
                    f"{_difference(found.get(name, ''), value)}. Give the search a store of its own, or the same settings"
                )
        self._records = self._load()
        self.next_seq = len(self._records) + 1
        self._offset = self._records[-1].seconds if self._records else 0.0
        self._began = time.monotonic()

    def _load(self) -> list[Record]:
        records: list[Record] = []
        with _explained(self.path):
            rows = self._db.execute("SELECT * FROM journal ORDER BY seq").fetchall()
        for index, row in enumerate(rows):
            try:
                records.append(_record(index, row))
            except StoreError:
                if index < len(rows) - 1:
                    raise StoreError(
                        f"record {index + 1} of {self.path} is damaged and others follow it; restore the file from a copy"
                    ) from None
                with _explained(self.path):  # a torn last record: as if it had not been written
                    self._db.execute("DELETE FROM journal WHERE seq = ?", (row[0],))
        return records

    # ---- reading back ------------------------------------------------------------------------------
    def records(self) -> list[Record]:
        """What was there when the store was opened."""
        return self._records

    # ---- writing -----------------------------------------------------------------------------------
    def append(
        self, kind: str, ticket: int, body: Mapping[str, Any], *, cost: float = 0.0, timing: Mapping[str, float] | None = None
    ) -> None:
        """Adds a record. `cost`: seconds that it took to obtain; decides under "auto" whether to commit at once."""
        raw = encode(body)
        row = (self.next_seq, kind, ticket, self.seconds(), json.dumps(timing or {}), raw, zlib.crc32(raw))
        with _explained(self.path):
            if not self._uncommitted:
                self._db.execute("BEGIN IMMEDIATE")
            self._uncommitted += 1
            self._db.execute("INSERT INTO journal VALUES (?, ?, ?, ?, ?, ?, ?)", row)
            self.next_seq += 1
            now = time.monotonic()
            wait = self.sync == "grouped" or (self.sync == "auto" and cost < self.cheap_seconds)
            if not wait or now - self._last_commit > self.group_seconds:
                self.commit()

    def commit(self) -> None:
        """Makes everything durable."""
        if self._uncommitted:
            with _explained(self.path):
                self._db.execute("COMMIT")
            self._uncommitted = 0
        self._last_commit = time.monotonic()

    def seconds(self) -> float:
        """Seconds of work so far, those of earlier sittings included."""
        return self._offset + time.monotonic() - self._began

    def close(self) -> None:
        """Commits and lets go of the lock; safe to call twice."""
        if getattr(self, "_db", None) is not None:
            try:
                self.commit()
            finally:
                with contextlib.suppress(sqlite3.Error):
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")
                self._db.close()
                self._db = None  # type: ignore[assignment]
                self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()


def _record(index: int, row: tuple) -> Record:
    seq, kind, ticket, seconds, timing, raw, crc = row
    if seq != index + 1 or not isinstance(raw, bytes) or zlib.crc32(raw) != crc:
        raise StoreError(f"record {index + 1} is damaged")
    try:
        return Record(seq, str(kind), int(ticket), float(seconds), json.loads(timing), decode(raw))
    except (TypeError, ValueError) as problem:
        raise StoreError(f"record {index + 1} is damaged ({problem})") from problem


@contextlib.contextmanager
def _explained(path: Path | None) -> Iterator[None]:
    """One clear error for what SQLite says."""
    try:
        yield
    except sqlite3.Error as problem:
        text = str(problem)
        if "full" in text or "disk I/O" in text:
            raise StoreError(
                f"cannot write to {path}: the disk is full or not writable ({text}). What was committed is safe; make room "
                "and resume"
            ) from problem
        if "not a database" in text or "malformed" in text:
            raise StoreError(f"{path} is not a thalweg store, or it is damaged ({text})") from problem
        if "locked" in text:
            raise StoreError(f"{path} is locked by another program ({text})") from problem
        raise StoreError(f"{path}: {text}") from problem


def _difference(before: str, now: str) -> str:
    """What changed between two JSON texts, in a few words."""
    try:
        a, b = json.loads(before), json.loads(now)
    except ValueError:
        return f" ('{before[:60]}' there, '{now[:60]}' here)"
    if not isinstance(a, dict) or not isinstance(b, dict):
        return f" ({str(a)[:80]} there, {str(b)[:80]} here)"
    names = [name for name in {**a, **b} if a.get(name) != b.get(name)]
    return " in " + "; ".join(f"{name}: {str(a.get(name))[:100]} there, {str(b.get(name))[:100]} here" for name in names[:3])


# ---- reading -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class History:
    """What a store holds, for reports and statistics.

    rows: every true evaluation in order; columns energy [eV, NaN when failed], status (0 ok, 1 failed), iteration,
    seconds (since the search began, sittings added), origin, ...; atom column forces.
    """

    path: Path | None
    rows: Batch
    problem: Problem
    meta: Mapping[str, str]
    iterations: int
    finished: bool
    stage_seconds: Mapping[str, float]
    reasons: Mapping[int, str]


def read(path: str | Path) -> History:
    """Reads a store without locking it; safe while a search writes to it.

    Raises StoreError if there is none, or it is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise StoreError(f"there is no store at {path}")
    with _explained(path), contextlib.closing(_reader(path)) as db:
        tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not {"meta", "journal"} <= tables:
            raise StoreError(f"{path} is not a thalweg store")
        meta = dict(db.execute("SELECT name, value FROM meta").fetchall())
        found = db.execute("SELECT * FROM journal ORDER BY seq").fetchall()
    if meta.get("format") != FORMAT:
        raise StoreError(f"{path} has the format '{meta.get('format')}', this thalweg reads '{FORMAT}'")
    return history([_record(index, row) for index, row in enumerate(found)], meta, path)


def _reader(path: Path) -> sqlite3.Connection:
    """A connection for reading. A killed writer leaves a rollback journal behind: only a connection that may write can
    take the torn transaction back, so that is tried first."""
    from urllib.parse import quote

    for mode in ("rw", "ro"):
        with contextlib.suppress(sqlite3.OperationalError):
            db = sqlite3.connect(f"file:{quote(str(path))}?mode={mode}", uri=True, timeout=30)
            db.execute("SELECT count(*) FROM sqlite_master").fetchone()
            return db
    return sqlite3.connect(path, timeout=30)


def history(records: list[Record], meta: Mapping[str, str], path: Path | None = None) -> History:
    """The summary of a journal."""
    rows, reasons, stage_seconds = [], {}, {}
    iterations, finished = 0, False
    for record in records:
        for name, seconds in record.timing.items():
            stage_seconds[name] = stage_seconds.get(name, 0.0) + float(seconds)
        if record.kind == "evaluation":
            row: Batch = record.body["row"]
            if row.columns["status"][0] == FAILED:
                reasons[len(rows)] = str(record.body.get("reason", ""))
            rows.append(row.with_columns(seconds=record.seconds))
        elif record.kind == "told":
            finished = record.body["kind"] == "finish"
            iterations += record.body["kind"] == "search"
    problem = Problem.from_json(meta["problem"])
    return History(path, Batch.concat(rows), problem, meta, iterations, finished, stage_seconds, reasons)


def open_runs(pattern: str | Path) -> list[History]:
    """Histories of all stores that match: a store, a folder (searched for *.db), or a glob such as "runs/**"."""
    import glob

    text = str(pattern)
    paths: set[Path] = set()
    for match in [text] if Path(text).exists() else glob.glob(text, recursive=True):
        one = Path(match)
        paths.update([one] if one.is_file() and one.suffix == ".db" else one.rglob("*.db") if one.is_dir() else [])
    if not paths:
        raise StoreError(f"no store (*.db) was found under {text}")
    return [read(path) for path in sorted(paths)]
