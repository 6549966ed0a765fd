"""The autoregressive twin looks back only, learns the next token, and is saved, loaded and asked like any model."""

import json

import pytest
import torch
from tiny import examples, model, processor

from medv.checkpoints.bundled import bundled, load_model
from medv.companion.studies.twin import twin_in, twin_table
from medv.companion.towers.twin import causal_recipe, obtain_twin
from medv.diffusion.config import SamplerConfig
from medv.diffusion.schedules import FixedSchedule
from medv.evaluation.answering import Answerer
from medv.model.twin import MedVForCausalLM, causal_twin
from medv.profiles import get_profile
from medv.training.collate import Collator, Encoder


@pytest.fixture(scope="module")
def twin():
    return causal_twin(model())


def ids(seed: int = 0, rows: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(20, 200, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_a_later_token_changes_nothing_before_it_in_the_twin_and_everything_in_the_diffusion_model(twin):
    first, second = ids(), ids()
    second[:, -1] = (second[:, -1] + 1) % 200
    with torch.no_grad():
        gaps = {net: (net.model(first)[:, :-1] - net.model(second)[:, :-1]).abs().max() for net in (twin, model())}
    assert gaps[twin] == 0
    assert min(gap for net, gap in gaps.items() if net is not twin) > 1e-3


def test_the_loss_is_the_mean_cross_entropy_of_the_labelled_next_tokens(twin):
    tokens, labels = ids(1), ids(1)
    labels[:, :5] = -100
    with torch.no_grad():
        loss = twin(tokens, labels=labels).loss
        chances = twin(tokens).logits.log_softmax(-1)
    told = [-chances[row, i - 1, tokens[row, i]] for row in range(2) for i in range(5, 12)]
    assert torch.isclose(loss, torch.stack(told).mean(), atol=1e-5)


def test_padding_and_noise_do_not_change_the_loss(twin):
    encode = Encoder(processor(), loss_tokens="response", max_length=256)
    items = [encode(example) | {"noise": (0, 0, i), "stratum": (0, 1)} for i, example in enumerate(examples(4))]
    batch = Collator(processor().special, padding="none")(items)
    with torch.no_grad():
        alone = [twin(**Collator(processor().special, padding="none")([item])) for item in items]
        counts = torch.tensor([sum(label != -100 for label in item["labels"]) for item in items])
        together = twin(**batch).loss
        noisy = twin(**(batch | {"t": batch["t"] / 2, "u": batch["u"] / 2})).loss
    wanted = (torch.stack([out.loss for out in alone]) * counts).sum() / counts.sum()
    assert torch.isclose(together, wanted, atol=1e-5) and noisy == together


def test_images_that_were_looked_at_before_give_the_same_loss_and_logits(twin):
    encode = Encoder(processor(), loss_tokens="response", max_length=256)
    item = encode(examples(1)[0]) | {"noise": (0, 0, 0), "stratum": (0, 1)}
    batch = Collator(processor().special, padding="none")([item])
    with torch.no_grad():
        seen = {name: value for name, value in batch.items() if name != "pixel_values"}
        seen["vision_states"] = twin.model.look(batch["pixel_values"])
        assert torch.equal(twin(**seen).loss, twin(**batch).loss)
        del seen["labels"], batch["labels"]
        assert torch.equal(twin(**seen).logits, twin(**batch).logits)


def test_an_answer_is_the_most_probable_token_again_and_again(twin):
    example = examples(3)[1]
    (answer,) = Answerer(twin, processor()).answer([example], SamplerConfig(6, 6, 6), quiet=True)
    prompt = processor()(images=example.image(), text=example.question)
    canvas = prompt["input_ids"]
    banned = [*twin.config.suppress_token_ids, twin.config.image_token_id, twin.config.mask_token_id]
    for _ in range(6):
        with torch.no_grad():
            logits = twin(canvas, pixel_values=prompt["pixel_values"]).logits[0, -1]
        logits[banned] = -torch.inf
        canvas = torch.cat([canvas, logits.argmax()[None, None]], dim=1)
        if int(canvas[0, -1]) in twin.config.stop_token_ids:
            break
    new = canvas[0, prompt["input_ids"].shape[1] :].tolist()
    kept = [token for token in new if token not in twin.config.stop_token_ids]
    assert answer.text == processor().decode_response(kept) and answer.tokens == len(kept) and answer.forwards == len(new)


def test_answers_do_not_depend_on_the_batch_and_a_length_can_be_forced(twin):
    config = SamplerConfig(8, 8, 8, min_length=8)
    together = Answerer(twin, processor()).answer(examples(4), config, quiet=True)
    alone = Answerer(twin, processor()).answer(examples(4), config, batch_size=1, quiet=True)
    assert [a.text for a in together] == [a.text for a in alone]
    assert {a.tokens for a in together} == {8} and {a.finish_reason for a in together} == {"length"}


@pytest.mark.parametrize("option", [{"temperature": 1.0}, {"schedule": FixedSchedule("cosine")}, {"cfg_scale": 1.0}])
def test_settings_of_diffusion_are_refused(twin, option):
    with pytest.raises(ValueError, match="greedily"):
        Answerer(twin, processor()).answer(examples(1), SamplerConfig(8, 8, 8, **option), quiet=True)


def test_a_saved_twin_comes_back_as_a_twin_and_its_source_is_untouched(tmp_path, twin):
    twin.save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    loaded, _ = load_model(tmp_path)
    assert type(loaded) is MedVForCausalLM and loaded.config.text_config.is_causal
    assert not model().config.text_config.is_causal
    with torch.no_grad():
        assert torch.equal(loaded.model(ids()), twin.model(ids()))


def test_the_recipes_of_both_models_differ_in_padding_and_times_alone():
    recipe = get_profile("tiny").stages["vqa"]
    changed = {name for name, value in vars(causal_recipe(recipe)).items() if value != getattr(recipe, name)}
    assert changed <= {"padding", "times"}


@pytest.mark.slow
def test_the_bundled_tower_becomes_a_twin_and_a_finished_one_is_kept(tmp_path):
    facts = obtain_twin(get_profile("smoke"), tmp_path / "twin")
    assert {"align", "instruct", "seconds"} == set(facts)
    assert type(load_model(tmp_path / "twin")[0]) is MedVForCausalLM
    before = (tmp_path / "twin/model.safetensors").stat().st_mtime_ns
    obtain_twin(get_profile("smoke"), tmp_path / "twin")
    assert (tmp_path / "twin/model.safetensors").stat().st_mtime_ns == before
    copied = obtain_twin(get_profile("smoke"), tmp_path / "copy", source=tmp_path / "twin")
    assert copied == {"copied from": "twin"} == json.loads((tmp_path / "copy/twin.json").read_text())
    assert twin_in(tmp_path / "copy") == tmp_path / "copy"


def test_a_profile_without_a_bundled_tower_says_why_it_has_no_twin(tmp_path):
    facts = obtain_twin(get_profile("small"), tmp_path / "none")
    assert facts["none"].startswith("profile small has no bundled tower")
    assert twin_in(tmp_path / "none") is None
    assert twin_table(tmp_path / "none")["twin"].tolist() == [facts["none"]]
    with pytest.raises(ValueError, match="holds a diffusion model"):
        obtain_twin(get_profile("small"), tmp_path / "given", source=bundled("tiny_model"))
    assert not (tmp_path / "given").exists()
