"""Builds the site: the pages of `docs/`, and those that are made of a run, the notebooks and the code.

Sphinx reads a temporary folder; nothing is written into `docs/`. Where the run lacks a notebook or a result, what is committed
in `figures/` stands in, and the page says so.
"""

import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from medv.artifacts import PACKAGE, atomic_directory
from medv.companion.figures.tables import to_html
from medv.companion.figures.templates import template
from medv.companion.reproduction.exhibits import is_made, manifest_of, numbers_of
from medv.companion.reproduction.index import WORDS, facts_of
from medv.companion.reproduction.registry import EXHIBITS, all_nodes
from medv.companion.reproduction.reproduce import Progress
from medv.companion.site.notebooks import page_of, unbroken
from medv.companion.site.questions import questions_page
from medv.companion.studies.node import Node

ROOT = PACKAGE.parent
INCLUDED = ("contributing", "changelog")
"""Files of the source tree that are pages as they are."""
GALLERY = {True: "The paper's tables and figures", False: "Our own"}
"""Headings of the gallery: of exhibits of the paper, and of what is none."""


def build(run: str | Path, target: str | Path, *, only: tuple[str, ...] = (), options: tuple[str, ...] = ()) -> int:
    """Build the site of the run folder `run` into `target`, which it replaces; returns Sphinx's exit code.

    A `run` that does not exist leaves the committed results of `figures/NAME`, where NAME is that of the folder. `only`:
    notebooks, by the beginnings of their file names; of the API then only what imports no more than torch. `options` go to
    `sphinx-build`. Raises FileNotFoundError outside the source tree, and where there is neither a run nor a committed result;
    FileExistsError where `target` is something else than a site.
    """
    from sphinx.cmd.build import build_main

    if not (ROOT / "docs" / "conf.py").is_file():
        raise FileNotFoundError(f"{ROOT / 'docs'} is not there: the site is built from a clone of the source tree")
    target = Path(target).resolve()  # a link stays, and what it leads to is replaced
    if target.exists() and not (target / "objects.inv").is_file():
        raise FileExistsError(f"{target} is there and no site: give another folder, or remove it")
    with tempfile.TemporaryDirectory() as folder:
        pages = Path(folder, "pages")
        write_pages(Path(run), pages, only)
        made = Path(folder, "site")
        code = build_main(["-b", "html", "-q", *options, str(pages), str(made)])
        if code == 0:
            with atomic_directory(target) as new:
                shutil.copytree(made, new, ignore=shutil.ignore_patterns(".doctrees"), dirs_exist_ok=True)
    return code


def write_pages(run: Path, pages: Path, only: tuple[str, ...] = ()) -> None:
    """Write all that Sphinx reads into the new folder `pages`."""
    shutil.copytree(ROOT / "docs", pages)
    shutil.copyfile(PACKAGE / "companion" / "reproduction" / "results.css", pages / "static" / "results.css")
    shutil.copyfile(ROOT / "figures" / "screens" / "explorer.png", pages / "explorer.png")
    out = pages / "extra" / "results"  # copied to the site as it is
    committed = ROOT / "figures" / run.name
    for source in (committed, run / "figures"):
        if source.is_dir():
            shutil.copytree(source, out / "figures", dirs_exist_ok=True)
    if not out.is_dir():
        raise FileNotFoundError(f"neither {run} nor {committed} is there: `medv reproduce` makes a run")
    for page in (pages / "api").glob("*.rst"):
        if only and page.stem not in ("index", "diffusion"):
            page.unlink()
    nodes = [node for node in all_nodes() if not only or node.notebook.startswith(only)]
    _write_notebooks(nodes, run, out, pages)
    _write_results(nodes, run, out, pages / "results")
    _write_reading(pages / "reading")
    files = {name: ROOT / f"{name.upper()}.md" for name in INCLUDED}
    texts = {name: path.read_text(encoding="utf-8") for name, path in files.items() if path.is_file()}
    texts |= {"replication": _replication(out)} if is_made(out, "replication") else {}
    texts |= {} if only else {"questions": _questions(out / "figures")}
    lines = (pages / "index.md").read_text(encoding="utf-8").splitlines()
    for name in (*files, "replication", "questions"):
        if name in texts:
            _write(pages / f"{name}.md", texts[name])
        else:
            lines = [line for line in lines if line != name and f"({name}.md)" not in line]
    _write(pages / "index.md", "\n".join(lines))


def _write_notebooks(nodes: list[Node], run: Path, out: Path, pages: Path) -> None:
    """One page for each notebook, the notebooks themselves for download, and the list of them."""
    rows, sources = [], pages / "extra" / "sources"
    sources.mkdir()
    for node in nodes:
        plain, executed = ROOT / "notebooks" / node.notebook, run / "notebooks" / node.notebook
        ran = executed.is_file() and (run / "state" / f"{node.name}.json").is_file()
        shutil.copyfile(plain, sources / node.notebook)
        _write(pages / "notebooks" / node.notebook, page_of(executed if ran else plain, ran, out, node))
        made = ", ".join(f"[{name}](../results/{name}.md)" for name in node.results if is_made(out, name))
        rows.append(f"| {node.notebook[:2]} | [{node.title}]({node.notebook}) | {made} |")
    table = "\n".join(["| | notebook | makes |", "|---|---|---|", *rows])
    _write(pages / "notebooks" / "index.md", f"# Tutorials\n\n{table}\n\n{_contents(node.notebook for node in nodes)}")


