"""`thalweg bench`: rows, values compared before times, the peer's process, restarts that are kept."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from thalweg import bench
from thalweg.errors import ConfigurationError, ThalwegError

SOURCE = Path(__file__).parents[1]
KEPT = SOURCE / "benchmarks/data/agox_gofee_au4ni4.json"

# Speaks as benchmarks/against_agox.py does, without AGOX.
FAKE = """
import json, os, sys
for line in sys.stdin:
    request = json.loads(line)
    if request["work"] == "hello":
        answer = {"agox": "0.0", "threads": os.environ.get("OMP_NUM_THREADS")}
    elif request["work"] == "search":
        open("asked", "a").write(f"{request['seed']} ")
        energies = [9.0, 8.0, 7.805 if request["seed"] == 1 else 7.9, 8.5]
        answer = {"seed": request["seed"], "iterations": request["iterations"], "energies": energies, "cpu_seconds": 1.0,
                  "settings": {}}
    elif request["work"] == "die":
        print("last words", file=sys.stderr)
        sys.exit(3)
    else:
        answer = {"error": "no such work"}
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(bench, "_script", lambda: tmp_path / "fake.py")
    for name, value in bench.ONE_THREAD.items():
        monkeypatch.setenv(name, value)
    return Path(sys.executable)


def test_rows_say_whether_targets_are_met(capsys):
    table = bench.Table("AGOX")
    table.add("time", 2.0, "ms", 300.0, target=100)
    table.add("rate", 500.0, "/s", 10.0, more=True, target=200)
    table.add("alone", 60.0, "ms", target=50)
    assert [row.ratio for row in table.rows] == [150.0, 50.0, None]
    assert [row.verdict.split(": ")[1] for row in table.rows] == ["met", "MISSED", "MISSED"]
    table.check("energy", 1e-3, 1e-8)
    assert "values DIFFER: energy" in capsys.readouterr().out
    assert not table.checks[0]["agrees"]
    assert json.loads(json.dumps(table.as_json()))["rows"][0]["theirs"] == 300.0


def test_kernels_alone_prints_rows(fake, capsys, tmp_path):
    assert bench.kernels(filter="random structures", json_file=tmp_path / "rows.json") == 0
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["name"] for row in rows] == [
        "random structures per second, Ni4Au4", "random structures per second, Ni12Au12",
        "random structures per second, Ni6 on a 60-atom slab",
    ]  # fmt: skip
    assert all(row["ours"] > 0 and row["theirs"] is None for row in rows)
    assert "random structures per second, Ni4Au4" in capsys.readouterr().out


def test_the_peer_answers_in_one_thread_and_its_end_is_told(fake):
    with bench.Peer(fake) as peer:
        assert peer.versions == {"agox": "0.0", "threads": "1"}
        with pytest.raises(ThalwegError, match="no such work"):
            peer.ask("nothing", positions=np.zeros((1, 3)))
        with pytest.raises(ThalwegError, match="last words"):
            peer.ask("die")


def test_restarts_are_kept_and_joined(fake, capsys, tmp_path):
    options = {"against": "agox", "iterations": 2, "folder": tmp_path / "kept", "agox_python": fake}
    bench.search(restarts=1, **options)
    assert bench.search(restarts=2, json_file=tmp_path / "all.json", **options) == 0
    assert (tmp_path / "asked").read_text().split() == ["0", "1"]  # the first was not run again
    kept = json.loads((tmp_path / "all.json").read_text())
    assert [restart["seed"] for restart in kept["restarts"]] == [0, 1] and kept["problem"]["symbols"] == "Au4Ni4"
    assert [len(history) for history in kept["thalweg"]["gofee"]] == [4, 4]  # as many evaluations as AGOX
    capsys.readouterr()
    bench.search(results=tmp_path / "all.json", restarts=1, iterations=2)
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if line.startswith("AGOX 0.0")).split()[3:5] == ["1/2", "3"]


def test_bad_input_is_told(fake, tmp_path):
    with pytest.raises(ConfigurationError, match="must be 'agox'"):
        bench.kernels(against="airss")
    with pytest.raises(ConfigurationError, match="no interpreter is there"):
        bench.prepare_agox(tmp_path / "nowhere" / "python")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ConfigurationError, match="no kept results"):
        bench.search(results=tmp_path / "other.json")


