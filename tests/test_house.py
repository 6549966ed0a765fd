"""The rules of the house, checked on the tree: floors, sizes, notebooks, environment, and a README whose table is true."""

import ast
import functools
import importlib.metadata
import itertools
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT

from medv.companion.reproduction.cache import Workshop, parameter_names
from medv.companion.reproduction.registry import all_nodes
from medv.profiles import PROFILES, get_profile

MAX_FILE, MAX_FUNCTION, MAX_CELLS, MAX_CELL = 450, 80, 15, 15
MAX_LIBRARY, MAX_TOTAL = 12_955, 28_985  # medv without phantoms and companion, and all of it: lower these as lines go


def sources(root):
    return sorted((root / "medv").rglob("*.py"))


def notebooks(root):
    return sorted((root / "notebooks").glob("*.ipynb"))


def test_a_module_imports_only_from_floors_below(root):
    done = subprocess.run([Path(sys.executable).with_name("lint-imports")], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0 and "0 broken" in done.stdout, done.stdout + done.stderr


def test_no_library_file_is_longer_than_450_lines(root):
    long = {path.name: n for path in sources(root) if (n := len(path.read_text().splitlines())) > MAX_FILE}
    assert not long


@pytest.mark.slow
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


def test_the_rooms_keep_their_sizes(root):
    lines = {path.relative_to(root / "medv"): len(path.read_text().splitlines()) for path in sources(root)}
    rooms = dict.fromkeys({path.parts[0] for path in lines}, 0)
    for path, count in lines.items():
        rooms[path.parts[0]] += count
    assert rooms["diffusion"] <= 1_900 and rooms["model"] <= 2_000
    library = sum(count for room, count in rooms.items() if room not in ("phantoms", "companion"))
    assert library <= MAX_LIBRARY and sum(rooms.values()) <= MAX_TOTAL, rooms


def test_the_declared_notebooks_are_the_ones_there_and_take_their_parameters(root, tmp_path):
    shop = Workshop(root / "notebooks", tmp_path, get_profile("tiny"), 0)
    assert {node.notebook for node in all_nodes()} == {path.name for path in notebooks(root)}
    for node in all_nodes():
        shop.check_parameters(node)
        assert {"profile", "seed", "out"} <= set(parameter_names(shop.notebooks / node.notebook))


@pytest.fixture(params=sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.name[:2])
def notebook(request):
    """The path of a notebook, its cells, and the texts of its Markdown cells."""
    cells = json.loads(request.param.read_text(encoding="utf-8"))["cells"]
    return request.param, cells, ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]


def test_a_notebook_is_short_clean_and_numbered(notebook):
    path, cells, texts = notebook
    book, code = json.loads(path.read_text(encoding="utf-8")), [cell for cell in cells if cell["cell_type"] == "code"]
    assert re.match(r"\d\d_[a-z0-9_]+\.ipynb", path.name) and book["nbformat"] == 4
    assert book["metadata"]["kernelspec"]["name"] == "python3" and "widgets" not in book["metadata"]
    assert len(cells) <= MAX_CELLS and all(len("".join(cell["source"]).splitlines()) <= MAX_CELL for cell in code)
    assert all(isinstance(cell["source"], list) and "".join(cell["source"]).strip() for cell in cells), "no list of lines"
    assert not any(cell.get("outputs") or cell.get("execution_count") or cell.get("attachments") for cell in cells)
    assert len({cell["id"] for cell in cells}) == len(cells) and len(code) + len(texts) == len(cells)
    tagged = [cell for cell in cells if cell["metadata"].get("tags")]
    assert [cell["metadata"] for cell in tagged] == [{"tags": ["parameters"]}] and cells.index(tagged[0]) == 1
    assert not re.search(r"<(script|img|iframe|style|a)\b|\]\(http", "".join(texts)), "raw HTML, or a link that leaves"


def test_a_notebook_opens_with_its_question_and_ends_with_what_to_try(notebook):
    _, _, texts = notebook
    for promised in ("**The question.**", "**The paper's claim.**", "**What it cannot show:**", "**Running time.**"):
        assert promised in texts[0]
    assert texts[0].startswith("# ") and re.search(r"## .*[Tt]ry next", texts[-1]) and "$$" in "".join(texts)


def test_headings_are_in_order_links_resolve_and_no_path_is_absolute(notebook):
    path, cells, texts = notebook
    levels = [len(found[1]) for text in texts for line in text.splitlines() if (found := re.match(r"(#+) ", line))]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    for link in re.findall(r"\]\((?!http)([^)]+)\)", "".join(texts)):
        assert (path.parent / link).exists(), f"{path.name} links to {link}"
    code = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert not re.search(r"""["'](/|~/|[A-Z]:\\)\w""", code)


