"""`medv replicate`: what comes again in runs with other seeds, against numbers worked out by hand."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from medv.artifacts import Manifest
from medv.cli import app
from medv.companion.reproduction.replication import _status, holm, pooled, replicate, student, write_replication
from medv.companion.reproduction.run import open_run
from medv.companion.studies.effects import COLUMNS
from medv.intervals import Estimate
from medv.profiles import get_profile
from medv.reading import DataError


@pytest.fixture
def runs(tmp_path):
    """Three runs with four effects: one that comes again, one that flips, one that is not measured, one never found."""
    values = {"steady": (10.0, 11.0, 10.5), "flips": (3.0, -3.0, 3.0), "absent": (np.nan,) * 3, "none": (0.1, -0.1, 0.0)}
    folders = []
    for seed in range(3):
        figures = tmp_path / f"run{seed}" / "figures"
        figures.mkdir(parents=True)
        rows = [(name, v[seed], v[seed] - 2, v[seed] + 2, "points", 100, 1, "") for name, v in values.items()]
        pd.DataFrame(rows, columns=COLUMNS).to_csv(figures / "effects_some_study.csv", index=False)
        about = {"notebook": "33_some_study.ipynb"}
        Manifest("effects_some_study", {"name": "tiny"}, seed, about=about).write(figures / "effects_some_study.json")
        folders.append(figures.parent)
    return folders


def test_an_effect_is_shown_only_where_every_run_agrees(runs):
    table = replicate(runs)[0].set_index("effect")
    assert table["status"].to_dict() == {"steady": "shown: higher", "flips": "open", "absent": "not measured", "none": "open"}
    assert table["again"].to_dict() == {"steady": "3 of 3", "flips": "2 of 3", "absent": "0 of 3", "none": "0 of 3"}
    assert table.loc["steady", "value"] == 10.5 and table.loc["steady", "seed 1"] == "+11.0 [+9.0, +13.0]"


# The effects behind each row of the README's table of results, in its order.
README_ROWS = [
    ("after stage 1 minus before: F1",),
    ("after stage 1 minus after stage 1, wrong image: F1",),
    ("stage 2 minus stage 2, wrong image: F1",),
    tuple(f"phantoms, after stage 3 minus shuffled images: {score}" for score in ("closed accuracy", "open recall")),
    ("phantoms, hard, after stage 3 minus shuffled images: open recall",),
    ("phantoms, hard, after stage 3 minus shuffled images: closed accuracy",),
    *((f"{start} minus LLaDA-MedV: findings f1",) for start in ("LLaDA-MedV V2", "LLaDA-MedV V1", "random")),
    *((f"{size} questions: full minus LoRA, all ranks",) for size in (64, 1024)),
    ("A: a longer canvas scores higher: score",),
    ("B: more steps score higher: score",),
    ("B: and stutter less: adjacent duplicates",),
    ("B: more steps repeat less: repeated share",),
    ("C: larger blocks do not score higher throughout: score",),
    ("budgeted by entropy, 16 forwards: score",),
    ("budgeted by entropy, 16 forwards: adjacent duplicates",),
    *((f"phrase veto, 8 forwards: {measure}",) for measure in ("adjacent duplicates", "repeated share", "score")),
    ("phrase veto, 64 forwards: repeated share",),
    ("and scores higher: score",),
    ("diffusion writes more words: words",),
    *((f"chosen length, veto minus fixed canvas: {measure}",) for measure in ("repeated share", "score")),
    ("all, given all other words: diffusion minus twin",),
    *((f"strongest region on the lesion, minus {base}",) for base in ("chance", "shuffled images")),
]


def test_a_result_of_the_readme_came_again_in_every_run_or_is_called_open(root):
    """A row holds the means over runs of its own effects; it is "3 of 3" where `medv replicate` shows them all, else "open"."""
    table = pd.read_csv(root / "figures/tiny/replication.csv").set_index("effect")
    section = (root / "README.md").read_text(encoding="utf-8").split("## What the `tiny` run shows\n")[1].split("\n## ")[0]
    lines = [line.split(" | ") for line in section.splitlines() if line.startswith("| ")][1:]
    for (question, cells, said, _), effects in zip(lines, README_ROWS, strict=True):
        found = table.loc[list(effects)]
        means = [Estimate.of(row).cell("+.1f") for row in found.itertuples()]
        assert re.findall(r"[+-][\d.]+ \[[^]]+\]", cells) == means, question
        assert said == ("3 of 3" if found["status"].str.startswith("shown").all() else "open"), question


def test_an_effect_that_a_run_lacks_is_open(runs):
    file = runs[2] / "figures" / "effects_some_study.csv"
    rows = pd.read_csv(file)
    rows[rows["effect"] != "steady"].to_csv(file, index=False)
    found = replicate(runs)[0].set_index("effect").loc["steady"]
    assert found["again"] == "2 of 2" and found["status"] == "open" and pd.isna(found["seed 2"])


def test_two_runs_show_nothing_and_the_order_of_runs_does_not_matter(runs):
    assert not replicate(runs[:2])[0]["status"].str.startswith("shown").any()
    first, last = (replicate(order)[0][["value", "low", "high", "p", "status"]] for order in (runs, runs[::-1]))
    pd.testing.assert_frame_equal(first, last)


def test_the_error_of_the_mean_has_a_part_between_and_a_part_within_runs():
    parts = [Estimate(v, v - 1.96, v + 1.96, 50) for v in (4.0, 6.0, 5.0)]  # a standard error of 1 within, of 1 between
    mean, _ = pooled(parts)
    freedom = (1 / 3 + 1) ** 2 / ((1 / 3) ** 2 / 2)  # Welch and Satterthwaite: 32, where Student's t is 2.037
    assert freedom == pytest.approx(32) and mean.value == 5
    assert mean.high - 5 == pytest.approx(2.037 * np.sqrt(4 / 3), rel=1e-3)
    equal, p = pooled([Estimate(3, 1.04, 4.96, 50)] * 3)  # no difference between runs: the items alone, and a normal law
    assert equal.high - 3 == pytest.approx(1.96, rel=1e-3) and p == pytest.approx(0.0027, rel=1e-2)


@pytest.mark.parametrize(
    ("freedom", "size", "beyond"), [(1, 12.706, 0.05), (2, 4.303, 0.05), (2, 31.599, 0.001), (30, 2.75, 0.01)]
)
def test_students_t_is_that_of_the_tables(freedom, size, beyond):
    assert np.interp(size, *student(freedom)) == pytest.approx(beyond, rel=2e-3)


def test_holms_correction_is_that_of_the_textbook():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert np.isnan(holm([np.nan, 0.5])[0]) and holm([np.nan, 0.5])[1] == 0.5


def test_the_command_writes_what_it_can_read_again(runs, tmp_path):
    out = tmp_path / "published"
    table, file = write_replication(runs, out)
    again = replicate([out / "replication" / f"seed{seed}" for seed in range(3)])[0]
    pd.testing.assert_frame_equal(table, again)
    assert (out / "replication.png").stat().st_size > 10_000 and len(pd.read_csv(file)) == 4
    assert [run["seed"] for run in json.loads((out / "replication.json").read_text())["about"]["runs"]] == [0, 1, 2]
    shown = CliRunner().invoke(app, ["replicate", *map(str, runs)], env={"COLUMNS": "80"})
    assert shown.exit_code == 0 and "1 of 4 effects are shown" in shown.output and "…" not in shown.output


def test_runs_that_cannot_be_compared_end_with_a_sentence(runs, tmp_path):
    with pytest.raises(DataError, match="each of its own seed"):
        replicate([runs[0], runs[0]])
    with pytest.raises(DataError, match="each of its own seed"):
        replicate(runs[:1])
    with pytest.raises(DataError, match="holds no effects_"):
        replicate([runs[0], tmp_path])
    manifest = runs[1] / "figures" / "effects_some_study.json"
    Manifest("effects_some_study", {"name": "small"}, 1, about={"notebook": "33_some_study.ipynb"}).write(manifest)
    with pytest.raises(DataError, match="several profiles, small, tiny"):
        replicate(runs)


def test_each_pipeline_seed_has_trial_seeds_of_its_own(tmp_path):
    used = [open_run("lora", profile="tiny", seed=seed, out=tmp_path).profile for seed in range(3)]
    for plan in ("lora", "initialization", "adaptation"):
        numbers = [number for profile in used for number in getattr(profile, plan).seeds]
        assert numbers == list(range(9)), plan
    assert used[0] == get_profile("tiny")


def test_runs_from_others_end_with_a_sentence_or_a_table(runs, tmp_path):
    """Whatever their manifests and tables hold, nothing is written out of place, and no bug is reported."""
    manifest, table = (runs[0] / "figures" / f"effects_some_study.{kind}" for kind in ("json", "csv"))
    good, rows = json.loads(manifest.read_text()), pd.read_csv(table)
    wrong = [
        {"seed": "/../../out"},
        {"seed": None},
        {"about": {}},
        {"about": []},
        {"profile": "tiny"},
        {"profile": {"name": [1]}},
    ]
    for change in wrong:
        manifest.write_text(json.dumps(good | change))
        shown = CliRunner().invoke(app, ["replicate", *map(str, runs), "--out", str(tmp_path / "new")])
        assert shown.exit_code == 2 and manifest.name in shown.output.replace("\n", ""), change
    manifest.write_text(json.dumps(good))
    for changed in (rows.drop(columns="n"), rows.assign(n=np.nan), rows.assign(value="x"), rows.assign(unit=1, low=np.inf)):
        changed.to_csv(table, index=False)
        with pytest.raises(DataError, match=f"{table.name}.*give the folder of a run"):
            replicate(runs)
    pd.concat([rows, rows]).to_csv(table, index=False)
    with pytest.raises(DataError, match="'steady' of 33_some_study twice"):
        replicate(runs)
    rows.assign(unit="nats").to_csv(table, index=False)
    with pytest.raises(DataError, match="in nats and in points"):
        replicate(runs)
    rows.to_csv(table, index=False)
    for file in (run / "figures" / table.name for run in runs):  # what matplotlib would read as a formula
        pd.read_csv(file).assign(effect=lambda part: r"$\frac{" + part["effect"]).to_csv(file, index=False)
    assert write_replication(runs, tmp_path / "new")[1].is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "run0", "run1", "run2"]


def test_a_run_is_not_replaced_by_its_copy_and_no_other_seed_stays(runs, tmp_path):
    (tmp_path / "replication").mkdir()
    inside = [run.rename(tmp_path / "replication" / f"seed{seed}") for seed, run in enumerate(runs)]
    with pytest.raises(ValueError, match="none of the effects of these runs"):
        write_replication(inside, tmp_path)
    assert all((run / "figures").is_dir() for run in inside) and not (tmp_path / "replication.csv").exists()
    write_replication(inside, tmp_path / "out")
    with pytest.raises(ValueError, match=r"seed2.*none of the effects"):
        write_replication(inside[:2], tmp_path / "out")


def test_files_that_the_command_did_not_write_are_kept_and_its_own_are_replaced(runs, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name, text in (("replication.csv", "mine"), ("replication.json", "{}")):
        (out / name).write_text(text)
        with pytest.raises(ValueError, match=r"replication.csv is not of|is not a medv manifest"):
            write_replication(runs, out)
        assert (out / "replication.csv").read_text() == "mine" and not (out / "replication").exists()
    for file in out.iterdir():
        file.unlink()
    write_replication(runs, out)
    assert write_replication(runs, out)[1].is_file() and "profile tiny" in (out / "replication.svg").read_text()


def test_an_effect_that_never_varies_is_measured_and_one_that_a_fourth_run_lacks_is_open():
    same, p = pooled([Estimate(5.0, 5.0, 5.0, 9)] * 3)
    assert (same.low, same.high, p) == (5, 5, 0) and pooled([Estimate(0.0, 0.0, 0.0, 9)] * 3)[1] == 1
    assert _status({"p": 0.001, "agree": 3, "value": 2.0}, 3) == "shown: higher"
    assert _status({"p": 0.001, "agree": 3, "value": 2.0}, 4) == "open"
