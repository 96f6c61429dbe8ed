"""The commands around a search: new, export, import, figures, completion."""

from __future__ import annotations

import inspect
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import ase.db
import ase.io
import numpy as np
import pytest
from test_cli import call
from thalweg import campaign
from thalweg.config import RESERVED, Configuration, recipe_options
from thalweg.errors import ConfigurationError, ThalwegError
from thalweg.importing import read_structures
from thalweg.recipes import RECIPES
from thalweg.scaffold import commented_configuration, documented_options

TABLE, LIST = {0: 2.0, 5: 1.0}, [1, 2]
DATA = Path(__file__).parent / "data"

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
steps = 6
target = { energy = 5.7, tolerance = 0.5 }
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run folder of three short restarts."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "case.toml").write_text(CASE)
    campaign.prepare(Configuration.load(folder / "case.toml"), folder / "run")
    assert not campaign.run(folder / "run").failed
    campaign.summarise(folder / "run")
    return folder / "run"


# ---- new -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", RECIPES)
def test_new_file_is_accepted_as_it_is(method, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, "new", method)
    assert code == 0 and f"thalweg run {method}.toml" in out, err
    configuration = Configuration.load(f"{method}.toml")
    assert configuration.search.method == method and configuration.options == recipe_options(method)
    code, out, err = call(capsys, "run", f"{method}.toml", "--iterations", "1", "--restart-index", "0", "--out", "a")
    assert code == 0 and "1 iterations done" in out, err
    text = Path(f"{method}.toml").read_text()
    assert call(capsys, "new", method)[0] == 2 and Path(f"{method}.toml").read_text() == text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("method", RECIPES)
def test_new_file_names_and_explains_every_option(method):
    lines = commented_configuration(method).splitlines()
    documented = documented_options(RECIPES[method])
    for name, parameter in inspect.signature(RECIPES[method]).parameters.items():
        if name in RESERVED or parameter.kind is not parameter.KEYWORD_ONLY:
            continue
        place = next(k for k, line in enumerate(lines) if line.removeprefix("# ").startswith(f"{name} ="))
        assert lines[place - 1].startswith("# ") and lines[place - 1].endswith("]"), name
        assert documented[name][1], f"the docstring of {method} does not explain {name}"


def test_new_writes_tables_and_lists_inline(monkeypatch, capsys):
    def scheduled(problem, calculator, *, store=None, seed=0, kappa: dict[int, float] = TABLE, sizes: list[int] = LIST):
        """A recipe without a Parameters section."""

    monkeypatch.setitem(RECIPES, "scheduled", scheduled)
    code, out, _ = call(capsys, "new", "scheduled", "-o", "-")
    assert code == 0 and "kappa = { 0 = 2.0, 5 = 1.0 }" in out and "sizes = [1, 2]" in out
    assert "# Kappa. [a table from iteration to value" in out
    code, _, err = call(capsys, "new", "gofe", "-o", "-")
    assert code == 2 and "Did you mean 'gofee'?" in err


# ---- export --------------------------------------------------------------------------------------------------


def test_export_all_best_within_and_a_single_journal(finished, tmp_path, capsys):
    histories = campaign.histories(finished)
    energies = {index: history.rows.columns["energy"] for index, history in histories.items()}
    everything = np.concatenate([energies[index] for index in sorted(energies)])
    lowest = everything.min()

    def exported(*arguments, source=finished, name="out.extxyz"):
        out = tmp_path / name
        out.unlink(missing_ok=True)
        code, _, err = call(capsys, "export", source, "-o", out, *arguments)
        assert code == 0, err
        return ase.io.read(out, ":")

    found = exported()
    np.testing.assert_allclose([atoms.get_potential_energy() for atoms in found], everything, atol=1e-8)
    rows = histories[1].rows
    one = next(atoms for atoms in found if atoms.info["restart"] == 1 and atoms.info["evaluation"] == 3)
    np.testing.assert_allclose(one.positions, rows.positions_of(2), atol=1e-7)  # extxyz has eight digits
    np.testing.assert_allclose(one.get_forces(), rows[2].atom_columns["forces"], atol=1e-7)
    best = exported("--best")
    assert [atoms.info["restart"] for atoms in best] == [0, 1, 2]
    np.testing.assert_allclose(
        [atoms.get_potential_energy() for atoms in best], [energies[i].min() for i in range(3)], atol=1e-8
    )
    close = exported("--within", "0.5")
    assert 0 < len(close) < len(found) and len(close) == np.sum(everything <= lowest + 0.5)
    assert len(exported("--best", "--within", "0")) == 1
    alone = exported(source=finished / "restarts" / "002" / "store.journal")
    np.testing.assert_allclose([atoms.get_potential_energy() for atoms in alone], energies[2], atol=1e-8)
    exported("--best", name="best.db")
    row = ase.db.connect(tmp_path / "best.db").get(restart=1)
    assert row.energy == energies[1].min() and row.evaluation == int(np.argmin(energies[1])) + 1
    assert not list(tmp_path.glob(".part*"))


