"""Text as the reference sees it: hidden states, losses, sampled tokens, prompts and labels.

The folder with the reference's outputs is MEDV_FIXTURES (default: ../shared/fixtures beside the repository). Every case that
its files hold is tested; no name, number or size of a case stands here.
"""

import inspect
import re
from dataclasses import replace
from functools import cache

import pytest
import torch
from PIL import Image
from reference import FOLDER, keys, needs_reference, read, reference_network
from safetensors.torch import load_file
from tiny import special, tokenizer
from transformers import LlamaConfig, SiglipVisionConfig

from medv.checkpoints.assembly import new_processor
from medv.data.chat import SYSTEM_PROMPTS, encode_dialogue, encode_plain, encode_prompt, prompt_text
from medv.data.example import IMAGE_TOKEN, Turn
from medv.diffusion.config import SamplerConfig
from medv.diffusion.official import add_gumbel_noise
from medv.diffusion.schedules import transfer_counts
from medv.model.configuration import MedVConfig
from medv.model.modeling import MedVForMaskedDiffusion
from medv.training.collate import Collator

pytestmark = needs_reference

IMAGE_PLACEHOLDER = -200  # in the reference's ids
COLUMN_STRIDE = 997  # of the stored logits


@cache
def tensors(name: str) -> dict[str, torch.Tensor]:
    return load_file(FOLDER / name)


GEN, MM, LOSS, LABELS = (read(f"{name}.json") for name in ("gen", "mm", "loss", "labels"))
FORWARD_KEYS, GEN_KEYS = (keys(f"{name}.safetensors") for name in ("forward", "gen"))
FORWARDS = [key.removesuffix(".hidden") for key in FORWARD_KEYS if key.endswith(".hidden")]


def robust(cases: list[dict]) -> list:
    """Cases whose tokens do not hang on rounding (of random draws the reference does not say)."""
    return [pytest.param(case, id=case["name"]) for case in cases if case.get("fp64_agrees") is not False]


@cache
def used_ids() -> set[int]:
    """Ids that some prompt holds: the placeholder of medv must be none of them."""
    stored = [load_file(FOLDER / name) for name in ("gen.safetensors", "mm.safetensors", "forward.safetensors")]
    found = {int(i) for file in stored for key, ids in file.items() if not ids.is_floating_point() for i in ids.flatten()}
    return found | {i for case in GEN["llada_text"] for row in case["prompt_ids"] for i in row}


@cache
def config() -> MedVConfig:
    settings = read("config.json")
    vision, mm = settings["vision"], settings["mm"]
    return MedVConfig(
        # The last layer of the released tower is not computed.
        vision_config=SiglipVisionConfig(**vision | {"num_hidden_layers": vision["num_hidden_layers"] - 1}),
        text_config=LlamaConfig(**settings["lm"]),
        image_token_id=next(i for i in reversed(range(settings["lm"]["vocab_size"])) if i not in used_ids()),
        patch_merge=mm["mm_patch_merge_type"],
        image_grid=mm["image_grid_pinpoints"],
    )


@pytest.fixture(scope="module")
def text_network() -> MedVForMaskedDiffusion:
    return reference_network(config())


# Hidden states, logits and losses. The reference does not shift positions by padding.


def positions(inputs: torch.Tensor) -> torch.Tensor:
    return torch.arange(inputs.shape[1])[None]


