"""What the generation notebooks compute: settings from the paper's table, effects from paired answers, scores from facts."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from medv import paper
from medv.checkpoints.bundled import bundled
from medv.companion.figures.studies import group_scores, radar
from medv.companion.figures.words import AGAIN, FACTS, FALSE, INK, REPEATED, compared_answers, marked_words
from medv.companion.studies import conversation, generation, lengths, summaries
from medv.companion.studies import repetition as repetition_study
from medv.data.example import Example, Turn
from medv.intervals import own_items, shared_items
from medv.phantoms.facts import fact_spans, stated_facts
from medv.profiles import get_profile
from medv.reading import DataError

TINY = get_profile("tiny")


def answers(values: dict[str, tuple[float, float]], count: int = 60) -> pd.DataFrame:
    """Made-up answers of settings with a mean and a spread; what one image does to all settings is shared."""
    rng, frames = np.random.default_rng(0), []
    shared = rng.normal(0, 20, (2, count))
    for setting, (mean, spread) in values.items():
        for seed in (0, 1):
            score = mean + shared[seed] + rng.normal(0, spread, count)
            frames.append(
                pd.DataFrame({"setting": setting, "seed": seed, "id": [f"{seed}/{i}" for i in range(count)], "score": score})
            )
    return pd.concat(frames, ignore_index=True)


def test_the_settings_are_those_of_table_5_divided_and_the_papers_own_at_its_size():
    ours, printed = generation.table5_settings(TINY), paper.table("table5")
    assert len(ours) == len(printed) == 12 and generation.divisor(TINY) == 4
    assert (ours["gen_length"] * 4 == printed["generation_length"]).all()
    same = generation.table5_settings(get_profile("paper"))
    assert same[["gen_length", "block_length", "steps"]].to_numpy().tolist() == (
        printed[["generation_length", "block_length", "sampling_steps"]].to_numpy().tolist()
    )
    for profile in ("tiny", "smoke", "paper", "small"):
        generation.plain_configs(generation.table5_settings(get_profile(profile)))
        generation.plain_configs(repetition_study.sweep_settings(get_profile(profile)))
        repetition_study.schedule_configs(get_profile(profile))


def test_a_small_paired_change_is_seen_through_a_large_spread_between_images():
    items = answers({"a": (50, 1), "b": (52, 1), "c": (50, 1)})
    pairs = {("a", "b"): "rises", ("b", "a"): "falls", ("a", "c"): "no change shown"}
    for pair, expected in pairs.items():
        assert summaries.direction(summaries.change(items, "score", *pair)) == expected
    claims = [("up", "score", "a", "b", "rises"), ("down", "score", "a", "b", "falls"), ("same", "score", "a", "c", "rises")]
    assert summaries.check_effects(items, claims)["appears here"].tolist() == ["yes", "no: rises", "no: no change shown"]


def test_the_interval_covers_the_mean_and_widens_with_the_seeds():
    values = np.arange(50.0)
    for resampled in (own_items, shared_items):
        same, apart = resampled(np.stack([values, values])), resampled(np.stack([values - 30, values + 30]))
        assert same.low < same.value < same.high and same.value == pytest.approx(24.5) and same.seeds == 2
        assert apart.high - apart.low > 2 * (same.high - same.low)


def test_requests_of_different_seeds_show_different_images():
    asked = generation.requests(TINY)
    ids = [example.id for examples in asked.values() for example in examples]
    assert len(asked) == 3 and len(ids) == 300 == len(set(ids))


def test_every_schedule_spends_what_it_is_given():
    configs, budgets = repetition_study.schedule_configs(TINY)
    assert {config.steps for config in configs.values()} == set(budgets)
    assert all(f"linear, {budget} forwards" in configs for budget in budgets)


def test_true_and_false_facts_are_marked_where_they_stand_and_denied_ones_are_not():
    example = conversation.questions(get_profile("smoke"))[-1]
    spans = fact_spans(example.answer, example.meta["scene"])
    assert spans and all(true for _, _, true in spans)
    scene = replace(example.meta["scene"])
    wrong = "left" if scene.side == "right" else "right"
    text = f"No cyst is seen. It is on the {wrong} side. It is on the {wrong} side."
    words = marked_words(text, scene)
    assert [word.ink for word in words if word.text == wrong] == [FALSE, FALSE]
    assert all(word.ink == INK and not word.bold for word in words if word.text == "cyst")
    assert [word.fill for word in words].count(AGAIN) == 6


def test_the_findings_score_wants_the_facts_of_the_reference_and_punishes_invented_ones():
    asked = conversation.questions(TINY)
    kinds = [example.meta["type"] for example in asked]
    assert kinds.count("conversation") == 143 and kinds.count("description") == 50
    for example in asked:
        assert stated_facts(example.answer) and conversation.findings_score(example.answer, example) == 100
    assert conversation.findings_score("", asked[0]) == 0
    invented = asked[-1].answer + " There is also a carcinoma, an ulcer and an infarct."
    assert conversation.findings_score(invented, asked[-1]) < 100


def test_table_1_takes_judgements_of_real_answers_beside_the_findings_scores(tmp_path):
    domains = ("chest_xray", "ct_scan", "mri", "histology", "gross")
    rows = [
        {"question_id": str(i), "type": kind, "domain": {domain: True}, "result": f"8 {2 + 2 * (i % 2)}\nbecause"}
        for i, (kind, domain) in enumerate(itertools.product(("conversation", "detailed_description"), domains))
    ]
    file = tmp_path / "judged.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"question_id": "x", "result": "no idea"}]))
    judged = conversation.judged_scores({"a model": file})
    overall = judged[judged["group"] == "overall"].iloc[0]
    assert overall["value"] == pytest.approx(37.5) and overall["n"] == 10
    assert set(judged["group"]) == set(conversation.GROUPS)
    items = pd.DataFrame({"system": "ours", "type": ["conversation", "description"], "domain": ["ct", "mri"]})
    table = conversation.table1(items.assign(score=[40.0, 60.0], words=5.0), judged)
    row = table[table["source"].str.startswith("ours: judge's score")].iloc[0]
    assert row["system"] == "a model, n = 10" and row["overall"].startswith("37.5 [")
    assert table[table["source"] == "ours: findings score"]["overall"].iloc[0].startswith("50.0 [")
    file.write_text(json.dumps({"question_id": "x", "result": "no idea"}) + "\n")
    with pytest.raises(ValueError, match="no judged answer of 'a model'"):
        conversation.judged_scores({"a model": file})


def test_table_7_lists_every_model_of_the_paper_and_says_why_one_cannot_be_asked():
    table = conversation.table7()
    assert table["model"].tolist() == paper.table("table7")["model"].tolist()
    assert table["on this machine"].str.match("on this machine|not available: ").all()


def test_asking_for_words_changes_the_request_and_nothing_else():
    asked = generation.requests(get_profile("smoke"))
    wished = lengths.asking_for_words(asked, 50)
    pairs = zip(asked[0], wished[0], strict=True)
    assert all(new.question == old.question + " Use at least 50 words." and new.id == old.id for old, new in pairs)
    assert wished[0][0].turns[0] == Turn("user", wished[0][0].question)
    assert lengths.asked_words(get_profile("paper")) == 200


def test_table_3_and_figure_4_are_made_without_a_twin_too(tmp_path):
    smoke = get_profile("smoke")
    asked = {0: generation.requests(smoke)[0][:2]}
    items = lengths.ask_lengths(smoke, bundled("tiny_model"), None, asked, tmp_path)
    table = lengths.table3(items, smoke)
    assert table["model"].str.startswith("diffusion, Z").all() and table["seconds per query (paper)"].notna().all()
    assert set(lengths.length_frame(items, smoke)["model"]) == {"diffusion"}
    claims = lengths.length_claims(smoke, twin=False)
    assert {c[0] for c in claims} < {c[0] for c in lengths.length_claims(smoke)}
    assert (summaries.check_effects(items, claims)["n"] == 2).all()


def test_answers_of_other_models_stand_beside_the_papers_row_of_that_model_alone(tmp_path):
    smoke = get_profile("smoke")
    asked = {0: generation.requests(smoke)[0][:2]}
    rows = [{"question_id": example.id, "text": "two words", "seconds": 3.0} for example in asked[0]]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = dict.fromkeys(("LLaVA-Med", "Another"), tmp_path / "answers.jsonl")
    items = lengths.ask_lengths(smoke, bundled("tiny_model"), None, asked, tmp_path / "out", given=given)
    table = lengths.table3(items, smoke).set_index("model")
    assert (table.loc[["LLaVA-Med, default", "Another, default"], "s per query"] == 3).all()
    bare = [{"text": "two words"}] * len(asked[0])
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bare))
    with pytest.raises(DataError, match="2 answers without ids to 4 questions"):  # not the same ones again to each seed
        both = asked | {1: generation.requests(smoke)[0][2:4]}
        lengths.ask_lengths(smoke, bundled("tiny_model"), None, both, tmp_path / "out", given=given)
    assert table["seconds per query (paper)"].notna()[["LLaVA-Med, default", "Another, default"]].tolist() == [True, False]


def test_answers_without_ids_are_in_the_order_of_all_questions_and_of_their_number(tmp_path):
    asked = [Example(name, None, (Turn("user", "q"),), meta={"type": "conversation"}) for name in ("3", "1", "2", "0")]
    file, out = tmp_path / "answers.jsonl", tmp_path / "out.jsonl"

    def given(rows, part=asked, **how):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return [row["text"] for row in conversation.given_answers(file, part, out, **how)]

    texts = [{"text": f"to {example.id}"} for example in asked]
    assert given(texts) == ["to 3", "to 1", "to 2", "to 0"] and given(texts, asked[1::2], among=asked) == ["to 1", "to 0"]
    named = [row | {"question_id": example.id} for row, example in zip(texts, asked, strict=True)]
    assert given(named[::-1]) == ["to 3", "to 1", "to 2", "to 0"]
    for rows, said in ((texts[:3], "3 answers without ids to 4 questions"), ([*texts[:3], named[3]], "no 'question_id'")):
        with pytest.raises(DataError, match=said):
            given(rows)
    with pytest.raises(DataError, match="'seconds' is 'fast', but must be a number"):
        given([row | {"seconds": "fast"} for row in named])


def test_a_radar_of_two_groups_is_refused():
    with pytest.raises(ValueError, match="three groups"):
        radar(pd.DataFrame({"system": ["a", "a"], "group": ["x", "y"], "value": [1.0, 2.0]}))


@pytest.mark.parametrize("groups", [["overall"], ["overall", "mri"], ["overall", "mri", "ct"]])
def test_judgements_of_fewer_than_three_groups_are_drawn_as_bars(groups):
    rows = {"system": "a", "group": groups, "value": 40.0, "low": 30.0, "high": 50.0}
    (axes,) = group_scores(pd.DataFrame(rows), labels={"mri": "MRI"}).axes
    assert axes.name != "polar" and len(axes.get_xticks()) == len(groups)
    assert "mri" not in [label.get_text() for label in axes.get_xticklabels()]


def test_the_legend_of_facts_stands_only_where_facts_are_known():
    scene = generation.requests(TINY, share=0.01)[0][0].meta["scene"]
    for known, legend in ((None, REPEATED), (scene, f"{FACTS}   {REPEATED}")):
        example = Example("a", None, (Turn("user", "q"),), meta={"scene": known})
        drawn = compared_answers(pd.DataFrame([{"name": "a", "text": "a nodule", "score": 1.0, "words": 2}]), example, "t")
        assert legend in [text.get_text() for text in drawn.texts]
        assert known or not any("fact" in text.get_text() for text in drawn.texts)
