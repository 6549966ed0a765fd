"""Notebook 15 and `medv compare-loss`: curves recorded from real trainings, a band over seeds, a user's log laid over it."""

import json
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from command import run
from tiny import examples, model, shape, training_batch

from medv.artifacts import Manifest
from medv.companion.figures.losses import band_figure
from medv.companion.studies import loss_band as study
from medv.companion.studies import loss_compare as compare
from medv.diffusion.loss import NORMALIZATIONS
from medv.intervals import NOT_MEASURED
from medv.model.modeling import IGNORED_LABEL
from medv.profiles import get_profile


@pytest.fixture(scope="module")
def profile():
    """Five steps of stage 2 with the test model, two seeds."""
    smoke = get_profile("smoke")
    return replace(smoke, model=shape(), band_steps=5, band_seeds=2)


@pytest.fixture(scope="module")
def losses():
    """Made-up curves: they fall from 2 to 1 nat, with a scatter of 10 %, halved by stratified times."""
    rng, rows = np.random.default_rng(0), []
    for times, noise in (("iid", 0.1), ("stratified", 0.05)):
        for normalization in NORMALIZATIONS:
            for seed in range(5):
                trend = np.linspace(2, 1, 60) * (1 + rng.normal(0, noise, 60))
                frame = pd.DataFrame({"step": range(1, 61), "loss": trend})
                rows.append(frame.assign(times=times, normalization=normalization, seed=seed))
    return pd.concat(rows, ignore_index=True)


@pytest.fixture(scope="module")
def band(losses, tmp_path_factory):
    """The CSV of the made-up band, with a manifest."""
    path = tmp_path_factory.mktemp("band") / "loss_band.csv"
    study.band_of(losses, "masked", 300).to_csv(path, index=False)
    about = {"data": "synthetic phantoms, profile smoke: not comparable with the paper"}
    Manifest("loss_band", profile=get_profile("smoke").to_dict(), about=about).write(path.with_suffix(".json"))
    return path


def log_of(path, values, *, every=10, **more):
    """A trainer_state.json of these losses, a row every so many steps."""
    rows = [{"step": every * (i + 1), "loss": float(value), "epoch": 0.1} for i, value in enumerate(values)]
    path.write_text(json.dumps({"log_history": [*rows, {"eval_loss": 1.0, "step": 3}], "max_steps": every * len(rows)} | more))
    return path


def test_the_recorded_losses_are_those_that_the_trainer_logs(profile, model_dir, tmp_path):
    trial = study.BandTrial("stratified", 1, 4, 8)
    asked = examples(32)
    found = study.recorded(trial, profile, model_dir, asked, asked[:4], tmp_path / "a")
    rows = found["losses"]
    history = json.loads((tmp_path / "a" / "history.json").read_text())
    logged = [row["loss"] for row in history if "loss" in row]
    trained = profile.stages["instruct"].normalization
    assert [row[trained] for row in rows] == pytest.approx(logged, rel=1e-5) and len(rows) == 4
    assert set(rows[0]) == set(NORMALIZATIONS)


def test_every_normalization_is_the_loss_of_the_model_under_it():
    network, batch = model(), training_batch()
    record = study.Recorder()
    handle = network.register_forward_hook(record, with_kwargs=True)
    network(**batch)
    handle.remove()
    for name in NORMALIZATIONS:
        network.config.loss_normalization = name
        with torch.no_grad():
            assert record.rows[0][name] == pytest.approx(float(network(**batch).loss), rel=1e-5)
    with torch.no_grad():  # the slow way, from the definition: each sample's masked tokens over p times its own length
        targets, total = batch["labels"] != IGNORED_LABEL, 0.0
        p = (1 - network.config.noise_eps) * batch["t"] + network.config.noise_eps
        masked = (batch["u"] < p[:, None]) & targets
        ids = batch["input_ids"].masked_fill(masked, network.config.mask_token_id)
        others = {key: value for key, value in batch.items() if key not in ("input_ids", "labels", "t", "u")}
        logits = network(input_ids=ids, **others).logits
        for row in range(len(ids)):
            for place in masked[row].nonzero()[:, 0].tolist():
                nats = float(F.cross_entropy(logits[row, place][None], batch["labels"][row, place][None]))
                total += nats / float(p[row]) / int(targets[row].sum()) / len(ids)
    assert record.rows[0]["sample"] == pytest.approx(total, rel=1e-4)


