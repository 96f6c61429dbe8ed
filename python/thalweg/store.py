"""The append-only journal of one search: all durable state; everything else is rebuilt from it.

One file per restart, one writer, records one after the other:

    thalweg-1\\n
    | length | crc of body | crc of the 8 bytes before |  body  |   | length | ...
      4 bytes  4 bytes       4 bytes                     `encode`d mapping: kind, ticket, seconds, timing, body

    meta        problem, configuration, seed, build: what defines the search
    asked       what the ticket will evaluate, data horizon, state of the models, what stages kept
    evaluation  one true evaluation, written as it arrives
    told        the ticket is settled: carry, columns of the settled rows

`seconds` and `timing` are measurements; everything in `body` is logical and equal for equal seeds. Bodies are a JSON
header and raw arrays, never pickles.

Every record goes to the operating system as it is made, so that a killed process loses nothing; it is forced to disk
(one fdatasync) at once for costly evaluations, and at most `group_seconds` later when evaluations are cheaper than that:
a power cut then loses the last moments, which replay recovers. An incomplete last record is as if it had not been
written. (An append-only file instead of SQLite: a rollback journal needs some ten forced writes per commit, 40 commits
per second on a disk that does 300 of them, and its locks fail on network file systems; readers here need no locks.)

A lock file with host, process and heartbeat guards the writer.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import socket
import struct
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from thalweg.errors import StoreError, ThalwegError
from thalweg.records import FAILED, Batch, Problem

__all__ = ["History", "Record", "Store", "open_runs", "read"]

FORMAT = "thalweg-1"
SUFFIX = ".journal"
_MAGIC = FORMAT.encode() + b"\n"
_HEAD = struct.Struct("<III")
_BATCH_FIELDS = ("positions", "numbers", "offsets", "cells", "pbc", "fixed")


# ---- bodies ------------------------------------------------------------------------------------------------


def encode(values: Mapping[str, Any]) -> bytes:
    """Values as bytes: arrays, batches, strings, numbers, lists and mappings of them.

    4 bytes   length of the header
    header    JSON: {"arrays": [[dtype, shape], ...], "values": {...}}; in values {"#": k} stands for array k,
              {"batch": [k, columns, atom columns]} for a batch whose arrays begin at k, {"map": {...}} for a mapping
    arrays    their raw little-endian bytes, one after the other
    """
    kinds: list[list[Any]] = []
    raw: list[bytes] = []

    def add(array: np.ndarray) -> int:
        name = _DTYPE_NAMES.get(array.dtype)
        if name is None:
            if array.dtype.kind not in "fiubU":
                raise StoreError(f"only plain arrays can be stored, not {array.dtype}")
            name = _DTYPE_NAMES[array.dtype] = array.dtype.newbyteorder("<").str
        kinds.append([name, array.shape])
        raw.append((array if _LITTLE else array.astype(name)).tobytes())
        return len(raw) - 1

    def convert(value: Any) -> Any:
        if value is None or isinstance(value, (bool, int, float, str)):
            return value.item() if isinstance(value, np.generic) else value
        if isinstance(value, Batch):
            first = len(raw)
            for name in _BATCH_FIELDS:
                add(getattr(value, name))
            for columns in (value.columns, value.atom_columns):
                for array in columns.values():
                    add(array)
            return {"batch": [first, list(value.columns), list(value.atom_columns)]}
        if isinstance(value, np.ndarray):
            return {"#": add(value)}
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, Mapping):
            return {"map": {str(name): convert(item) for name, item in value.items()}}
        if isinstance(value, (list, tuple)):
            return [convert(item) for item in value]
        raise StoreError(f"a {type(value).__name__} cannot be stored")

    tree = {name: convert(value) for name, value in values.items()}
    text = _JSON.encode({"arrays": kinds, "values": tree}).encode()
    return b"".join([struct.pack("<I", len(text)), text, *raw])


_JSON = json.JSONEncoder(separators=(",", ":"), check_circular=False)
_DTYPE_NAMES: dict[np.dtype, str] = {}

# What reading senseless content may raise.
_MALFORMED = (
    struct.error, LookupError, TypeError, ValueError, AttributeError, ArithmeticError, MemoryError, RecursionError,
)  # fmt: skip
_LITTLE = sys.byteorder == "little"


def decode(body: bytes) -> dict[str, Any]:
    """The inverse of `encode`; raises StoreError on anything malformed, never runs code."""
    try:
        (length,) = struct.unpack_from("<I", body)
        header = json.loads(body[4 : 4 + length])
        arrays: list[np.ndarray] = []
        at = 4 + length
        for name, shape in header["arrays"]:
            dtype = np.dtype(name)
            if dtype.kind not in "fiubU" or min(shape, default=0) < 0:
                raise ValueError(f"an array of {name}, {shape}")
            count = math.prod(shape)
            arrays.append(np.frombuffer(body, dtype, count, at).reshape(shape) if count else np.zeros(shape, dtype))
            at += count * dtype.itemsize

        def convert(value: Any) -> Any:
            if isinstance(value, list):
                return [convert(item) for item in value]
            if not isinstance(value, dict):
                return value
            if "#" in value:
                return arrays[value["#"]]
            if "batch" in value:
                first, columns, atom_columns = value["batch"]
                middle = first + len(_BATCH_FIELDS)
                end = middle + len(columns)
                return Batch(
                    **dict(zip(_BATCH_FIELDS, arrays[first:middle], strict=True)),
                    columns=dict(zip(columns, arrays[middle:end], strict=True)),
                    atom_columns=dict(zip(atom_columns, arrays[end : end + len(atom_columns)], strict=True)),
                )
            return {name: convert(item) for name, item in value["map"].items()}

        return {name: convert(value) for name, value in header["values"].items()}
    except _MALFORMED as problem:
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
                alive = self._now() - self._beat_time() < self.stale
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
                owner = _owner_in(self.path)
            except FileNotFoundError:
                return None
            if owner is not None:
                return owner
            time.sleep(0.02)  # another process is between creating and writing it
        return (
            "?",
            0,
            "",
        )  # killed in between: nobody owns it (host "?" is never this one; its beat is old or gets old)

    def _beat_time(self) -> float:
        try:
            return self.path.stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def _now(self) -> float:
        """The present by the clock that stamps the lock: a file server's may differ from this host's by more than
        `stale`, and a task that is queued again on another host would then take over a store that is being written."""
        probe = self.path.with_name(f"{self.path.name}.now.{socket.gethostname()}.{os.getpid()}")
        try:
            probe.touch()
            os.utime(probe)
            return probe.stat().st_mtime
        except OSError:
            return time.time()
        finally:
            with contextlib.suppress(OSError):
                probe.unlink()

    def _beats_on(self) -> bool:
        before = self._beat_time()
        time.sleep(self.beat + 1.0)
        return self._beat_time() > before

    def _take_over(self, owner: tuple[str, int, str]) -> None:
        """Renaming is atomic: of several that saw the stale lock only one moves it away."""
        aside = self.path.with_name(f"{self.path.name}.stale.{os.getpid()}")
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.path, aside)
            moved = _owner_in(aside)
            if moved is not None and moved[:2] != owner[:2]:
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
            if self.path.read_text(errors="replace") == self.mine:
                self.path.unlink()


def _owner_in(path: Path) -> tuple[str, int, str] | None:
    """Host, process and its start as a lock file names them; None if it does not."""
    with open(path, errors="replace") as file:
        words = file.read(1000).split()
    if len(words) < 2 or not words[1].isdecimal() or len(words[1]) > 12:
        return None
    return words[0], int(words[1]), words[2] if len(words) > 2 else ""


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
        The file; None keeps nothing.
    meta : mapping of str to str
        What defines the search (problem, configuration, seed, ...). Written to a new store; an existing one must agree
        in everything but the build.
    sync : "auto", "each" or "grouped"
        When to force records to disk: each, or at most every `group_seconds`; "auto" groups while evaluations are
        cheaper than `cheap_seconds`.

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
        self.meta: dict[str, str] = dict(meta or {})
        self._records: list[Record] = []
        self._file = -1
        self._end = 0
        self._unforced = False
        self._last_force = time.monotonic()
        self._lock: _Lock | None = None
        if self.path is not None:
            with _explained(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _Lock(self.path.with_name(self.path.name + ".lock"))
            try:
                self._open(self.path)
            except BaseException:
                self.close()
                raise
        self._offset = self._records[-1].seconds if self._records else 0.0
        self._began = time.monotonic()

    def _open(self, path: Path) -> None:
        with _explained(path):
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644)
        raw = _content(path)
        records, self._end = _parse(raw, path)
        if not records:
            if raw[: len(_MAGIC)] != _MAGIC[: len(raw)]:
                raise StoreError(f"{path} is not a thalweg store")
            self._end = 0
            self._write(_MAGIC + _packed({"kind": "meta", "meta": self.meta}))
            self.commit()
            with _explained(path), contextlib.suppress(PermissionError):
                folder = os.open(path.parent, os.O_RDONLY)
                os.fsync(folder)  # the new name itself
                os.close(folder)
            return
        with _explained(path):
            os.ftruncate(self._file, self._end)
        found = _meta(records, path)
        for name, value in self.meta.items():
            if name != "build" and found.get(name) != value:
                raise StoreError(
                    f"{path} was written by another search: its {name} differs{_difference(found.get(name, ''), value)}. "
                    "Give the search a store of its own, or the same settings"
                )
        self.meta = found
        self._records = [_record(values, path) for values in records[1:]]

    def records(self) -> list[Record]:
        """What was there when the store was opened."""
        return self._records

    def append(
        self,
        kind: str,
        ticket: int,
        body: Mapping[str, Any],
        *,
        cost: float = 0.0,
        timing: Mapping[str, float] | None = None,
    ) -> None:
        """Adds a record. `cost`: seconds that it took to obtain; decides under "auto" whether to force it at once."""
        if self.path is None:
            return
        if self._file < 0:
            raise StoreError(f"{self.path} was closed; open it again to go on")
        values = {
            "kind": kind,
            "ticket": ticket,
            "seconds": self.seconds(),
            "timing": timing or {},
            "body": body,
        }
        self._write(_packed(values))
        wait = self.sync == "grouped" or (self.sync == "auto" and cost < self.cheap_seconds)
        if not wait or time.monotonic() - self._last_force > self.group_seconds:
            self.commit()

    def _write(self, raw: bytes) -> None:
        """The whole record or nothing: what a full disk cut off is taken back."""
        assert self.path is not None
        with _explained(self.path):
            try:
                done = 0
                while done < len(raw):
                    done += os.pwrite(self._file, raw[done:], self._end + done)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file, self._end)
                raise
        self._end += len(raw)
        self._unforced = True

    def commit(self) -> None:
        """Forces everything to disk."""
        if self._unforced and self._file >= 0 and self.path is not None:
            with _explained(self.path):
                getattr(os, "fdatasync", os.fsync)(self._file)
            self._unforced = False
        self._last_force = time.monotonic()

    def seconds(self) -> float:
        """Seconds of work so far, those of earlier sittings included."""
        return self._offset + time.monotonic() - self._began

    def close(self) -> None:
        """Forces everything to disk and lets go of the lock; safe to call twice."""
        try:
            self.commit()
        finally:
            if self._file >= 0:
                os.close(self._file)
                self._file = -1
            if self._lock is not None:
                self._lock.release()
                self._lock = None

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()


def _content(path: Path) -> bytes:
    with _explained(path):
        try:
            return path.read_bytes()
        except MemoryError:
            raise StoreError(f"{path} does not fit into memory; it is hardly a thalweg store") from None


def _packed(values: Mapping[str, Any]) -> bytes:
    body = encode(values)
    head = struct.pack("<II", len(body), zlib.crc32(body))
    return head + struct.pack("<I", zlib.crc32(head)) + body


def _parse(raw: bytes, path: Path) -> tuple[list[dict[str, Any]], int]:
    """Every whole record, and where the last one ends; what is cut off at the end is as if it had not been written.

    Raises StoreError if a record is damaged that others follow, or the file is something else.
    """
    if not raw.startswith(_MAGIC):
        if _MAGIC.startswith(raw):
            return [], 0
        first = raw[: len(_MAGIC)].split(b"\n")[0]
        other = f"; its format is '{first.decode(errors='replace')}'" if first.startswith(b"thalweg-") else ""
        raise StoreError(f"{path} is not a thalweg store that this version ({FORMAT}) reads{other}")
    records: list[dict[str, Any]] = []
    at = len(_MAGIC)
    while at + _HEAD.size <= len(raw):
        length, crc, head_crc = _HEAD.unpack_from(raw, at)
        start = at + _HEAD.size
        whole = zlib.crc32(raw[at : at + 8]) == head_crc
        if whole and start + length > len(raw):
            break  # cut off
        body = raw[start : start + length]
        if not whole or zlib.crc32(body) != crc:
            # A power cut may leave the last, unforced record as a hole of zeros; anything else is damage.
            if (whole and start + length == len(raw)) or not any(raw[at:]):
                break
            raise StoreError(
                f"record {len(records) + 1} of {path} (byte {at}) is damaged and others follow it; restore the file from a "
                f"copy, or cut it off there (truncate -s {at}) to go on from that point"
            )
        records.append(decode(body))
        at = start + length
    return records, at


def _meta(records: list[dict[str, Any]], path: Path) -> dict[str, str]:
    try:
        return {str(name): str(value) for name, value in records[0]["meta"].items()}
    except _MALFORMED as problem:
        raise StoreError(f"{path} does not begin with what defines the search; it is no thalweg store") from problem


def _record(values: Mapping[str, Any], path: Path) -> Record:
    try:
        return Record(
            str(values["kind"]),
            int(values["ticket"]),
            float(values["seconds"]),
            values["timing"],
            values["body"],
        )
    except _MALFORMED as problem:
        raise StoreError(f"a record of {path} is malformed ({problem})") from problem


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """One clear error for what the operating system says."""
    try:
        yield
    except OSError as problem:
        if problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StoreError(
                f"cannot write to {path}: the disk is full ({problem.strerror}). What was written before is safe; make room "
                "and resume"
            ) from problem
        raise StoreError(f"cannot use {path}: {problem.strerror or problem}") from problem


def _difference(before: str, now: str) -> str:
    """What changed between two JSON texts, in a few words."""
    try:
        a, b = json.loads(before), json.loads(now)
    except ValueError:
        return f" ('{before[:60]}' there, '{now[:60]}' here)"
    if not isinstance(a, dict) or not isinstance(b, dict):
        return f" ({str(a)[:80]} there, {str(b)[:80]} here)"
    names = [name for name in {**a, **b} if a.get(name) != b.get(name)]
    return " in " + "; ".join(
        f"{name}: {str(a.get(name))[:100]} there, {str(b.get(name))[:100]} here" for name in names[:3]
    )


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
    records, _ = _parse(_content(path), path)
    meta = _meta(records, path)
    return history([_record(values, path) for values in records[1:]], meta, path)


def history(records: list[Record], meta: Mapping[str, str], path: Path | None = None) -> History:
    """The summary of a journal."""
    rows: list[Batch] = []
    reasons: dict[int, str] = {}
    stage_seconds: dict[str, float] = {}
    seconds: list[float] = []
    iterations, finished = 0, False
    try:
        for record in records:
            for name, value in record.timing.items():
                stage_seconds[name] = stage_seconds.get(name, 0.0) + float(value)
            if record.kind == "evaluation":
                row: Batch = record.body["row"]
                check_row(row)
                if row.columns["status"][0] == FAILED:
                    reasons[len(rows)] = str(record.body.get("reason", ""))
                rows.append(row)
                seconds.append(record.seconds)
                finished = False
            elif record.kind == "told":
                finished = record.body["kind"] == "finish"
                iterations += record.body["kind"] == "search"
        order = _in_order(rows)
        together = Batch.empty()
        if rows:
            # a row counts as there when those before it are
            arrived = np.maximum.accumulate(np.array(seconds)[order])
            together = Batch.concat([rows[k] for k in order]).with_columns(seconds=arrived)
            reasons = {place: reasons[k] for place, k in enumerate(order) if k in reasons}
        problem = Problem.from_json(meta["problem"])
    except _MALFORMED as trouble:
        text = f"{type(trouble).__name__}: {trouble}" if not isinstance(trouble, ThalwegError) else str(trouble)
        raise StoreError(f"{path} does not hold what every store has ({text})") from trouble
    return History(path, together, problem, meta, iterations, finished, stage_seconds, reasons)


def check_row(row: Batch) -> None:
    """An evaluation as `Search` writes it, as far as readers rely on it; also against files that are none of ours."""
    wanted = {"energy": "f", "status": "iu", "iteration": "iu", "ticket": "iu", "point": "iu"}
    if len(row) != 1 or not row.atoms:
        raise StoreError(f"an evaluation is of one structure, not of {len(row)} with {row.atoms} atoms")
    for name, kinds in wanted.items():
        if row.columns[name].shape != (1,) or row.columns[name].dtype.kind not in kinds:
            raise StoreError(
                f"the column {name} of an evaluation is {row.columns[name].dtype}, {row.columns[name].shape}"
            )
    if not (np.isfinite(row.positions).all() and np.isfinite(row.cells).all()):
        raise StoreError("positions and cell of an evaluation must be finite")
    if np.any((row.numbers < 1) | (row.numbers > 118)):
        raise StoreError("an evaluation holds something that is not an element")
    forces = row.atom_columns.get("forces")
    if forces is not None and (forces.shape != row.positions.shape or forces.dtype.kind != "f"):
        raise StoreError(f"the forces of an evaluation are {forces.dtype}, {forces.shape}")


def _in_order(rows: list[Batch]) -> list[int]:
    """The rows of a ticket by their number: they may have been measured at once and have arrived in any order."""
    places: dict[int, list[int]] = {}
    for k, row in enumerate(rows):
        places.setdefault(int(row.columns["ticket"][0]), []).append(k)
    order = list(range(len(rows)))
    for at in places.values():
        for place, k in zip(at, sorted(at, key=lambda k: int(rows[k].columns["point"][0])), strict=True):
            order[place] = k
    return order


def open_runs(pattern: str | Path) -> list[History]:
    """Histories of all stores that match: a store, a folder (searched for *.journal), or a glob such as "runs/**"."""
    import glob

    text = str(pattern)
    paths: set[Path] = set()
    for match in [text] if Path(text).exists() else glob.glob(text, recursive=True):
        one = Path(match)
        paths.update(
            [one] if one.is_file() and one.suffix == SUFFIX else one.rglob(f"*{SUFFIX}") if one.is_dir() else []
        )
    if not paths:
        raise StoreError(f"no store (*{SUFFIX}) was found under {text}")
    return [read(path) for path in sorted(paths)]
