"""The two ablations: trials resume one by one, arms differ in what they say they do, verdicts follow from the numbers."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tiny import model, training_batch

from medv.checkpoints.bundled import bundled
from medv.companion.figures.studies import lora_figure
from medv.companion.reproduction.run import open_run
from medv.companion.studies import initialization as init
from medv.companion.studies import lora as lora_study
from medv.companion.studies.summaries import differences, summarize
from medv.companion.studies.trials import run_trials
from medv.intervals import NOT_MEASURED
from medv.phantoms.sets import vqa_set
from medv.profiles import PROFILES, get_profile
from medv.training.examples import drawn
from medv.training.lora import LoraRecipe, attach_lora


@dataclass(frozen=True)
class Trial:
    number: int


def test_a_stopped_comparison_repeats_only_the_trial_that_it_was_at(tmp_path):
    begun, stop = [], [True]

    def work(trial, scratch):
        begun.append((trial.number, (scratch / "half").exists()))
        scratch.mkdir(exist_ok=True)
        (scratch / "half").touch()
        if trial.number == 1 and stop.pop():
            raise KeyboardInterrupt
        return {"square": trial.number**2}

    trials = {f"t{number}": Trial(number) for number in range(3)}
    with pytest.raises(KeyboardInterrupt):
        run_trials(tmp_path, trials, work, quiet=True)
    stop.append(False)
    results = run_trials(tmp_path, trials, work, quiet=True)
    assert begun == [(0, False), (1, False), (1, True), (2, False)]
    assert [result["square"] for result in results.values()] == [0, 1, 4] and not list(tmp_path.glob("*.work"))
    run_trials(tmp_path, trials | {"t0": Trial(5)}, work, quiet=True)
    assert begun[4:] == [(5, False)], "only the trial whose settings changed"


def test_a_notebook_run_by_hand_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    monkeypatch.delenv("MEDV_RESUME_KEY", raising=False)
    run = open_run("initialization", profile="smoke", out=tmp_path)
    with pytest.raises(KeyboardInterrupt), run.making("trials/initialization") as folder:
        (folder / "first.json").touch()
        raise KeyboardInterrupt
    other = open_run("initialization", profile="smoke", out=tmp_path, parameters={"language": "x"})
    for again, found in ((run, True), (other, False)):
        with again.making("trials/initialization") as folder:
            assert (folder / "first.json").exists() == found
            (folder / "first.json").touch()


def test_a_notebook_that_a_launcher_starts_several_times_says_how_to_start_it(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="start papermill without torchrun, and only trainings with it"):
        open_run("stage1", profile="smoke", out=tmp_path)


@pytest.fixture(scope="module")
def smoke():
    return get_profile("smoke")


# LoRA versus full (notebook 31).


def test_a_larger_training_set_holds_the_smaller_and_seeds_draw_others():
    train = vqa_set("train", 40)
    small, large = (drawn(train, size, 1) for size in (8, 32))
    assert large[:8] == small and drawn(train, 8, 2) != small
    with pytest.raises(ValueError, match="lower the sizes"):
        drawn(train, 41, 0)


def test_at_one_size_and_seed_the_arms_differ_in_rank_and_learning_rate_only():
    for name, plan in ((profile.name, profile.lora) for profile in PROFILES.values()):
        trials = lora_study.trials_of(plan).values()
        alike = {replace(trial, rank=0, learning_rate=0.0) for trial in trials}
        assert len(alike) == len(plan.sizes) * len(plan.seeds), name
        assert len(trials) == len(alike) * len(plan.rates) and min(plan.rates) == 0 and len(plan.rates) > 1


@pytest.mark.slow
def test_all_arms_begin_at_one_model_and_without_padded_steps_at_the_given_one(tmp_path, smoke):
    plan = replace(smoke.lora, seeds=(0,))
    given = bundled("general_model")
    assert lora_study.padded_start(smoke, replace(plan, padded_steps=0), tmp_path, given) == given
    start = lora_study.padded_start(smoke, plan, tmp_path, given)
    made = (start / "model.safetensors").stat().st_mtime_ns
    assert lora_study.padded_start(smoke, plan, tmp_path, given) == start
    assert (start / "model.safetensors").stat().st_mtime_ns == made and not (start / "checkpoints").exists()
    test = vqa_set("test", 8)
    items, facts = lora_study.compare_lora(smoke, plan, tmp_path, start, vqa_set("train", 16), test)
    assert len(facts) == len(lora_study.trials_of(plan)) == 4 and len(items) == 4 * 8
    sizes = facts.groupby("arm")[["checkpoint_bytes", "trainable_parameters"]].first()
    assert (sizes.loc["LoRA r = 2"] < 0.1 * sizes.loc["full"]).all()
    assert not list(tmp_path.glob("*.work"))


def answers(means: dict[tuple[str, int], float]) -> pd.DataFrame:
    """Made-up closed answers: each arm right with some share, over three seeds and 60 questions."""
    rng, rows = np.random.default_rng(0), []
    for (arm, size), share in means.items():
        for seed in range(3):
            for number in range(60):
                hit = 100.0 * (rng.random() < share)
                rows.append({"arm": arm, "size": size, "seed": seed, "id": number, "closed_accuracy": hit})
    return lora_study.scored(pd.DataFrame(rows).assign(open_recall=np.nan))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("small", "large", "scarce", "enough"),
    [
        ((0.2, 0.8, 0.8), (0.9, 0.4, 0.4), "appears", "appears."),
        ((0.2, 0.8, 0.8), (0.6, 0.6, 0.6), "appears", "does not appear."),
        ((0.5, 0.5, 0.5), (0.9, 0.4, 0.4), "does not appear", "appears."),
        ((0.9, 0.4, 0.4), (0.3, 0.8, 0.8), "does not appear", "does not appear."),
        ((0.5, 0.5, 0.5), (0.6, 0.1, 0.9), "does not appear", "does not appear. But the ranks disagree."),
        ((0.5, 0.5, 0.5), (0.7, 0.35, 0.7), "does not appear", "appears."),  # one rank shows it, the other nothing
    ],
)
def test_the_verdict_on_lora_follows_from_the_intervals(few_resamples, small, large, scarce, enough):
    arms = [(lora_study.FULL, 0), ("LoRA r = 2", 1), ("LoRA r = 8", 2)]
    items = answers({(arm, size): shares[k] for size, shares in ((64, small), (512, large)) for arm, k in arms})
    gaps = lora_study.gaps(items)
    last = lora_study.conclusion(gaps).split("\n")[-1]
    assert last == f"Over all ranks, LoRA wins at the smallest size: {scarce}, full wins at the largest: {enough}"
    mean = gaps[(gaps["against"] == lora_study.ALL_RANKS) & (gaps["size"] == 512)].iloc[0]
    assert abs(mean["value"] - 100 * (large[0] - (large[1] + large[2]) / 2)) < 10
    assert mean["low"] <= mean["value"] <= mean["high"]


@pytest.mark.slow
def test_adapters_cost_less_memory_than_all_weights_and_the_figure_shows_every_arm(few_resamples):
    rows = []
    for arm, network in ((lora_study.FULL, model().train()), ("LoRA r = 2", attach_lora(model(), LoraRecipe(2, 4)).train())):
        before = {name: p.numel() for name, p in network.named_parameters() if p.requires_grad}
        cost = lora_study.step_cost(network, training_batch(), repeats=2)
        rows.append({"arm": arm, "trainable_parameters": sum(before.values()), "checkpoint_bytes": 1} | cost)
    cost = pd.DataFrame(rows).set_index("arm", drop=False)
    assert cost.loc["LoRA r = 2", "peak_memory_bytes"] < cost.loc["full", "peak_memory_bytes"]
    weights = sum(p.numel() for p in model().parameters()) * 4
    assert cost.loc["full", "peak_memory_bytes"] > weights + 3 * 4 * cost.loc["full", "trainable_parameters"]
    curve = lora_study.curve_of(answers({(arm, size): 0.5 for arm in cost["arm"] for size in (8, 16)}))
    left = lora_figure(curve[curve["metric"] == "score"], cost, {"before": 40.0}).axes[0]
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["before", "full", "LoRA r = 2"]


# Initial weights (notebook 30).


@pytest.mark.slow
def test_the_arms_share_the_vision_tower_and_differ_in_the_language_tower(smoke):
    parts = init.parts_of(smoke)
    starts = {arm.name: init.initial(arm, parts, smoke, seed=0).model.state_dict() for arm in init.ARMS}
    base = starts[init.BASE]
    for name, start in starts.items():
        tower = [key for key in start if ".vision_tower." in key]
        assert tower and all(start[key].equal(base[key]) for key in tower), name
    key = "model.language_model.layers.0.mlp.up_proj.weight"
    assert starts["LLaDA-MedV V1"][key].equal(starts["LLaDA-MedV V2"][key])
    assert len({start[key].sum().item() for start in starts.values()}) == 3
    again, other = (init.initial(init.ARMS[3], parts, smoke, seed=seed).model.state_dict() for seed in (0, 1))
    assert again[key].equal(starts["random"][key]) and not other[key].equal(again[key])


@pytest.mark.slow
def test_only_aligned_arms_go_through_stage_1(smoke, tmp_path):
    plan, parts = smoke.initialization, init.parts_of(smoke)
    for arm in init.ARMS[1:3]:
        network = init.initial(arm, parts, smoke, seed=0)
        init.tune(network, arm, plan, smoke, tmp_path / arm.name, seed=0)
    assert {folder.parent.name for folder in tmp_path.glob("*/align")} == {"LLaDA-MedV V2"}
    assert len(list(tmp_path.glob("*/instruct/training.json"))) == 2


def test_what_cannot_be_compared_is_refused_with_what_to_set(tmp_path):
    paper, three = get_profile("paper"), {"language": Path("a"), "vision": Path("b"), "general": Path("c")}
    assert init.parts_of(paper, **three) == three and init.arms_of(three, paper) == init.ARMS[:3]
    with pytest.raises(FileNotFoundError, match=r"bring them with `medv towers small --out"):
        init.parts_of(get_profile("small"), language="somewhere", towers=tmp_path)
    small = get_profile("small")
    given = init.parts_of(small, "a", "b", towers=tmp_path)
    arms = init.arms_of(given, small)
    assert [arm.name for arm in arms] == ["LLaDA-MedV", "random"] and init.gaps(arms)
    assert init.arms_of(given | {"general": tmp_path}, small) == init.ARMS and not init.gaps(init.ARMS)


def said(shares: dict[str, tuple[float, float]]) -> pd.DataFrame:
    """Made-up results: findings F1 and adjacent duplicates of each arm about some means."""
    rng, rows = np.random.default_rng(0), []
    for arm, (score, repeated) in shares.items():
        for seed in range(3):
            for number in range(30):
                row = {"condition": arm, "seed": seed, "id": f"d{number}", "text": f"{arm} says"}
                row |= {"findings_f1": score + rng.normal(), "adjacent_duplicates": repeated + rng.normal(), "words": 50.0}
                rows += [row, {"condition": arm, "seed": seed, "id": f"q{number}", "closed_accuracy": 50.0, "open_recall": 9.0}]
    return pd.DataFrame(rows)


@pytest.mark.slow
def test_the_verdict_on_the_starts_follows_from_the_intervals_and_the_paper_keeps_its_columns(few_resamples):
    names = [arm.name for arm in init.ARMS]
    items = said(dict(zip(names, [(60, 2), (40, 2), (80, 9), (20, 30)], strict=True)))
    lines = init.conclusion(init.differences(items)).split("\n")
    assert [": appears;" in line for line in lines] == [True, False, False, True]
    assert "does not appear (higher)" in lines[1] and "does not appear (no difference shown)" in lines[2]
    table = init.table4(summarize(items, list(init.METRICS))).set_index("model")
    assert table.loc["LLaDA-MedV", "judge's overall score (paper)"] == 52.605
    assert table.loc["LLaDA-MedV", "findings F1 (%) (ours)"].startswith("60")
    assert pd.isna(table.loc["random", "judge's overall score (paper)"])
    assert pd.isna(table.loc["LLaVA-Med", "findings F1 (%) (ours)"])
    assert len(init.bars(summarize(items, list(init.METRICS)))) == 4 * 4


def test_a_difference_pairs_by_seed_and_text():
    items = pd.DataFrame(
        [
            {"condition": c, "seed": s, "id": i, "x": 10.0 * s + i + (c == "b"), "y": np.nan}
            for c in "ab"
            for s in (0, 1)
            for i in (0, 1)
        ]
    )
    found = differences(items.iloc[:-1], "b", "a", ["x", "y"]).set_index("metric")
    assert found.loc["x", ["value", "low", "high", "n", "seeds", "verdict"]].tolist() == [1.0, 1.0, 1.0, 2, 2, "higher"]
    assert found.loc["y", ["n", "seeds", "verdict"]].tolist() == [0, 0, NOT_MEASURED]
