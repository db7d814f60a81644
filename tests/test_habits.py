"""The checks that run by themselves: `.ci/run`, the workflows, and what `pyproject.toml` declares."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

#: Where the distribution is not called as what one imports.
DISTRIBUTION = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}


# -- .ci/run -------------------------------------------------------------------------------------


@pytest.fixture
def scratch(tmp_path):
    """A checkout that its user has trained in, and programs in place of those that .ci/run calls."""
    clone, programs = tmp_path / "clone", tmp_path / "programs"
    (clone / ".ci").mkdir(parents=True)
    for name in (".ci/run", ".gitignore", "README.md"):
        (clone / name).write_bytes((ROOT / name).read_bytes())
    (clone / ".ci/run").chmod(0o755)
    (clone / "results").mkdir()
    (clone / "results/mine.ckpt").write_text("weeks of training")
    subprocess.run(["git", "init", "-q"], cwd=clone, check=True)
    programs.mkdir()
    stub = programs / "python3"
    stub.write_text(
        f'#!/bin/sh\necho "$(basename "$0") $*" >> {tmp_path}/called\n[ "$(basename "$0")" != "$BROKEN" ]\n'
    )
    for name in ("pip", "anomalib", "ruff", "mypy", "pytest"):
        (programs / name).symlink_to(stub)
    stub.chmod(0o755)
    # The README's first command leaves results where it runs.
    (programs / "anomalib").unlink()
    (programs / "anomalib").write_text("#!/bin/sh\nmkdir -p results && touch results/model.ckpt\n")
    (programs / "anomalib").chmod(0o755)
    return clone


def ci(clone, broken=""):
    path = f"{clone.parent / 'programs'}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "BROKEN": broken, "TMPDIR": str(clone.parent)}
    return subprocess.run([clone / ".ci/run"], env=environment, capture_output=True, text=True, check=False)


def test_ci_leaves_the_checkout_as_it_was(scratch):
    before = sorted(scratch.rglob("*"))
    done = ci(scratch)
    assert done.returncode == 0, done.stderr
    assert (scratch / "results/mine.ckpt").read_text() == "weeks of training"
    assert sorted(scratch.rglob("*")) == before
    assert sorted(path.name for path in scratch.parent.iterdir()) == ["called", "clone", "programs"]


def test_ci_runs_the_readmes_commands_and_all_checks(scratch):
    ci(scratch)
    called = (scratch.parent / "called").read_text().splitlines()
    assert [line for line in called if not line.startswith("python3 -m venv")] == [
        "pip install .",
        "pip install -q .[dev]",
        "ruff format --check .",
        "ruff check .",
        "mypy ",
        "pip install .[dev]",
        "pytest -n 2 --dist loadfile",
    ]


@pytest.mark.parametrize("program", ["pip", "ruff", "mypy", "pytest"])
def test_ci_fails_where_one_of_them_does(scratch, program):
    assert ci(scratch, broken=program).returncode != 0


# -- workflows -----------------------------------------------------------------------------------


WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_ask_for_little_and_pin_their_actions(path):
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"]
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            assert re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v1)", step.get("uses", "some/action@v1"))


def test_only_the_steps_that_need_it_may_write():
    granted = {
        (path.stem, name, permission)
        for path in WORKFLOWS
        for name, job in yaml.safe_load(path.read_text())["jobs"].items()
        for permission, level in job.get("permissions", {}).items()
        if level == "write"
    }
    assert granted == {("hosts", "main", "issues"), ("release", "publish", "id-token")}


def test_the_oldest_and_newest_versions_are_tested():
    matrix = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["tests"]["strategy"]["matrix"]
    runs = {(run["python"], run["resolution"]) for run in matrix["include"]}
    oldest = PROJECT["requires-python"].removeprefix(">=")
    assert {(oldest, "lowest-direct"), (oldest, "highest"), ("3.13", "highest")} <= runs


def test_hooks_before_a_commit_are_those_of_ci():
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert {hook["id"] for repository in repositories for hook in repository["hooks"]} == {
        "ruff-check",
        "ruff-format",
        "mypy",
    }


# -- dependencies --------------------------------------------------------------------------------


def name_of(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def declared(extras: list[str]) -> set[str]:
    """Names of the dependencies and those of ``extras``, with the extras that these name."""
    names = {name_of(requirement) for requirement in PROJECT["dependencies"]}
    while extras:
        for requirement in PROJECT["optional-dependencies"][extras.pop()]:
            if requirement.startswith("toll-plugin["):
                extras += requirement.removeprefix("toll-plugin[").rstrip("]").split(",")
            else:
                names.add(name_of(requirement))
    return names


def imported(folder: str) -> dict[str, str]:
    """Third-party packages that files below ``folder`` import, anywhere in them, and a file that does."""
    found = {}
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            else:
                modules = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            found |= {module.partition(".")[0]: str(path.relative_to(ROOT)) for module in modules}
    ours = {*sys.stdlib_module_names, "toll_plugin", "benchmarks"}
    return {DISTRIBUTION.get(name, name.replace("_", "-")): file for name, file in found.items() if name not in ours}


@pytest.mark.parametrize(
    ("folder", "extras"),
    [("toll_plugin", ["export", "plot", "scale"]), ("benchmarks", ["bench", "scale"])],
)
def test_what_is_imported_is_declared(folder, extras):
    names = declared(extras)
    assert {name: file for name, file in imported(folder).items() if name not in names} == {}


def test_hosts_are_bounded_at_their_next_minor_version():
    bounds = {name_of(requirement): requirement for requirement in PROJECT["dependencies"]}
    for host in ("anomalib", "pyod"):
        major, minor = re.search(r">=(\d+)\.(\d+)", bounds[host]).groups()
        assert f"<{major}.{int(minor) + 1}" in bounds[host]
