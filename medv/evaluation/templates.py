"""Templates: a text with blanks, and how a blank is cut into tokens.

A run of two or more underscores is a blank. The space in front of it belongs to it, as to any word of the tokenizer. A word
often takes several tokens, and nothing tells how many: all numbers from one to a limit are tried, and the filling with the
highest mean log-confidence is kept. This mean prefers words whose later tokens follow from the first.
"""

import re
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

from medv import limits
from medv.data.chat import SpecialTokens, without_special

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BLANK = re.compile(r"_{2,}")
BLANK_TOKENS = 3
"""Tokens that a blank may have, where nothing else is asked for."""
MOST_FILLINGS = 256
FILLER = "x"
DESCRIBE = "Describe the image in detail."
"""The question of a template that has none, as in the training on descriptions."""


@dataclass(frozen=True)
class Canvas:
    """A template as token ids: `ids` with the mask at open positions and the end of turn at the end; `parts` cut it into
    (first, behind the last, whether it is a blank).
    """

    ids: tuple[int, ...]
    parts: tuple[tuple[int, int, bool], ...]


@dataclass(frozen=True)
class Template:
    """A text with blanks. Raises ValueError where it has none."""

    text: str

    def __post_init__(self):
        if not BLANK.search(self.text):
            raise ValueError(f"the template {self.text!r} has no blank: write ____ where a word is to be filled in")

    def sizes(self, most: int = BLANK_TOKENS) -> list[tuple[int, ...]]:
        """All numbers of tokens for the blanks, from 1 to `most` each. Raises ValueError where they are too many to try."""
        limits.whole("blank_tokens", most, 1)
        blanks = len(BLANK.findall(self.text))
        if most**blanks > MOST_FILLINGS:
            fits = max(size for size in range(1, MOST_FILLINGS + 1) if size**blanks <= MOST_FILLINGS)
            raise ValueError(
                f"the template has {blanks} blank{'s' * (blanks > 1)} of 1 to {most} tokens, {most**blanks} fillings to try, "
                f"more than {MOST_FILLINGS}: allow fewer tokens (--blank-tokens {fits}), or leave fewer blanks"
            )
        return list(product(range(1, most + 1), repeat=blanks))

    def canvas(self, tokenizer: "PreTrainedTokenizerBase", sizes: tuple[int, ...]) -> Canvas:
        """The template with so many tokens in each blank. Raises ValueError for a blank inside a word."""
        special, ids, parts = SpecialTokens.of(tokenizer), [], []
        fixed = self._fixed_ids(tokenizer)
        for tokens, size in zip(fixed, (*sizes, 0), strict=True):
            for some, blank in ((tokens, False), ([special.mask] * size, True)):
                if some:
                    parts.append((len(ids), len(ids) + len(some), blank))
                    ids += some
        return Canvas((*ids, special.end_of_turn), tuple(parts))

    def _fixed_ids(self, tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
        """The ids before, between and behind the blanks, as in the text with a letter in each blank."""
        plain, spans = "", []
        *before, last = BLANK.split(without_special(self.text).strip())
        for piece in before:
            plain += piece
            spans.append((len(plain.removesuffix(" ")), len(plain) + 1))
            plain += FILLER
        coded = tokenizer(plain + last, add_special_tokens=False, return_offsets_mapping=True)
        ids: list[list[int]] = [[] for _ in range(len(spans) + 1)]
        for token, (start, stop) in zip(coded["input_ids"], coded["offset_mapping"], strict=True):
            place = sum(end <= start for _, end in spans)  # blanks that lie before the token
            begin, end = spans[place] if place < len(spans) else (stop, stop)
            if stop <= begin:
                ids[place].append(token)
            elif start < begin or stop > end:
                raise ValueError(f"a blank of the template {self.text!r} stands inside a word: put spaces around it")
        return ids
