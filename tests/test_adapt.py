"""From causal to diffusion: attention really opens, the teacher is the causal model on clean text, the loop resumes exactly."""

import json
import math
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command import run as run_command
from launched import start_command
from tiny import model, special, tokenizer
from transformers import AutoTokenizer, LlamaForCausalLM
from typer.testing import CliRunner

from medv.checkpoints.assembly import assemble
from medv.checkpoints.bundled import bundled
from medv.cli import app
from medv.companion.studies import adaptation
from medv.companion.studies.adaptation import adapt_on_text, continue_documents
from medv.companion.towers.adapt import (
    Adapter,
    AdaptRecipe,
    Batches,
    adapt,
    distance,
    held_out_losses,
    load_tower,
    opened_attention,
)
from medv.companion.towers.text import ENDS, Writing, continue_ids, pack, write_text_of
from medv.data.texts import Document, all_prompts, read_documents, split_documents
from medv.diffusion.config import SamplerConfig
from medv.diffusion.corruption import noise_generator
from medv.model.twin import language_tower
from medv.profiles import PROFILES, get_profile

RECIPE = AdaptRecipe(tokens=10 * 4 * 32, length=32, batch_size=4, learning_rate=3e-3)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def causal(tmp_path_factory) -> Path:
    """A causal tower with random weights and the tokenizer of the tests."""
    folder = tmp_path_factory.mktemp("causal")
    tower = language_tower(model())
    tower.config.is_causal = True
    tower.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    (folder / "LICENSE").write_text("a licence", encoding="utf-8")
    (folder / "LICENSES").mkdir()  # of others' packages
    return folder


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    """Twelve rows of 32 tokens in which every second token says what follows."""
    first = torch.randint(20, 30, (12, 16), generator=torch.Generator().manual_seed(0))
    return torch.stack([first, first + 40], dim=2).flatten(1)


def run(causal: Path, rows: torch.Tensor, out: Path, recipe: AdaptRecipe = RECIPE, **options) -> dict:
    return adapt(causal, rows[:10], rows[10:], recipe, out, quiet=True, **options)


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_tower(folder, dtype=torch.float32, causal=False).state_dict()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(value.equal(other[name]) for name, value in one.items())


# Attention.


@torch.inference_mode()
def test_a_later_token_changes_an_earlier_logit_of_the_adapted_tower_and_none_of_its_teacher(causal, rows):
    other = rows[:1].clone()
    other[0, -1] = 5
    for is_causal in (True, False):
        tower = load_tower(causal, dtype=torch.float32, causal=is_causal)
        before, after = (tower(ids).logits[0, 0] for ids in (rows[:1], other))
        assert before.equal(after) == is_causal


@torch.inference_mode()
def test_opening_attention_begins_causal_and_ends_full(causal, rows):
    both, left = (load_tower(causal, dtype=torch.float32, causal=is_causal).model for is_causal in (False, True))
    shut, half, full = (opened_attention(32, share, noise_generator(0, 0, 0)) for share in (0.0, 0.5, 1.0))
    torch.testing.assert_close(both(rows, attention_mask=shut)[0], left(rows)[0])
    torch.testing.assert_close(both(rows, attention_mask=full)[0], both(rows)[0])
    later = ~torch.ones(32, 32, dtype=torch.bool).tril()
    assert 0.4 < half[0, 0][later].float().mean() < 0.6 and half[0, 0][~later].all()


def test_annealed_attention_opens_step_by_step_and_is_drawn_from_seed_and_step(rows):
    recipe = replace(RECIPE, attention="annealed", anneal=0.6)
    batches = Batches(rows, recipe, special().mask, seed=3)
    shares = [seen if (seen := batches.attention(step)) is None else seen.float().mean() for step in range(10)]
    assert shares[:5] == sorted(shares[:5]) and shares[0] > 0.5 and shares[5:] == [None] * 5
    assert batches.attention(2).equal(Batches(rows, recipe, special().mask, seed=3).attention(2))
    assert not batches.attention(2).equal(Batches(rows, recipe, special().mask, seed=4).attention(2))
    assert Batches(rows, RECIPE, special().mask, seed=3).attention(0) is None


# What is learned from.