def test_what_cannot_be_exported(finished, tmp_path, capsys):
    (tmp_path / "other.txt").write_text("nothing of ours")
    for arguments, words in [
        ((finished, "-o", tmp_path / "other.txt"), "exists already"),
        ((tmp_path / "other.txt", "-o", tmp_path / "a.extxyz"), "not a thalweg store"),
        ((tmp_path / "nowhere", "-o", tmp_path / "a.extxyz"), "does not exist"),
        ((finished, "-o", tmp_path / "a.nonsense"), "cannot write"),
        ((finished, "-o", tmp_path / "no" / "a.db"), "cannot write"),
    ]:
        code, _, err = call(capsys, "export", *arguments)
        assert code == 2 and words in err and len(err.splitlines()) == 1, err
    assert not (tmp_path / "a.extxyz").exists()


# ---- import --------------------------------------------------------------------------------------------------


def test_agox_database(tmp_path, capsys):
    """Against ASE's own EMT: energies and forces must be those of the positions that came out."""
    from ase.calculators.emt import EMT

    structures, left_out = read_structures(DATA / "agox_au2ni2.db")
    assert len(structures) == 16 and left_out == 0  # four iterations of AGOX, first point and three steps each
    for atoms in structures:
        assert atoms.get_chemical_formula() == "Au2Ni2" and atoms.pbc.tolist() == [True, True, False]
        np.testing.assert_array_equal(atoms.cell.array, np.diag([12.0, 13.0, 14.0]))
        assert atoms.constraints[0].index.tolist() == [0, 1]
        again = atoms.copy()
        again.set_constraint()
        again.calc = EMT()
        assert abs(again.get_potential_energy() - atoms.get_potential_energy()) < 1e-10
        np.testing.assert_allclose(again.get_forces()[2:], atoms.calc.results["forces"][2:], atol=1e-10)
    assert [atoms.info["iteration"] for atoms in structures] == np.repeat([1, 2, 3, 4], 4).tolist()

    out = tmp_path / "out.extxyz"
    code, said, err = call(capsys, "import", DATA / "agox_au2ni2.db", "-o", out)
    assert code == 0 and "16 structures" in said, err
    written = ase.io.read(out, ":")
    np.testing.assert_allclose(
        [atoms.get_potential_energy() for atoms in written],
        [atoms.get_potential_energy() for atoms in structures],
        atol=1e-8,
    )
    assert call(capsys, "import", DATA / "agox_au2ni2.db", "-o", out)[0] == 2  # never overwrites


def test_importing_leaves_the_database_and_its_pickles_alone(tmp_path):
    copy = tmp_path / "copy.db"
    shutil.copy(DATA / "agox_au2ni2.db", copy)
    with sqlite3.connect(copy) as database:
        poison = b"cposix\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR."
        database.execute("UPDATE other_key_values SET value = ?", (poison,))
    database.close()
    before = copy.read_bytes()
    assert len(read_structures(copy)[0]) == 16
    assert copy.read_bytes() == before and not (tmp_path / "ran").exists()


def test_ase_databases_and_extxyz_and_what_has_no_energy(finished, tmp_path, capsys):
    for name in ("all.db", "all.extxyz"):
        assert call(capsys, "export", finished, "-o", tmp_path / name)[0] == 0
    energies = [
        [atoms.get_potential_energy() for atoms in read_structures(tmp_path / name)[0]]
        for name in ("all.db", "all.extxyz")
    ]
    np.testing.assert_allclose(energies[0], energies[1], atol=1e-8)
    structures = ase.io.read(tmp_path / "all.extxyz", ":")[:3]
    structures[1].calc = None
    ase.io.write(tmp_path / "some.extxyz", structures)
    kept, left_out = read_structures(tmp_path / "some.extxyz")
    assert len(kept) == 2 and left_out == 1
    structures[1].write(tmp_path / "none.extxyz")
    with pytest.raises(ConfigurationError, match="none with an energy"):
        read_structures(tmp_path / "none.extxyz")
    with pytest.raises(ConfigurationError, match=r"Did you mean 'some\.extxyz'"):
        read_structures(tmp_path / "soem.extxyz")