@pytest.mark.slow
def test_finished_trainings_are_kept_and_both_ways_to_draw_t_see_the_same_order(profile, model_dir, tmp_path):
    first, ends = study.train_all(profile, model_dir, tmp_path)
    assert len(first) == 2 * 2 * 5 * len(NORMALIZATIONS) and np.isfinite(first["loss"]).all()
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    assert ends["before"].nunique() == 1 and (ends["after"] != ends["before"]).all()
    pd.testing.assert_frame_equal(first, study.train_all(profile, model_dir, tmp_path)[0])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")} == times and len(times) == 4
    assert len(study.band_of(first, "masked", 300)) == 2 * len(NORMALIZATIONS) * 2 * 5


def test_a_profile_without_such_trainings_says_so():
    with pytest.raises(ValueError, match="profile paper has no short trainings"):
        study.trials_of(get_profile("paper"))


def test_the_band_is_the_quantiles_over_seeds_of_the_means_of_windows(losses):
    band = study.band_of(losses, "masked", 300)
    mine = band[(band["times"] == "iid") & (band["normalization"] == "token")]
    part = losses[(losses["times"] == "iid") & (losses["normalization"] == "token")]
    third = [g[(g["step"] > 8) & (g["step"] <= 12)]["loss"].mean() for _, g in part.groupby("seed")]
    row = mine[(mine["scale"] == study.NATS) & (mine["step"] == 12)].iloc[0]
    assert row[["low", "median", "high"]].tolist() == pytest.approx(np.quantile(third, [0.05, 0.5, 0.95]).tolist())
    early = [g[g["step"] <= 12]["loss"].mean() for _, g in part.groupby("seed")]
    shape = np.array(third) / np.array(early)
    row = mine[(mine["scale"] == study.SHAPE) & (mine["step"] == 12)].iloc[0]
    assert row["median"] == pytest.approx(np.median(shape)) and row["window"] == 4 and row["uniform"] == np.log(300)


def test_the_noise_is_the_scatter_around_the_trend_and_the_pairs_find_that_it_is_halved(losses):
    assert study.relative_noise(np.linspace(2, 1, 600)) < 0.002
    found = study.noise_of(losses).groupby("times")["noise"].mean()
    assert found["iid"] == pytest.approx(0.1, rel=0.15) and found["stratified"] == pytest.approx(0.05, rel=0.15)
    ratio = study.noise_ratio(losses, "sample")
    assert ratio.low < 0.5 < ratio.high and study.ratio_verdict(ratio) == "less noise" and ratio.n == 5
    alike = losses.assign(loss=losses.groupby(["normalization", "seed", "step"])["loss"].transform("first"))
    ends = pd.DataFrame({"times": ["iid", "stratified"] * 3, "before": 2.0, "after": [1.5, 2.1] * 3})
    said = study.conclusion(alike, ends, "masked")
    assert said.count("no difference shown") == len(NORMALIZATIONS) and "at fixed noise: -25.0 [-25.0, -25.0]: falls" in said
    assert "+5.0 [+5.0, +5.0]: rises" in said and said.count(": falls;") == 2
    table = study.band_table(losses)
    assert len(table) == 2 * len(NORMALIZATIONS) and set(table["n"]) == {5}
    fall = study.fall_of(losses, "stratified", "token")
    assert fall.low < 100 * (np.linspace(2, 1, 60)[48:].mean() / np.linspace(2, 1, 60)[:12].mean() - 1) < fall.high
    assert len(band_figure(study.band_of(losses, "masked", 300)).axes) == 4


