"""The site: every notebook with outputs, nothing from the network, no link or picture that leads nowhere."""

import itertools
import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from medv.companion.reproduction.registry import all_nodes, find_node
from medv.companion.site.build import build, fenced, write_pages
from medv.companion.site.notebooks import page_of

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
PATIENCE = 90_000  # milliseconds; a busy machine may need them
NOTEBOOKS = ("33", "43")  # which lead to no other notebook


@pytest.fixture
def committed(root, tmp_path):
    """The committed results, as the folder of a run."""
    (tmp_path / "figures").symlink_to(root / "figures" / "tiny")
    return tmp_path


def cells_of(page: str) -> list[dict]:
    return json.loads(page)["cells"]


def outputs_of(page: str) -> list[dict]:
    return [output for cell in cells_of(page) for output in cell.get("outputs", ())]


@pytest.mark.parametrize("node", all_nodes(), ids=lambda node: node.name)
def test_a_notebook_that_was_not_executed_shows_each_committed_result_once_and_says_so(node, root, committed):
    page = page_of(root / "notebooks" / node.notebook, False, committed, node)
    there = [name for name in node.results if (committed / "figures" / f"{name}.json").exists()]
    assert len(outputs_of(page)) == len(there) > 0, f"`make figures` commits the results of {node.name}"
    assert sorted(re.findall(r"\(cell-(\w+)\)=", page)) == sorted(there)
    assert "Not executed for this page" in cells_of(page)[0]["source"].split("**The question.**")[0]


def test_a_result_stands_after_the_cell_that_names_it_and_those_of_a_loop_after_the_loop(root, committed):
    node = find_node("open_conversation", all_nodes())
    made = {}
    for cell in cells_of(page_of(root / "notebooks" / node.notebook, False, committed, node)):
        links = re.findall(r"\(cell-(\w+)\)=", cell["source"])
        made |= {name: None for name in links}
        if cell["cell_type"] == "code":
            made |= {name: cell["source"] for name, source in made.items() if source is None}
    assert '"table1"' in made["table1"] and '"fig01"' in made["fig01"] and '"table7"' in made["table7"]
    assert all("for name, example in zip" in made[name] for name in ("fig02", "fig06", "fig07", "fig08"))


def cell(source="", outputs=(), tags=(), kind="code"):
    made = {"cell_type": kind, "id": f"c{len(source)}", "metadata": {"tags": list(tags)}, "source": [source]}
    return made | ({"outputs": list(outputs), "execution_count": None} if kind == "code" else {})


@pytest.fixture
def executed(tmp_path):
    """A notebook as papermill leaves it: parameters of this machine, a progress bar, a widget, a table."""
    view = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "0%|      |"}
    outputs = [
        {"output_type": "display_data", "data": view, "metadata": {}},
        {
            "output_type": "execute_result",
            "data": view | {"text/html": ["<a href='../figures/fig01.svg'>", "x"]},
            "metadata": {},
        },
        {"output_type": "execute_result", "data": view, "metadata": {}},
        {"output_type": "stream", "name": "stdout", "text": ["<script>alert(1)</script>"]},
    ]
    cells = [
        cell("# Title\n\nText", kind="markdown"),
        cell('out = "/somewhere/runs/tiny"', tags=["injected-parameters"]),
        cell("show()", outputs),
    ]
    (tmp_path / "n.ipynb").write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    return tmp_path / "n.ipynb"


def test_an_executed_notebook_keeps_what_needs_no_kernel_folds_parameters_and_names_no_folder_of_a_machine(executed, tmp_path):
    page = page_of(executed, True, tmp_path, find_node("corruption", all_nodes()))
    first, second, third = outputs_of(page)
    assert (
        first["data"]["text/html"] == "<a href='../results/figures/fig01.svg'>x"
        and "widget" in second["data"]["text/html"].lower()
    )
    assert third["text"] == ["<script>alert(1)</script>"] and "0%|" not in json.dumps(second)
    folded = next(cell for cell in cells_of(page) if "out =" in cell["source"])
    assert "hide-input" in folded["metadata"]["tags"] and folded["source"] == 'out = "tiny"'
    assert "Not executed" not in page


