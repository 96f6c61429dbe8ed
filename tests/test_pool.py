"""Calculators in worker processes: whatever happens in one is a failed evaluation, and the rows do not depend on it."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import cache, partial
from pathlib import Path

import numpy as np
import poor_calculators
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from test_search import PROBLEM
from thalweg.calculators import EMT
from thalweg.config import Configuration
from thalweg.errors import CalculationFailed, ConfigurationError
from thalweg.evaluate import Evaluate, calculate
from thalweg.pool import Guarded
from thalweg.records import FAILED, Batch
from thalweg.search import Search, describe
from thalweg.store import read
from toys import PairToy, Scatter, closeness, same_rows

HERE = Path(__file__).parent


def some(n: int) -> Batch:
    rng = np.random.default_rng(3)
    return PROBLEM.batch(rng.uniform(3, 9, (n, 4, 3)))


def guard_poor(how, folder, times=-1, **settings) -> Guarded:
    arguments = {"how": how, "folder": str(folder), "times": times}
    return Guarded("poor_calculators:poor", arguments, scratch=folder / "scratch", **settings)


def gone(pid: int, *, within: float = 10.0) -> bool:
    """Whether a process has ended (or is dead and only not waited for)."""
    last = time.monotonic() + within
    while time.monotonic() < last:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX":
                return True
            os.kill(pid, 0)
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.02)
    return False


def test_it_is_an_ase_calculator_with_the_numbers_of_the_one_inside():
    atoms = molecule("CH3CH2OH")
    atoms.calc = Guarded("emt")
    plain = atoms.copy()
    plain.calc = EMT()
    assert atoms.get_potential_energy() == plain.get_potential_energy()
    assert np.array_equal(atoms.get_forces(), plain.get_forces())
    crystal = bulk("Cu", cubic=True)
    crystal.rattle(0.1, seed=1)
    other = crystal.copy()
    crystal.calc, other.calc = atoms.calc, EMT()
    assert np.array_equal(crystal.get_forces(), other.get_forces())  # cell and periodicity arrive


@pytest.mark.parametrize(
    "make", ["poor_calculators:toy", poor_calculators.toy, partial(poor_calculators.toy, fails=0.0), PairToy]
)
def test_factories_by_name_and_by_object(make):
    calculator = pickle.loads(pickle.dumps(Guarded(make, {"delay": 0.0})))  # restarts run in processes
    expected = calculate(PairToy(), some(1))
    energy, forces, reason = calculate(calculator, some(1))
    assert (energy, reason) == (expected[0], "")
    assert np.array_equal(forces, expected[1])


def test_a_factory_in_the_main_script(tmp_path):
    body = """
import sys
sys.path[:0] = [{here!r}]
import numpy as np
from ase.build import molecule
from thalweg.pool import Guarded
from toys import PairToy

def make():
    return PairToy()

{guard}
    atoms = molecule("CH4")
    atoms.calc = Guarded(make)
    print(np.isfinite(atoms.get_potential_energy()))
