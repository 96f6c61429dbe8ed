"""The journal: nothing lost, nothing doubled, whatever happens to the process."""

from __future__ import annotations

import contextlib
import os
import random as stdlib_random  # only to choose when to kill; nothing in the package may use it
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_search import PROBLEM, make
from thalweg.errors import StoreError
from thalweg.evaluate import Evaluate
from thalweg.records import Problem
from thalweg.store import Store, decode, encode, open_runs, read
from toys import PairToy, Scatter, same_rows

HERE = Path(__file__).parent


def straight(steps: int, **settings):
    search = make(**settings)
    search.run(steps)
    return search.data


def test_bodies_survive_exactly():
    data = straight(2)
    values = {
        "row": data,
        "numbers": [1, 2.5, "x", None, True],
        "carry": {"a": np.arange(3), "b": {"c": np.float64(0.1)}},
    }
    again = decode(encode(values))
    assert same_rows(again["row"], data)
    assert again["numbers"] == values["numbers"]
    assert np.array_equal(again["carry"]["a"], np.arange(3))
    assert again["carry"]["b"]["c"] == 0.1
    with pytest.raises(StoreError, match="plain arrays"):
        encode({"x": np.array([object()])})


def test_malformed_bodies_never_crash():
    body = encode({"row": straight(1), "n": 3})
    rng = np.random.default_rng(5)
    for _ in range(300):
        cut = bytearray(body[: rng.integers(len(body))] if rng.random() < 0.3 else body)
        for _ in range(rng.integers(1, 6)):
            if cut:
                cut[rng.integers(min(len(cut), 400))] = rng.integers(256)
        with contextlib.suppress(StoreError, ValueError):  # ConfigurationError of a batch that does not fit is one
            decode(bytes(cut))


def test_resume_between_steps(tmp_path):
    with make(tmp_path / "a.journal") as search:
        search.run(3)
        polished = search.evaluations
    with make(tmp_path / "a.journal") as search:
        assert (search.iteration, search.evaluations) == (3, polished)
        search.run(3)
        assert same_rows(search.data, straight(6))
    history = read(tmp_path / "a.journal")
    assert history.iterations == 6 and history.finished
    assert same_rows(history.rows, straight(6).with_columns(seconds=0.0)) or len(history.rows) == len(straight(6))


@pytest.mark.parametrize("evaluations", [1, 2, 5, 7, 11])
def test_resume_inside_a_relaxation_repeats_no_evaluation(tmp_path, evaluations):
    calculator = PairToy()
    with make(tmp_path / "a.journal", calculator=calculator) as search:
        search.run(5, evaluations=evaluations)
    assert calculator.calls == evaluations
    again = PairToy()
    with make(tmp_path / "a.journal", calculator=again) as search:
        search.run(5 - search.iteration)
        assert same_rows(search.data, straight(5))
        assert calculator.calls + again.calls == len(search.data)


def test_open_tickets_are_issued_again(tmp_path):
    with make(tmp_path / "a.journal") as search:
        search.run(2)
        first, second = search.ask(), search.ask()
        search.tell(second, search.evaluate(second))
    with make(tmp_path / "a.journal") as search:
        again = search.ask()
        assert again.ticket == first.ticket
        assert np.array_equal(again.chosen.positions, first.chosen.positions)
        assert np.array_equal(again.proposed.positions, first.proposed.positions)
        search.tell(again, search.evaluate(again))
        assert search.iteration == 4


def test_another_search_is_refused(tmp_path):
    make(tmp_path / "a.journal").close()
    with pytest.raises(StoreError, match=r"its seed differs"):
        make(tmp_path / "a.journal", seed=2)
    with pytest.raises(StoreError, match=r"its configuration differs in propose"):
        make(tmp_path / "a.journal", propose=[Scatter(4)])
    make(tmp_path / "a.journal").close()  # a refusal leaves no lock behind


def test_the_second_process_gets_a_clear_error(tmp_path):
    with make(tmp_path / "a.journal") as search:
        search.run(1)
        path = str(tmp_path / "a.journal")
        code = f"import sys; sys.path[:0] = {[str(HERE)]}\nfrom test_search import make\nmake({path!r})"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert result.returncode != 0
        assert f"is being written by process {os.getpid()}" in result.stderr
        assert read(tmp_path / "a.journal").rows is not None  # readers are welcome
    assert not (tmp_path / "a.journal.lock").exists()


def test_a_dead_owner_loses_the_lock_and_a_foreign_one_after_its_heartbeat_stops(tmp_path, monkeypatch):
    make(tmp_path / "a.journal").close()
    lock = tmp_path / "a.journal.lock"
    import socket

    lock.write_text(f"{socket.gethostname()} {os.getpid()} 1")  # this pid, but another process's start: a reused pid
    make(tmp_path / "a.journal").close()
    lock.write_text("elsewhere 7 7")
    os.utime(lock, (time.time() - 3600,) * 2)
    make(tmp_path / "a.journal").close()
    from thalweg.store import _Lock

    monkeypatch.setattr(_Lock, "beat", 0.1)
    monkeypatch.setattr(_Lock, "stale", 0.5)
    lock.write_text("elsewhere 7 7")
    make(tmp_path / "a.journal").close()  # waits until the silent heartbeat is stale


