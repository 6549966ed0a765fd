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

    @property
    def pieces(self) -> list[str]:
        """The texts before, between and after the blanks; the space before a blank is left out."""
        *before, last = BLANK.split(self.text.strip())
        return [*(piece.removesuffix(" ") for piece in before), last]

    def sizes(self, most: int = BLANK_TOKENS) -> list[tuple[int, ...]]:
        """All numbers of tokens for the blanks, from 1 to `most` each. Raises ValueError where they are too many to try."""
        limits.whole("blank_tokens", most, 1)
        blanks = len(self.pieces) - 1
        if most**blanks > MOST_FILLINGS:
            raise ValueError(
                f"the template has {blanks} blanks of 1 to {most} tokens, {most**blanks} fillings to try, more than "
                f"{MOST_FILLINGS}: leave fewer blanks, or allow fewer tokens (--blank-tokens {most - 1})"
            )
        return list(product(range(1, most + 1), repeat=blanks))

    def canvas(self, tokenizer: "PreTrainedTokenizerBase", sizes: tuple[int, ...]) -> Canvas:
        """The template with so many tokens in each blank."""
        special, ids, parts = SpecialTokens.of(tokenizer), [], []
        for piece, size in zip(self.pieces, (*sizes, 0), strict=True):
            for tokens, blank in (
                (tokenizer.encode(without_special(piece), add_special_tokens=False), False),
                ([special.mask] * size, True),
            ):
                if tokens:
                    parts.append((len(ids), len(ids) + len(tokens), blank))
                    ids += tokens
        return Canvas((*ids, special.end_of_turn), tuple(parts))