"""
    script = tmp_path / "script.py"
    for guard in ("if __name__ == '__main__':", "if True:"):
        script.write_text(body.format(here=str(HERE), guard=guard))
        result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
        if "__main__" in guard:
            assert result.stdout.strip() == "True", result.stderr
        else:
            assert "put what it does under `if __name__" in result.stderr


def test_a_hung_calculation_is_ended_with_what_it_started(tmp_path):
    calculator = guard_poor("hang", tmp_path, times=1, timeout=0.7)
    calculator.check()  # what takes time is loaded before the timeout counts
    begin = time.monotonic()
    energy, forces, reason = calculator.calculate_many(some(1))[0]
    assert time.monotonic() - begin < 30
    assert np.isnan(energy) and forces.shape == (4, 3) and "timeout of 0.7 s" in reason
    assert gone(int((tmp_path / "child").read_text()))
    assert calculator.calculate_many(some(1))[0][2] == ""  # a new worker


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("segfault", ["signal 11", "SIGSEGV"]),
        ("killed", ["signal 9", "out of memory?"]),
        ("leave", ["exit status 3"]),
        ("complain", ["RuntimeError: did not converge"]),
    ],
)
def test_crashes_are_failures_with_a_reason_and_the_next_call_works(tmp_path, how, words):
    calculator = guard_poor(how, tmp_path, times=1)
    atoms = some(1).to_ase()[0]
    atoms.calc = calculator
    with pytest.raises(CalculationFailed) as caught:
        atoms.get_potential_energy()
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)
    assert atoms.get_potential_energy() == calculate(PairToy(), some(1))[0]


def test_retries_use_new_processes(tmp_path):
    measured = guard_poor("leave", tmp_path, times=2, retries=2).calculate_many(some(1))[0]
    assert measured[2] == "" and measured[0] == calculate(PairToy(), some(1))[0]
    attempts = [path.name.split("-") for path in tmp_path.glob("attempt-*")]
    assert len(attempts) == 3 and len({pid for _, _, pid in attempts}) == 3
    (again := tmp_path / "again").mkdir()
    reason = guard_poor("leave", again, retries=1).calculate_many(some(1))[0][2]
    assert reason == "the worker process ended with exit status 3 (2 attempts)"


def test_scratch_folders_are_new_and_removed_and_kept_if_asked(tmp_path):
    calculator = guard_poor("write", tmp_path)
    folders = []
    for _ in range(2):
        calculator.calculate_many(some(1))
        folders.append((tmp_path / "where").read_text())
    assert folders[0] != folders[1] and all(Path(one).parent == tmp_path / "scratch" for one in folders)
    assert list((tmp_path / "scratch").iterdir()) == []
    for how in ("complain", "leave"):
        guard_poor(how, tmp_path).calculate_many(some(1))
        assert list((tmp_path / "scratch").iterdir()) == []
    reason = guard_poor("complain", tmp_path, keep_failed=True).calculate_many(some(1))[0][2]
    (kept,) = (tmp_path / "scratch").iterdir()
    assert f"(files in {kept})" in reason and (kept / "density.dat").is_file()
    log = (kept / "calculation.log").read_text()
    assert "it does not converge" in log and "after 100 steps" in log


def test_workers_run_at_once():
    seconds, n = 0.4, 6
    calculator = Guarded("poor_calculators:toy", {"delay": seconds}, workers=3)
    calculator.calculate_many(some(3))  # starts them
    begin = time.monotonic()
    found = calculator.calculate_many(some(n))
    spent = time.monotonic() - begin
    assert 2 * seconds < spent < 0.8 * n * seconds
    for k, (energy, forces, reason) in enumerate(found):
        expected = calculate(PairToy(), some(n)[k])
        assert (energy, reason) == (expected[0], "") and np.array_equal(forces, expected[1])


def test_the_environment_reaches_the_workers(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_TASKS", "no")
    (program := tmp_path / "program.py").write_text(poor_calculators.PROGRAM)
    (program.parent / "keep.py").write_text(
        program.read_text() + f"open({str(tmp_path / 'told')!r}, 'w').write(tasks)\n"
    )
    arguments = {"program": str(tmp_path / "keep.py"), "launcher": ""}
    calculator = Guarded("poor_calculators:with_files", arguments, environment={"FAKE_TASKS": "yes"})
    assert calculator.calculate_many(some(1))[0][2] == ""
    assert (tmp_path / "told").read_text() == "yes"


def test_workers_end_with_the_process_that_started_them(tmp_path):
    code = (
        f"import sys; sys.path[:0] = [{str(HERE)!r}]\n"
        "from pathlib import Path\n"
        "from test_pool import guard_poor, some\n"
        f"calculator = guard_poor('hang', Path({str(tmp_path)!r}))\n"
        "calculator.calculate_many(some(1))\n"
    )
    search = subprocess.Popen([sys.executable, "-c", code])
    last = time.monotonic() + 30
    while not (tmp_path / "child").exists() or not (tmp_path / "child").read_text():
        assert time.monotonic() < last and search.poll() is None
        time.sleep(0.05)
    worker = int(next(tmp_path.glob("attempt-*")).name.split("-")[2])
    search.send_signal(signal.SIGKILL)
    search.wait()
    assert gone(worker) and gone(int((tmp_path / "child").read_text()))


def test_a_caller_that_takes_no_more_ends_what_runs(tmp_path):
    calculator = guard_poor("hang", tmp_path, workers=2, times=1)
    structures = some(3)
    results = calculator.as_completed(structures[i] for i in range(3))
    assert next(results)[1][2] == ""  # another one came first
    results.close()
    assert gone(int((tmp_path / "child").read_text()))
    assert not calculator._pool or all(worker.process.poll() is None for worker in calculator._pool)
    assert list((tmp_path / "scratch").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("emt", None, {"workers": 0}), "workers must be a whole number of at least 1"),
        (("emt", None, {"retries": 1.5}), "retries must be a whole number"),
        (("emt", None, {"timeout": 0}), "timeout must be a positive number of seconds"),
        (("emt", None, {"environment": {"A": 1}}), "environment must map text to text"),
        ((EMT(), None, {}), "pass its class and arguments"),
        ((lambda: EMT(), None, {}), "must be picklable"),
    ],
)
def test_senseless_settings(arguments, words):
    make, inside, settings = arguments
    with pytest.raises(ConfigurationError, match=words):
        Guarded(make, inside, **settings)


@pytest.mark.parametrize(
    ("make", "inside", "words"),
    [
        ("emtt", {}, "no calculator named 'emtt'"),
        ("emt", {"cutoff": 3}, "takes no argument named 'cutoff'"),
        ("poor_calculators:nothing", {}, "nothing to call that is named 'nothing'"),
        ("poor_calculators:no_calculator", {}, "must return an ASE calculator, but it returned 3"),
    ],
)
def test_what_cannot_be_made_is_told_before_the_search(make, inside, words):
    with pytest.raises(ConfigurationError, match=words):
        search(Guarded(make, inside))


# ---- in a search ---------------------------------------------------------------------------------------------


def search(calculator, store=None, **changes) -> Search:
    settings = {"propose": Scatter(6), "acquire": closeness, "choose": 4, "evaluate": Evaluate(calculator)}
    return Search(PROBLEM, **{**settings, "store": store, "seed": 2, **changes})


def finished(calculator, store=None, iterations: int = 3) -> Batch:
    with search(calculator, store) as one:
        one.run(iterations - one.iteration)
        return one.data


@cache
def plain() -> Batch:
    """The rows of an uninterrupted search without workers."""
    return finished(PairToy())


@pytest.fixture(scope="module")
def uneven():
    """Three workers that answer in another order than they are asked."""
    calculator = Guarded("poor_calculators:uneven", workers=3)
    yield calculator
    calculator.close()


def test_the_rows_do_not_depend_on_the_number_of_workers(tmp_path, uneven):
    for calculator in (Guarded("poor_calculators:uneven", workers=1), uneven):
        path = tmp_path / f"{calculator.workers}.journal"
        assert same_rows(finished(calculator, path), plain())
        stored = read(path).rows
        assert same_rows(stored, plain().with_columns(seconds=stored.columns["seconds"]))
        assert np.all(np.diff(stored.columns["seconds"]) >= 0)


def test_failures_are_rows_in_their_place():
    settings = {"fails": 0.3}
    expected = finished(PairToy(**settings))
    assert 0 < np.sum(expected.columns["status"] == FAILED) < len(expected)
    assert same_rows(finished(Guarded("poor_calculators:toy", settings, workers=2)), expected)


def test_settings_of_the_pool_may_change_and_those_of_the_calculator_may_not(tmp_path):
    first = Guarded("poor_calculators:toy", {"fails": 0.1}, workers=1)
    assert describe(first) == describe(Guarded("poor_calculators:toy", {"fails": 0.1}, workers=3, timeout=5, retries=1))
    assert describe(first) != describe(Guarded("poor_calculators:toy", {"fails": 0.2}))
    assert describe(Guarded(poor_calculators.toy)) == describe(Guarded(poor_calculators.toy))


@pytest.mark.parametrize("evaluations", [1, 6])
def test_budgets_stop_inside_an_iteration_and_resume(tmp_path, evaluations, uneven):
    path = tmp_path / "a.journal"
    with search(uneven, path) as one:
        found = one.run(3, evaluations=evaluations)
        assert (found.evaluations, found.reason) == (evaluations, "evaluations")
    assert same_rows(finished(uneven, path), plain())


def test_a_stop_lets_what_runs_arrive(tmp_path):
    calculator = Guarded("poor_calculators:toy", {"delay": 0.2}, workers=2)
    with search(calculator, tmp_path / "a.journal") as one:
        asked = one.ask()
        original = one._record

        def stop_at_the_first(*arguments):
            one.request_stop("enough")
            return original(*arguments)

        one._record = stop_at_the_first
        with pytest.raises(Exception, match="enough"):
            one.evaluate(asked)
        assert 1 <= one.evaluations <= 3
    assert same_rows(finished(calculator, tmp_path / "a.journal"), plain())


def test_a_killed_search_repeats_only_what_was_in_flight(tmp_path):
    """Kills the process at several moments; the last, whole run has the rows of an uninterrupted one."""
    code = (
        f"import sys; sys.path[:0] = [{str(HERE)!r}]\n"
        "from test_pool import finished\n"
        "from thalweg.pool import Guarded\n"
        f"finished(Guarded('poor_calculators:poor', {{'how': 'write', 'folder': {str(tmp_path)!r}}}, workers=2),"
        f" {str(tmp_path / 'a.journal')!r})\n"
    )
    rng = np.random.default_rng(8)
    kills = 0
    while kills < 2:
        one = subprocess.Popen([sys.executable, "-c", code])
        before = len(list(tmp_path.glob("attempt-*")))
        last = time.monotonic() + 30
        while one.poll() is None and len(list(tmp_path.glob("attempt-*"))) <= before and time.monotonic() < last:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.005))
        one.kill()
        one.wait()
        kills += 1
        time.sleep(0.2)
    arguments = {"how": "write", "folder": str(tmp_path)}
    rows = finished(Guarded("poor_calculators:poor", arguments, workers=2), tmp_path / "a.journal")
    assert same_rows(rows, plain())
    calls = len(list(tmp_path.glob("attempt-*")))
    assert len(rows) <= calls <= len(rows) + 2 * kills


def test_relaxations_work_point_by_point():
    one = search(None, evaluate=Evaluate(PairToy(), 2))
    two = search(None, evaluate=Evaluate(Guarded("poor_calculators:toy", workers=2), 2))
    for either in (one, two):
        either.run(2)
    assert same_rows(one.data, two.data)


def test_any_calculator_with_calculate_many_is_given_all_at_once():
    class Batched(PairToy):
        def calculate_many(self, batch):
            sizes.append(len(batch))
            return [calculate(PairToy(), batch[i]) for i in range(len(batch))]

    sizes: list[int] = []
    assert same_rows(finished(Batched()), plain())
    assert sizes == [4, 4, 4]


# ---- launchers and real programs -----------------------------------------------------------------------------


def fake_srun(folder: Path) -> str:
    """A launcher that takes one option and becomes the program, as srun does on one node."""
    folder.mkdir()
    script = folder / "srun"
    script.write_text('#!/bin/sh\nFAKE_TASKS="$2"; export FAKE_TASKS\nshift 2\nexec "$@"\n')
    script.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def test_a_program_with_files_under_a_launcher(tmp_path):
    (program := tmp_path / "program.py").write_text(poor_calculators.PROGRAM)
    calculator = Guarded(
        "poor_calculators:with_files",
        {"program": str(program), "launcher": "srun -n 4"},
        workers=2,
        timeout=60,
        scratch=tmp_path / "scratch",
        environment={"PATH": fake_srun(tmp_path / "bin")},
    )
    batch = some(4)
    for k, (energy, forces, reason) in enumerate(calculator.calculate_many(batch)):
        assert reason == ""
        x = batch.positions_of(k)
        assert energy == pytest.approx(0.5 * np.sum(x**2), rel=1e-14)
        np.testing.assert_array_equal(forces, -x)
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_launched_program_that_hangs_is_ended(tmp_path):
    (program := tmp_path / "program").write_text(f"echo $$ > {tmp_path / 'pid'}\nexec sleep 1000\n")
    calculator = Guarded(
        "poor_calculators:WithFiles",
        {"command": f"srun -n 4 sh {program}"},
        timeout=3.0,
        environment={"PATH": fake_srun(tmp_path / "bin")},
    )
    calculator.check()  # what takes time is loaded before the second that it has
    assert "timeout" in calculator.calculate_many(some(1))[0][2]
    assert gone(int((tmp_path / "pid").read_text()))


def gpaw_python() -> str:
    """An interpreter that has GPAW: this one, or that of THALWEG_GPAW_PYTHON (its NumPy and ASE may be others)."""
    python = os.environ.get("THALWEG_GPAW_PYTHON", sys.executable)
    plain = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if subprocess.run([python, "-c", "import gpaw"], capture_output=True, env=plain).returncode != 0:
        pytest.skip(f"{python} has no GPAW (THALWEG_GPAW_PYTHON may name another; see docs/calculators.md)")
    return python


def run_gpaw(tmp_path, monkeypatch, command: str) -> Guarded:
    """The calculator of docs/calculators.md, with settings that are coarse and fast."""
    page = HERE.parent / "docs" / "calculators.md"
    code = re.search(r"```python\n(# gpaw_parallel.py.*?)```", page.read_text(), re.S).group(1)
    assert "h=0.2, xc" in code
    (tmp_path / "gpaw_parallel.py").write_text(code.replace("h=0.2, xc", "h=0.25, xc"))
    monkeypatch.syspath_prepend(tmp_path)
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    return Guarded(
        "gpaw_parallel:Parallel", {"command": command}, timeout=300, environment=environment, keep_failed=True
    )


@pytest.mark.skipif(not (HERE.parent / "docs").is_dir(), reason="the documents are not beside the tests")
def test_gpaw(tmp_path, monkeypatch):
    calculator = run_gpaw(tmp_path, monkeypatch, gpaw_python())
    energies = []
    for distance in (0.65, 0.75, 1.05):
        atoms = molecule("H2", vacuum=2.5)
        atoms.set_distance(0, 1, distance)
        atoms.calc = calculator
        energies.append(atoms.get_potential_energy())
        force = atoms.get_forces()[1, 2] - atoms.get_forces()[0, 2]
    assert energies[1] < min(energies[0], energies[2])  # the bond length of H2 is 0.75 angstrom in PBE
    assert abs(force) > 1.0  # stretched: the atoms attract each other
    launcher = shutil.which("mpirun")
    if launcher is None:
        pytest.skip("there is no mpirun: GPAW was tried without it")
    monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT", "1")
    monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
    atoms.calc = run_gpaw(tmp_path, monkeypatch, f"{launcher} --oversubscribe -np 2 {gpaw_python()}")
    assert atoms.get_potential_energy() == pytest.approx(energies[2], abs=1e-4)


def test_gfn1_xtb_energy_and_forces():
    pytest.importorskip("tblite", reason='tblite is not installed: pip install "thalweg[xtb]"')
    atoms = molecule("CH3CH2OH")
    atoms.rattle(0.05, seed=2)
    atoms.calc = Guarded("gfn1-xtb")
    forces, step = atoms.get_forces(), 1e-4
    direction = np.random.default_rng(4).normal(size=forces.shape)
    energies = []
    for sign in (-1, 1):
        moved = atoms.copy()
        moved.positions += sign * step * direction
        moved.calc = atoms.calc
        energies.append(moved.get_potential_energy())
    # self-consistency is converged to about 1e-6 eV
    assert (energies[1] - energies[0]) / (2 * step) == pytest.approx(-np.sum(forces * direction), abs=2e-2)


def test_gfn1_xtb_does_not_remember_the_structure_before():
    pytest.importorskip("tblite", reason='tblite is not installed: pip install "thalweg[xtb]"')
    from thalweg.calculators import make_calculator

    def energies(order):
        calculator, found = make_calculator("gfn1-xtb"), {}
        for seed in order:
            atoms = molecule("CH3CH2OH")
            atoms.rattle(0.15, seed=seed)
            atoms.calc = calculator
            found[seed] = atoms.get_potential_energy()
        return found

    assert energies([1, 2, 3]) == energies([3, 2, 1])


def test_charges_that_run_away_are_a_failed_calculation():
    """Self-consistency ends with ten valence electrons on one carbon here, 17 eV below the best isomer."""
    pytest.importorskip("tblite", reason='tblite is not installed: pip install "thalweg[xtb]"')
    from ase.calculators.calculator import CalculationFailed as FailedInAse
    from thalweg.calculators import make_calculator

    heavy = "6.8 6.4  8.0 6.2  8.0 7.6  4.8 4.8  5.0 3.0  3.8 4.2  5.6 5.6"
    hydrogen = "4.4 3.6  5.0 2.0  5.8 2.8  5.6 4.4  3.8 2.6  2.8 4.0  3.8 5.4"
    flat = np.array(f"{heavy} {hydrogen}".split(), float).reshape(-1, 2)
    calculator = make_calculator("gfn1-xtb")
    atoms = Atoms("C6NH7", np.column_stack([flat, np.zeros(len(flat))]), calculator=calculator)
    with pytest.raises(FailedInAse, match=r"ran away|not converged"):  # how it ends may hang on the machine
        atoms.get_potential_energy()
    atoms.calc = Guarded("gfn1-xtb", retries=0)
    with pytest.raises(CalculationFailed, match=r"ran away|not converged"):
        atoms.get_potential_energy()
    numbers = np.array([1, 6, 9, 16, 79])
    calculator._check_charges(numbers, np.array([-1.4, -4.4, 7.0, 6.0, 30.0]))
    for atom, charge, electrons in ((0, 1.6, "-0.6"), (1, -5.98, "10.0"), (3, -2.6, "8.6")):
        charges = np.zeros(5)
        charges[atom] = charge
        with pytest.raises(FailedInAse, match=f"{electrons} valence electrons on atom {atom}"):
            calculator._check_charges(numbers, charges)


def test_gfn1_xtb_without_its_package_says_what_to_install(monkeypatch):
    from thalweg.calculators import make_calculator

    monkeypatch.setitem(sys.modules, "tblite", None)
    monkeypatch.setitem(sys.modules, "tblite.ase", None)
    for name in ("gfn1-xtb", "tblite"):
        with pytest.raises(ConfigurationError, match=r'pip install "thalweg\[xtb\]"'):
            make_calculator(name)


# ---- configuration files -------------------------------------------------------------------------------------


def configuration(**calculator) -> Configuration:
    data = {"problem": {"symbols": "Au4", "box": 6.0}, "calculator": {"name": "emt", **calculator}}
    return Configuration.from_dict(data)


def test_four_keys_of_a_configuration_put_a_calculator_into_workers(tmp_path, monkeypatch):
    monkeypatch.setenv("PLACE", str(tmp_path))
    settings = {"workers": 2, "timeout": 600, "retries": 1, "scratch": "$PLACE/scratch"}
    one = configuration(name="lj", sigma=2.5, **settings)
    calculator = one.make_calculator()
    assert isinstance(calculator, Guarded) and calculator.arguments == {"sigma": 2.5}
    assert (calculator.workers, calculator.timeout, calculator.retries) == (2, 600, 1)
    assert calculator.scratch == tmp_path / "scratch"
    (path := tmp_path / "again.toml").write_text(one.to_toml())
    again = Configuration.load(path)
    assert again.to_dict() == one.to_dict() and again.calculator == one.calculator
    assert type(configuration().make_calculator()) is EMT
    with one.make_search(seed=0, store=None) as guarded:
        guarded.run(2)
        assert np.isfinite(guarded.best_energy)


@pytest.mark.parametrize(
    ("calculator", "words"),
    [
        ({"workers": 0}, r"calculator.workers: .*at least 1"),
        ({"workers": "two"}, r"calculator.workers: expected a whole number"),
        ({"timeout": -1}, r"calculator.timeout: .*greater than 0"),
        ({"retries": 1.5}, r"calculator.retries: expected a whole number"),
        ({"scratch": 3}, r"calculator.scratch: expected a text"),
        ({"scratch": "$NOT_THERE_AT_ALL/x"}, r"calculator.scratch: a variable in .* is not set"),
        ({"scratch": "/dev/null/x"}, r"calculator.scratch: cannot make the folder"),
        ({"workers": 2, "cutoff": 3}, r"takes no argument named 'cutoff'"),
    ],
)
def test_mistakes_in_the_four_keys(calculator, words):
    with pytest.raises(ConfigurationError, match=words):
        configuration(**calculator).make_search(seed=0, store=None)