def test_the_table_of_one_seed_has_no_band_to_be_outside_of(losses):
    table = study.band_table(losses[losses["seed"] == losses["seed"].min()])
    assert set(table["left-out seed outside (%)"]) == {NOT_MEASURED} and "nan" not in table.to_string().lower()
    assert set(table["stratified t"]) == {NOT_MEASURED, ""}


def test_a_left_out_curve_is_outside_where_it_leaves_the_others():
    curves = np.array([[1.0, 1.0], [1.1, 1.1], [0.9, 0.9], [1.0, 5.0]])
    assert study.left_out(curves).tolist() == [0, 0, 1, 0.5] or study.left_out(curves)[3] == 0.5


# --- medv compare-loss ---


def test_the_size_does_not_matter_and_a_bump_is_above_the_band_at_its_own_steps(band, tmp_path):
    reference = compare.read_band(band, "sample", "iid", study.SHAPE)
    trend = np.linspace(2, 1, 60)
    small, large, bump = (trend, 7 * trend, np.where((np.arange(60) >= 32) & (np.arange(60) < 36), 3 * trend, trend))
    logs = [compare.read_history(log_of(tmp_path / f"{i}.json", values)) for i, values in enumerate((small, large, bump))]
    own = [compare.lay_over(log, reference, study.SHAPE) for log in logs]
    pd.testing.assert_frame_equal(own[0], own[1])
    assert own[0]["first"].tolist() == [10 + 40 * i for i in range(15)] and own[0]["last"].iloc[-1] == 600
    assert (own[0]["where"] != own[2]["where"]).sum() == 1 and own[2]["where"][8] == "above"
    assert "330 to 360" in compare.spans(own[2][8:9], "above") and compare.spans(own[2][8:9], "below") == "none"
    shown = run("compare-loss", tmp_path / "1.json", "--band", band)
    assert shown.exit_code == 0, shown.output
    for said in ("60 rows, one every 10 steps, of 600", "5 trainings", "profile smoke", "Over the last fifth"):
        assert said in shown.output


def test_a_loss_that_does_not_fall_lies_above_at_the_end_and_the_figure_shows_it(band, tmp_path):
    state, out = log_of(tmp_path / "trainer_state.json", np.full(30, 3.0)), tmp_path / "mine.png"
    shown = run("compare-loss", state, "--band", band, "--out", out, "--batch-size", 2)
    assert shown.exit_code == 0, shown.output
    assert re.search(r"Above the band at steps: (.*, )?\d+ to 300\.", shown.output) and "rows of 20 examples" in shown.output
    assert out.read_bytes().startswith(b"\x89PNG")
    found = json.loads(run("compare-loss", state, "--band", band, "--json").output)
    assert found["last_fifth"] == 1 and found["band_end_high"] < 0.8 and found["noise_of_a_row"] == 0
    assert ("more than any of ours" in shown.output) == (found["outside_share"] > found["healthy_outside_most"])
    again = run("compare-loss", state, "--band", band, "--out", out)
    assert again.exit_code == 2 and "exists and would be overwritten" in again.output


def test_the_recipe_beside_a_history_chooses_the_band_and_an_option_overrides_it(band, tmp_path):
    rows = [{"step": 10 * i, "loss": 2 - i / 30} for i in range(1, 31)] + [{"train_loss": 1.0, "step": 300}]
    (tmp_path / "history.json").write_text(json.dumps(rows))
    (tmp_path / "training.json").write_text(json.dumps({"recipe": {"normalization": "token", "times": "stratified"}}))
    found = json.loads(run("compare-loss", tmp_path / "history.json", "--band", band, "--json").output)
    assert (found["normalization"], found["times"]) == ("token", "stratified")
    how = ("--normalization", "masked", "--times", "iid", "--json")
    found = json.loads(run("compare-loss", tmp_path / "history.json", "--band", band, *how).output)
    assert (found["normalization"], found["times"]) == ("masked", "iid")


