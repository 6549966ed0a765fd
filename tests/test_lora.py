"""LoRA: only the language tower is adapted, merging changes nothing, and a folder of adapters is as good as a model."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command import SHORT, run, save_picture
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from tiny import examples, gradients, model, processor, shape, special, training_batch

from medv.checkpoints.adapters import AdaptedModel
from medv.checkpoints.assembly import new_processor, random_model
from medv.checkpoints.bundled import load_model, save_projector
from medv.companion.studies.sizes import empty_model
from medv.companion.studies.vqa_study import sampler_config
from medv.evaluation.answering import Answerer
from medv.model.modeling import MedVForMaskedDiffusion
from medv.profiles import SamplerSpec, StageRecipe, get_profile
from medv.training.launch import RunOptions
from medv.training.lora import LoraRecipe, attach_lora, merge_lora
from medv.training.stages import train_stage

RECIPE = StageRecipe(("projector", "language_model"), 0, 0.8, 2, 1e-2, max_length=200, loss_tokens="response")
TILES = {"image_aspect": "anyres", "image_grid": [[32, 64], [64, 32]], "patch_merge": "spatial_unpad"}


def saved(folder, network=None, reader=None):
    (network or model()).save_pretrained(folder)
    (reader or processor()).save_pretrained(folder)
    return folder


def train_adapters(folder, *, options=TILES, **more):
    """Adapters trained for a few steps on a saved model: (the folder of the base, the merged model, the run's folder)."""
    reader = new_processor(processor().tokenizer, random_model(shape(), special(), seed=0, **options).config)
    base = saved(folder / "base", random_model(shape(), special(), seed=0, **options), reader)
    network, reader = load_model(base)
    out = folder / "run"
    lora = LoraRecipe(rank=4, alpha=8)
    return base, train_stage(network, reader, RECIPE, examples(10), out, RunOptions(lora=lora, quiet=True, **more)), out


def adapted(seed: int = 0) -> PeftModel:
    """A model with adapters that are not zero."""
    network = attach_lora(model(seed=seed), LoraRecipe(rank=4, alpha=8))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05, generator=generator)
    return network


def test_lora_touches_the_language_layers_and_the_projector_only():
    network = adapted().train()
    trainable = {name for name, p in network.named_parameters() if p.requires_grad}
    adapters = {name for name in trainable if "lora_" in name}
    assert all(".language_model.layers." in name for name in adapters)
    assert len(adapters) == 2 * 7 * 2, "seven linear maps in each of two layers, A and B"
    assert all(".projector.modules_to_save." in name for name in trainable - adapters)
    assert len(trainable - adapters) == 4
    found = gradients(network, training_batch())
    assert set(found) == trainable, "the vision tower gets no gradient"
    assert any("lora_A" in name for name, grad in found.items() if grad.abs().sum() > 0)


def test_a_new_adapter_changes_nothing():
    batch = training_batch()
    with torch.no_grad():
        plain = model()(**batch).loss
        network = attach_lora(model(), LoraRecipe()).eval()
        torch.testing.assert_close(network(**batch).loss, plain)


def test_merged_equals_unmerged_and_the_merged_model_is_plain(tmp_path):
    network, batch = adapted().eval(), training_batch()
    ids, mask, pixels = batch["input_ids"], batch["attention_mask"], batch["pixel_values"]
    with torch.no_grad():
        unmerged = network(ids, mask, pixels).logits
        assert not torch.allclose(unmerged, model()(ids, mask, pixels).logits, atol=1e-3)
        close = {"rtol": 0, "atol": 1e-5 * unmerged.abs().max().item()}
        merged = merge_lora(network, tmp_path / "adapter")
        torch.testing.assert_close(merged(ids, mask, pixels).logits, unmerged, **close)
        reloaded = PeftModel.from_pretrained(model(), tmp_path / "adapter").eval()
        torch.testing.assert_close(reloaded(ids, mask, pixels).logits, unmerged, **close)
    assert type(merged) is MedVForMaskedDiffusion
    assert merged.state_dict().keys() == model().state_dict().keys()


@pytest.mark.slow
def test_the_targets_of_the_released_shape_are_the_seven_maps_of_each_language_layer():
    paper = get_profile("paper").model
    network = attach_lora(empty_model(paper), LoraRecipe())
    adapters = [name for name, _ in network.named_parameters() if "lora_A" in name]
    assert len(adapters) == 7 * paper.layers and all("model.language_model.layers." in name for name in adapters)


def test_what_is_trained_on_adapters_is_loaded_with_the_adapters_below_it(tmp_path):
    _, _, first = train_adapters(tmp_path)
    network, reader = load_model(first / "adapter")
    save_projector(network, tmp_path / "stage1", {"model": str(first / "adapter")})
    reader.save_pretrained(tmp_path / "stage1")
    same(load_model(tmp_path / "stage1")[0], network)
    options = RunOptions(seed=1, lora=LoraRecipe(rank=2, alpha=4), quiet=True)
    for name in ("adapter", "../stage1"):
        network, reader = load_model(first / name)
        out = tmp_path / f"after-{Path(name).name}"
        trained = train_stage(network, reader, RECIPE, examples(10), out, options)
        same(load_model(out / "adapter")[0], trained)