def test_an_environment_that_cannot_be_made_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(bench.sys, "executable", "/bin/false")
    with pytest.raises(ThalwegError, match="--agox-python"):
        bench.prepare_agox()
    assert not (tmp_path / "thalweg/agox-venv/thalweg-ready").exists()


@pytest.mark.skipif(not (SOURCE / "benchmarks").is_dir(), reason="the sources are not beside the tests")
def test_the_other_side_knows_nothing_of_thalweg():
    text = (SOURCE / "benchmarks/against_agox.py").read_text()
    assert "import thalweg" not in text and "from thalweg" not in text
    assert bench._script().read_text() == text


@pytest.mark.skipif(not KEPT.is_file(), reason="no kept results beside the tests")
def test_kept_results_of_agox_are_whole():
    kept = json.loads(KEPT.read_text())
    assert kept["versions"]["agox"] == "3.11.1" and kept["minimum"] == bench.MINIMUM
    for restart in kept["restarts"]:
        assert len(restart["energies"]) == 2 * restart["iterations"]
        assert min(restart["energies"]) >= bench.MINIMUM - bench.TOLERANCE  # no lower one is known


@pytest.mark.parametrize(
    ("peer", "row"),
    [
        ("dscribe", "SOAP values, C6H7N"),
        ("featomic", "SOAP values, C6H7N"),
        ("qmllib", "FCHL19 values, C6H7N"),
        ("vesin", "pairs, C6H7N"),
    ],
)
def test_peers_from_pypi(capsys, monkeypatch, peer, row):
    """Values are compared before times; without the peer the command says what is missing."""
    monkeypatch.setattr(bench, "_one_thread_again", lambda arguments: None)
    if importlib.util.find_spec(peer) is None:
        with pytest.raises(ConfigurationError, match=f"pip install {peer}"):
            bench.kernels(against=peer, filter=row)
        pytest.skip(f"{peer} is not installed")
    assert bench.kernels(against=peer, filter=row) == 0
    printed = capsys.readouterr().out
    assert row in printed and (peer == "featomic" or f"values agree: {row}" in printed)


@pytest.fixture
def asla_benchmark(monkeypatch):
    path = SOURCE / "benchmarks/asla.py"
    if not path.is_file():
        pytest.skip("the sources are not beside the tests")
    for name in ("OMP_NUM_THREADS", "THALWEG_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    spec = importlib.util.spec_from_file_location("asla_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_asla_benchmark_goes_on_where_it_was_cut_off(asla_benchmark, tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch")

    class Here:
        """A pool of this process."""

        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        imap_unordered = staticmethod(map)

    monkeypatch.setattr(asla_benchmark.multiprocessing, "get_context", lambda _: SimpleNamespace(Pool=Here))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["asla.py", "--problem", "toy", "--folder", str(tmp_path), *arguments])
        asla_benchmark.main()
        return capsys.readouterr().out

    assert " 0/2" in run("--arm", "uniform", "--restarts", "2", "--cap", "2")
    with open(tmp_path / "toy.jsonl", "a") as file:
        file.write('{"problem": "toy", "ar')  # killed while it wrote
    assert " 0/2" in run("--table")
    assert " 0/3" in run(
        "--arm", "uniform", "--restarts", "3", "--cap", "3"
    )  # a longer one takes a shorter one's place
    assert len((tmp_path / "toy.jsonl").read_text().splitlines()) == 2 + 1 + 3
    rows = asla_benchmark.kept(tmp_path / "toy.jsonl")
    assert [(row["seed"], row["cap"]) for row in rows] == [(0, 3), (1, 3), (2, 3)]
    with pytest.raises(SystemExit):
        run("--arm", "transfer")
    assert "cannot run on toy" in capsys.readouterr().err


def test_every_arm_of_the_asla_benchmark_is_one_of_the_recipes(asla_benchmark):
    from thalweg.config import recipe_options

    for name, options in asla_benchmark.ARMS.items():
        plain = {k: v for k, v in options.items() if k != "transfer_from" and v != "2/N"}
        assert plain.items() <= recipe_options("asla", plain).items(), name
