"""Every block of the README runs, in its order, and its links and table are in order."""

from __future__ import annotations

import re
import sys

import pytest
from page_blocks import ROOT, blocks, lines, parameters, run_block

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

README = "README.md"
TEXT = (ROOT / README).read_text(encoding="utf-8")
BLOB = "https://github.com/toll-plugin/toll_plugin/blob/main/"


@pytest.mark.parametrize(("kind", "code"), parameters(README))
def test_block(kind, code, clone, monkeypatch, capfd):
    if code.startswith('pip install ".[dev]"'):
        pytest.skip("this is the command that runs this test")
    run_block(kind, code, clone, monkeypatch)
    if "anomalib train" in code or "anomalib test" in code:
        assert "image_AUROC" in capfd.readouterr().out


def test_there_are_blocks_for_every_user():
    commands = [line.split()[1] for kind, code in blocks(README) if kind == "bash" for line in lines(code)]
    assert {"train", "test", "predict", "export"} <= {*commands}
    for module in ("toll_plugin.anomalib", "toll_plugin.pyod", "toll_plugin.core"):
        assert any(module in code for kind, code in blocks(README) if kind == "python")


def test_the_readme_is_short_and_its_table_can_be_written():
    assert len(TEXT.splitlines()) <= 250
    marks = ("<!-- line: contaminated -->\n", "<!-- table: main -->\n")
    assert [TEXT.count(mark) for mark in marks] == [1, 1]
    assert TEXT.count("<!-- end -->\n") == 2


def test_links_lead_somewhere_from_the_package_index_too():
    targets = re.findall(r"\]\(([^)]+)\)", TEXT)
    assert [target for target in targets if not target.startswith("https://")] == []
    raw = "https://raw.githubusercontent.com/toll-plugin/toll_plugin/main/"
    for target in targets:
        for start in (BLOB, BLOB.replace("/blob/", "/tree/"), raw):
            if target.startswith(start):
                assert (ROOT / target.removeprefix(start)).exists(), target


def test_urls_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {BLOB.removesuffix("/blob/main/")} == {
        re.sub(r"(/toll_plugin)/.*", r"\1", url) for url in project["urls"].values()
    }