def same(one, other):
    """Two networks have the same weights, up to the rounding of a merge."""
    for (name, value), (wanted, expected) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        assert name == wanted
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-5)


def test_training_leaves_every_weight_of_the_base_as_it_was():
    network = adapted().train()
    before = {name: p.detach().clone() for name, p in network.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    for _ in range(2):
        network(**training_batch()).loss.backward()
        optimizer.step()
    after = dict(network.named_parameters())
    assert not [name for name, value in before.items() if not value.equal(after[name])]
    base = {name for name in before if "lora_" not in name}
    assert {name.replace(".base_layer", "") for name in base if "original_module" not in name} == {
        f"base_model.model.{name}" for name, _ in model().named_parameters() if ".projector." not in name
    }


def bytes_of(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["small", "paper"])
def test_the_adapters_of_a_realistic_model_are_under_5_percent_of_it(tmp_path, profile):
    full = empty_model(get_profile(profile).model).float()
    rank = {"small": 4, "paper": 16}[profile]
    whole = bytes_of(full.parameters())
    network = attach_lora(full, LoraRecipe(rank, 2 * rank))
    assert bytes_of(p for p in network.parameters() if p.requires_grad) < 0.05 * whole


def test_a_folder_of_adapters_holds_what_was_trained_and_nothing_else(tmp_path):
    network = adapted()
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    network.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert bytes_of(stored.values()) == bytes_of(trained.values()) and len(stored) == len(trained)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, TILES], ids=["flat", "with a newline"])
def test_adapters_answer_as_the_merged_model_does(tmp_path, options):
    base, merged, out = train_adapters(tmp_path, options=options, checkpoints=False)
    network, reader = load_model(out / "adapter")
    assert type(network) is type(merged) and not network.training
    start = load_model(base)[0].state_dict()
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], value, rtol=0, atol=1e-6)
        if "image_newline" in name or "projector" in name:
            assert not value.equal(start[name]), f"{name} did not learn"
    config = sampler_config(SamplerSpec(8, 8, 8))
    texts = [
        [answer.text for answer in Answerer(net, reader).answer(examples(4), config, quiet=True)] for net in (network, merged)
    ]
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_a_run_with_a_newline_that_was_stopped_ends_as_one_that_was_not(tmp_path):
    _, whole, _ = train_adapters(tmp_path / "whole", checkpoints=False)
    train_adapters(tmp_path / "torn", stop_after=2)
    _, resumed, _ = train_adapters(tmp_path / "torn")
    again = resumed.state_dict()
    assert not [name for name, value in whole.state_dict().items() if not value.equal(again[name])]


@pytest.mark.slow
def test_ask_takes_a_folder_of_adapters_wherever_both_folders_were_moved(tmp_path):
    base, _, out = train_adapters(tmp_path / "first", options={}, checkpoints=False)
    save_picture(tmp_path / "a.png", "rgb")
    (tmp_path / "first").rename(tmp_path / "second")
    adapter = tmp_path / "second" / out.name / "adapter"
    assert str(tmp_path) not in (adapter / "adapter_config.json").read_text()
    done = run("ask", tmp_path / "a.png", "What is shown?", "--model", adapter, "--json", *SHORT)
    assert done.exit_code == 0 and "text" in json.loads(done.stdout)
    (tmp_path / "second" / base.name).rename(tmp_path / "gone")
    done = run("ask", tmp_path / "a.png", "What is shown?", "--model", adapter, *SHORT)
    assert done.exit_code == 2 and "set base_model_name_or_path in" in done.stderr


@pytest.mark.slow
def test_adapters_of_a_model_that_was_never_saved_point_to_the_merged_one(tmp_path):
    recipe = replace(RECIPE, epochs=0.4)
    train_stage(model(), processor(), recipe, examples(10), tmp_path, RunOptions(lora=LoraRecipe(4, 8), quiet=True))
    with pytest.raises(ValueError, match="use the merged model beside them"):
        load_model(tmp_path / "adapter")


def test_the_newline_of_a_model_without_one_is_neither_asked_for_nor_written(tmp_path):
    network = adapted()
    assert isinstance(network, AdaptedModel) and network.newline is None
    network.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("image_newline*"))


def test_adapters_of_a_tied_head_are_refused_as_merging_would_change_the_embedding_too(tmp_path):
    base = saved(tmp_path / "base")
    network = get_peft_model(
        load_model(base)[0], LoraConfig(r=2, target_modules=["lm_head"], base_model_name_or_path=str(base))
    )
    network.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(ValueError, match=r"adapts .*lm_head.*embedding and head at once: adapt the layers alone"):
        load_model(tmp_path / "adapter")
