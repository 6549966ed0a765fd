"""The network: it sees both directions, padding is invisible, and it loads like any transformers model."""

import pytest
import torch
from tiny import gradients, model, picture, processor, shape, special, tokenizer, training_batch
from transformers import AutoConfig, AutoModel, AutoProcessor, SiglipVisionModel

from medv.checkpoints.assembly import assemble, new_processor, random_model
from medv.checkpoints.bundled import load_model
from medv.diffusion.config import SamplerConfig
from medv.model.configuration import MedVConfig
from medv.model.modeling import MedVForMaskedDiffusion, pool_patches
from medv.model.processing import MedVProcessor
from medv.model.twin import language_tower

pytestmark = pytest.mark.usefixtures("untouched_generators")

PADDINGS = ("left", "right", "none")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def text_row(length: int, width: int, padding: str, pad: int = 1) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Ids [1, width] of `length` tokens padded on one side, and their attention mask; unpadded there is no mask."""
    ids = torch.arange(20, 20 + length)
    if padding == "none":
        return ids[None], None
    fill, seen = torch.full((width - length,), pad), torch.ones(length, dtype=torch.long)
    pair = [(fill, ids), (torch.zeros_like(fill), seen)]
    ids, mask = (torch.cat(parts if padding == "left" else parts[::-1])[None] for parts in pair)
    return ids, mask


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("padding", PADDINGS)
def test_a_future_token_changes_earlier_states(attention, padding):
    network = model(attention=attention).model
    assert network.language_model.config._attn_implementation == attention
    ids, mask = text_row(8, 11, padding)
    last = 10 if padding == "left" else 7
    changed = ids.clone()
    changed[0, last] += 50
    with torch.no_grad():
        before, after = network(ids, mask), network(changed, mask)
    moved = (before - after).abs().amax(dim=-1)[0]  # [T]
    visible = torch.ones_like(ids[0], dtype=torch.bool) if mask is None else mask[0].bool()
    assert (moved[visible] > 1e-3).all(), f"some visible token does not see the last one: {moved}"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_both_attentions_give_the_same_states(attention):
    ids, mask = text_row(8, 11, "left")
    with torch.no_grad():
        reference = model(attention="eager").model(ids, mask)[:, 3:]
        torch.testing.assert_close(model(attention=attention).model(ids, mask)[:, 3:], reference, **CLOSE)


def test_a_training_batch_is_bidirectional_too():
    network = model().train().model
    batch = training_batch()
    changed = batch["input_ids"].clone()
    changed[0, batch["attention_mask"][0].sum() - 1] = 50
    with torch.no_grad():
        before = network(batch["input_ids"], batch["attention_mask"], batch["pixel_values"])
        after = network(changed, batch["attention_mask"], batch["pixel_values"])
    moved = (before - after).abs().amax(dim=-1)
    assert (moved[0, : batch["attention_mask"][0].sum()] > 1e-4).all()
    assert (moved[1:] == 0).all(), "rows of a batch must not see each other"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_what_stands_in_the_padding_changes_nothing(attention, padding):
    network = model(attention=attention).model
    ids, mask = text_row(8, 13, padding, pad=1)
    other, _ = text_row(8, 13, padding, pad=200)
    with torch.no_grad():
        difference = (network(ids, mask) - network(other, mask)).abs().amax(dim=-1)
    assert (difference[mask.bool()] == 0).all()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("width", [9, 20])
def test_a_padded_row_has_the_states_of_its_single_run(attention, padding, width):
    network = model(attention=attention).model
    ids, mask = text_row(8, width, padding)
    alone, _ = text_row(8, 8, "none")
    with torch.no_grad():
        torch.testing.assert_close(network(ids, mask)[mask.bool()], network(alone)[0], **CLOSE)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_moves_no_token(padding):
    network, seen = model().model, []
    network.language_model.rotary_emb.register_forward_pre_hook(
        lambda _, args, options: seen.append(options.get("position_ids", args[-1])), with_kwargs=True
    )
    ids, mask = text_row(8, 13, padding)
    network(ids, mask)
    assert seen[0][mask.bool()].tolist() == list(range(8))


def test_the_logits_of_asked_columns_are_those_of_the_whole():
    network = model()
    ids, mask = text_row(8, 11, "left")
    with torch.no_grad():
        whole = network(ids, mask).logits
        torch.testing.assert_close(network(ids, mask, logits_to_keep=slice(4, 7)).logits, whole[:, 4:7])


# Images.


def test_visual_features_are_the_states_before_the_final_norm_of_the_tower():
    network = model()
    pixels = processor().pixels([picture(0), picture(3)])
    with torch.no_grad():
        states = network.model.vision_tower(pixels, output_hidden_states=True)
        features = network.model.get_image_features(pixels)
    assert isinstance(network.model.vision_tower, SiglipVisionModel)
    torch.testing.assert_close(features, network.model.projector(states.hidden_states[-1]))
    assert not torch.allclose(states.hidden_states[-1], states.last_hidden_state, atol=1e-3)
    assert features.shape == (2, network.config.image_tokens, 32)


def test_the_image_reaches_the_answer_and_features_may_be_given_instead():
    network, inputs = model(), processor()(images=picture(0), text="What is shown?")
    other = processor().pixels([picture(4)])
    with torch.no_grad():
        first = network(**inputs).logits
        features = network.model.get_image_features(inputs["pixel_values"])
        given = network(inputs["input_ids"], inputs["attention_mask"], image_features=features).logits
        second = network(inputs["input_ids"], inputs["attention_mask"], other).logits
    assert given.equal(first)
    assert (first - second).abs().amax() > 1e-3


@pytest.mark.parametrize("tokens", [0, 3, 5])
def test_a_wrong_number_of_placeholders_is_refused_with_both_numbers(tokens):
    ids = torch.tensor([[special().image] * tokens + [30, 31]])
    with pytest.raises(ValueError, match=f"{tokens} image placeholders but the images give 4 visual tokens"):
        model()(ids, pixel_values=processor().pixels([picture(0)]))


def test_placeholders_without_an_image_are_refused():
    with pytest.raises(ValueError, match="4 image placeholders but the images give 0"):
        model()(torch.tensor([[special().image] * 4 + [30]]))


# Configuration and files.


def content(settings: dict) -> dict:
    """A configuration without what loading adds to it: where it came from and the type of the weights."""
    kept = {key: value for key, value in settings.items() if key not in ("_name_or_path", "dtype", "architectures")}
    return {key: content(value) if isinstance(value, dict) else value for key, value in kept.items()}


@pytest.mark.parametrize("tie", [True, False])
def test_save_and_load_keep_configuration_weights_and_direction(tmp_path, tie):
    network = random_model(shape(tie_word_embeddings=tie), special(), seed=1, noise_eps=0.02).eval()
    network.save_pretrained(tmp_path)
    processor("general").save_pretrained(tmp_path)
    loaded = MedVForMaskedDiffusion.from_pretrained(tmp_path).eval()
    assert content(loaded.config.to_dict()) == content(network.config.to_dict())
    assert loaded.config.noise_eps == 0.02 and loaded.config.text_config.is_causal is False
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tie
    ids, mask = text_row(8, 11, "left")
    with torch.no_grad():
        assert loaded(ids, mask).logits.equal(network(ids, mask).logits)


def test_auto_classes_load_it_without_remote_code(tmp_path):
    model().save_pretrained(tmp_path)
    processor("medical").save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), MedVConfig)
    assert isinstance(AutoModel.from_pretrained(tmp_path), MedVForMaskedDiffusion)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, MedVProcessor)
    assert (loaded.system, loaded.image_tokens, loaded.special) == ("medical", 4, special())
    network, same = load_model(tmp_path)
    inputs, again = (p(images=picture(1), text="Is there a mass?") for p in (loaded, same))
    assert all(inputs[key].equal(again[key]) for key in inputs)
    assert not network.training


def test_a_causal_text_configuration_is_made_bidirectional(tmp_path):
    raw = model().config.to_dict()
    raw["text_config"]["is_causal"] = True
    assert MedVConfig(**raw).text_config.is_causal is False


def test_assembled_towers_keep_their_weights(tmp_path):
    network = random_model(shape(tie_word_embeddings=False), special(), seed=2)
    language_tower(network).save_pretrained(tmp_path / "language")
    processor().tokenizer.save_pretrained(tmp_path / "language")
    network.model.vision_tower.save_pretrained(tmp_path / "vision")
    built = assemble(tmp_path / "language", tmp_path / "vision", seed=5)
    for name, value in network.state_dict().items():
        same = built.state_dict()[name].equal(value)
        assert same != name.startswith("model.projector") or "bias" in name, name
    again = assemble(tmp_path / "language", tmp_path / "vision", seed=5)
    assert all(v.equal(again.state_dict()[k]) for k, v in built.state_dict().items())
    assert built.config.text_config.is_causal is False
    assert new_processor(processor().tokenizer, built.config).image_tokens == 4


def test_a_random_model_depends_on_its_seed_alone():
    first, second, other = model(seed=4), model(seed=4), model(seed=5)
    assert first.lm_head.weight.equal(second.lm_head.weight)
    assert not first.lm_head.weight.equal(other.lm_head.weight)


def test_the_default_token_ids_are_those_of_the_release():
    config = MedVConfig()
    assert (config.mask_token_id, config.stop_token_ids[0], config.image_token_id) == (126336, 126348, 126349)


# Training switches.


def test_gradient_checkpointing_gives_the_same_gradients():
    network, batch = model().train(), training_batch()
    plain = gradients(network, batch)
    network.activation_checkpointing_enable()
    checkpointed = gradients(network, batch)
    layers = network.model.language_model.layers
    assert all(layer.gradient_checkpointing for layer in layers)
    assert plain.keys() == checkpointed.keys()
    for name, grad in plain.items():
        torch.testing.assert_close(checkpointed[name], grad, rtol=1e-5, atol=1e-7, msg=name)


def test_gradient_checkpointing_reaches_the_projector_when_all_else_is_frozen():
    network, batch = model().train(), training_batch()
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name.startswith("model.projector."))
    plain = gradients(network, batch)
    network.activation_checkpointing_enable()
    checkpointed = gradients(network, batch)
    assert plain.keys() == checkpointed.keys() and len(plain) == 4
    assert all(torch.allclose(checkpointed[name], grad, rtol=1e-5, atol=1e-7) for name, grad in plain.items())


# Generation through the model; the sampler itself is tested in test_sampler.py.


def test_generate_refuses_prompts_padded_on_the_right():
    ids, mask = text_row(8, 11, "right")
    with pytest.raises(ValueError, match="padded on its right"):
        model().generate(ids, mask, config=SamplerConfig(gen_length=4, block_length=4, steps=4))


def test_the_configuration_knows_which_tokens_end_a_response_and_which_are_never_written():
    network = model()
    config = network.config
    assert set(config.suppress_token_ids) == {
        special().start_of_text,
        special().start_header,
        special().end_header,
        special().image,
        special().mask,
    }
    assert set(config.stop_token_ids) == {special().end_of_turn, special().end_of_text}


def test_pooling_averages_neighboring_patches_row_by_row():
    features = torch.arange(16.0).view(1, 16, 1)  # a 4 x 4 grid, numbered row by row
    assert pool_patches(features, 2).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert pool_patches(features, 1) is features


def test_an_assembled_model_carries_no_path_of_its_towers(tmp_path):
    original = model()
    language_tower(original).save_pretrained(tmp_path / "language")
    tokenizer().save_pretrained(tmp_path / "language")
    original.model.vision_tower.save_pretrained(tmp_path / "vision")
    built = assemble(tmp_path / "language", tmp_path / "vision", seed=0)
    built.save_pretrained(tmp_path / "built")
    assert str(tmp_path) not in (tmp_path / "built" / "config.json").read_text()
    for name, tensor in built.model.language_model.state_dict().items():
        assert torch.equal(tensor, original.model.language_model.state_dict()[name])