def test_a_torn_last_record_is_dropped_wherever_it_was_torn(tmp_path):
    path = tmp_path / "a.journal"
    with make(path) as search:
        search.run(2)
    whole, expected = path.read_bytes(), straight(2)
    rng = np.random.default_rng(3)
    for cut in [1, 5, 11, 12, 13, *rng.integers(1, len(whole) - 4000, 12)]:
        path.write_bytes(whole[:-cut])
        with make(path) as search:
            search.run(2 - search.iteration)
            assert same_rows(search.data, expected)
    path.write_bytes(whole + bytes(500))  # a hole after a power cut
    with make(path) as search:
        assert same_rows(search.data, expected)
    path.write_bytes(b"")
    with make(path) as search:
        search.run(2)
        assert same_rows(search.data, expected)


def test_a_damaged_record_is_reported_never_dropped(tmp_path):
    path = tmp_path / "a.journal"
    with make(path) as search:
        search.run(2)
    whole = path.read_bytes()
    rng = np.random.default_rng(4)
    for at in rng.integers(10, len(whole) - 3000, 40):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        with pytest.raises(StoreError, match=r"record \d+ of .* is damaged and others follow"):
            make(path)
        with pytest.raises(StoreError, match="damaged"):
            read(path)


def test_not_a_store(tmp_path):
    (tmp_path / "a.journal").write_text("hello " * 400)
    with pytest.raises(StoreError, match="is not a thalweg store"):
        make(tmp_path / "a.journal")
    with pytest.raises(StoreError, match="no store"):
        read(tmp_path / "b.journal")
    with pytest.raises(StoreError, match="no store"):
        open_runs(tmp_path / "none" / "**")


def test_a_full_disk_is_one_clear_error_and_nothing_committed_is_lost(tmp_path):
    """RLIMIT_FSIZE stands for the full disk: writing beyond it fails in the same place."""
    path = tmp_path / "a.journal"
    code = f"""
import resource, signal, sys
sys.path[:0] = {[str(HERE)]}
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from test_search import make
from thalweg.errors import StoreError
search = make({str(path)!r})
search.run(3)
search._store.sync = "each"
print(search.evaluations, flush=True)
import os
limit = os.path.getsize({str(path)!r}) + 20000
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    search.run(500)
except StoreError as problem:
    print("StoreError", problem, flush=True)
    search_data = search.evaluations
    try:
        search.close()
    except StoreError:
        pass
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    lines = result.stdout.splitlines()
    assert "the disk is full" in lines[1], result.stdout + result.stderr
    with make(path) as search:
        assert search.evaluations >= int(lines[0])
        done = search.iteration
        search.run(max(0, done + 2 - search.iteration))
        data = search.data
    reference = make()
    for _ in range(2):  # the same calls as above: run(3) finished once in between
        pass
    reference.run(3)
    reference.run(search.iteration - 3)
    assert same_rows(data, reference.data)


_KILLED = """
import sys
sys.path[:0] = [{here!r}]
from test_search import make
from toys import PairToy
search = make({path!r}, calculator=PairToy(delay=0.001))
search._store.sync = {sync!r}
search.run({steps} - search.iteration)
search.close()
"""


def test_killed_at_random_moments_and_resumed_equals_straight(tmp_path):
    """Kill -9, 20 times, at moments spread over start-up, evaluation and commit; then the rows are those of a run that
    was left alone."""
    path, steps = tmp_path / "a.journal", 60
    dice = stdlib_random.Random(7)
    expected = straight(steps)
    kills = 0
    while kills < 20:
        code = _KILLED.format(here=str(HERE), path=str(path), steps=steps, sync="each" if kills % 2 else "auto")
        process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
        # wait until the store is open (start-up is the same every time), then a random moment
        while not (tmp_path / "a.journal.lock").exists() and process.poll() is None:
            time.sleep(0.002)
        time.sleep(dice.uniform(0.0, 0.06))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.returncode in (-signal.SIGKILL, 0), process.stderr.read().decode()
        kills += 1
    with make(path) as search:
        assert search.iteration <= steps
        search.run(steps - search.iteration)
        assert same_rows(search.data, expected)
    history = read(path)
    assert len(history.rows) == len(expected) and history.iterations == steps


def test_readers_merge_many_stores(tmp_path):
    for seed in (1, 2, 3):
        with make(tmp_path / f"r{seed}" / "store.journal", seed=seed) as search:
            search.run(2)
    runs = open_runs(tmp_path)
    assert [run.meta["seed"] for run in runs] == ["1", "2", "3"]
    assert len(open_runs(str(tmp_path / "**" / "*.journal"))) == 3


def test_grouped_and_synchronous_stores_hold_the_same(tmp_path):
    for sync in ("each", "grouped"):
        store = Store(tmp_path / f"{sync}.journal", make()._meta(), sync=sync)
        with make(store) as search:
            search.run(4)
    assert len(read(tmp_path / "each.journal").rows) == len(read(tmp_path / "grouped.journal").rows)
    with pytest.raises(StoreError, match="sync must be"):
        Store(None, {}, sync="never")


def test_failure_reasons_are_kept(tmp_path):
    with make(tmp_path / "a.journal", evaluate=Evaluate(PairToy(fails=0.3))) as search:
        search.run(10)
    history = read(tmp_path / "a.journal")
    failed = np.flatnonzero(history.rows.columns["status"] == 1)
    assert len(failed) and set(history.reasons) == set(failed.tolist())
    assert all("RuntimeError: did not converge" in reason for reason in history.reasons.values())
    assert isinstance(history.problem, Problem) and history.problem.to_json() == PROBLEM.to_json()
