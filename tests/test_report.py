"""The report of synthetic run folders: offline, complete, and readable by a browser where there is one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from thalweg import campaign
from thalweg.config import Configuration
from thalweg.errors import ThalwegError
from thalweg.report import _q_figure, chosen_structures, report, success_curves
from thalweg.store import Store

TARGET = 7.8049


def make_folder(path, *, restarts=6, target=True, seed=0, symbols="Au4Ni4", method="random_search"):
    """A run folder whose stores hold invented evaluations; returns the energies by restart."""
    search = {"method": method, "iterations": 50, "restarts": restarts, "seed": seed}
    if target:
        search["target"] = {"energy": TARGET, "tolerance": 0.001}
    data = {"problem": {"symbols": symbols, "box": 6.0}, "calculator": {"name": "emt"}, "search": search}
    configuration = campaign.prepare(Configuration.from_dict(data), path)
    problem = configuration.make_problem()
    folder = campaign.RunFolder(path)
    energies = {}
    for index in range(restarts):
        rng = np.random.default_rng([seed, index])
        values = TARGET + 0.01 + rng.exponential(2.0, 40 + 5 * index) * np.exp(-np.arange(40 + 5 * index) / 10)
        if index % 2 == 0:
            values[25 + index] = TARGET + 0.0005
        values[3] = np.nan
        meta = {
            "problem": problem.to_json(),
            "configuration": "{}",
            "seed": str(seed + index),
            "build": "test",
        }
        with Store(folder.store(index), meta, sync="grouped") as store:
            for k, energy in enumerate(values):
                failed = bool(np.isnan(energy))
                # atoms so far apart that no relaxation can bring them to the target
                spread = np.arange(8)[:, None] * 40.0 + rng.normal(0, 0.1, (8, 3))
                row = problem.batch(
                    spread[None],
                    energy=energy,
                    status=np.uint8(failed),
                    iteration=k,
                    origin="Random",
                    ticket=k,
                    point=0,
                ).with_atom_columns(forces=np.full((8, 3), np.nan if failed else 0.01))
                reason = "RuntimeError: <did not> converge" if failed else ""
                store.append("evaluation", k, {"row": row, "reason": reason}, timing={"evaluate": 0.01})
                store.append(
                    "told",
                    k,
                    {"kind": "search", "columns": {}, "kept": {}},
                    timing={"propose": 0.02, "evaluate": 0.01},
                )
        energies[index] = values
    return energies


class Page(HTMLParser):
    """Counts elements, collects addresses that would be loaded, and checks that elements close."""

    VOID = frozenset({"meta", "br", "hr", "img", "input", "link"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.loaded, self.open, self.scripts, self.words = {}, [], [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags[tag] = self.tags.get(tag, 0) + 1
        for name, value in attributes:
            if name in (
                "src",
                "href",
                "xlink:href",
                "action",
                "data",
                "poster",
                "srcset",
            ) and not value.startswith("#"):
                self.loaded.append((tag, name, value[:80]))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] == "script":
            self.scripts.append(text)
        else:
            self.words += text


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("report")
    energies = make_folder(base / "one")
    make_folder(base / "two", restarts=3, seed=50)
    return base, energies


def test_one_folder(folders):
    base, energies = folders
    out = report([base / "one"], base / "one.html")
    text = out.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == [] and page.loaded == []  # well formed; nothing is loaded, from anywhere
    assert "default-src 'none'" in text
    styles = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    assert styles and not any("url(" in style or "@import" in style for style in styles)
    assert page.tags["svg"] == 4
    for words in [
        "Au4Ni4",
        "random_search",
        "emt",
        "true evaluations",
        "best energy (eV)",
        "Median evaluations",
    ]:
        assert words in page.words or words in text
    lowest = min(np.nanmin(values) for values in energies.values())
    assert f"{lowest:.4f} eV" in page.words
    assert str(sum(map(len, energies.values()))) in page.words
    assert "6 true evaluations failed" in page.words and "<did not> converge" in page.words  # escaped, not an element
    assert "tolerance = 0.001" in page.words  # the configuration


def test_numbers_are_those_of_the_histories(folders):
    base, energies = folders
    results = campaign.summarise(base / "one")
    delivered = {e["index"]: e["delivered_evaluation"] for e in results.restarts}
    assert delivered == {i: 26 + i if i % 2 == 0 else None for i in energies}
    curves = success_curves(results)
    assert curves["delivered"].successes == 3 and curves["delivered"].restarts == 6
    # nothing relaxes to the target from afar, so success is delivery
    assert [e["success_evaluation"] for e in results.restarts] == [delivered[i] for i in energies]
    summary = json.loads((base / "one" / "summary.json").read_text())
    assert summary["best_energy"] == min(np.nanmin(values) for values in energies.values())
    assert summary["evaluations"] == sum(map(len, energies.values()))
    assert [e["seed"] for e in summary["restarts"]] == list(range(6))
    assert all(not e["finished"] for e in summary["restarts"])
    from ase.io import read as ase_read

    best = ase_read(base / "one" / "best.extxyz", ":")
    found = [atoms.get_potential_energy() for atoms in best]
    np.testing.assert_allclose(found, sorted(np.nanmin(values) for values in energies.values()), atol=1e-6)
    assert best[0].get_forces().shape == (8, 3)


def test_structures_of_the_viewer(folders):
    base, energies = folders
    results = campaign.load_results(base / "one")
    chosen = chosen_structures([("one", results)])
    values = [entry[0] for entry in chosen]
    assert values == sorted(values) and len(chosen) <= 106
    for index, one in energies.items():  # the best of each restart is there
        assert (float(np.nanmin(one)), index) in [(entry[0], entry[2]) for entry in chosen]
    page = Page(report([base / "one"], base / "one.html").read_text(encoding="utf-8"))
    data = json.loads(next(script for script in page.scripts if script.startswith('{"meta"')))
    assert len(data["structures"]) == len(chosen)
    np.testing.assert_allclose(data["properties"]["energy"]["values"], values)
    assert data["properties"]["evaluation"]["values"] == [entry[3] for entry in chosen]


def test_several_folders_are_compared(folders):
    base, _ = folders
    page = Page(report([base / "one", base / "two"], base / "both.html").read_text(encoding="utf-8"))
    assert page.loaded == [] and "Comparison" in page.words
    assert page.tags["svg"] == 2 + 4 + 4
    data = json.loads(next(script for script in page.scripts if script.startswith('{"meta"')))
    assert set(data["properties"]["run"]["values"]) == {"one", "two"}


def test_without_chemiscope_the_rest_is_there(folders, monkeypatch):
    base, _ = folders
    find = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "chemiscope" else find(name, *a))
    page = Page(report([base / "one"], base / "plain.html").read_text(encoding="utf-8"))
    assert "pip install chemiscope" in page.words and page.tags["svg"] == 4 and "script" not in page.tags


def test_folder_without_target_or_evaluations(tmp_path):
    make_folder(tmp_path / "free", restarts=1, target=False)
    page = Page(report([tmp_path / "free"], tmp_path / "free.html").read_text(encoding="utf-8"))
    assert "Median" not in page.words and page.tags["svg"] == 2
    make_folder(tmp_path / "empty", restarts=1)
    shutil.rmtree(tmp_path / "empty" / "restarts")
    page = Page(report([tmp_path / "empty"], tmp_path / "empty.html").read_text(encoding="utf-8"))
    assert "No structure has been evaluated yet" in page.words


def test_a_damaged_store_is_named_and_the_others_are_reported(tmp_path):
    make_folder(tmp_path / "run", restarts=3)
    (tmp_path / "run" / "restarts" / "001" / "store.journal").write_bytes(
        b"not a database, but long enough to look at" * 40
    )
    results = campaign.summarise(tmp_path / "run")
    assert [entry["index"] for entry in results.restarts] == [0, 2]
    page = Page(report([tmp_path / "run"], tmp_path / "run.html").read_text(encoding="utf-8"))
    assert "restart 1:" in page.words


def test_what_cannot_be_reported(tmp_path):
    with pytest.raises(ThalwegError, match="at least one"):
        report([], tmp_path / "x.html")
    with pytest.raises(ThalwegError, match="does not exist"):
        report([tmp_path / "nowhere"], tmp_path / "x.html")
    with pytest.raises(ThalwegError, match="not a run folder"):
        report([tmp_path], tmp_path / "x.html")
    make_folder(tmp_path / "run", restarts=1)
    with pytest.raises(ThalwegError, match="given twice"):
        report([tmp_path / "run", tmp_path / "run"], tmp_path / "x.html")


ASLA = """
[problem]
symbols = "C4"
cell = [[5.0, 0, 0], [1.5, 4.4, 0], [0, 0, 10.0]]
pbc = [true, true, false]
box = { corner = [0, 0, 4.5], vectors = [[5.0, 0, 0], [1.5, 4.4, 0], [0, 0, 1.0]] }
[calculator]
name = "smooth-carbon"
[search]
method = "asla"
grid = 0.4
iterations = 3
"""


def test_an_agents_run_leaves_pictures_and_a_snapshot_to_go_on_from(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    (tmp_path / "first.toml").write_text(ASLA)
    campaign.prepare(Configuration.load(tmp_path / "first.toml"), tmp_path / "first")
    assert not campaign.run(tmp_path / "first", workers=1).failed
    out = report([tmp_path / "first"], tmp_path / "first.html").read_text()
    assert "Training of the agents" in out and "Q-maps along the best build" in out
    with np.load(tmp_path / "first/restarts/000/portrait.npz") as portrait:
        assert len(portrait["losses"]) >= 2 and len(portrait["q"]) == 4
        lengths, angle = np.linalg.norm(portrait["plane"], axis=1), portrait["plane"][0] @ portrait["plane"][1]
        assert np.allclose(lengths * portrait["q"].shape[2:], [5.0, np.hypot(1.5, 4.4)])
        assert np.isclose(angle / lengths.prod(), 1.5 / np.hypot(1.5, 4.4))

        plane, placed = portrait["plane"], portrait["placed"]
        counts = portrait["q"].shape[2:]
    # The picture is as skewed as the cell, and its atoms lie where they do.
    axes = _q_figure(campaign.load_results(tmp_path / "first")).axes[0]
    image = axes.images[0].get_transform() - axes.transData
    assert np.allclose(image.transform([counts, (counts[0], 0)]), [np.add([5.0, 0], [1.5, 4.4]), [5.0, 0]])
    ring = np.ravel([line.get_xydata() for line in axes.lines if line.get_markerfacecolor() == "none"])
    assert np.allclose(ring, (placed[0, 1:] + 0.5) @ plane)

    # A relative file is found beside the TOML file, and the run folder keeps a copy.
    (tmp_path / "second.toml").write_text(ASLA + 'transfer_from = "first/restarts/000/agent.npz"\n')
    campaign.prepare(Configuration.load(tmp_path / "second.toml"), tmp_path / "second")
    with np.load(tmp_path / "first/restarts/000/agent.npz") as snapshot:
        learned = snapshot["parameters"]
    (tmp_path / "first").rename(tmp_path / "moved")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert not campaign.run("../second", workers=1).failed
    (tmp_path / "second.toml").write_text((tmp_path / "second.toml").read_text().replace("first/", "moved/"))
    with Configuration.load(tmp_path / "second.toml").make_search(seed=3, store=None) as search:
        assert np.array_equal(search.models["agent"].trainer().parameters, learned)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_the_viewer_starts_in_a_browser(folders, tmp_path):
    base, _ = folders
    out = report([base / "one"], base / "browser.html")
    run = subprocess.run(
        [
            "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-unsafe-swiftshader", "--disable-quic",
            "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={tmp_path}", "--virtual-time-budget=10000", "--dump-dom", out.as_uri(),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert 'data-viewer="ready"' in run.stdout, run.stderr[-2000:]
    assert 'id="viewer-error" class="error" hidden' in run.stdout


def test_importing_the_report_leaves_matplotlib_alone():
    code = "import sys, thalweg.report; assert 'matplotlib' not in sys.modules and 'chemiscope' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
