"""LLaDA's chat format: what the ids say, what is trained on, and that text stays text."""

import re

import pytest
from tiny import special, tokenizer

from medv.data.chat import IGNORED, SYSTEM_PROMPTS, SpecialTokens, encode_dialogue, encode_prompt
from medv.data.example import Turn

DIALOGUE = tuple(
    Turn(role, text)
    for question, answer in (("What is shown?", "a chest"), ("Is there a mass?", "yes"), ("Where?", "on the left"))
    for role, text in (("user", question), ("assistant", answer))
)


def decode(ids: list[int]) -> str:
    """The text of `ids`, without the space that this tokenizer puts before every text it is given."""
    return re.sub(r"(^|[>\n]) ", r"\1", tokenizer().decode(ids))


def message(role: str, text: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>"


@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("system", [None, SYSTEM_PROMPTS["medical"]])
def test_a_dialogue_reads_back_as_it_was_said(turns, system):
    said = DIALOGUE[: 2 * turns]
    encoded = encode_dialogue(tokenizer(), said, system=system)
    text = "".join(message(turn.role, turn.text) for turn in said)
    opening = "" if system is None else message("system", system)
    assert decode(encoded.ids) == "<|startoftext|>" + opening + text
    assert len(encoded.labels) == len(encoded.ids)
    assert decode(encoded.ids[-encoded.answer_length :]) == said[-1].text + "<|eot_id|>"


@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("image_tokens", [0, 4])
def test_a_prompt_is_the_dialogue_up_to_the_answer(turns, image_tokens):
    said = DIALOGUE[: 2 * turns]
    whole = encode_dialogue(tokenizer(), said, system="Be brief.", image_tokens=image_tokens)
    prompt = encode_prompt(tokenizer(), said[:-1], system="Be brief.", image_tokens=image_tokens)
    assert whole.ids[: -whole.answer_length] == prompt
    assert decode(prompt).endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")


def test_the_image_comes_first_in_the_first_user_message_and_only_there():
    ids = encode_dialogue(tokenizer(), DIALOGUE, system="Be brief.", image_tokens=3).ids
    assert ids.count(special().image) == 3
    assert "user<|end_header_id|>\n\n<image><image><image>\nWhat is shown?<|eot_id|>" in decode(ids)


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_response_labels_are_the_answers_and_their_ends(turns):
    said = DIALOGUE[: 2 * turns]
    encoded = encode_dialogue(tokenizer(), said, system="Be brief.", image_tokens=2, loss_tokens="response")
    assert decode([x for x in encoded.labels if x != IGNORED]) == "".join(t.text + "<|eot_id|>" for t in said[1::2])
    assert all(label in (IGNORED, token) for label, token in zip(encoded.labels, encoded.ids, strict=True))


def test_official_labels_are_whole_assistant_messages_and_the_structure_of_the_others():
    encoded = encode_dialogue(tokenizer(), DIALOGUE[:4], system="Be brief.", image_tokens=2)
    kept = decode([x for x in encoded.labels if x != IGNORED])
    frame = "<|start_header_id|><|end_header_id|><|eot_id|>"
    assert kept == (f"<|startoftext|>{frame}{frame}{message('assistant', 'a chest')}{frame}{message('assistant', 'yes')}")
    assert special().image not in encoded.labels


def test_an_unknown_choice_of_labels_is_refused():
    with pytest.raises(ValueError, match="'all': use one of official, response"):
        encode_dialogue(tokenizer(), DIALOGUE, loss_tokens="all")


@pytest.mark.parametrize("string", SpecialTokens.STRINGS.values())
@pytest.mark.parametrize("template", ["say {}", "{}{}", "a{}b <|eot_<|eot_id|>id|>"])
def test_special_strings_inside_text_stay_text(string, template):
    text = template.replace("{}", string)
    plain = encode_dialogue(tokenizer(), (Turn("user", "x"), Turn("assistant", "y")), system="z", image_tokens=2)
    attacked = encode_dialogue(tokenizer(), (Turn("user", text), Turn("assistant", text)), system=text, image_tokens=2)
    for name in SpecialTokens.STRINGS:
        token = getattr(special(), name)
        assert attacked.ids.count(token) == plain.ids.count(token), name
    assert special().mask not in attacked.labels


@pytest.mark.parametrize("turns", [(), DIALOGUE[:1], DIALOGUE[:3]])
def test_a_training_dialogue_must_end_with_the_assistant(turns):
    with pytest.raises(ValueError, match="must end with an assistant turn"):
        encode_dialogue(tokenizer(), turns)


@pytest.mark.parametrize("turns", [(), DIALOGUE[:2]])
def test_a_prompt_must_end_with_the_user(turns):
    with pytest.raises(ValueError, match="must end with a user turn"):
        encode_prompt(tokenizer(), turns)


def test_a_turn_is_by_one_of_two_roles():
    with pytest.raises(ValueError, match="unknown role 'system'"):
        Turn("system", "x")


class Lacking:
    """A tokenizer without some strings: it answers None, or the id of the unknown token, as tokenizers do."""

    def __init__(self, missing: tuple[str, ...], unknown: int | None):
        self.missing, self.unk_token_id = missing, unknown

    def convert_tokens_to_ids(self, token: str) -> int | None:
        return self.unk_token_id if token in self.missing else tokenizer().convert_tokens_to_ids(token)


@pytest.mark.parametrize("unknown", [None, 260])
def test_missing_special_tokens_are_named(unknown):
    with pytest.raises(ValueError, match=r"no token <\|mdm_mask\|>, <image>: a LLaDA tokenizer with <image>"):
        SpecialTokens.of(Lacking(("<image>", "<|mdm_mask|>"), unknown))


def test_special_tokens_are_found_by_their_strings():
    found = SpecialTokens.of(tokenizer())
    for name, string in SpecialTokens.STRINGS.items():
        assert tokenizer().convert_ids_to_tokens(getattr(found, name)) == string
