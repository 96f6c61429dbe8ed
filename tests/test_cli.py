"""The command line end to end: run folders, parallel restarts, interruptions, and errors in one line."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from thalweg import campaign, cli
from thalweg.config import Configuration
from thalweg.store import read
from toys import same_rows

CASE = """
[problem]
symbols = "Au2Ni2"
cell = 12.0
box = 5.0

[calculator]
name = "emt"

[search]
method = "random_search"
iterations = 4
restarts = 3
seed = 5
steps = 12
target = { energy = 5.7, tolerance = 0.05 }
"""

# A calculator of the user's own: slow enough to be interrupted; can end its own process, once.
OWN = """
import os, signal, time
from ase.calculators.emt import EMT

class Slow(EMT):
    def __init__(self, delay=0.0, flag=""):
        super().__init__()
        self.delay, self.flag = delay, flag

    def calculate(self, *arguments, **options):
        time.sleep(self.delay)
        if self.flag:
            try:
                os.close(os.open(self.flag, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        super().calculate(*arguments, **options)
"""


@pytest.fixture
def case(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "case.toml").write_text(CASE)
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path


def call(capsys, *arguments):
    """Runs the command in this process: exit code, stdout, stderr."""
    before = sys.argv
    sys.argv = ["thalweg", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        sys.argv = before
    out = capsys.readouterr()
    return ended.value.code or 0, out.out, out.err


def start(*arguments, **options):
    """Starts the command as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "thalweg.cli", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


def wait_for(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def rows(folder, index):
    return read(campaign.RunFolder(Path(folder)).store(index)).rows


def gone(process):
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def quietly(folder, *overrides, **options):
    """The same as `thalweg run`, without display and report."""
    campaign.prepare(Configuration.load("case.toml", overrides=overrides), folder)
    outcome = campaign.run(folder, **options)
    campaign.summarise(folder)
    return outcome


def straight(index, *overrides):
    """Rows of a restart as the Python interface gives them, in one go."""
    configuration = Configuration.load("case.toml", overrides=overrides)
    with configuration.make_search(seed=configuration.search.seed + index, store=f"straight-{index}.journal") as search:
        search.run(configuration.search.iterations)
    return read(f"straight-{index}.journal").rows


def summary(folder):
    return json.loads((Path(folder) / "summary.json").read_text())


def test_a_run_in_which_nothing_fits_says_so(case, capsys):
    """Eight gold atoms in a box that holds their volume, but not all of them."""
    (case / "narrow.toml").write_text(
        """
[problem]
symbols = "Au8"
cell = [12.0, 12.0, 16.0]
box = { corner = [4, 4, 3], vectors = [[4.0, 0, 0], [0, 4.0, 0], [0, 0, 10.0]] }
[calculator]
name = "emt"
[search]
method = "asla"
grid = 0.5
iterations = 2
restarts = 1
"""
    )
    pytest.importorskip("torch")
    code, _, err = call(capsys, "run", "narrow.toml", "--out", "narrow")
    assert code == 1 and "nothing was evaluated" in err and "spacing of the grid" in err


def test_run_folder_and_its_continuation(case, capsys):
    code, out, err = call(capsys, "run", "case.toml", "--set", "search.steps=10", "--out", "a", "--workers", "2")
    assert code == 0, err
    folder = case / "a"
    for name in ["config.toml", "summary.json", "best.extxyz", "report.html", "restarts/002/store.journal"]:
        assert (folder / name).stat().st_size > 0, name
    assert "best energy" in out and "a/report.html" in out and out.count("iterations done") == 3
    found = summary(folder)
    assert [entry["seed"] for entry in found["restarts"]] == [5, 6, 7]
    assert all(entry["finished"] and entry["iterations"] == 4 for entry in found["restarts"])
    assert found["best_energy"] == min(entry["best_energy"] for entry in found["restarts"])
    assert found["evaluations"] == sum(len(rows(folder, i)) for i in range(3))
    for entry in found["restarts"]:
        delivered, success = entry["delivered_evaluation"], entry["success_evaluation"]
        energies = rows(folder, entry["index"]).columns["energy"]
        reached = np.flatnonzero(energies <= 5.75)
        assert delivered == (int(reached[0]) + 1 if len(reached) else None)
        assert delivered is None or success <= delivered
    configuration = Configuration.load(folder / "config.toml")
    assert configuration.options["steps"] == 10 and configuration.options["force_tolerance"] == 0.05

    code, out, _ = call(capsys, "run", "case.toml", "--set", "search.steps=10", "--out", "a")
    assert code == 0 and summary(folder) == found  # nothing left to do
    code, _, err = call(capsys, "run", "case.toml", "--set", "search.steps=11", "--out", "a")
    assert code == 2 and "search.steps is 10 there and 11 here" in err and len(err.splitlines()) == 1
    code, _, err = call(capsys, "resume", "a", "--iterations", "3")
    assert code == 2 and "only be extended" in err
    before = [rows(folder, i) for i in range(3)]
    code, out, err = call(capsys, "resume", "a", "--iterations", "6", "--restarts", "4")
    assert code == 0, err
    after = summary(folder)
    assert [entry["iterations"] for entry in after["restarts"]] == [6, 6, 6, 6]
    for i in range(3):
        n = len(before[i])
        assert len(rows(folder, i)) > n
        np.testing.assert_array_equal(rows(folder, i).columns["energy"][:n], before[i].columns["energy"])

    code, out, err = call(capsys, "export", "a", "-o", "all.extxyz")
    from ase.io import read as ase_read

    assert code == 0 and len(ase_read("all.extxyz", ":")) == after["evaluations"]
    assert call(capsys, "export", "a", "-o", "all.extxyz")[0] == 2  # never overwrites


def test_default_folders_are_numbered_by_configuration(case, capsys):
    small = ["--restarts", "1", "--iterations", "1"]
    assert "run folder: case\n" in call(capsys, "run", "case.toml", *small)[1]
    assert "run folder: case-2\n" in call(capsys, "run", "case.toml", *small, "--seed", "9")[1]
    code, out, _ = call(capsys, "report", "case", "case-2", "--out", "both.html")
    assert code == 0 and "both.html" in out
    assert "Comparison" in (case / "both.html").read_text()


def test_number_of_workers_does_not_matter(case):
    for workers in (1, 4):
        assert not quietly(f"w{workers}", workers=workers).failed
    for index in range(3):
        assert same_rows(rows("w1", index), rows("w4", index))
        assert same_rows(rows("w1", index), straight(index))
    assert not same_rows(rows("w1", 0), rows("w1", 1))


AGREE = """
[problem]
symbols = "Au2Ni2"
cell = 12.0
box = 5.0

[calculator]
name = "emt"

[search]
method = "random_search"
iterations = 1
restarts = 24
steps = 100
force_tolerance = 0.01
stop_when_agree = 3
"""


def test_a_campaign_ends_when_restarts_agree(case, capsys):
    """The verdict, and the restart after which it falls, do not depend on the number of workers; how many of the others
    had begun by then does."""
    (case / "agree.toml").write_text(AGREE)
    verdicts = []
    for workers in (1, 3):
        folder = f"a{workers}"
        code, out, _ = call(capsys, "run", "agree.toml", "--out", folder, "--workers", workers)
        assert code == 0 and "no more restarts are needed" in out and "go on with" not in out
        summary = json.loads((case / folder / "summary.json").read_text())
        verdicts.append(summary["agreement"])
        agreement = summary["agreement"]
        m = agreement["decided_after"]
        energies = np.array([entry["best_energy"] for entry in summary["restarts"][:m]])
        assert agreement["found"] == 3 == len(agreement["restarts"]) and agreement["energy"] == energies.min()
        assert agreement["restarts"] == np.flatnonzero(energies <= energies.min() + 0.001).tolist()
        assert all(entry["finished"] for entry in summary["restarts"][:m]) and 3 < m < 20
        assert m <= len(summary["restarts"]) <= (m if workers == 1 else 23)
    assert verdicts[0] == verdicts[1]
    for index in range(verdicts[0]["decided_after"]):
        assert same_rows(rows("a1", index), rows("a3", index))
    # what is there is enough: nothing is begun when it is continued
    before = sorted(path.name for path in (case / "a1" / "restarts").iterdir())
    code, out, _ = call(capsys, "resume", "a1")
    assert code == 0 and "no more restarts are needed" in out
    assert sorted(path.name for path in (case / "a1" / "restarts").iterdir()) == before


def test_agreement_is_of_energy_and_structure_and_needs_an_unbroken_beginning(case):
    from thalweg import Problem

    configuration = Configuration.from_dict({
        "problem": {"symbols": "Au2Ni2", "box": 5.0}, "calculator": {"name": "emt"},
        "search": {"restarts": 9, "stop_when_agree": 2},
    })  # fmt: skip
    problem = Problem("Au2Ni2", box=5.0)
    square = np.array([[0, 0, 0], [2.6, 2.6, 0], [2.6, 0, 0], [0, 2.6, 0]]) + 5.0
    line = np.array([[0, 0, 0], [2.6, 0, 0], [5.2, 0, 0], [7.8, 0, 0]]) + 3.0

    def ended(energy, positions):
        row = problem.batch(positions[None], energy=energy, status=np.uint8(0))
        return _History(row, problem)

    def verdict(*ends):
        agreement = campaign.Agreement(configuration)
        for index, history in ends:
            agreement.add(index, history)
        return agreement.state["decided_after"]

    assert verdict((0, ended(5.0, square)), (1, ended(5.0005, square + 1.0))) == 2
    assert verdict((0, ended(5.0, square)), (1, ended(5.0005, line))) is None
    assert verdict((0, ended(5.0, square)), (1, ended(5.002, square))) is None
    assert verdict((0, ended(5.0, square)), (1, ended(4.9, line)), (2, ended(5.0, square))) is None  # not the lowest
    assert verdict((0, ended(5.0, square)), (2, ended(5.0, square))) is None  # 1 has not ended
    assert verdict((2, ended(5.0, square)), (0, ended(5.0, square)), (1, None)) == 3  # 1 has failed


class _History:
    def __init__(self, rows, problem):
        self.rows, self.problem = rows, problem


def test_job_array_shares_a_folder(case, capsys):
    jobs = [start("run", "case.toml", "--out", "array", "--restart-index", k) for k in (2, 0)]
    for job in jobs:
        assert job.wait(60) == 0, job.stderr.read()
    code, _, err = call(capsys, "report", "array")
    assert code == 0, err
    assert [entry["index"] for entry in summary("array")["restarts"]] == [0, 2]
    assert all(entry["finished"] for entry in summary("array")["restarts"])
    code, _, err = call(capsys, "run", "case.toml", "--out", "array", "--restart-index", "3")
    assert code == 2 and "0 to 2" in err
    code, _, err = call(capsys, "run", "case.toml", "--seed", "6", "--out", "array", "--restart-index", "0")
    assert code == 2 and "search.seed is 5 there and 6 here" in err


def test_sigterm_stops_in_good_order_and_resume_gives_the_same_rows(case, capsys):
    own = [
        "--set",
        "calculator.name=own:Slow",
        "--set",
        "calculator.delay=0.03",
        "--restarts",
        "2",
        "--workers",
        "2",
    ]
    run = start("run", "case.toml", *own, "--out", "stopped")
    store = campaign.RunFolder(case / "stopped").store(0)
    wait_for(lambda: store.exists() and store.stat().st_size > 12_000)
    children = psutil.Process(run.pid).children(recursive=True)
    run.send_signal(signal.SIGTERM)
    out, err = run.communicate(timeout=30)
    assert run.returncode == 0, err
    assert "stopped (SIGTERM); go on with: thalweg resume stopped" in out and err == ""
    wait_for(lambda: all(map(gone, children)), 5)
    assert not summary("stopped")["restarts"][0]["finished"]
    assert "SIGTERM" in summary("stopped")["restarts"][0]["reason"]
    n = len(rows("stopped", 0))
    assert n > 0
    assert not campaign.run("stopped").failed
    assert len(rows("stopped", 0)) > n
    for index in range(2):
        assert same_rows(rows("stopped", index), straight(index, "calculator.name=own:Slow"))


def test_time_limit(case, capsys):
    code, out, err = call(capsys, "run", "case.toml", "--restarts", "1", "--out", "late", "--max-seconds", "0")
    assert code == 0 and "stopped (time limit of 0 s); go on with: thalweg resume late" in out, err
    assert not summary("late")["restarts"] or not summary("late")["restarts"][0]["finished"]
    assert campaign.run("late").results[0]["finished"]


def test_a_worker_that_dies_is_reported_and_the_others_go_on(case, capsys):
    flag = case / "died"
    own = ["--set", "calculator.name=own:Slow", "--set", f'calculator.flag="{flag}"']
    code, _, err = call(capsys, "run", "case.toml", *own, "--workers", "1", "--out", "crash")
    assert code == 1
    assert "restart 0 failed: its worker process died (signal SIGKILL)" in err
    states = {entry["index"]: entry for entry in summary("crash")["restarts"]}
    assert not states[0]["finished"] and "SIGKILL" in states[0]["reason"]
    assert states[1]["finished"] and states[2]["finished"]
    outcome = campaign.run("crash")
    assert not outcome.failed and all(entry["finished"] for entry in outcome.results.values())


def test_workers_end_when_their_parent_is_killed(case):
    own = [
        "--set",
        "calculator.name=own:Slow",
        "--set",
        "calculator.delay=0.1",
        "--restarts",
        "2",
        "--workers",
        "2",
    ]
    run = start("run", "case.toml", *own, "--iterations", "50", "--out", "orphans", "--set", "search.steps=50")
    stores = [campaign.RunFolder(case / "orphans").store(i) for i in range(2)]
    wait_for(lambda: all(store.exists() and store.stat().st_size > 3000 for store in stores))
    children = psutil.Process(run.pid).children(recursive=True)
    assert len(children) >= 2
    run.kill()
    run.wait()
    run.stdout.close()
    run.stderr.close()
    wait_for(lambda: all(map(gone, children)), 20)


def test_full_disk_is_one_clear_error(case, capsys):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # noqa: E731
    run = start("run", "case.toml", "--restarts", "2", "--out", "full", preexec_fn=limit)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 2
    assert len(err.splitlines()) == 1 and err.startswith("error:") and "disk is full" in err
    assert not campaign.run("full").failed
    for index in range(2):
        assert same_rows(rows("full", index), straight(index))


def test_restart_ends_at_the_target_or_the_budget(case):
    quietly("soon", "search.target.energy=100.0", "search.target.stop=true", "search.restarts=1")
    entry = summary("soon")["restarts"][0]
    assert entry["reason"] == "target reached" and entry["iterations"] == 1 and entry["delivered_evaluation"] == 1
    quietly("budget", "search.max_evaluations=7", "search.restarts=1")
    entry = summary("budget")["restarts"][0]
    assert entry["evaluations"] == 7 and entry["finished"] and entry["reason"] == "7 evaluations spent"


def test_template_is_copied_and_used(case, capsys):
    from ase.build import fcc111
    from ase.constraints import FixAtoms
    from ase.io import write

    slab = fcc111("Au", (2, 2, 2), vacuum=5.0)
    slab.set_constraint(FixAtoms(mask=slab.get_tags() == 2))
    write("slab.traj", slab)
    top = float(slab.positions[:, 2].max())
    problem = [
        "--set",
        'problem.template="slab.traj"',
        "--set",
        f"problem.box={{corner=[0, 0, {top}], vectors=[5.7, 5, 4]}}",
    ]
    text = CASE.replace("cell = 12.0\nbox = 5.0\n", "").replace('"Au2Ni2"', '"Ni2"')
    (case / "case.toml").write_text(text)
    code, _, err = call(capsys, "run", "case.toml", *problem, "--restarts", "1", "--iterations", "1", "--out", "slab")
    assert code == 0, err
    (case / "slab.traj").unlink()  # the run folder stands alone
    assert not campaign.run("slab").failed
    fixed = rows("slab", 0)[0].fixed
    assert fixed.shape == (10, 3) and fixed.all(axis=1).sum() == 4


def test_errors_are_one_line_and_exit_code_2(case, capsys):
    for arguments, words in [
        (["run", "cas.toml"], "Did you mean 'case.toml'?"),
        (["run", "case.toml", "--set", "search.stepz=3"], "Did you mean 'steps'?"),
        (["run", "case.toml", "--set", "calculator.name=emtt"], "Did you mean 'emt'?"),
        (["run", "case.toml", "--set", "problem.symbols=Au2Xx"], "not a chemical symbol"),
        (["run", "case.toml", "--set", "problem.box=0.5"], "too small"),
        (["resume", "nowhere"], "does not exist"),
        (["report", "."], "not a run folder"),
    ]:
        code, _, err = call(capsys, *arguments)
        assert code == 2 and words in err, (arguments, err)
        assert err.startswith("error: ") and len(err.splitlines()) == 1 and "Traceback" not in err
    assert not (case / "case").exists()  # a mistake leaves no folder behind
    run = start("--debug", "run", "cas.toml")
    _, err = run.communicate(timeout=30)
    assert run.returncode != 0 and "Traceback" in err


def test_several_mistakes_give_several_lines(case, capsys):
    code, _, err = call(capsys, "run", "case.toml", "--set", "search.stepz=3", "--set", "problem.bxo=3")
    assert code == 2 and len(err.splitlines()) == 2
    assert all(line.startswith("error: ") for line in err.splitlines())


def test_demo_finds_the_known_minimum(case, capsys):
    (case / "thalweg-demo").mkdir()  # somebody else's: left alone
    code, out, err = call(capsys, "demo", "--restarts", "2")
    assert code == 0, err
    assert "Found the known minimum" in out and (case / "thalweg-demo-2" / "report.html").exists()
    assert not list((case / "thalweg-demo").iterdir())


def test_info_names_methods_options_and_calculators(capsys):
    code, out, _ = call(capsys, "info")
    assert code == 0
    for words in ["thalweg", "instruction set", "threads", "emt", "gofee", "kappa = 2.0", "basin_hopping"]:
        assert words in out


def test_help_loads_nothing_heavy():
    code = (
        "import sys, thalweg.cli\n"
        "heavy = [name for name in ('ase', 'scipy', 'matplotlib', 'chemiscope', 'pydantic') if name in sys.modules]\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    shown = subprocess.run([sys.executable, "-m", "thalweg.cli", "--help"], capture_output=True, text=True, check=True)
    for command in ["demo", "run", "resume", "report", "export", "info"]:
        assert re.search(rf"\b{command}\b", shown.stdout)


@pytest.mark.parametrize("name", ["au4ni4", "ni6_au111"])
def test_examples_are_valid(name):
    path = Path(__file__).parents[1] / "examples" / f"{name}.toml"
    configuration = Configuration.load(path)
    with configuration.make_search(seed=0, store=None) as search:
        assert search.iteration == 0
    assert os.path.getsize(path) < 4000
