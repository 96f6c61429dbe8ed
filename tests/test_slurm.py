"""SLURM's job script without SLURM: its commands are stood in for by small scripts, its signals by ours."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from test_cli import OWN, straight, wait_for
from thalweg import campaign
from thalweg.store import read
from toys import same_rows

SCRIPT = Path(__file__).parents[1] / "docs" / "slurm_array.sh"
pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="the documents are not beside the tests")

CASE = """
[problem]
symbols = "Au2Ni2"
cell = 12.0
box = 5.0
[calculator]
name = "emt"
[search]
method = "random_search"
iterations = 3
restarts = 2
steps = 6
target = { energy = 5.7, tolerance = 0.5 }
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A folder with thalweg, sbatch, squeue and scontrol of our own, and a function that starts a task."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "case.toml").write_text(CASE.replace('"emt"', '"own:Slow"\ndelay = 0.05'))
    (tmp_path / "own.py").write_text(OWN)
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in {
        "thalweg": f'exec "{sys.executable}" -m thalweg.cli "$@"',
        "sbatch": 'echo "sbatch $*" >> calls; echo 7',
        "squeue": 'cat state 2>/dev/null || echo RUNNING',
        "scontrol": 'echo "scontrol $*" >> calls',
    }.items():  # fmt: skip
        (commands / name).write_text(f"#!/bin/bash\n{text}\n")
        (commands / name).chmod(0o755)
    path = {"PATH": f"{commands}:{os.environ['PATH']}"}
    plain = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}

    def start(*arguments, **variables):
        return subprocess.Popen(
            ["bash", str(SCRIPT), *arguments], env={**plain, **path, **variables}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    return start


def task(index, **more):
    return {"SLURM_JOB_ID": "8", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(index), **more}


def stop_in_between(process, index):
    store = campaign.RunFolder(Path("runs")).store(index)
    before = store.stat().st_size if store.exists() else 0
    wait_for(lambda: store.exists() and store.stat().st_size > before + 4000, 90)
    process.send_signal(signal.SIGTERM)  # as --signal=B:TERM does: to the batch script alone
    _, err = process.communicate(timeout=90)
    return process.returncode, err


def calls():
    return Path("calls").read_text().splitlines() if Path("calls").exists() else []


def test_job_array_goes_on_after_its_walltime(cluster):
    code, err = stop_in_between(cluster("case.toml", "runs", "2", **task(1)), 1)
    assert code == 0, err
    assert calls() == ["scontrol requeue 7_1"]
    assert not Path("runs/restarts/001/store.journal.lock").exists()
    for index in range(2):
        last = cluster("case.toml", "runs", "2", **task(index))
        _, err = last.communicate(timeout=120)
        assert last.returncode == 0, err
    assert calls() == ["scontrol requeue 7_1"]  # what is finished is not queued again
    report = cluster("case.toml", "runs", "2", SLURM_JOB_ID="9")
    _, err = report.communicate(timeout=120)
    assert report.returncode == 0 and Path("runs/report.html").exists(), err
    for index in range(2):
        assert same_rows(
            read(campaign.RunFolder(Path("runs")).store(index)).rows, straight(index, "calculator.delay=0.0")
        )


def test_job_script_submits_gives_up_and_obeys_scancel(cluster):
    submit = cluster("case.toml", "runs", "2", THALWEG_SBATCH="--partition=short")
    assert submit.communicate(timeout=20)[0] == "restarts 0 to 1: job 7, then the report: job 7\n"
    first = f"sbatch --parsable --partition=short --array=0-1 {SCRIPT} case.toml runs 2"
    last = "sbatch --parsable --partition=short --dependency=afterany:7 --output=thalweg-%j-report.log"
    assert calls() == [first, f"{last} {SCRIPT} case.toml runs 2"]
    Path("calls").unlink()
    assert cluster("case.toml", "runs", "2", THALWEG_ROUNDS="2").wait(20) == 0
    assert [line.split(f" {SCRIPT}")[0] for line in calls()] == [
        "sbatch --parsable --array=0-1",
        "sbatch --parsable --dependency=afterany:7 --array=0-1",
        "sbatch --parsable --dependency=afterany:7 --output=thalweg-%j-report.log",
    ]
    assert cluster("case.toml").wait(20) == 2
    Path("calls").unlink()
    Path("case.toml").write_text(Path("case.toml").read_text().replace("iterations = 3", "iterations = 30"))
    code, err = stop_in_between(cluster("case.toml", "runs", "2", **task(0, SLURM_RESTART_COUNT="100")), 0)
    assert code == 1 and "giving up" in err and not calls()
    code, err = stop_in_between(cluster("case.toml", "runs", "2", **task(0, THALWEG_MOST_REQUEUES="0")), 0)
    assert code == 75 and not calls()
    Path("bin/scontrol").write_text("#!/bin/bash\nexit 1\n")  # a cluster that does not let tasks requeue themselves
    code, err = stop_in_between(cluster("case.toml", "runs", "2", **task(0)), 0)
    assert code == 75 and "submit again to go on" in err
    Path("state").write_text("COMPLETING\n")  # cancelled by its owner
    code, _ = stop_in_between(cluster("case.toml", "runs", "2", **task(0)), 0)
    assert code == 75 and not calls()


def test_job_script_does_not_wait_for_a_long_evaluation(cluster):
    Path("case.toml").write_text(Path("case.toml").read_text().replace("delay = 0.05", "delay = 60.0"))
    process = cluster("case.toml", "runs", "2", **task(0, THALWEG_GRACE="1"))
    store = campaign.RunFolder(Path("runs")).store(0)
    wait_for(lambda: store.with_name("store.journal.lock").exists(), 90)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    wait_for(lambda: calls() == ["scontrol requeue 7_0"], 10)
    assert time.monotonic() - began < 8
    process.wait(10)
    left = [p for p in psutil.process_iter(["cmdline", "cwd"]) if p.info["cwd"] == os.getcwd() and p.pid != os.getpid()]
    for one in left:  # with SLURM the requeue ends them
        one.kill()
    process.stdout.close()
    process.stderr.close()
