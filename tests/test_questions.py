"""The page of open questions: its numbers are those of the CSV files, its links exist, what is missing is left out."""

import re
import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from medv.companion.reproduction.registry import all_nodes
from medv.companion.site.questions import QUESTIONS, escaped, moves, questions_page
from medv.companion.studies import loss_band
from medv.intervals import NOT_MEASURED, Estimate

NUMBER = re.compile(r"(?<![\w.-])[+-]?\d+(?:\.\d+)?(?![\w-])")
RESULTS = ("stage2", "fig10", "less_repetition", "chosen_length", "table_chosen_length", "lora_vs_full", "table_lora_vs_full")

WRITTEN = ("table_loss_band", "less_repetition", "table_chosen_length", "table_adaptation", "audit", "table2")
"""Those whose numbers stand in text."""
MADE_UP = ("adaptation", "table_adaptation", "loss_band", "table_loss_band")


@pytest.fixture
def figures(results, tmp_path):
    """A copy of `results`."""
    return shutil.copytree(results, tmp_path / "figures")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The committed results that the page reads, and made-up ones of notebooks 14 and 15."""
    tmp_path = tmp_path_factory.mktemp("results")
    for name in (*RESULTS, "audit", "table2"):
        shutil.copy(ROOT / "figures" / "tiny" / f"{name}.csv", tmp_path)
    arms = ["at once, aligned, uniform", "annealed, aligned, 1/t"]
    curve = [(arm, 100 * i, 9.0 - i - place / 7) for place, arm in enumerate(arms) for i in range(5)]
    pd.DataFrame(curve, columns=["arm", "tokens", "loss"]).to_csv(tmp_path / "adaptation.csv", index=False)
    head = ["attention", "alignment", "weights", "held-out masked cross-entropy (nats)", "adjacent duplicates (%)", "seeds"]
    rows = [[*arm.split(", "), f"5.{i} [4.{i}, 6.{i}]", f"2{i} [1{i}, 3{i}]", 3] for i, arm in enumerate(arms)]
    rows.append(["the text itself", "", "", "", "0.25", ""])
    pd.DataFrame(rows, columns=head).to_csv(tmp_path / "table_adaptation.csv", index=False)
    rng = np.random.default_rng(0)
    keys = [(t, n, s) for t in loss_band.TIMES for n in loss_band.NORMALIZATIONS for s in range(5)]
    frames = [
        pd.DataFrame({"step": range(1, 31), "loss": np.linspace(2, 1, 30) * (1 + rng.normal(0, 0.1, 30))}).assign(
            times=times, normalization=normalization, seed=seed
        )
        for times, normalization, seed in keys
    ]
    losses = pd.concat(frames, ignore_index=True)
    loss_band.band_of(losses, "masked", 300).to_csv(tmp_path / "loss_band.csv", index=False)
    loss_band.band_table(losses).to_csv(tmp_path / "table_loss_band.csv", index=False)
    return tmp_path


def numbers_of(page):
    """The numbers of the page as (text, value), without those of links, of names in code, of headings and of "95 %"."""
    text = re.sub(r"\[[^\]]*\]\([^)]*\)|`[^`]*`|^#.*$|\b(?:95|5 to 95) %", "", page, flags=re.MULTILINE)
    return [(found[0], float(found[0])) for found in NUMBER.finditer(text)]


def known_in(figures):
    """Every number that stands in a cell or a heading of the CSV files."""
    found = set()
    for path in figures.glob("*.csv"):
        found |= {float(text) for text in NUMBER.findall(path.read_text())}
        frame = pd.read_csv(path)
        found |= {float(x) for x in frame.select_dtypes("number").to_numpy().ravel() if np.isfinite(x)}
    return np.array(sorted(found))


def test_every_number_on_the_page_is_in_a_csv(figures):
    page, known = questions_page(figures), known_in(figures)
    shown = numbers_of(page)
    assert len(shown) > 150 and page.count("\n## ") == len(QUESTIONS) and "left out" not in page
    for text, value in shown:
        digits = len(text.partition(".")[2])
        assert (np.abs(known - value) <= 0.5000001 * 10.0**-digits).any(), f"{text} is in no CSV"


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("table_loss_band", r"\| sample \| iid \|"),
        ("stage2", r"The whole stage"),
        ("loss_band", r"scatters around the trend"),
        ("fig10", r"neighboring words (rises|falls|does)"),
        ("less_repetition", r"^\| \d+\.0 \|"),
        ("chosen_length", r"From the arm without"),
        ("table_chosen_length", r"hidden and scored"),
        ("lora_vs_full", r"LoRA r = 8"),
        ("table_lora_vs_full", r"LoRA r = 8"),
        ("adaptation", r"nats at the start"),
        ("table_adaptation", r"the worst"),
        ("audit", r"references as answers"),
        ("table2", r"first yes or no"),
    ],
)
def test_other_results_give_other_numbers(figures, name, pattern):
    before = questions_page(figures)
    path = figures / f"{name}.csv"
    first, *lines = path.read_text().splitlines()
    keys = re.compile(r"\d")
    if name not in WRITTEN:  # numeric columns; keys stay
        frame = pd.read_csv(path)
        kept = {"gen_length", "block_length", "steps", "tokens_per_step", "size", "tokens", "step", "scale"}
        for column in frame.select_dtypes("number").columns.difference(kept):
            frame[column] = frame[column] * 3 + 7
        frame.to_csv(path, index=False)
    else:
        path.write_text("\n".join([first, *(re.sub(r"(?<=[\d.])\d(?=[ %\],\"]|$)", _turned, line) for line in lines)]))
    after = questions_page(figures)
    assert keys.search(before) and before != after
    assert after.count("\n## ") == len(QUESTIONS), "a changed number is no missing result"
    changed = [(a, b) for a, b in zip(before.splitlines(), after.splitlines(), strict=True) if a != b]
    assert any(re.search(pattern, line) for pair in changed for line in pair), changed


def _turned(found):
    return str(9 - int(found[0]))


@pytest.mark.parametrize("name", [*RESULTS, *MADE_UP, "audit", "table2"])
def test_a_question_whose_results_are_missing_is_left_out_and_counted(figures, name):
    titles = re.findall(r"^## (.*)$", questions_page(figures), re.MULTILINE)
    (figures / f"{name}.csv").unlink()
    page = questions_page(figures)
    left = re.findall(r"^## (.*)$", page, re.MULTILINE)
    assert len(left) == len(titles) - 1 and set(left) < set(titles)
    assert page.endswith("this run lacks their results: 1.\n")


def test_a_folder_without_results_gives_a_page_without_questions(tmp_path):
    page = questions_page(tmp_path)
    assert "## " not in page and f"{len(QUESTIONS)}.\n" in page


def test_every_notebook_of_a_link_exists_and_makes_the_results_that_are_named(figures):
    page, made = questions_page(figures), {node.notebook: node.results for node in all_nodes()}
    links = re.findall(r"\]\((notebooks/[^)]+)\), ((?:`\w+`(?: and )?)+)", page)
    assert len(links) == sum(len(question.shown) for question in QUESTIONS) == page.count("](notebooks/")
    more = {node.notebook: {r for n in all_nodes() if n.notebook == node.notebook for r in n.results} for node in all_nodes()}
    for link, results in links:
        assert (ROOT / f"{link}.ipynb").is_file()
        assert set(re.findall(r"`(\w+)`", results)) <= more[f"{link.removeprefix('notebooks/')}.ipynb"], (link, made)


def test_issues_are_linked_and_text_of_a_cell_is_text(figures):
    page = questions_page(figures)
    for repo, number in [issue for question in QUESTIONS for issue in question.asked]:
        assert f"(https://github.com/{repo}/issues/{number})" in page
    assert escaped("[1, 2] [x](https://a.b)") == r"[1, 2] [x\](https://a.b)"
    assert escaped("a|b <script>*x*`y`$z$\n") == r"a\|b \<script>\*x\*\`y\`\$z\$"
    table = pd.read_csv(figures / "audit.csv")
    table.loc[table["check"] == "gaming", "reading"] = "<script>alert(1)</script>"
    table.to_csv(figures / "audit.csv", index=False)
    assert "<script>" not in questions_page(figures).replace(r"\<script>", "")


def test_a_value_that_was_not_measured_does_not_move():
    nothing, some = Estimate(np.nan, np.nan, np.nan), Estimate(2.0, 1.0, 3.0)
    assert moves(nothing, some).startswith(NOT_MEASURED) and moves(some, nothing).startswith(NOT_MEASURED)
    assert moves(some, Estimate(5.0, 4.0, 6.0)) == "rises, from 2.0 [1.0, 3.0] to 5.0 [4.0, 6.0]"
    assert moves(some, Estimate(2.5, 2.0, 3.0)).startswith("does not change")


def test_the_words_follow_the_intervals(figures):
    frame = pd.read_csv(figures / "fig10.csv")
    assert "falls, from" in questions_page(figures)
    frame[["low", "high"]] = [-1e6, 1e6]
    frame.to_csv(figures / "fig10.csv", index=False)
    page = questions_page(figures)
    part = page.partition("## Why does it repeat")[2].partition("\n## ")[0]
    assert part.count("does not change beyond the intervals") == 4 and "falls, from" not in part