def test_conda_takes_every_version_from_pyproject(root):
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    environment = yaml.safe_load((root / "environment.yml").read_text())
    plain = [item for item in environment["dependencies"] if isinstance(item, str)]
    (pip,) = [item["pip"] for item in environment["dependencies"] if isinstance(item, dict)]
    assert pip == ["-c constraints.txt", "-e .[all]"] and "all" in project["optional-dependencies"]
    (python,) = [item.removeprefix("python=") for item in plain if item != "pip"]
    least = tuple(map(int, project["requires-python"].removeprefix(">=").split(".")))
    assert tuple(map(int, python.split("."))) >= least


@functools.cache
def packages() -> dict[str, list[str]]:
    """The distributions that bring each module."""
    return importlib.metadata.packages_distributions()


def imports(paths, *, whole: bool = True) -> dict[str, set[str]]:
    """Each distribution that these files import, with the files; without `whole`, imports inside functions do not count."""
    known, found = packages(), {}
    for path in paths:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree) if whole else tree.body:
            named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            named += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for top in {name.split(".")[0] for name in named} - set(sys.stdlib_module_names) - {"medv"}:
                if not (path.parent / f"{top}.py").exists():
                    found.setdefault(known.get(top, [top])[0].lower().replace("_", "-"), set()).add(path.name)
    return found


@pytest.mark.slow
def test_pyproject_declares_what_is_imported_and_nothing_else(root):
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    groups = {"": project["dependencies"], **project["optional-dependencies"]}
    declared = {
        group: {re.match(r"[\w.-]+", item)[0].lower().replace("_", "-") for item in items} for group, items in groups.items()
    }
    everything = set.union(*declared.values()) - {"medv"}
    used = imports([*sources(root), *(root / "tests").glob("*.py"), *(root / "benchmarks").glob("*.py")])
    assert not {name: files for name, files in used.items() if name not in everything}
    # Declared for what they run: commands, the kernel, plugins of pytest, the theme and extensions of the site.
    run = {"ipykernel", "voila", "ruff", "import-linter", "pytest-timeout", "pytest-xdist", "playwright"}
    run |= {"myst-nb", "furo", "sphinx-mathjax-offline"}
    assert everything - set(used) == run
    core = [path for path in sources(root) if "companion" not in path.parts]
    assert set(imports(core, whole=False)) <= declared[""], "the library needs more than the plain install brings"


def test_torch_is_a_range_in_pyproject_and_one_version_in_the_constraints(root):
    (pin,) = [line for line in (root / "constraints.txt").read_text().splitlines() if line.startswith("torch==")]
    assert re.search(r'"torch>=[\d.]+,<\d+"', (root / "pyproject.toml").read_text())
    command = ["make", "-nB", "setup", "TORCH_INDEX=https://example.org"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert f'"{pin}"' in done.stdout and "-c constraints.txt -e '.[all]'" in done.stdout


def test_the_lock_names_every_requirement_and_the_versions_that_are_installed(root):
    lines = [line for line in (root / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {name.lower().replace("_", "-"): version for name, version in (line.split("==") for line in lines)}
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    declared = [item for group in (project["dependencies"], *project["optional-dependencies"].values()) for item in group]
    assert {re.match(r"[\w.-]+", item)[0].lower().replace("_", "-") for item in declared} - {"medv"} <= set(pins)
    found = {
        d.metadata["Name"].lower().replace("_", "-"): d.version.partition("+")[0] for d in importlib.metadata.distributions()
    }
    others = {name: found[name] for name in set(found) & set(pins) if found[name] != pins[name]}
    assert not others, "`make setup` did not install the locked versions"
    unpinned = set(found) - set(pins) - {"medv", "pip", "setuptools", "wheel"}
    assert not unpinned or torch.version.cuda, f"make lock: {unpinned}"


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


def test_documents_and_notebooks_name_only_files_that_exist(root):
    pages = [*root.glob("[CR]*.md"), *(root / "docs").rglob("*.md"), *notebooks(root)]
    named = {
        (page.name, name)
        for page in pages
        for name in re.findall(r"(?<![\w/])((?:medv|tests|benchmarks)/[\w./-]*\.\w+)", page.read_text(encoding="utf-8"))
    }
    made = "medv/companion/studies/reference_words.py"  # the example of CONTRIBUTING.md
    assert named and not {(page, name) for page, name in named if name != made and not (root / name).exists()}


def test_the_reading_order_of_the_readme_is_five_files_that_exist_and_are_short(root):
    section = (root / "README.md").read_text(encoding="utf-8").split("## Read in this order\n")[1].split("\n## ")[0]
    files = [root / name for name in re.findall(r"^\d+\. `([^`]+)`", section, re.MULTILINE)]
    assert len(files) == 5
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files) <= 750


def test_the_readme_offers_only_targets_and_profiles_that_exist(root):
    text = (root / "README.md").read_text(encoding="utf-8")
    makefile = (root / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z]+)\b", "\n".join(re.findall(r"`[^`]*`|^ *make .*$", text, re.MULTILINE)))) <= targets
    assert set(re.findall(r"(?:PROFILE=|--profile )(\w+)", text)) <= set(PROFILES)


@pytest.mark.slow
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