def _write_results(nodes: list[Node], run: Path, out: Path, folder: Path) -> None:
    """The gallery, and a page for each result: command, seed, profile, data, manifest; what the run lacks is "committed"."""
    said = WORDS | {"done": "", "cached": "committed"}
    by_notebook = {node.notebook: node for node in nodes}
    made = {name: node for node in nodes for name in node.results}
    for path in sorted((out / "figures").glob("*.json")):  # what a notebook made with parameters of its own
        if (node := by_notebook.get(manifest_of(out, path.stem)["about"]["notebook"])) is not None:
            made.setdefault(path.stem, node)
    order = [name for name in EXHIBITS if name in made] + [name for name in made if name not in EXHIBITS]
    macros, cards = template("medv.companion.reproduction", "results.html.jinja").module, {True: "", False: ""}
    for name in order:
        here = is_made(out, name)
        state = "cached" if run.is_dir() and not is_made(run, name) else "done"
        item = Progress(made[name], state if here else "waiting", seconds=manifest_of(out, name)["seconds"] if here else None)
        facts = facts_of(out, name, EXHIBITS.get(name, ""), item, embed=False)
        cards[name in EXHIBITS] += macros.card(facts, said, f"{name}.html")
        if here:
            title = f"{name}: {EXHIBITS[name]}" if name in EXHIBITS else name
            made_by = f"[Notebook {made[name].notebook[:2]}: {made[name].title}](../notebooks/{made[name].notebook})"
            body = f"<div class='in-full'>{macros.in_full(facts, said)}</div>"
            _write(folder / f"{name}.md", f"# {title}\n\n{made_by}\n\n{_raw(unbroken(body))}")
    shown = [f"## {head}\n\n{_raw(f'<div class=cards>{cards[own]}</div>')}" for own, head in GALLERY.items() if cards[own]]
    text = "\n\n".join(["# Figures and tables", *shown, _contents(f"{name}.md" for name in order if is_made(out, name))])
    _write(folder / "index.md", text)


def _write_reading(folder: Path) -> None:
    """The five files of the README's "Read in this order", each whole on a page of its own."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Read in this order\n")[1].split("\n## ")[0]
    intro, names = section.split("\n1. ")[0].strip(), re.findall(r"^\d+\. `([^`]+)`: (.*)$", section, re.MULTILINE)
    pages = [f"{number}-{Path(name).stem}.md" for number, (name, _) in enumerate(names, 1)]
    for page, (name, said) in zip(pages, names, strict=True):
        title, module = Path(page).stem.replace("-", ". "), name.removesuffix(".py").replace("/", ".")
        text = f"# {title}\n\n{said[0].upper()}{said[1:]}\n`{name}`, in the reference: {{py:mod}}`{module}`.\n\n"
        _write(folder / page, text + fenced("{code-block} python", f":linenos:\n\n{(ROOT / name).read_text('utf-8')}"))
    rows = "\n".join(f"1. [`{name}`]({page}): {said}" for page, (name, said) in zip(pages, names, strict=True))
    _write(folder / "index.md", "\n\n".join(["# Read in this order", intro, rows, _contents(pages)]))


def _replication(out: Path) -> str:
    """The page of the effects over seeds of the whole pipeline: figure and table."""
    table = unbroken(f"<div class='scroll'>{to_html(numbers_of(out, 'replication'), digits=3)}</div>")
    picture = "<div class='in-full'><img alt='Effects by pipeline seed' src='results/figures/replication.png'></div>"
    said = "`medv replicate RUN RUN RUN` makes this page's table: what holds in every run is shown, everything else is open."
    return f"# Replication\n\n{said}\n\n{_raw(picture + table)}"


def _questions(figures: Path) -> str:
    """The page of questions; a result that it names leads to the cell that made it."""
    page = questions_page(figures)
    return re.sub(r"(?m)^\*Made by\*.*$", lambda line: re.sub(r"`(\w+)`", r"[`\1`](#cell-\1)", line[0]), page)


def _contents(pages: Iterable[str]) -> str:
    """A hidden table of contents, for the navigation."""
    return fenced("{toctree}", ":hidden:\n\n" + "\n".join(pages))


def _raw(page: str) -> str:
    return fenced("{raw} html", page)


def fenced(kind: str, text: str) -> str:
    """A directive of MyST around any text: the fence is longer than every run of backticks in it."""
    fence = "`" * (1 + max(2, *map(len, re.findall("`+", text) or [""])))
    return f"{fence}{kind}\n{text}\n{fence}\n"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