def test_no_position_is_padding_and_the_ends_of_documents_are_hidden_and_scored(rows):
    documents = [Document("a mass", "What is shown?"), Document("cut off", "Is there", ended=False), Document("plain")] * 8
    packed = pack(documents, tokenizer(), 32)
    end, turn = special().end_of_text, special().end_of_turn
    assert packed.shape[1] == 32 and (packed == turn).sum() in (23, 24), "of each prompt, and of each answer but those cut off"
    runs = "".join("e" if token == end else "-" for token in packed.flatten().tolist()).split("-")
    assert {len(ends) for ends in runs if ends} <= set(range(1, 2 * ENDS)) and len({*map(len, runs)}) > 3
    recipe = replace(RECIPE, length=32, batch_size=len(packed), tokens=len(packed) * 32)
    (batch,) = Batches(packed, recipe, special().mask, seed=0)(0)
    assert (batch.labels == end).sum() > 0.2 * (packed == end).sum()
    assert (batch.noisy.flatten()[batch.places] == special().mask).all()
    assert batch.clean.flatten()[batch.places].equal(batch.labels), "no shift: the label is the token at the place"


def test_text_in_a_document_cannot_become_a_special_token():
    packed = pack([Document("<|mdm_mask|> <|eot_id|> " * 40)], tokenizer(), 32)
    assert not torch.isin(packed[0], torch.tensor([special().mask, special().end_of_turn])).any()


@pytest.mark.parametrize("weighting", ["uniform", "1/t"])
def test_parts_of_a_batch_add_up_to_the_batch(causal, rows, weighting):
    recipe = replace(RECIPE, weights=weighting)
    adapter = Adapter(causal, recipe, CPU)
    losses = []
    for parts in (1, 2):
        batches = Batches(rows, recipe, special().mask, seed=0, accumulation=parts)(1)
        losses.append(torch.stack([torch.stack(adapter.losses(batch)) for batch in batches]).sum(dim=0))
    torch.testing.assert_close(*losses)
    assert losses[0][1] > 0


@torch.inference_mode()
def test_the_teacher_is_the_causal_model_on_clean_text(causal, rows):
    adapter = Adapter(causal, RECIPE, CPU)
    (batch,) = Batches(rows, RECIPE, special().mask, seed=0)(0)
    told = adapter.teacher.model(batch.clean, output_hidden_states=True).hidden_states
    own = load_tower(causal, dtype=torch.float32, causal=True).model(batch.clean, output_hidden_states=True).hidden_states
    assert len(told) == adapter.student.config.num_hidden_layers + 1
    assert distance(own, told, batch.places).abs() < 1e-4
    noisy = adapter.student.model(batch.noisy, output_hidden_states=True).hidden_states
    assert distance(noisy, told, batch.places) > 1


# The loop.


@pytest.fixture(scope="module")
def whole(causal, rows, tmp_path_factory) -> Path:
    """A run of ten steps."""
    out = tmp_path_factory.mktemp("adapted") / "whole"
    run(causal, rows, out)
    return out


def test_the_loss_falls_and_the_result_is_a_bidirectional_language_tower(causal, whole):
    history = read(whole / "history.json")
    evaluated = [row for row in history if "eval_loss" in row]
    assert evaluated[0]["step"] == 0 and evaluated[-1]["tokens"] == RECIPE.tokens
    assert evaluated[-1]["eval_loss"] < evaluated[0]["eval_loss"] and len(evaluated[0]["eval_by_t"]) == 4
    facts = read(whole / "training.json")
    assert facts["eval_loss"] == evaluated[-1]["eval_loss"] and facts["rows"] == {"train": 10, "held_out": 2}
    speed = read(whole / "speed.json")
    assert speed["total"]["tokens_per_second"] > 0 and [row["step"] for row in speed["rows"]] == list(range(1, 11))
    assert (
        not LlamaForCausalLM.from_pretrained(whole).config.is_causal and str(causal) not in (whole / "config.json").read_text()
    )
    assert AutoTokenizer.from_pretrained(whole).get_vocab() == tokenizer().get_vocab()
    assert (whole / "LICENSE").exists() and not (whole / "checkpoint.pt").exists()


def test_layers_learn_and_embeddings_and_head_do_not(causal, whole):
    before, after = weights(causal), weights(whole)
    moved = {name for name in before if not before[name].equal(after[name])}
    assert moved == {name for name in before if ".layers." in name or name == "model.norm.weight"}