@pytest.mark.parametrize(
    "change, words",
    [
        ("UPDATE structures SET positions = x'00' WHERE id = 2", "positions must be 96 bytes"),
        ("UPDATE structures SET cell = 'text'", "cell must be 72 bytes, but it is a str"),
        ("UPDATE structures SET type = x'000000000000F87F000000000000F87F'", "whole numbers from 1 to 118"),
        ("UPDATE structures SET positions = replace(hex(positions), '3', '3')", "positions must be"),
        ("UPDATE structures SET template_indices = x'0000000000005940'", "from 0 to 3"),
        ("UPDATE structures SET energy = NULL", "none with an energy"),
        ("ALTER TABLE structures DROP COLUMN forces", None),
        ("ALTER TABLE structures DROP COLUMN cell", "lacks cell"),
        ("ALTER TABLE structures RENAME TO others", "neither a database of AGOX"),
    ],
)
def test_damaged_agox_databases(change, words, tmp_path):
    copy = tmp_path / "copy.db"
    shutil.copy(DATA / "agox_au2ni2.db", copy)
    with sqlite3.connect(copy) as database:
        database.execute(change)
    database.close()
    if words is None:
        assert all("forces" not in atoms.calc.results for atoms in read_structures(copy)[0])
    else:
        with pytest.raises(ThalwegError, match=words):
            read_structures(copy)


# ---- figures, completion -------------------------------------------------------------------------------------


def test_figures_as_files(finished, tmp_path, capsys):
    code, out, err = call(capsys, "report", finished, "--figures", tmp_path / "figures")
    assert code == 0, err
    names = ["success", "energy", "restarts", "stages"]
    files = {path.name for path in (tmp_path / "figures").iterdir()}
    assert files == {f"{name}.{ending}" for name in names for ending in ("png", "svg")}
    for name in files:
        raw = (tmp_path / "figures" / name).read_bytes()
        assert len(raw) > 3000 and (raw.startswith(b"\x89PNG") if name.endswith("png") else b"<svg" in raw)
        assert name in out
    assert "<svg" in (finished / "report.html").read_text()


def test_completion_is_offered_and_loads_nothing_heavy(tmp_path):
    environment = {**os.environ, "_THALWEG_COMPLETE": "complete_bash", "COMP_WORDS": "thalweg rep", "COMP_CWORD": "1"}
    code = (
        "import sys; sys.argv[0] = 'thalweg'\n"
        "import atexit; from thalweg import cli\n"
        "atexit.register(lambda: print([n for n in ('ase', 'scipy', 'matplotlib') if n in sys.modules], file=sys.stderr))\n"
        "cli.main()"
    )
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=20)
    assert told.stdout.split() == ["report"], told.stderr
    assert told.stderr.strip() == "[]"


def test_bash_completes_commands_options_and_recipes():
    """What a press of TAB gives in bash, by the script that users install."""
    bash, command = shutil.which("bash"), Path(sys.executable).with_name("thalweg")
    if bash is None or not command.exists():
        pytest.skip("there is no bash, or the command is not beside the interpreter")
    script = """
source <(env _THALWEG_COMPLETE=source_bash thalweg)
complete -p thalweg > /dev/null || exit 1
for line in "re" "run --restart-" "new b"; do
    COMP_WORDS=(thalweg $line)
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
    _thalweg_completion thalweg
    echo "${COMPREPLY[*]}"
done
"""
    path = {"PATH": f"{command.parent}:{os.environ['PATH']}"}
    done = subprocess.run([bash, "-c", script], env={**os.environ, **path}, capture_output=True, text=True, timeout=60)
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert lines[-1] == "basin_hopping" and lines[0].split() == ["resume", "report"], done.stdout + done.stderr


def test_export_to_a_format_that_nobody_knows(finished, tmp_path, capsys):
    code, _, err = call(capsys, "export", finished, "-o", tmp_path / "a.foo")
    assert code == 2 and "ASE has no format '.foo'" in err and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_database_keeps_what_its_entries_are_called(finished, tmp_path, capsys):
    assert call(capsys, "export", finished, "-o", tmp_path / "a.db", "--best")[0] == 0
    assert call(capsys, "import", tmp_path / "a.db", "-o", tmp_path / "b.extxyz")[0] == 0
    assert [atoms.info["restart"] for atoms in ase.io.read(tmp_path / "b.extxyz", ":")] == [0, 1, 2]
    one = ase.io.read(tmp_path / "b.extxyz")
    one.info |= {"natoms": 4, "id": 3, "5": "no name", "text": "12"}  # names and values that ASE's databases refuse
    one.write(tmp_path / "c.extxyz")
    assert call(capsys, "import", tmp_path / "c.extxyz", "-o", tmp_path / "c.db")[0] == 0


def test_a_search_without_one_success_is_a_failure(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("broken_calculator.py").write_text(
        "from ase.calculators.emt import EMT\n\n\nclass Broken(EMT):\n"
        "    def calculate(self, *arguments, **options):\n        raise RuntimeError('no licence')\n"
    )
    Path("case.toml").write_text(CASE.replace('"emt"', '"broken_calculator:Broken"'))
    code, _, err = call(capsys, "run", "case.toml", "--restarts", "1")
    assert code == 1 and "not one evaluation has succeeded" in err
