"""Every block of the benchmarks' README and of the pages of results runs, in its order, on small data."""

from __future__ import annotations

import pytest
from page_blocks import ROOT, SMALL, beginning, blocks, lines, parameters, run_block

PAGES = ["benchmarks/README.md", *sorted(str(page.relative_to(ROOT)) for page in ROOT.glob("benchmarks/results/*.md"))]


def parameters_once():
    """The blocks of all pages, each once, without those of README.md, which test_readme.py runs."""
    known, found = {*blocks("README.md")}, []
    for block in (block for page in PAGES for block in parameters(page)):
        if block.values not in known:
            known.add(block.values)
            found.append(block)
    return found


@pytest.mark.parametrize(("kind", "code"), parameters_once())
def test_block(kind, code, clone, monkeypatch):
    run_block(kind, code, clone, monkeypatch)


def test_every_page_has_blocks():
    assert [page for page in PAGES if not blocks(page)] == []


def test_what_runs_small_is_on_a_page():
    pages = ("README.md", *PAGES)
    written = {
        beginning(line) for page in pages for kind, code in blocks(page) if kind == "bash" for line in lines(code)
    }
    assert SMALL.keys() <= written, SMALL.keys() - written


def test_an_unknown_command_fails(tmp_path, monkeypatch):
    with pytest.raises(AssertionError, match="SMALL has nothing for python -m benchmarks unheard_of"):
        run_block("bash", "python -m benchmarks unheard_of --jobs 2\n", tmp_path, monkeypatch)