def test_an_adapted_tower_takes_its_place_under_a_vision_tower(whole):
    network = assemble(whole, bundled("vision_tower"), seed=0, image_pool=2)
    assert network.model.language_model.layers[0].mlp.up_proj.weight.equal(weights(whole)["model.layers.0.mlp.up_proj.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [RECIPE, replace(RECIPE, attention="annealed", align=False, weights="1/t")], ids=["a", "b"])
def test_ten_steps_equal_five_an_interruption_and_five_more(causal, rows, whole, tmp_path, recipe):
    first = whole
    if recipe != RECIPE:
        first = tmp_path / "whole"
        run(causal, rows, first, recipe)
    assert run(causal, rows, tmp_path / "cut", recipe, stop_after=5) == {}
    assert not (tmp_path / "cut" / "config.json").exists()
    run(causal, rows, tmp_path / "cut", recipe)
    assert same(weights(first), weights(tmp_path / "cut")), "bit for bit"
    evaluated = [[row for row in read(out / "history.json") if "eval_loss" in row] for out in (first, tmp_path / "cut")]
    assert evaluated[0] == evaluated[1]


def test_a_folder_of_another_run_is_refused(causal, rows, tmp_path):
    run(causal, rows, tmp_path, stop_after=2)
    with pytest.raises(ValueError, match=r"made from something else \(seed 0, now 1\)"):
        run(causal, rows, tmp_path, seed=1)
    with pytest.raises(ValueError, match=r"made from something else .text"):
        run(causal, rows.flip(0), tmp_path)


@pytest.mark.slow
def test_a_killed_command_goes_on_bit_for_bit(causal, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"on the left, small {i % 7} mass " * 9}) + "\n" for i in range(40)))
    command = ["train", "adapt", "--language", causal, "--text", text, "--length", "32"]
    command += ["--batch-size", "4", "--tokens", str(100 * 4 * 32), "--continuations", "0", "--device", "cpu"]
    assert run_command(*command, "--out", tmp_path / "whole").exit_code == 0
    begun = start_command(tmp_path / "said", *command, "--out", tmp_path / "cut")
    checkpoint, deadline = tmp_path / "cut" / "checkpoint.pt", time.monotonic() + 300
    while not checkpoint.exists() and begun.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    begun.kill()
    begun.join()
    assert checkpoint.exists() and not (tmp_path / "cut" / "training.json").exists(), "killed on the way"
    assert run_command(*command, "--out", tmp_path / "cut").exit_code == 0
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_a_step_that_masks_nothing_and_steps_of_any_number_leave_a_whole_history(causal, rows, tmp_path):
    short = replace(RECIPE, length=4, batch_size=1, tokens=90 * 4)
    batches = Batches(rows[:10, :4], short, special().mask, seed=0)
    assert any(batches(step)[0].masked == 0 for step in range(90)), "some step masks nothing, or this shows nothing"
    adapt(causal, rows[:10, :4], rows[10:, :4], short, tmp_path / "out", quiet=True, checkpoints=False)
    history = read(tmp_path / "out/history.json")
    assert all(math.isfinite(row.get("alignment", 0)) for row in history)
    assert [row["step"] for row in history if "eval_loss" in row] == [*range(0, 90, 11), 90]


def test_held_out_losses_do_not_depend_on_how_many_rows_are_asked_at_once(causal, rows):
    tower = load_tower(causal, dtype=torch.float32, causal=False)
    torch.testing.assert_close(*(held_out_losses(tower, rows, special().mask, at_once=n) for n in (3, 12)))


# What the tower writes itself.


def test_a_causal_tower_writes_text_that_is_kept_and_gone_on_with(causal, tmp_path):
    writing = Writing(batch_size=4, new_tokens=8)
    first = write_text_of(causal, tmp_path, 30, writing, quiet=True)
    kept = {file.name: file.read_bytes() for file in tmp_path.glob("*.jsonl")}
    more = write_text_of(causal, tmp_path, 60, writing, quiet=True)
    assert first["tokens"] >= 30 and more["files"] > first["files"] == len(kept)
    assert kept == {name: (tmp_path / name).read_bytes() for name in kept}
    documents = read_documents(tmp_path)
    assert {document.prompt for document in documents} <= set(all_prompts()) and all(d.text for d in documents)
    with pytest.raises(ValueError, match="written otherwise"):
        write_text_of(causal, tmp_path, 60, replace(writing, seed=1), quiet=True)


def test_files_of_somebody_else_are_not_read_as_what_the_tower_wrote(causal, tmp_path):
    (tmp_path / "batch-00000.jsonl").write_text('{"tokens": 100}\n')
    with pytest.raises(ValueError, match="holds other files"):
        write_text_of(causal, tmp_path, 30, Writing(batch_size=4, new_tokens=8), quiet=True)
    assert [file.name for file in tmp_path.iterdir()] == ["batch-00000.jsonl"]


