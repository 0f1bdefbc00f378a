"""Promises about the project as a whole: imports, packaging, what files may say."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

PROJECT = Path(__file__).resolve().parent.parent
LAYERS = ("stores", "student", "teachers", "distill", "cli")
"""Each may import those before it, and itself."""


def sources() -> list[Path]:
    return [PROJECT / "cli.py", *(f for p in LAYERS[:-1] for f in (PROJECT / p).rglob("*.py"))]


def imported_packages(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_imports_point_one_way() -> None:
    for path in sources():
        layer = path.relative_to(PROJECT).parts[0].removesuffix(".py")
        later = set(LAYERS[LAYERS.index(layer) + 1 :])
        assert not imported_packages(path) & later, path


def test_training_loads_neither_teachers_nor_distill_nor_ray() -> None:
    code = (
        "import sys, student.train; "
        "sys.exit(', '.join({'teachers', 'distill', 'ray'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_help_loads_neither_torch_nor_ray() -> None:
    code = (
        "import sys, cli\n"
        "try: cli.cli(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(', '.join({'torch', 'ray', 'zarr', 'av'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "distill" in result.stdout


def test_wheel_holds_the_packages_and_runs_elsewhere(tmp_path: Path) -> None:
    copy = tmp_path / "project"  # a build leaves folders behind where it runs
    for path in [
        *sources(),
        *(PROJECT / name for name in ("pyproject.toml", "README.md", "LICENSE")),
    ]:
        place = copy / path.relative_to(PROJECT)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    shutil.copytree(PROJECT / "tests", copy / "tests")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(copy)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("tinyhd-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {*LAYERS[:-1], "cli.py"}
    for path in sources():
        assert path.relative_to(PROJECT).as_posix() in names

    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)],
        check=True,
    )
    # What the project depends on is borrowed from here, behind what was installed there.
    scheme = {"base": str(environment), "platbase": str(environment)}
    there = Path(sysconfig.get_path("purelib", vars=scheme))
    (there / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    clean = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    command = [str(environment / "bin" / "tinyhd"), "--help"]
    result = subprocess.run(
        command, cwd=elsewhere, env=clean, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "distill" in result.stdout
    where = "import cli, distill.run; print(cli.__file__, distill.run.__file__)"
    result = subprocess.run(
        [python, "-c", where], cwd=elsewhere, env=clean, capture_output=True, text=True, check=True
    )
    assert result.stdout.count(str(environment)) == 2


def tracked_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("needs a git checkout to know which files belong to the project")
    return [PROJECT / name for name in listed.stdout.split("\0") if name]


def test_files_name_no_machine() -> None:
    home = re.compile(rb"(?<![\w.])/(home|root|work)/\w")
    for path in tracked_files():
        if path.is_file():
            assert not home.search(path.read_bytes()), path


def test_links_between_documents_lead_somewhere() -> None:
    for path in tracked_files():
        if path.suffix == ".md":
            for target in re.findall(r"\]\(([^)#\s]+)", path.read_text()):
                if "://" not in target:
                    assert (path.parent / target).exists(), f"{path}: {target}"


def test_pinned_versions_satisfy_the_ranges() -> None:
    pins = dict(
        line.split("==")
        for line in (PROJECT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"].values()
    listed = [
        *project["dependencies"],
        *(requirement for extra in optional for requirement in extra),
    ]
    wanted = [text for text in listed if not text.startswith(f"{project['name']}[")]
    for requirement in map(Requirement, wanted):
        assert requirement.name in pins, f"{requirement.name} is not pinned"
        assert requirement.specifier.contains(pins[requirement.name]), requirement
    documented = (PROJECT / "docs" / "dependencies.md").read_text()
    for requirement in map(Requirement, wanted):
        assert f"`{requirement.name}`" in documented, requirement.name
