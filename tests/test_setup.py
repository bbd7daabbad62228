"""The set-up files agree with each other."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def constraints():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {
        r.name.lower().replace("_", "-"): str(r.specifier).lstrip("=")
        for r in (Requirement(line) for line in lines if line.strip() and not line.startswith("#"))
    }


def test_constraints_hold_a_tested_version_of_every_dependency():
    pinned = constraints()
    wanted = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(Version(pinned[requirement.name.lower()])), requirement


def test_environment_yml_installs_the_project_and_nothing_else():
    env = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert env["channels"][0] == "conda-forge"
    conda = [d for d in env["dependencies"] if isinstance(d, str)]
    pip = next(d["pip"] for d in env["dependencies"] if isinstance(d, dict))
    assert len(conda) == 2 and "pip" in conda  # python and pip: everything else stands in pyproject.toml once
    python = next(d for d in conda if d.startswith("python="))
    assert SpecifierSet(PROJECT["requires-python"]).contains(python.split("=")[1] + ".0")
    assert pip == ["--constraint constraints.txt", "--editable .[test]"]


@pytest.mark.parametrize("version,fits", [("3.10", False), ("3.11", True), ("3.13", True), ("3.14", False)])
def test_the_set_up_takes_the_pythons_that_the_project_takes(version, fits, tmp_path):
    assert SpecifierSet(PROJECT["requires-python"]).contains(f"{version}.1") == fits
    python, code = tmp_path / "python", f"import sys; sys.version_info = ({version.replace('.', ', ')}, 1)"
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exec {sys.executable} -c "{code}; $2"\necho asked "$@"; exit 9\n')
    python.chmod(0o755)
    result = subprocess.run(
        ["sh", "scripts/setup.sh", tmp_path / "venv"],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(python)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == (9 if fits else 2), result.stderr  # it goes on to make the environment, or says no
    assert fits or "Python 3.11, 3.12 or 3.13 is needed" in result.stderr


def test_ci_calls_the_readmes_command():
    assert "make test" in (ROOT / ".ci/run").read_text()
    readme = (ROOT / "README.md").read_text()
    assert "make run" in readme and "make test" in readme


def test_every_path_in_the_readmes_tree_exists():
    tree = re.search(r"```\n(notebooks/.*?)```", (ROOT / "README.md").read_text(), re.S).group(1)
    for line in tree.splitlines():
        for name in re.findall(r"^(\S+)", line):
            assert (ROOT / name).exists(), name


DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "LOG.md", ROOT / "srlm_utils/seed_data/DATA_CARD.md", *DOCS]


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_link_of_a_page_leads_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for target in re.findall(r"\]\((?!https?://)([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


def test_the_readme_names_every_page():
    readme = (ROOT / "README.md").read_text()
    assert [p.name for p in DOCS if f"](docs/{p.name})" not in readme] == []


def test_the_tests_that_faults_names_exist():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs/faults.md").read_text()))
    assert named and [n for n in named if not (ROOT / f"tests/{n}.py").exists()] == []


def test_light_modules_do_not_import_torch():
    code = (
        "import sys; import srlm_utils.metrics, srlm_utils.pairs, srlm_utils.plots, srlm_utils.params, "
        "srlm_utils.plan, srlm_utils.report, srlm_utils.judge, srlm_utils.step, srlm_utils.cli; "
        "print([m for m in ('torch', 'transformers', 'trl', 'peft') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