def test_a_tower_reads_as_much_of_its_own_text_as_was_asked_for_whatever_else_it_wrote(causal, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("medv.companion.studies.adaptation.adapt", lambda _tower, rows, *_, **__: seen.append(rows) or {})
    for tokens in (200, 600, 200):
        how = {"writing": Writing(batch_size=8, new_tokens=16), "self_tokens": tokens, "quiet": True}
        adapt_on_text(causal, tmp_path / "out", AdaptRecipe(length=16), **how)
    assert len(seen[1]) > len(seen[0]) and torch.equal(seen[0], seen[2])


def test_a_folder_of_somebody_else_is_refused_before_a_word_is_written(causal, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds other files \(notes\.txt\)"):
        adapt_on_text(causal, tmp_path / "out", AdaptRecipe(length=16), writing=Writing(batch_size=4, new_tokens=8))
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "notes.txt"]


def test_a_batch_that_cannot_be_cut_leaves_no_run_behind(causal, rows, tmp_path):
    with pytest.raises(ValueError, match="cannot be cut into 3"):
        run(causal, rows, tmp_path / "out", accumulation=3)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command_lets_a_tower_write_and_adapts_it(causal, tmp_path):
    command = ["train", "adapt", "--language", causal, "--out", tmp_path / "out", "--self", "--self-tokens", "600"]
    command += ["--self-batch", "4", "--length", "32", "--batch-size", "4", "--tokens", "256", "--continuations", "2"]
    for _ in range(2):  # a finished run is told again
        done = CliRunner().invoke(app, [*map(str, command), "--device", "cpu", "--json"])
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout.splitlines()[-1])["written"]["tokens"] >= 600
    said = read(tmp_path / "out" / "continuations.json")
    assert 1 <= len(said) <= 2 and {"prompt", "written", "before", "after"} == set(said[0])
    other = CliRunner().invoke(app, [*map(str, command), "--seed", "1"])
    assert other.exit_code == 2 and "written otherwise" in " ".join(other.stderr.split())


def test_a_prompt_is_continued_once_however_often_it_was_answered(causal, tmp_path):
    rows = [{"prompt": f"What is {name}?", "text": "a lung on the left " * 9} for name in "abc" for _ in range(3)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = AdaptRecipe(tokens=32, length=16, batch_size=2)
    adapt_on_text(causal, tmp_path / "out", recipe, text=str(tmp_path / "text.jsonl"), continuations=3, quiet=True)
    assert len(read(tmp_path / "out" / "continuations.json")) == 1, "one prompt is held out, with three answers"


def test_continuing_with_a_cache_draws_from_the_logits_of_the_whole(causal, rows):
    tower, stop = load_tower(causal, dtype=torch.float32, causal=True), [special().end_of_text]
    greedy = Writing(new_tokens=4, temperature=1e-4)
    ids = rows[:3, :9]
    written = continue_ids(tower, ids, greedy, stop, [special().mask], seed=0)
    with torch.inference_mode():
        for _ in range(4):
            logits = tower(ids).logits[:, -1]
            logits[:, special().mask] = -math.inf
            ids = torch.cat([ids, logits.argmax(dim=-1, keepdim=True)], dim=1)
    assert written.equal(ids[:, 9:])


def test_continuations_are_the_same_alone_and_in_a_batch(causal):
    documents = [Document("x", "What is shown?"), Document("on the left, small", ""), Document("x", "Is there a mass? " * 3)]
    config = SamplerConfig(16, 8, 16)
    together = continue_documents(causal, documents, config=config)
    assert together == [continue_documents(causal, [document], config=config)[0] for document in documents]


# Reading text, and what cannot be done.


def test_text_is_read_from_folders_and_lines(tmp_path):
    (tmp_path / "b.txt").write_text("second\n", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n\n{"prompt": "Why?", "text": "so", "ended": false}\n')
    (tmp_path / "ignored.csv").write_text("no")
    expected = [Document("first"), Document("so", "Why?", ended=False), Document("second")]
    assert read_documents(tmp_path) == expected and read_documents(tmp_path / "b.txt") == expected[2:]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"answer": "x"}', 'row 1 has no "text"'),
        ("a.jsonl", "{", "line 1: not JSON"),
        ("a.jsonl", '{"text": "x", "ended": "no"}', "row 1: prompt '' must be text, and ended 'no' true or false"),
        ("a.jsonl", '{"text": "x", "prompt": 5}', "row 1: prompt 5 must be text"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.txt", "", "holds no text"),
        ("a.csv", "x", "neither .txt nor .jsonl"),
    ],
)
def test_text_that_cannot_be_read_is_one_sentence(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=words):
        read_documents(tmp_path / name)


