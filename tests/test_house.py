"""The rules of the house, checked on the tree: floors, sizes, notebooks, environment, and a README whose table is true."""

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from medv.companion.reproduction.cache import Workshop, check_parameters, parameter_names
from medv.companion.reproduction.registry import NODES, ordered
from medv.profiles import PROFILES, get_profile

MAX_FILE, MAX_FUNCTION, MAX_CELLS, MAX_CELL = 450, 80, 15, 15


def sources(root):
    return sorted((root / "medv").rglob("*.py"))


def notebooks(root):
    return sorted((root / "notebooks").glob("*.ipynb"))


def test_a_module_imports_only_from_floors_below(root):
    done = subprocess.run([Path(sys.executable).with_name("lint-imports")], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0 and "0 broken" in done.stdout, done.stdout + done.stderr


def test_no_library_file_is_longer_than_400_lines(root):
    long = {path.name: n for path in sources(root) if (n := len(path.read_text().splitlines())) > MAX_FILE}
    assert not long


def test_no_function_is_longer_than_80_lines(root):
    long = []
    for path in sources(root):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                start = node.body[0].end_lineno if ast.get_docstring(node) else node.lineno
                if node.end_lineno - start > MAX_FUNCTION:
                    long.append(f"{path.relative_to(root)}:{node.lineno} {node.name} ({node.end_lineno - start})")
    assert not long


def test_every_module_says_what_it_is(root):
    assert not [path for path in sources(root) if not ast.get_docstring(ast.parse(path.read_text()))]


def test_importing_medv_loads_neither_torch_nor_transformers():
    heavy = "{'torch', 'transformers', 'papermill', 'seaborn'}"
    code = f"import sys, medv, medv.profiles, medv.companion.reproduction.reproduce; print(*{heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_declared_notebooks_are_the_ones_there_and_take_their_parameters(root, tmp_path):
    shop = Workshop(root / "notebooks", tmp_path, get_profile("tiny"), 0)
    assert {node.notebook for node in ordered()} == {path.name for path in notebooks(root)}
    for node in NODES:
        check_parameters(node, shop)
        assert {"profile", "seed", "out"} <= set(parameter_names(shop.notebooks / node.notebook))


def test_notebooks_are_short_clean_and_numbered(root):
    wrong = []
    for path in notebooks(root):
        book = json.loads(path.read_text(encoding="utf-8"))
        code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
        checks = {
            "has stored outputs": any(cell.get("outputs") or cell.get("execution_count") for cell in code),
            "has widget state": "widgets" in book["metadata"],
            "is not on kernel python3": book["metadata"].get("kernelspec", {}).get("name") != "python3",
            f"has more than {MAX_CELLS} cells": len(book["cells"]) > MAX_CELLS,
            f"has a cell of over {MAX_CELL} lines": any(len("".join(c["source"]).splitlines()) > MAX_CELL for c in code),
            "has a source that is no list of lines": not all(isinstance(cell["source"], list) for cell in book["cells"]),
            "has no title": not "".join(book["cells"][0]["source"]).startswith("# "),
            "has no number": not re.match(r"\d\d_[a-z0-9_]+\.ipynb", path.name),
        }
        wrong += [f"{path.name} {what}" for what, is_so in checks.items() if is_so]
    assert not wrong


def test_conda_takes_every_version_from_pyproject(root):
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    environment = yaml.safe_load((root / "environment.yml").read_text())
    plain = [item for item in environment["dependencies"] if isinstance(item, str)]
    (pip,) = [item["pip"] for item in environment["dependencies"] if isinstance(item, dict)]
    assert pip == ["-c constraints.txt", "-e .[all]"] and "all" in project["optional-dependencies"]
    (python,) = [item.removeprefix("python=") for item in plain if item != "pip"]
    least = tuple(map(int, project["requires-python"].removeprefix(">=").split(".")))
    assert tuple(map(int, python.split("."))) >= least


def imports(paths, *, whole: bool = True) -> dict[str, set[str]]:
    """Each distribution that these files import, with the files; without `whole`, imports inside functions do not count."""
    known, found = importlib.metadata.packages_distributions(), {}
    for path in paths:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree) if whole else tree.body:
            named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            named += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for top in {name.split(".")[0] for name in named} - set(sys.stdlib_module_names) - {"medv"}:
                if not (path.parent / f"{top}.py").exists():
                    found.setdefault(known.get(top, [top])[0].lower().replace("_", "-"), set()).add(path.name)
    return found