def test_texts_of_data_are_escaped_and_no_text_closes_its_fence(root, tmp_path):
    (tmp_path / "figures").mkdir()
    node = find_node("twin", all_nodes())
    for kind in ("csv", "json"):
        text = (root / "figures" / "tiny" / f"twin.{kind}").read_text()
        about = {"kind": "table", "notebook": node.notebook, "caption": "<script>", "data": "<i>"}
        text = json.dumps(json.loads(text) | {"about": about}) if kind == "json" else "a\n<script>x\n"
        (tmp_path / "figures" / f"twin.{kind}").write_text(text)
    (shown,) = outputs_of(page_of(root / "notebooks" / node.notebook, False, tmp_path, node))
    assert "<script>" not in shown["data"]["text/html"] and shown["data"]["text/html"].count("&lt;script&gt;") == 2
    assert fenced("{raw} html", "a\n````\nb").startswith("`````{raw}") and fenced("x", "plain").startswith("```x")


def test_what_is_neither_run_nor_committed_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither .*nowhere nor .* is there"):
        write_pages(tmp_path / "nowhere", tmp_path / "pages")


def test_a_folder_that_is_no_site_is_kept(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="no site"):
        build(tmp_path / "tiny", tmp_path)
    assert (tmp_path / "mine.txt").exists()


def test_the_replication_is_a_page_of_its_own_where_it_is_committed(root, tmp_path):
    run = tmp_path / "tiny"
    write_pages(run, tmp_path / "without", NOTEBOOKS)
    assert (tmp_path / "without" / "replication.md").exists() == (
        "replication" in (tmp_path / "without" / "index.md").read_text()
    )
    shutil.copytree(root / "figures" / "tiny", run / "figures")
    for kind in ("csv", "json", "png"):
        shutil.copyfile(run / "figures" / f"twin.{kind}", run / "figures" / f"replication.{kind}")
    write_pages(run, tmp_path / "with", NOTEBOOKS)
    page = (tmp_path / "with" / "replication.md").read_text()
    assert "<table>" in page and "replication.png" in page and "replication" in (tmp_path / "with" / "index.md").read_text()


@pytest.fixture(scope="module")
def site(root, tmp_path_factory):
    """A site of two notebooks: one as if executed, with the committed results of `tiny` for the others."""
    place = tmp_path_factory.mktemp("site")
    for folder in ("notebooks", "state", "figures"):
        (place / "tiny" / folder).mkdir(parents=True)
    name = "33_repetition.ipynb"
    book = json.loads((root / "notebooks" / name).read_text(encoding="utf-8"))
    for ran in (cell for cell in book["cells"] if cell["cell_type"] == "code"):
        data = {"text/html": "<table class='dataframe'><tr><td>1</td></tr></table>", "text/plain": "1"}
        ran["outputs"] = [{"output_type": "execute_result", "data": data, "metadata": {}, "execution_count": 1}]
    (place / "tiny" / "notebooks" / name).write_text(json.dumps(book), encoding="utf-8")
    (place / "tiny" / "state" / "repetition.json").write_text("{}")
    (place / "old").mkdir()
    (place / "old" / "objects.inv").write_text("")
    (place / "site").symlink_to(place / "old")  # an earlier site, by a link: it is replaced where it lies
    assert build(place / "tiny", place / "site", only=NOTEBOOKS, options=("-W", "--keep-going")) == 0, "Sphinx warns"
    assert (place / "site").is_symlink()
    return place / "old"


class Links(HTMLParser):
    """What a page loads, where it leads, and the names that can be led to."""

    def __init__(self, path: Path):
        super().__init__()
        self.loads, self.leads, self.names = [], [], {"", "top"}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.names |= {found[key] for key in ("id", "name") if found.get(key)}
        address = found.get("src") or found.get("href")
        if address and not address.startswith("data:"):
            (self.leads if tag == "a" else self.loads).append(address)


