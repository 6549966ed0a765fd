"""An oracle to judge samplers by: a Markov chain whose exact posterior is the denoiser.

Forward-backward gives the exact distribution of each masked token of a canvas, the chain the exact likelihood of a sample, so
that the sampler's own loss is measured, without the errors of a network. After "Is your diffusion sampler actually correct?"
(arXiv 2602.19619). Token ids are the states 0 .. n - 1, the mask is n. Dependencies beyond neighbors are not modelled.
"""

from dataclasses import dataclass

import torch

from medv.diffusion.config import Denoiser
from medv.diffusion.corruption import noise_generator


@dataclass(frozen=True)
class MarkovText:
    """A chain: start [n] and transition [n, n] float64, rows sum to 1. `marginals` and `log_likelihood` are exact."""

    start: torch.Tensor
    transition: torch.Tensor

    def __post_init__(self):
        total = self.transition.sum(dim=1)
        if not torch.allclose(total, torch.ones_like(total)) or (self.transition < 0).any():
            raise ValueError(f"the rows of the transition sum to {total.min():.4f} .. {total.max():.4f}: each must sum to 1")

    @property
    def mask_token_id(self) -> int:
        """The id behind the last state."""
        return len(self.start)

    def marginals(self, canvas: torch.Tensor, evidence: torch.Tensor | None = None) -> torch.Tensor:
        """p(token | the written tokens, the evidence) at each position of the canvas [B, T], float64 [B, T, n].

        evidence [B, T, n]: the likelihood of an observation at each position (an image, say) under each token. At a written
        position the result is one-hot. Raises ValueError where the written tokens are impossible.
        """
        written = canvas != self.mask_token_id  # [B, T]
        one_hot = torch.nn.functional.one_hot(canvas.clamp_max(len(self.start) - 1), len(self.start)).double()
        seen = torch.where(written[..., None], one_hot, 1.0)  # [B, T, n] likelihood of what is written at the place itself
        if evidence is not None:
            seen = seen * evidence
        length = canvas.shape[1]
        before, after = torch.empty_like(seen), torch.ones_like(seen)  # both scaled to sum 1 a position
        message = self.start.expand(len(canvas), -1)
        for i in range(length):
            here = message * seen[:, i]
            before[:, i] = here / here.sum(dim=1, keepdim=True)
            message = before[:, i] @ self.transition
        for i in reversed(range(length - 1)):
            here = (seen[:, i + 1] * after[:, i + 1]) @ self.transition.T
            after[:, i] = here / here.sum(dim=1, keepdim=True)
        joint = before * after
        total = joint.sum(dim=-1, keepdim=True)
        if not (total > 0).all():
            raise ValueError("the canvas holds tokens that cannot stand together in this chain: smooth its transitions")
        return joint / total

    def denoiser(self, evidence: torch.Tensor | None = None) -> Denoiser:
        """A `Denoiser` for canvases [B, L] without a prompt: exact float32 log-probabilities [B, K, n + 1].

        `evidence` as in `marginals`, one row for each of the canvas. The mask itself is never predicted.
        """

        def denoise(canvas: torch.Tensor, columns: slice, *, unconditional: bool = False) -> torch.Tensor:
            log_p = self.marginals(canvas, None if unconditional else evidence)[:, columns].log().float()
            return torch.nn.functional.pad(log_p, (0, 1), value=-torch.inf)

        return denoise

    def log_likelihood(self, tokens: torch.Tensor) -> torch.Tensor:
        """log p of whole sequences [B, L], float64 [B]."""
        steps = self.transition[tokens[:, :-1], tokens[:, 1:]].log().sum(dim=1)
        return self.start[tokens[:, 0]].log() + steps

    def draw(self, count: int, length: int, *, seed: int = 0) -> torch.Tensor:
        """Sequences [count, length] of the chain itself."""
        generator = noise_generator(seed, 1, 0)
        tokens = torch.multinomial(self.start, count, replacement=True, generator=generator)[:, None]
        while tokens.shape[1] < length:
            following = torch.multinomial(self.transition[tokens[:, -1]], 1, generator=generator)
            tokens = torch.cat([tokens, following], dim=1)
        return tokens


def word_chain(
    states: int = 96, *, function_words: int = 6, branches: int = 6, smoothing: float = 1e-3, seed: int = 0
) -> MarkovText:
    """A chain with the shape of text: a few frequent words between many rare ones, and hardly any word twice in a row.

    The first `function_words` states are frequent: a content word is followed by one of them with probability 1/2 or by one
    of `branches` content words of its own, a function word by content words in uneven shares. `smoothing` is the share of a
    step that goes anywhere. Without information the best guess is the most frequent word at every position: "the the the".
    """
    if not 0 < function_words < states or branches < 1 or not 0 <= smoothing < 1:
        raise ValueError(
            f"{function_words} function words of {states} states with {branches} branches and smoothing {smoothing}: "
            "there must be words of both kinds, at least one branch, and a smoothing from 0 to below 1"
        )
    generator = noise_generator(seed, 0, states)
    transition = torch.zeros(states, states, dtype=torch.float64)
    frequency = 1 / torch.arange(1, function_words + 1, dtype=torch.float64)  # Zipf
    content = states - function_words
    for word in range(states):
        is_function = word < function_words
        wide = min(content - 1, branches * (4 if is_function else 1))
        own = function_words + torch.randperm(content, generator=generator)
        own = own[own != word][:wide]
        shares = torch.rand(len(own), generator=generator, dtype=torch.float64) ** 2 + 0.02
        transition[word, own] = shares / shares.sum() * (1.0 if is_function else 0.5)
        if not is_function:
            transition[word, :function_words] = 0.5 * frequency / frequency.sum()
    transition = (1 - smoothing) * transition + smoothing / states
    start = torch.full((states,), 1 / states, dtype=torch.float64)
    for _ in range(200):
        start = start @ transition  # stationary: every place of a text is like every other
    return MarkovText(start / start.sum(), transition / transition.sum(dim=1, keepdim=True))


def blurred_evidence(text: MarkovText, tokens: torch.Tensor, *, block_length: int, seed: int = 0) -> torch.Tensor:
    """Hints about the text [B, L], as an image might give: likelihoods [B, L, n] float64.

    Each block of each row has a clarity drawn from U(0, 1), and each position in it a hint with that probability. A hint names
    the right token with probability 0.8 and a random one otherwise. So there are easy blocks and hard ones.
    """
    generator = noise_generator(seed, 2, 0)
    rows, length = tokens.shape
    states, sure = len(text.start), 0.8
    clarity = torch.rand(rows, -(-length // block_length), generator=generator).repeat_interleave(block_length, dim=1)
    hinted = torch.rand(rows, length, generator=generator) < clarity[:, :length]
    right = torch.rand(rows, length, generator=generator) < sure
    named = torch.where(right, tokens, torch.randint(states, tokens.shape, generator=generator))
    likelihood = sure * torch.nn.functional.one_hot(named, states).double() + (1 - sure) / states
    return torch.where(hinted[..., None], likelihood, 1.0)
