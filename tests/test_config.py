"""Configuration files: what is read, what is resolved, and one clear line for each mistake."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Literal

import numpy as np
import pytest
from thalweg.config import Configuration, parse_override, recipe_options, typed_options
from thalweg.errors import ConfigurationError

MINIMAL = """
[problem]
symbols = "Au4Ni4"
box = 6.0

[calculator]
name = "emt"
"""


def write(tmp_path, text, name="case.toml"):
    path = tmp_path / name
    path.write_text(textwrap.dedent(text))
    return path


def mistake(tmp_path, text, **options):
    with pytest.raises(ConfigurationError) as caught:
        Configuration.load(write(tmp_path, text), **options)
    return str(caught.value)


def test_defaults_are_resolved_and_survive_a_round_trip(tmp_path):
    configuration = Configuration.load(write(tmp_path, MINIMAL))
    assert configuration.search.method == "gofee" and configuration.search.restarts == 1
    assert configuration.options["kappa"] == 2.0  # the recipe's own default, spelt out
    again = Configuration.load(write(tmp_path, configuration.to_toml(), "again.toml"))
    assert again == configuration
    assert "None" not in configuration.to_toml()


@pytest.mark.parametrize("symbols", ["'Au4Ni4'", "{Au = 4, Ni = 4}"])
@pytest.mark.parametrize("box", ["6.0", "{corner = [1, 2, 3], vectors = [[6, 0, 0], [0, 6, 0], [0, 0, 6]]}"])
@pytest.mark.parametrize("cell", ["12", "[10, 11, 12]", "[[10, 0, 0], [0, 10, 0], [0, 0, 10.0]]"])
def test_every_form_of_a_problem(tmp_path, symbols, box, cell):
    text = f"[problem]\nsymbols = {symbols}\nbox = {box}\ncell = {cell}\n[calculator]\nname = 'emt'\n"
    configuration = Configuration.load(write(tmp_path, text))
    problem = configuration.make_problem()
    assert dict(problem.counts) == {"Au": 4, "Ni": 4}
    assert Configuration.load(write(tmp_path, configuration.to_toml(), "again.toml")) == configuration
    if "corner" in box:
        np.testing.assert_array_equal(problem.box_corner, [1, 2, 3])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("box =", "bxo ="), ["problem.bxo", "unknown key", "Did you mean 'box'?"]),
        (("[calculator]", "[calculater]"), ["[calculater]", "Did you mean 'calculator'?"]),
        (('name = "emt"', ""), ["calculator.name", "missing"]),
        (('symbols = "Au4Ni4"', ""), ["problem.symbols", "missing"]),
        (('"Au4Ni4"', "8"), ["problem.symbols", "formula", "got 8"]),
        (("box = 6.0", "box = 'large'"), ["problem.box", "edge length", '"large"']),
        (("box = 6.0", "box = 6.0\npbc = 'yes'"), ["problem.pbc", "true, false"]),
        (("box = 6.0", "box = 6.0\ncell = [1, 2]"), ["problem.cell", "three lengths"]),
        (("box = 6.0", "box = 6.0\nc1 = -1"), ["problem.c1", "greater than 0"]),
        (("box = 6.0", "box = 6.0\ntemplate = 'no.xyz'\ncell = 5.0"), ["problem.cell", "template"]),
        (("[problem]", "[problem"), ["not valid TOML"]),
    ],
)
def test_mistakes_in_problem_and_calculator(tmp_path, change, words):
    message = mistake(tmp_path, MINIMAL.replace(*change))
    assert message.startswith(str(tmp_path / "case.toml"))
    for word in words:
        assert word in message
    assert len(message.splitlines()) <= 2  # the misspelt section is also missing


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("metod = 'gofee'", ["search.metod", "Did you mean 'method'?"]),
        ("method = 'gofe'", ["search.method", "'gofe'", "Did you mean 'gofee'?"]),
        ("method = 'magic'", ["search.method", "basin_hopping, complementary_energy, gofee, random_search"]),
        ("kapa = 2.0", ["search.kapa", "Did you mean 'kappa'?"]),
        ("kappa = 'two'", ["search.kappa", "expected a number", '"two"']),
        ("restarts = 'ten'", ["search.restarts", "expected a whole number", '"ten"']),
        ("restarts = 4\nstop_when_agree = 5", ["search.stop_when_agree", "5 restarts cannot agree", "is 4"]),
        ("restarts = 4\nstop_when_agree = 1", ["search.stop_when_agree", "at least 2", "got 1"]),
        ("restarts = 2.5", ["search.restarts", "expected a whole number", "2.5"]),
        ("restarts = true", ["search.restarts", "expected a whole number", "true"]),
        ("restarts = 0", ["search.restarts", "at least 1", "got 0"]),
        ("seed = -1", ["search.seed", "at least 0"]),
        ("target = 7.8", ["search.target", "table"]),
        ("target = {enrgy = 7.8}", ["search.target.enrgy", "Did you mean 'energy'?"]),
        ("target = {energy = 7.8, tolerance = 'x'}", ["search.target.tolerance", "expected a number"]),
        ("polish_every = 1.5", ["search.polish_every", "expected a whole number", "1.5"]),
        ("classic = 1", ["search.classic", "expected true or false"]),
        ("kappa = 2026-01-01", ["search.kappa", "dates"]),
    ],
)
def test_mistakes_in_search(tmp_path, line, words):
    message = mistake(tmp_path, MINIMAL + f"\n[search]\n{line}\n")
    for word in words:
        assert word in message, message
    assert "\n" not in message.replace("missing\n", "")


def test_several_mistakes_give_a_line_each(tmp_path):
    message = mistake(tmp_path, MINIMAL + "\n[search]\nkapa = 1.0\nrestarts = 'x'\nmax_evaluations = 0\n")
    assert len(message.splitlines()) == 3
    assert all(line.startswith(str(tmp_path)) for line in message.splitlines())


def test_campaign_section_is_named_as_not_there_yet(tmp_path):
    assert "not in this version" in mistake(tmp_path, MINIMAL + "\n[campaign]\nsearch.kappa = [1, 2]\n")


def test_missing_file_names_its_neighbour(tmp_path):
    write(tmp_path, MINIMAL, "au4ni4.toml")
    with pytest.raises(ConfigurationError, match=r"Did you mean 'au4ni4.toml'"):
        Configuration.load(tmp_path / "au4ni.toml")
    with pytest.raises(ConfigurationError, match="thalweg resume"):
        Configuration.load(tmp_path)


def test_overrides_use_toml_values_and_win(tmp_path):
    path = write(tmp_path, MINIMAL + "\n[search]\ntarget = {energy = 1.0}\n")
    configuration = Configuration.load(
        path,
        overrides=[
            "search.seed=7",
            "search.method=basin_hopping",
            "search.target.stop=true",
            "problem.cell=[9, 9, 9]",
        ],
    )
    assert configuration.search.seed == 7 and configuration.search.method == "basin_hopping"
    assert configuration.search.target.stop and configuration.search.target.energy == 1.0
    assert configuration.problem.cell == [9, 9, 9]
    assert parse_override("a.b = 'x=y'") == {"a": {"b": "x=y"}}
    for bad in ["seed", "seed=3", "search.seed=", "search.seed=[1"]:
        with pytest.raises(ConfigurationError, match="--set"):
            parse_override(bad)


def test_with_search_changes_and_checks(tmp_path):
    configuration = Configuration.load(write(tmp_path, MINIMAL))
    assert configuration.with_search(restarts=5, iterations=None).search.restarts == 5
    with pytest.raises(ConfigurationError, match="restarts"):
        configuration.with_search(restarts=0)


def test_options_are_checked_against_the_signature_of_any_recipe(monkeypatch):
    from thalweg import recipes

    def custom(
        problem,
        calculator,
        *,
        store=None,
        seed: int = 0,
        weights: tuple[float, float] = (0.5, 0.5),
        mode: Literal["fast", "safe"] = "safe",
        schedule: int | Mapping[int, int] | None = None,
        hook: type(np.zeros(1)) = None,
    ):
        """A recipe."""

    monkeypatch.setitem(recipes.RECIPES, "custom", custom)
    assert recipe_options("custom") == {"weights": [0.5, 0.5], "mode": "safe"}
    plain = recipe_options("custom", {"schedule": {"0": 10, "5": 3}, "weights": [1, 2]})
    assert typed_options("custom", plain) == {
        "weights": (1.0, 2.0),
        "mode": "safe",
        "schedule": {0: 10, 5: 3},
    }
    for given, words in [
        ({"weights": [1, 2, 3]}, ["weights", "[a number, a number]"]),
        ({"mode": "slow"}, ["mode", '"fast" or "safe"', '"slow"']),
        ({"schedule": {"a": 1}}, ["schedule", "a whole number or a table from iteration"]),
        ({"hook": 1}, ["hook", "only be set from Python"]),
        ({"seed": 1}, ["seed", "unknown key"]),
        ({"problem": 1}, ["problem", "unknown key"]),
    ]:
        with pytest.raises(ConfigurationError) as caught:
            recipe_options("custom", given)
        assert all(word in str(caught.value) for word in words), str(caught.value)


def test_template_with_constraints(tmp_path):
    from ase.build import fcc111
    from ase.constraints import FixAtoms, FixedPlane
    from ase.io import write as ase_write

    slab = fcc111("Au", (2, 2, 3), vacuum=6.0, periodic=True)
    slab.set_constraint(
        [FixAtoms(mask=slab.get_tags() == 3), FixedPlane(int(np.argmax(slab.get_tags() == 1)), [0, 0, 1])]
    )
    ase_write(tmp_path / "slab.traj", slab)
    top = float(slab.positions[:, 2].max())
    text = f"""
    [problem]
    symbols = "Ni2"
    template = "slab.traj"
    box = {{corner = [0, 0, {top:.3f}], vectors = [5.77, 5.0, 4.0]}}
    [calculator]
    name = "emt"
    """
    problem = Configuration.load(write(tmp_path, text)).make_problem()
    fixed = problem.template.fixed
    assert fixed.all(axis=1).sum() == 4 and fixed.sum() == 4 * 3 + 1
    np.testing.assert_array_equal(problem.pbc, slab.pbc)
    message = ""
    with pytest.raises(ConfigurationError) as caught:
        Configuration.load(write(tmp_path, text.replace("slab.traj", "slap.traj"))).make_problem()
    message = str(caught.value)
    assert "problem.template" in message and "Did you mean 'slab.traj'?" in message
    (tmp_path / "broken.xyz").write_text("nonsense")
    with pytest.raises(ConfigurationError, match="expected a number of atoms"):
        Configuration.load(write(tmp_path, text.replace("slab.traj", "broken.xyz"))).make_problem()


def test_calculators_by_name(tmp_path, monkeypatch):
    (tmp_path / "mycalc.py").write_text(
        "from ase.calculators.lj import LennardJones\ndef make(sigma=1.0):\n    return LennardJones(sigma=sigma)\n"
    )
    monkeypatch.chdir(tmp_path)
    own = MINIMAL.replace('"emt"', '"mycalc:make"\nsigma = 2.5')
    calculator = Configuration.load(write(tmp_path, own)).make_calculator()
    assert calculator.parameters.sigma == 2.5
    for old, new, words in [
        ('"emt"', '"emtt"', ["calculator", "Did you mean 'emt'?"]),
        ('"emt"', '"mycalc:mak"', ["calculator", "Did you mean 'make'?"]),
        ('"emt"', '"lj"\nsigm = 1.0', ["calculator", "Did you mean 'sigma'?"]),
    ]:
        with pytest.raises(ConfigurationError) as caught:
            Configuration.load(write(tmp_path, MINIMAL.replace(old, new))).make_calculator()
        assert all(word in str(caught.value) for word in words), str(caught.value)