@pytest.mark.slow
def test_the_site_loads_nothing_from_elsewhere_and_every_link_inside_it_resolves(site):
    pages = {path: Links(path) for path in site.rglob("*.html")}
    assert len(pages) > 25
    outside = [address for page in pages.values() for address in page.loads if "//" in address.split("?")[0]]
    assert outside == []
    broken = []
    for path, page in pages.items():
        for address in [*page.loads, *page.leads]:
            if re.match(r"\w+:", address):
                continue
            file, _, name = unquote(address).partition("#")
            target = (path.parent / file.split("?")[0]).resolve() if file else path
            if not target.is_file() or (target in pages and name not in pages[target].names):
                broken.append((path.name, address))
    assert not broken
    assert not [path for path in pages if re.search(r'"/(work|tmp|home|root)/', path.read_text())], "a path of this machine"


@pytest.mark.slow
def test_the_site_has_every_notebook_with_outputs_every_result_with_its_facts_and_the_code_in_order(site, root):
    for path in sorted((site / "notebooks").glob("[0-9]*.html")):
        text = path.read_text()
        assert "cell_output" in text and f"sources/{path.stem}.ipynb" in text
        assert ("Not executed for this page" in text) == (not path.name.startswith("33"))
    assert len(list((site / "notebooks").glob("[0-9]*.html"))) == len(NOTEBOOKS)
    gallery = (site / "results" / "index.html").read_text()
    for name in (result for node in all_nodes() if node.notebook.startswith(NOTEBOOKS) for result in node.results):
        page = (site / "results" / f"{name}.html").read_text()
        assert f"--only {name}" in page and "seed 0" in page and "&#34;versions&#34;" in page
        assert f"{name}.html" in gallery and (site / "results" / "figures" / f"{name}.json").is_file()
    assert len(list((site / "reading").glob("[1-5]-*.html"))) == 5
    assert "medv.diffusion.corruption.corrupt" in (site / "api" / "diffusion.html").read_text()
    assert "Not for clinical use" in (site / "licence.html").read_text()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium here: apt-get install chromium")
    with playwright.sync_playwright() as play:
        rules = "--host-resolver-rules=MAP * ~NOTFOUND"
        opened = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", rules])
        yield opened
        opened.close()


@pytest.mark.slow
def test_a_browser_opens_it_from_disk_without_network_in_light_and_dark_wide_and_narrow(site, browser):
    context = browser.new_context(offline=True)
    opened, failed = context.new_page(), []
    context.set_default_timeout(PATIENCE)
    opened.on("requestfailed", lambda request: failed.append(request.url))
    opened.on("request", lambda request: None if request.url.startswith(("file:", "data:")) else failed.append(request.url))
    opened.on("pageerror", lambda error: failed.append(str(error)))
    names = ["index", "notebooks/33_repetition", "notebooks/43_confidence", "results/index", "results/schedules"]
    for name in [*names, "reading/2-loss", "api/diffusion", "search"]:
        opened.goto((site / f"{name}.html").as_uri())
        if name.startswith("notebooks"):
            opened.wait_for_selector("mjx-container svg")
            opened.wait_for_function("!document.querySelector('.math:not(:has(mjx-container))')")  # no formula is left out
        for scheme, width in itertools.product(("light", "dark"), (1400, 390)):
            opened.set_viewport_size({"width": width, "height": 900})
            opened.emulate_media(color_scheme=scheme)
            assert opened.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 1, name
            lost = "[...document.images].filter(i => i.loading != 'lazy' && !i.naturalWidth).map(i => i.src)"
            assert not opened.evaluate(lost), (name, scheme, width)
            ground = opened.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (int(re.search(r"\d+", ground)[0]) < 60) == (scheme == "dark")
            if os.environ.get("SCREENS"):
                path = f"{os.environ['SCREENS']}/{name.replace('/', '_')}-{scheme}-{width}.png"
                opened.screenshot(path=path, full_page=True)
    assert not failed
    context.close()


@pytest.mark.slow
def test_the_search_of_the_site_works_from_disk(site, browser):
    context = browser.new_context(offline=True)
    context.set_default_timeout(PATIENCE)
    opened = context.new_page()
    opened.goto((site / "search.html").as_uri() + "?q=corruption")
    opened.wait_for_selector("#search-results li a")
    context.close()
