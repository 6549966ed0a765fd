"""LLaDA's chat format: dialogues as token ids, and the ids that are trained on (Eq. 4).

A message is `<|start_header_id|>role<|end_header_id|>` + two newlines + text + `<|eot_id|>`; a dialogue begins with
`<|startoftext|>`. An image is `image_tokens` placeholders and a newline at the front of the first user message. Special tokens
are looked up by their strings in the tokenizer, never by number.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from medv import limits
from medv.data.example import IMAGE_TOKEN, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Of LLaDA-V and LLaDA-MedV; which one the released medical weights expect is not stated.
SYSTEM_PROMPTS = {
    kind: (
        f"You are a helpful {words}language and vision assistant. You are able to understand the visual content that the "
        "user provides, and assist the user with a variety of tasks using natural language."
    )
    for kind, words in (("general", ""), ("medical", "medical "))
}
LOSS_TOKENS = ("official", "response")
IGNORED = -100


@dataclass(frozen=True)
class SpecialTokens:
    """The ids of the special tokens of one tokenizer."""

    start_of_text: int
    end_of_text: int
    mask: int
    start_header: int
    end_header: int
    end_of_turn: int
    image: int

    STRINGS = {  # noqa: RUF012 (a constant, not a field)
        "start_of_text": "<|startoftext|>",
        "end_of_text": "<|endoftext|>",
        "mask": "<|mdm_mask|>",
        "start_header": "<|start_header_id|>",
        "end_header": "<|end_header_id|>",
        "end_of_turn": "<|eot_id|>",
        "image": IMAGE_TOKEN,
    }

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase") -> "SpecialTokens":
        """Look the ids up; raises ValueError naming every string that the tokenizer lacks."""
        ids = {name: tokenizer.convert_tokens_to_ids(text) for name, text in cls.STRINGS.items()}
        unknown = getattr(tokenizer, "unk_token_id", None)
        if missing := [cls.STRINGS[name] for name, value in ids.items() if value is None or value == unknown]:
            raise ValueError(f"the tokenizer has no token {', '.join(missing)}: a LLaDA tokenizer with {IMAGE_TOKEN} is needed")
        return cls(**ids)


@dataclass(frozen=True)
class Encoded:
    """Token ids of one dialogue, their labels (-100 where a token is never masked) and the length of the last answer."""

    ids: list[int]
    labels: list[int]
    answer_length: int


def encode_dialogue(
    tokenizer: "PreTrainedTokenizerBase",
    turns: tuple[Turn, ...],
    *,
    system: str | None = None,
    image_tokens: int = 0,
    loss_tokens: str = "official",
) -> Encoded:
    """A training dialogue, which must end with an assistant turn.

    loss_tokens="official": the targets are all tokens of assistant messages and the structural tokens (start of text, headers,
    end of turn) of the others, as in the reference. "response": only the assistant's text and its end of turn, as in Eq. 4.
    """
    limits.named("loss_tokens", loss_tokens, LOSS_TOKENS)
    if not turns or turns[-1].role != "assistant":
        raise ValueError("a training dialogue must end with an assistant turn")
    special = SpecialTokens.of(tokenizer)
    structural = {special.start_of_text, special.start_header, special.end_header, special.end_of_turn}
    ids, labels = [], []
    for role, header, body in _messages(tokenizer, special, turns, system, image_tokens):
        ids += header + body
        if loss_tokens == "response":
            labels += [IGNORED] * len(header) + (body if role == "assistant" else [IGNORED] * len(body))
        elif role == "assistant":
            labels += header + body
        else:
            labels += [token if token in structural else IGNORED for token in header + body]
    return Encoded(ids, labels, answer_length=len(body))


def encode_plain(tokenizer: "PreTrainedTokenizerBase", caption: str, *, image_tokens: int) -> Encoded:
    """An example of the reference's alignment stage: image, then caption and newline as targets; no chat format, no end."""
    text = _text(tokenizer, caption + "\n")
    special = SpecialTokens.of(tokenizer)
    return Encoded([special.image] * image_tokens + text, [IGNORED] * image_tokens + text, answer_length=len(text))


def prompt_text(turns: tuple[Turn, ...], *, system: str | None = None, image: bool = False) -> str:
    """A prompt as one string, as in the demonstrations of the released models."""
    messages = [] if system is None else [("system", system)]
    messages += [(turn.role, turn.text.strip()) for turn in turns]
    if image:
        first = next(i for i, (role, _) in enumerate(messages) if role == "user")
        messages[first] = ("user", f"{IMAGE_TOKEN}\n{messages[first][1]}")
    special = SpecialTokens.STRINGS
    parts = [
        f"{special['start_header']}{role}{special['end_header']}\n\n{text}" for role, text in [*messages, ("assistant", "")]
    ]
    return special["start_of_text"] + special["end_of_turn"].join(parts)


def encode_prompt(
    tokenizer: "PreTrainedTokenizerBase",
    turns: tuple[Turn, ...],
    *,
    system: str | None = None,
    image_tokens: int = 0,
    official: bool = False,
) -> list[int]:
    """The ids of a dialogue, which must end with a user turn, up to where the assistant's answer begins.

    official=True as the reference at inference, unlike its training: texts are trimmed, and the newline after the image is
    lost.
    """
    if not turns or turns[-1].role != "user":
        raise ValueError("a prompt must end with a user turn")
    special = SpecialTokens.of(tokenizer)
    if official:
        turns = tuple(replace(turn, text=turn.text.strip()) for turn in turns)
    ids = [token for _, header, body in _messages(tokenizer, special, turns, system, image_tokens) for token in header + body]
    if official and image_tokens:
        del ids[ids.index(special.image) + image_tokens]
    return ids + _header(tokenizer, special, "assistant")


def without_special(text: str) -> str:
    """`text` with the strings of special tokens blanked, so that text in data never becomes a special token."""
    for string in SpecialTokens.STRINGS.values():
        text = text.replace(string, " ")
    return text


def _messages(
    tokenizer: "PreTrainedTokenizerBase", special: SpecialTokens, turns: tuple[Turn, ...], system: str | None, image_tokens: int
) -> list[tuple[str, list[int], list[int]]]:
    """(role, header ids, body ids) of every message; start of text belongs to the first header."""
    messages = [] if system is None else [("system", _text(tokenizer, system))]
    for turn in turns:
        body = _text(tokenizer, turn.text)
        if turn.role == "user" and image_tokens:
            body = [special.image] * image_tokens + _text(tokenizer, "\n" + turn.text)
            image_tokens = 0  # in the first user message alone
        messages.append((turn.role, body))
    encoded = [(role, _header(tokenizer, special, role), [*body, special.end_of_turn]) for role, body in messages]
    encoded[0][1].insert(0, special.start_of_text)
    return encoded


def _header(tokenizer: "PreTrainedTokenizerBase", special: SpecialTokens, role: str) -> list[int]:
    return [special.start_header, *_text(tokenizer, role), special.end_header, *_text(tokenizer, "\n\n")]


def _text(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    return tokenizer.encode(without_special(text), add_special_tokens=False)