def test_the_uniform_scale_divides_by_the_loss_of_a_guess(band, tmp_path):
    log = compare.read_history(log_of(tmp_path / "trainer_state.json", np.linspace(2, 1, 30)))
    reference = compare.read_band(band, "sample", "iid", compare.UNIFORM)
    own = compare.lay_over(log, reference, compare.UNIFORM, vocabulary=1000)
    assert own["value"].iloc[-1] == pytest.approx(np.mean(np.linspace(2, 1, 30)[-2:]) / np.log(1000))
    assert reference["median"].iloc[0] < 2.2 / np.log(300)
    shown = run("compare-loss", tmp_path / "trainer_state.json", "--band", band, "--scale", "uniform")
    assert shown.exit_code == 2 and "--vocab-size" in shown.output


def test_a_run_that_has_not_ended_is_read_by_the_share_that_is_done(band, tmp_path):
    state = log_of(tmp_path / "trainer_state.json", np.linspace(2, 1.5, 30), max_steps=600)
    found = json.loads(run("compare-loss", state, "--band", band, "--json").output)
    assert found["steps"] == 600 and found["windows"] == 8 and found["last_fifth"] is None
    assert found["healthy_outside_share"] is None and "healthy" not in run("compare-loss", state, "--band", band).output


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "not JSON"),
        ('{"a": 1}', "no log of losses"),
        ("[1, 2]", "no log of losses"),
        ("[]", "0 rows with a loss"),
        ('[{"step": 1, "loss": "high"}]', "must be a finite number"),
        ('[{"step": 1, "loss": NaN}]', "NaN is no value of JSON"),
        ('[{"loss": 1.0}]', "the step of row 1"),
        (json.dumps([{"step": s, "loss": 1.0} for s in (1, 2, 3, 2, 5)]), "step 2 follows step 3"),
        (json.dumps([{"step": s, "loss": 0.0} for s in range(1, 8)]), "no loss is above 0"),
        (json.dumps({"log_history": [{"step": s, "loss": 1.0} for s in range(1, 8)], "max_steps": 3}), "beyond the 3 steps"),
        (json.dumps([{"step": s, "loss": 1.0} for s in range(50, 60)]), "within the first 20%"),
        ('[{"step": 1e999}, ' + ", ".join(f'{{"step": {s}, "loss": 1}}' for s in range(1, 8)) + "]", "beyond the inf steps"),
    ],
)
def test_a_bad_log_is_refused_in_one_sentence(band, tmp_path, text, why):
    path = tmp_path / "history.json"
    path.write_text(text)
    shown = run("compare-loss", path, "--band", band)
    assert shown.exit_code == 2 and why in shown.output and len(shown.output.strip().splitlines()) == 1, shown.output


def test_bad_options_and_bands_are_refused_in_one_sentence(band, tmp_path):
    state = log_of(tmp_path / "trainer_state.json", np.linspace(2, 1, 30))
    wrong = tmp_path / "wrong.csv"
    wrong.write_text("a,b\n1,2\n")
    cases = {
        ("--normalization", "mean"): "unknown normalization 'mean'",
        ("--times", "often"): "unknown times 'often'",
        ("--scale", "log"): "unknown scale 'log'",
        ("--out", tmp_path / "x.txt"): "no known kind of picture",
        ("--band", wrong): "no band of notebook 15",
        ("--band", tmp_path / "none.csv"): "medv reproduce --only loss_band",
    }
    rows = pd.read_csv(band)  # of an earlier version, or torn
    lacking = {column: rows.drop(columns=column) for column in ("rate", "left_out_most", "trained")}
    for name, changed in (lacking | {"twice": pd.concat([rows, rows]), "seeds": rows.assign(seeds=np.nan)}).items():
        changed.to_csv(tmp_path / f"{name}.csv", index=False)
        cases["--band", tmp_path / f"{name}.csv"] = "no band of notebook 15"
    for options, why in cases.items():
        shown = run("compare-loss", state, *(() if "--band" in options else ("--band", band)), *options)
        assert shown.exit_code == 2 and why in shown.output, shown.output
        assert len(shown.output.strip().splitlines()) == 1