def test_all_answers_to_a_prompt_are_held_out_together():
    documents = [Document(f"answer {i}", f"question {i % 50}") for i in range(200)]
    train, held_out = split_documents(documents, 0.1)
    assert len(held_out) == 20 and not {d.prompt for d in train} & {d.prompt for d in held_out}
    with pytest.raises(ValueError, match="single document"):
        split_documents(documents[:1])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--text", "none.jsonl"], "none.jsonl is not there"),
        ([], "either a text to adapt on"),
        (["--self", "--attention", "both"], "unknown attention 'both'"),
        (["--self", "--weights", "t"], "unknown weights 't'"),
        (["--self", "--lr", "-1"], "learning_rate is -1.0: it must be above 0"),
        (["--self", "--lr", "nan"], "learning_rate is nan: it must be a finite number"),
        (["--text", "TEXT", "--length", "9999"], "less than one row"),
        (["--text", "TEXT", "--length", "300"], "longer than the 256 positions"),
        (["--text", "TEXT", "--batch-size", "3", "--accumulation", "2", "--length", "32"], "cannot be cut into 2"),
    ],
)
def test_what_cannot_be_adapted_is_one_sentence_with_exit_code_2(causal, tmp_path, options, words):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"mass {i} " * 300}) + "\n" for i in range(3)))
    options = [str(text) if option == "TEXT" else option for option in options]
    command = ["train", "adapt", "--language", causal, "--out", tmp_path / "out", *options]
    done = CliRunner().invoke(app, [str(part) for part in command])
    assert done.exit_code == 2 and words in " ".join(done.stderr.split())
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_tower_that_sees_both_directions_is_refused(rows, tmp_path):
    with pytest.raises(ValueError, match="sees both directions already"):
        run(bundled("language_tower"), rows, tmp_path)


# The ablation of notebook 14.


def made_up(shift: dict[str, float]) -> dict:
    """Results in which each choice adds what `shift` says to the loss of every row; texts repeat where weights are 1/t."""
    plan, results = get_profile("tiny").adaptation, {}
    for seed in plan.seeds:
        noise = torch.randn(40, generator=torch.Generator().manual_seed(seed)) * 0.01
        for number, arm in enumerate(adaptation.arms_of(plan)):
            added = sum(value for name, value in shift.items() if name in arm.split(", "))
            text = "one one" if "1/t" in arm else "one two"
            history = [{"tokens": tokens, "eval_loss": 5 + added} for tokens in (0, 100)]
            results[f"{number}-seed{seed}"] = {"rows": (5 + added + noise).tolist(), "texts": [text], "history": history}
    return results


def test_the_eight_arms_differ_in_what_their_names_say_and_in_nothing_else():
    for plan in (profile.adaptation for profile in PROFILES.values() if profile.adaptation):
        arms = adaptation.arms_of(plan)
        assert len(arms) == 8 and len({*arms.values()}) == 8
        alike = {replace(arm, attention="at_once", align=True, weights="uniform") for arm in arms.values()}
        assert alike == {replace(AdaptRecipe(**plan.recipe), attention="at_once", align=True, weights="uniform")}
        assert arms["annealed, not aligned, 1/t"] == replace(
            AdaptRecipe(**plan.recipe), attention="annealed", align=False, weights="1/t"
        )


@pytest.mark.slow
def test_the_verdict_on_a_choice_follows_from_its_interval():
    plan, results = get_profile("tiny").adaptation, made_up({"aligned": -0.5, "1/t": 0.3})
    items = adaptation.items_of(plan, results)
    table = adaptation.effects(items).set_index(["factor", "metric"])
    loss = table.xs("cross_entropy", level="metric")
    assert loss.loc["aligned minus not aligned", "verdict"] == "lower"
    assert loss.loc["1/t minus uniform", "value"] == pytest.approx(0.3, abs=1e-5)
    assert loss.loc["annealed minus at once", "verdict"] == "no difference shown"
    assert table.loc[("1/t minus uniform", "adjacent_duplicates"), "value"] == 100
    said = adaptation.conclusion(table.reset_index())
    assert "aligned minus not aligned, held-out masked cross-entropy (nats): better, -0.500" in said
    assert "annealed minus at once, held-out masked cross-entropy (nats): no difference shown" in said
    arms = adaptation.arm_table(items, [Document("one two two")])
    assert list(arms.iloc[0])[:3] == ["at once", "aligned", "uniform"] and arms.iloc[-1]["adjacent duplicates (%)"] == "50.00"
    assert len(adaptation.curves_of(plan, results)) == 16
