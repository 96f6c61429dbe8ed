"""The code in README.md and docs/ runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks() -> list:
    found = []
    for page in PAGES:
        for k, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.S)):
            if "my_cluster" not in code:  # stands for the reader's own machine
                found.append(pytest.param(code, id=f"{page.name}-{k}"))
    return found


@pytest.mark.parametrize("code", blocks())
def test_block_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = tmp_path / "block.py"
    module.write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    import importlib
    import sys

    sys.modules.pop("block", None)
    importlib.import_module("block")


def test_every_document_exists_and_links_lead_somewhere():
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
