"""The index page: whole without network or other files, ours apart from the paper's, and no hole without its reason."""

import html
import re
from types import SimpleNamespace

import pandas as pd
import pytest

from medv.companion.figures import plots as figures
from medv.companion.reproduction.exhibits import gathered, overview
from medv.companion.reproduction.index import facts_of, write_index
from medv.companion.reproduction.registry import EXHIBITS, Node, all_nodes, find_node, makers
from medv.companion.reproduction.run import Run
from medv.profiles import get_profile


@pytest.fixture
def run(tmp_path):
    """A run folder with Table 2, Figure 9 in part, and a result of our own."""
    node = Node("toy", "toy.ipynb", "A toy", results=("table2", "fig09", "own"))
    run = Run(node, get_profile("smoke"), 3, tmp_path)
    frame = pd.DataFrame({"model": ["<b>ours</b>"], "open recall": [12.5]})
    run.table(frame, "table2", caption="Table 2, ours")
    picture = figures.table_figure(frame)
    run.figure(picture, "fig09", frame, caption="Lengths", gaps=["no endpoint: not judged"])
    run.figure(picture, "own", frame, caption="Our own")
    return run


def page_of(run):
    failed = Node("bad", "bad.ipynb", "Fails", results=("table5",))
    later = Node("later", "later.ipynb", "Later", results=("fig10",))
    items = [
        SimpleNamespace(node=run.node, status="done", note="", seconds=1.5),
        SimpleNamespace(node=failed, status="failed", note="ValueError: no <weights>", seconds=0.1),
        SimpleNamespace(node=later, status="waiting", note="", seconds=None),
    ]
    return write_index(run.out, "smoke", 0, items, EXHIBITS).read_text()


def card(page, name):
    return next(
        part for part in re.findall(r"<(?:a|div) class='card.*?</(?:a|div)>", page, re.DOTALL) if f"<b>{name}</b>" in part
    )


def test_the_page_needs_nothing_but_itself(run):
    page = page_of(run)
    assert "http" not in page and "<script" not in page and "<link" not in page
    assert all(source.startswith("data:image/png") for source in re.findall(r"src='([^']*)", page))
    for link in re.findall(r"href='([^'#][^']*)", page):
        assert (run.out / link).exists(), link


@pytest.mark.slow
def test_every_exhibit_has_a_card_and_every_hole_its_reason(run):
    page = page_of(run)
    assert all(card(page, name) for name in (*EXHIBITS, "own"))
    assert "ValueError: no &lt;weights&gt;" in card(page, "table5") and "hole" in card(page, "table5")
    assert "later.ipynb has not run here" in card(page, "fig10")
    assert "no notebook makes it yet" in card(page, "fig01")
    assert "in part: no endpoint: not judged" in card(page, "fig09") and "Missing: no endpoint" in page
    assert f"2 of the paper's {len(EXHIBITS)}" in page


def test_each_result_names_its_command_seed_profile_seconds_and_manifest(run):
    page = page_of(run)
    for name in ("table2", "fig09", "own"):
        article = re.search(rf"<article id='{name}'>.*?</article>", page, re.DOTALL)[0]
        assert f"medv reproduce --profile smoke --only {name}" in article
        assert "seed 3" in article and "1.5 s" in article and '"versions"' in html.unescape(article)
        assert f"figures/{name}.json" in article


def test_a_result_made_by_hand_names_the_command_with_its_seed_and_its_parameters_in_quotes(run):
    run.parameters = {"data": "a b; c", "init": None}
    run.table(pd.DataFrame({"a": [1]}), "own")
    other = SimpleNamespace(node=Node("by_hand", "toy.ipynb", "By hand"), status="done", seconds=1.0)
    command = facts_of(run.out, "own", "", other)["command"]
    assert command.endswith("-p profile smoke -p seed 3 -p data 'a b; c'")


def test_the_command_of_a_result_of_real_data_names_the_file_that_they_need(run):
    run.profile = get_profile("paper")
    run.table(pd.DataFrame({"a": [1]}), "own", data="real questions")
    item = SimpleNamespace(node=run.node, status="done", seconds=1.0)
    assert facts_of(run.out, "own", "", item)["command"] == "medv reproduce --profile paper --config FILE --only own --seed 3"


def test_the_papers_numbers_stand_in_a_block_of_their_own_and_texts_are_escaped(run):
    page = page_of(run)
    assert "<b>ours</b>" not in page and "&lt;b&gt;ours&lt;/b&gt;" in page
    article = re.search(r"<article id='table2'>.*?</article>", page, re.DOTALL)[0]
    ours, papers = article.split("<div class='paper'>")
    assert "12.5" in ours and "95.15" not in ours and "95.15" in papers
    assert "Table 5" in re.search(r"<article id='fig09'>.*?</article>", page, re.DOTALL)[0]
    assert "class='paper'" not in re.search(r"<article id='own'>.*?</article>", page, re.DOTALL)[0]


def test_the_report_names_what_is_absent_and_shows_the_rest(run):
    state = overview(run.out, EXHIBITS, makers(all_nodes())).set_index("name")
    assert state["here"].sum() == 2 and state.at["table2", "seed"] == 3
    assert state.at["fig09", "remark"] == "no endpoint: not judged"
    assert "has not run here" in state.at["table8", "remark"]
    assert gathered(run.out, EXHIBITS, "table").count("absent in this run") == 7
    assert "../figures/fig09.svg" in gathered(run.out, EXHIBITS, "fig")


def test_the_report_comes_last():
    assert find_node("report", all_nodes()).last