def test_pyproject_declares_what_is_imported_and_nothing_else(root):
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    groups = {"": project["dependencies"], **project["optional-dependencies"]}
    declared = {
        group: {re.match(r"[\w.-]+", item)[0].lower().replace("_", "-") for item in items} for group, items in groups.items()
    }
    everything = set.union(*declared.values()) - {"medv"}
    used = imports([*sources(root), *(root / "tests").glob("*.py"), *(root / "benchmarks").glob("*.py")])
    assert not {name: files for name, files in used.items() if name not in everything}
    # Declared for what they run: commands, the kernel, plugins of pytest.
    run = {"ipykernel", "voila", "ruff", "import-linter", "pytest-timeout", "pytest-xdist", "playwright"}
    assert everything - set(used) - {"jinja2"} == run
    core = [path for path in sources(root) if "companion" not in path.parts]
    assert set(imports(core, whole=False)) <= declared[""], "the library needs more than the plain install brings"


def test_torch_is_a_range_in_pyproject_and_one_version_in_the_constraints(root):
    (pin,) = [line for line in (root / "constraints.txt").read_text().splitlines() if line.startswith("torch==")]
    assert re.search(r'"torch>=[\d.]+,<\d+"', (root / "pyproject.toml").read_text())
    command = ["make", "-nB", "setup", "TORCH_INDEX=https://example.org"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert f'"{pin}"' in done.stdout and "-c constraints.txt -e '.[all]'" in done.stdout


def test_all_names_the_fixed_packages(root):
    required = " ".join(importlib.metadata.requires("medv"))
    for package in ("jupyterlab", "papermill", "torch", "transformers", "deepspeed", "peft", "seaborn", "ipywidgets"):
        assert re.search(rf"\b{package}\b", required)


def test_the_readme_names_only_what_exists(root):
    text = (root / "README.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    named = [
        name for row in rows for name in re.findall(r"`([\w./-]+/[\w./-]*|\w+\.(?:py|md|toml|yml|ipynb))`", row.split("|")[1])
    ]
    links = [link for link in re.findall(r"\]\(([^)#\s]+)\)", text) if "://" not in link]
    assert named, "the README has no table of files (rows that begin with | `path`)"
    missing = [name for name in [*named, *links] if not (root / name).exists() and not (root / "medv" / name).exists()]
    assert not missing


def test_the_readme_offers_only_targets_and_profiles_that_exist(root):
    text = (root / "README.md").read_text(encoding="utf-8")
    makefile = (root / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z]+)\b", "\n".join(re.findall(r"`[^`]*`|^ *make .*$", text, re.MULTILINE)))) <= targets
    assert set(re.findall(r"(?:PROFILE=|--profile )(\w+)", text)) <= set(PROFILES)


def test_make_lab_asks_nobody_for_news_updates_or_extensions(root):
    from jupyterlab.handlers.announcements import NeverCheckForUpdate
    from jupyterlab.labapp import LabApp

    flags = re.findall(r"--LabApp\.\S+", subprocess.run(["make", "-n", "lab"], cwd=root, capture_output=True, text=True).stdout)
    app = LabApp()
    app.parse_command_line(flags)
    assert (app.news_url, app.check_for_updates_class, app.extension_manager) == (None, NeverCheckForUpdate, "readonly")


def test_no_tracked_file_holds_a_path_of_somebodys_machine(root):
    pattern = "/(work|tmp|farm|root|home|Users)/"  # a plain grep, so that this file needs no exception
    command = ["git", "grep", "-nIE", pattern, "--", ":!.ci/*", ":!tests/test_house.py"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode > 1:
        pytest.skip("not a git checkout")
    assert done.stdout == ""