def conversation_mask(turns: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """bool [B, 1, T, T] of turns [B, T]: a query (third dimension) sees the keys of its own turn and of earlier ones."""
    seen = turns[:, :, None] >= turns[:, None, :]
    return (seen if attention_mask is None else seen & attention_mask[:, None, :].bool())[:, None]


def stored_parts(file: str, name: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(f"{name}."): v for k, v in tensors(file).items() if k.startswith(f"{name}.")}


@pytest.mark.parametrize("name", FORWARDS)
def test_hidden_states_and_logits_are_those_of_the_reference(name, text_network):
    stored = stored_parts("forward.safetensors", name)
    inputs = {part: stored[part] for part in ("input_ids", "inputs_embeds") if part in stored}
    if not inputs:  # cases share the ids of the last one before them that has the same shape
        shared = [tensors("forward.safetensors")[key] for key in sorted(FORWARD_KEYS) if key.endswith(".input_ids")]
        inputs = {"input_ids": [ids for ids in shared if ids.shape == stored["hidden"].shape[:2]][-1]}
    mask = stored.get("attention_mask")
    real = torch.ones(stored["hidden"].shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    if "conversation_ids" in stored:
        mask = conversation_mask(stored["conversation_ids"], mask)
    with torch.no_grad():
        output = text_network(attention_mask=mask, position_ids=positions(stored["hidden"]), **inputs)
    torch.testing.assert_close(output.last_hidden_state[real], stored["hidden"][real], rtol=0, atol=1e-5)
    if "logits" in stored:
        torch.testing.assert_close(output.logits[real], stored["logits"][real], rtol=0, atol=1e-4)


def loss_case(name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What the file holds of a loss case, and the arguments of the model's forward for it."""
    stored = stored_parts("loss.safetensors", name.partition("_")[0]) | stored_parts("loss.safetensors", name)
    mask = stored.get("attention_mask")
    if "conversation_ids" in LOSS["cases"][name]["kwargs"]:
        mask = conversation_mask(stored["conversation_ids"], mask)
    given = {key: stored[key] for key in ("labels", "t", "u", "inputs_embeds")}
    return stored, given | {"attention_mask": mask, "position_ids": positions(stored["labels"])}


@pytest.mark.parametrize("name", LOSS.get("cases", {}))
def test_losses_and_gradients_are_those_of_the_reference(name, text_network):
    facts, (stored, inputs) = LOSS["cases"][name], loss_case(name)
    text_network.zero_grad()
    output = text_network(**inputs)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(facts["loss"], rel=1e-6)
    assert output.loss.item() == pytest.approx(stored["loss"].item(), rel=1e-6)
    assert output.masked.equal(stored["masked_indices"]) and int(output.masked.sum()) == facts["n_masked"]
    logits = text_network.lm_head(output.last_hidden_state[output.masked])
    entropy = torch.nn.functional.cross_entropy(logits, stored["labels"][output.masked], reduction="none")
    torch.testing.assert_close(entropy, stored["token_ce"], rtol=0, atol=1e-4)
    torch.testing.assert_close(logits[:, ::COLUMN_STRIDE], stored["logits_masked_cols"], rtol=0, atol=1e-4)
    parameters = dict(text_network.model.language_model.named_parameters())
    for key in [key for key in stored if key.startswith("grad.")]:
        torch.testing.assert_close(
            gradient(parameters, key), stored[key], rtol=1e-5, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}"
        )


def gradient(parameters: dict[str, torch.nn.Parameter], key: str) -> torch.Tensor:
    """The gradient that a name such as grad.layers0.q_proj means."""
    part = key.removeprefix("grad.")
    layer = re.fullmatch(r"layers(\d+)\.(.+)", part)
    if layer is None:
        return parameters[f"{part}.weight"].grad
    wanted = re.compile(rf"layers\.{layer[1]}\.(.+\.)?{layer[2]}\.weight")
    return next(parameter for name, parameter in parameters.items() if wanted.fullmatch(name)).grad


@pytest.mark.parametrize("name", LOSS.get("cases", {}))
def test_the_masked_embeddings_of_a_loss_case_are_those_of_the_reference(name, text_network):
    stored, inputs = loss_case(name)
    seen = []
    handle = text_network.model.language_model.register_forward_pre_hook(
        lambda _, args, given: seen.append(given["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        text_network(**inputs)
    handle.remove()
    assert seen[0].equal(stored["noisy_embeds"])


# Sampling.


def settings_of(case: dict, preset) -> dict:
    """The settings of a case that the preset knows; what the reference swallows without effect is no setting here."""
    known = inspect.signature(preset).parameters
    return {key: value for key, value in case.items() if key in known}


def replayed(draws: torch.Tensor | None):
    """The reference's own draws for the confidence, one row a step."""
    if draws is None:
        return None
    rows = iter(draws)
    return lambda shape, dtype: next(rows).reshape(shape).to(dtype)


def stop_ids(name: str) -> tuple[int, ...]:
    return tuple(GEN["stop_strings"][name])


@pytest.mark.slow
@pytest.mark.parametrize("case", robust(GEN.get("embeds", [])))
def test_the_official_preset_samples_the_tokens_of_the_reference(case, text_network):
    suffix = case.get("generation_suffix")
    preset = SamplerConfig.official(
        **settings_of(case, SamplerConfig.official),
        stop_sequences=tuple(stop_ids(name) for name in case.get("stopping_criteria") or ()),
        suffix=stop_ids(suffix) if suffix else (),
    )
    draws = tensors("gen.safetensors").get(f"{case['name']}.draws")
    prompt = torch.tensor([GEN["prompts"][case["prompt"]]])
    output = text_network.generate(prompt, config=preset, uniform=replayed(draws))
    assert output.sequences[0, : output.lengths[0]].tolist() == case["out"]


@pytest.mark.slow
@pytest.mark.parametrize("case", robust(GEN.get("llada_text", [])))
def test_the_llada_preset_samples_the_tokens_of_the_reference(case, text_network):
    own, settings = text_network.config, settings_of(case, SamplerConfig.llada)
    end_of_text, end_of_turn = own.fill_token_id, own.stop_token_ids[0]
    if case.get("logits_eos_inf"):
        settings["suppress_tokens"] = (end_of_text,)
    if case.get("confidence_eos_eot_inf"):
        settings["unsure_tokens"] = (end_of_text, end_of_turn)
    prompt, mask = (None if case[key] is None else torch.tensor(case[key]) for key in ("prompt_ids", "attention_mask"))
    draws = tensors("gen.safetensors").get(f"{case['name']}.draws")
    output = text_network.generate(prompt, mask, config=SamplerConfig.llada(**settings), uniform=replayed(draws))
    assert output.sequences.tolist() == case["out"]


@pytest.mark.parametrize("case", GEN.get("num_transfer", []))
def test_each_step_writes_as_many_tokens_as_in_the_reference(case):
    wanted = case["out"] if isinstance(case["out"][0], list) else [case["out"]]
    assert [transfer_counts(masks, case["steps"]) for masks in case["masks"]] == wanted


@pytest.mark.parametrize("key", [key for key in GEN_KEYS if key.endswith("gumbel.out")])
def test_gumbel_noise_is_that_of_the_reference(key):
    stored, facts = tensors("gen.safetensors"), GEN["gumbel"]
    noisy = add_gumbel_noise(stored["gumbel.logits"], facts["temperature"], stored["gumbel.uniform"])
    torch.testing.assert_close(noisy, stored[key], rtol=1e-12, atol=0)
    assert noisy.argmax(dim=-1).tolist() == facts["argmax"]


@pytest.mark.slow
@pytest.mark.parametrize("key", [key for key, value in MM.items() if isinstance(value, dict) and key.startswith("generate_")])
def test_an_answer_about_an_image_has_the_tokens_of_the_reference(key, text_network):
    facts = MM[key]
    aspect, most, merge = re.fullmatch(r"generate_([a-z]+)(?:_max_(\d+))?_(\w+)", key).groups()
    stored = tensors("mm.safetensors")
    ids = stored.get(f"{key}.input_ids", stored.get("generate.input_ids"))[0]
    own = new_processor(tokenizer(), config())
    own.image_aspect, own.image_max_tiles, own.patch_merge = aspect, int(most) if most else None, merge
    pictures = [Image.open(FOLDER / "images" / f"{facts['image']}.png")]
    count = own.view_plan.tokens(*pictures[0].size)
    parts = [torch.full((count,), config().image_token_id) if i == IMAGE_PLACEHOLDER else i[None] for i in ids]
    preset = SamplerConfig.official(**settings_of(facts, SamplerConfig.official))
    output = text_network.generate(
        torch.cat(parts)[None], pixel_values=own.pixels(pictures), image_layouts=own.layouts(pictures), config=preset
    )
    assert output.sequences[0, : output.lengths[0]].tolist() == facts["out"]


def test_what_the_reference_does_not_survive_is_refused_or_works(text_network):
    """Its guidance without a mask and its batches of conversation masks break; here they work."""
    prompt = torch.tensor([next(iter(GEN["prompts"].values()))])
    preset = SamplerConfig.llada(gen_length=4, block_length=4, steps=2, cfg_scale=1.0)
    assert text_network.generate(prompt, config=preset).lengths == [4]
    with torch.no_grad():
        assert text_network(prompt).logits.shape[:2] == prompt.shape


# Prompts and labels. The reference's tokenizer is not in the folder: what it does to text is read from its prompts.


class ReadTokenizer:
    """The reference's tokenizer of text as far as its prompts show it: bytes in the order of GPT-2, and longer pieces.

    `known` maps ids to pieces, whose characters are bytes. Text is cut into the longest known pieces from left to right.
    """

    def __init__(self, known: dict[int, str], specials: dict[str, int]):
        self.ids, self.specials = {piece: token for token, piece in known.items()}, specials
        self.longest = max(map(len, self.ids))

    def convert_tokens_to_ids(self, token: str) -> int | None:
        return self.specials.get(token)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        ids, left = [], as_bytes(text)
        while left:
            piece = next(left[:n] for n in range(self.longest, 0, -1) if left[:n] in self.ids)
            ids.append(self.ids[piece])
            left = left[len(piece) :]
        return ids


def as_bytes(text: str) -> str:
    """Text with one character a byte."""
    return text.encode().decode("latin-1")


def byte_pieces() -> dict[int, str]:
    """The first 256 ids of GPT-2's byte order: the printable bytes, then the others."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    order = printable + [byte for byte in range(256) if byte not in printable]
    return {token: chr(byte) for token, byte in enumerate(order)}


def aligned(ids: list[int], text: str, known: dict[int, str]) -> dict[int, str] | None:
    """`known` and what the unknown ids must mean so that `ids` spell `text`; None where nothing fits."""
    if not ids:
        return None if text else known
    if ids[0] in known:
        piece = known[ids[0]]
        return aligned(ids[1:], text[len(piece) :], known) if text.startswith(piece) else None
    pieces = (text[:size] for size in range(2, min(len(text), 16) + 1))
    new = (piece for piece in pieces if " " not in piece and piece not in known.values())
    tries = (aligned(ids[1:], text[len(piece) :], known | {ids[0]: piece}) for piece in new)
    return next((found for found in tries if found is not None), None)


@cache
def their_tokenizer() -> ReadTokenizer:
    """Read from the prompts: the stretches between special tokens are the same in the strings and in the ids."""
    facts = LABELS["tokenizer"]
    specials = facts["ids"] | {IMAGE_TOKEN: IMAGE_PLACEHOLDER}
    known = byte_pieces()
    for prompt in LABELS["prompts"].values():
        texts = re.split("|".join(map(re.escape, specials)), prompt["prompt"])
        parts = [[]]
        for token in prompt["ids"]:
            if token in specials.values():
                parts.append([])
            else:
                parts[-1].append(token)
        for text, ids in zip(texts, parts, strict=True):
            # The newline after the image is lost in their ids.
            found = aligned(ids, as_bytes(text), known) or aligned(ids, as_bytes(text.removeprefix("\n")), known)
            assert found is not None, f"the ids {ids} do not spell {text!r}"
            known = found
    return ReadTokenizer(known, specials)


def system_of(key: str) -> str:
    return SYSTEM_PROMPTS["medical" if key.partition("|")[0].endswith("_med") else "general"]


def their_turns(messages: list[tuple[str, str]]) -> tuple[tuple[Turn, ...], bool]:
    """Turns and whether there is an image, which stands at the front of the first message."""
    roles = {"human": "user", "gpt": "assistant"}
    turns = tuple(Turn(roles.get(role, role), text.removeprefix(f"{IMAGE_TOKEN}\n")) for role, text in messages)
    return turns, any(IMAGE_TOKEN in text for _, text in messages)


@pytest.mark.parametrize("key", LABELS.get("prompts", {}))
def test_prompts_are_those_of_the_reference(key):
    wanted = LABELS["prompts"][key]
    turns, image = their_turns([tuple(message) for message in wanted["messages"] if message[1] is not None])
    assert prompt_text(turns, system=system_of(key), image=image) == wanted["prompt"]
    ids = encode_prompt(their_tokenizer(), turns, system=system_of(key), image_tokens=int(image), official=True)
    assert ids == wanted["ids"]


@pytest.mark.parametrize("key", LABELS.get("labels", {}))
def test_training_ids_and_labels_are_those_of_the_reference(key):
    wanted = LABELS["labels"][key]
    turns, image = their_turns([(m["from"], m["value"]) for m in wanted["after_preprocess_multimodal"]])
    if key.partition("|")[0].endswith("_plain"):
        encoded = encode_plain(their_tokenizer(), turns[-1].text, image_tokens=int(image))
    else:
        encoded = encode_dialogue(their_tokenizer(), turns, system=system_of(key), image_tokens=int(image))
    assert encoded.ids == wanted["input_ids"] and encoded.labels == wanted["labels"]


def test_role_words_and_newlines_are_those_of_the_reference():
    facts, own = LABELS["tokenizer"], their_tokenizer()
    words = {"assistant": facts["assistant"], "user": facts["user"], "\n\n": facts["nlnl"]}
    assert {word: own.encode(word) for word in words} == words


@pytest.mark.parametrize("key", [key for key in LABELS if key.startswith("collator") and "input_ids" in LABELS[key]])
def test_batches_are_padded_as_in_the_reference(key):
    wanted, end = LABELS[key], LABELS["tokenizer"]["ids"]["<|endoftext|>"]
    items = []
    for index, (ids, labels) in enumerate(zip(wanted["input_ids"], wanted["labels"], strict=True)):
        length = max(place for place, token in enumerate(ids) if token != end) + 1
        item = {"input_ids": ids[:length], "labels": labels[:length], "answer_length": 1}
        items.append(item | {"noise": (0, 0, index), "stratum": (0, 1)})
    their_special = replace(special(), end_of_text=end)
    batch = Collator(their_special, padding="batch")(items)
    assert batch["input_ids"].tolist() == wanted["input_ids"] and batch["labels"].tolist() == wanted["labels"]
    assert batch["attention_mask"].all()
