"""The oracle is exact: its posterior is that of enumeration, and sampling one token a forward gives the chain itself."""

import itertools
import math

import pytest
import torch

from medv.companion.studies.markov import MarkovText, blurred_evidence, word_chain
from medv.diffusion.config import SamplerConfig
from medv.diffusion.sampler import sample


def chain(states: int, seed: int = 0) -> MarkovText:
    """A random chain with nothing even about it."""
    generator = torch.Generator().manual_seed(seed)
    shares = torch.rand(states + 1, states, generator=generator, dtype=torch.float64) ** 2 + 0.05
    shares /= shares.sum(dim=1, keepdim=True)
    return MarkovText(shares[0], shares[1:])


def every_text(states: int, length: int) -> torch.Tensor:
    """All sequences [n ** L, L]."""
    return torch.tensor(list(itertools.product(range(states), repeat=length)))


def weight(text: MarkovText, tokens) -> float:
    """p of one sequence, factor by factor."""
    product = float(text.start[tokens[0]])
    for one, other in itertools.pairwise(tokens):
        product *= float(text.transition[one, other])
    return product


def enumerated(text: MarkovText, canvas: list[int], evidence: torch.Tensor | None = None) -> torch.Tensor:
    """The posterior [T, n] of one canvas by summing over all that could stand there."""
    total = torch.zeros(len(canvas), len(text.start), dtype=torch.float64)
    for tokens in every_text(len(text.start), len(canvas)).tolist():
        if any(seen not in (token, text.mask_token_id) for seen, token in zip(canvas, tokens, strict=True)):
            continue
        p = weight(text, tokens)
        if evidence is not None:
            p *= math.prod(float(evidence[i, token]) for i, token in enumerate(tokens))
        for i, token in enumerate(tokens):
            total[i, token] += p
    return total / total.sum(dim=1, keepdim=True)


def drawn(text: MarkovText, config: SamplerConfig, rows: int) -> torch.Tensor:
    """Sequences [rows, L] sampled from the oracle."""
    prompt, mask = torch.zeros(rows, 0, dtype=torch.long), text.mask_token_id
    return sample(text.denoiser(), prompt, config, mask_token_id=mask, fill_token_id=mask).sequences


# The posterior and the likelihood.


@pytest.mark.parametrize("hidden", [(), (0,), (4,), (1, 2), (0, 2, 4), (0, 1, 2, 3, 4)])
@pytest.mark.parametrize("told", [False, True])
def test_the_posterior_is_that_of_enumeration(hidden, told):
    text = chain(3, seed=len(hidden))
    generator = torch.Generator().manual_seed(7)
    canvas = torch.randint(3, (4, 5), generator=generator)
    canvas[:, list(hidden)] = text.mask_token_id
    evidence = torch.rand(4, 5, 3, generator=generator, dtype=torch.float64) + 0.1 if told else None
    found = text.marginals(canvas, evidence)
    for row in range(4):
        expected = enumerated(text, canvas[row].tolist(), None if evidence is None else evidence[row])
        torch.testing.assert_close(found[row], expected)


def test_the_posterior_of_a_long_canvas_keeps_its_digits():
    text = chain(4)
    found = text.marginals(torch.full((1, 2000), text.mask_token_id))
    assert found.isfinite().all()
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(1, 2000, dtype=torch.float64))
    torch.testing.assert_close(found[0, 1], text.start @ text.transition)


def test_impossible_texts_are_refused():
    text = MarkovText(torch.tensor([1.0, 0.0]).double(), torch.eye(2).double())
    with pytest.raises(ValueError, match="cannot stand together"):
        text.marginals(torch.tensor([[0, 2, 1]]))
    with pytest.raises(ValueError, match=r"sum to 0\.5000 \.\. 1\.0000"):
        MarkovText(text.start, torch.tensor([[1.0, 0.0], [0.25, 0.25]]).double())


def test_the_likelihood_is_the_product_of_its_factors_and_sums_to_one():
    text = chain(3)
    texts = every_text(3, 5)
    found = text.log_likelihood(texts).exp()
    assert found.sum() == pytest.approx(1)
    assert found.tolist() == pytest.approx([weight(text, tokens) for tokens in texts.tolist()])


def test_the_denoiser_gives_the_posterior_and_never_the_mask():
    text = chain(3)
    canvas = torch.tensor([[3, 1, 3, 3]])
    evidence = torch.rand(1, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    denoise, columns = text.denoiser(evidence), slice(1, 4)
    logits = denoise(canvas, columns)
    assert logits.shape == (1, 3, 4) and logits.dtype == torch.float32
    assert (logits[..., 3] == -torch.inf).all()
    torch.testing.assert_close(logits.softmax(-1)[..., :3].double(), text.marginals(canvas, evidence)[:, columns])
    blind = denoise(canvas, columns, unconditional=True).softmax(-1)[..., :3].double()
    torch.testing.assert_close(blind, text.marginals(canvas)[:, columns])


# Sampling from it.


def chi_square(text: MarkovText, sequences: torch.Tensor) -> float:
    """Of the counts of all sequences against the chain's own probabilities."""
    states, length = len(text.start), sequences.shape[1]
    places = states ** torch.arange(length - 1, -1, -1)
    observed = (sequences * places).sum(dim=1).bincount(minlength=states**length).double()
    expected = len(sequences) * text.log_likelihood(every_text(states, length)).exp()
    return float(((observed - expected) ** 2 / expected).sum())


AT_RANDOM = {"temperature": 1.0, "remasking": "random", "stop_tokens": ()}


@pytest.mark.slow
@pytest.mark.parametrize("block_length", [1, 2, 4])
def test_one_token_a_forward_samples_the_chain_itself(block_length):
    text = chain(2, seed=1)
    sequences = drawn(text, SamplerConfig(4, block_length, 4, **AT_RANDOM), 4000)
    assert chi_square(text, sequences) < 37.7, "15 degrees of freedom at 0.001"


def test_many_tokens_a_forward_do_not():
    text = chain(2, seed=1)
    assert chi_square(text, drawn(text, SamplerConfig(4, 4, 1, **AT_RANDOM), 4000)) > 200


def test_fewer_forwards_lose_likelihood_and_one_a_token_reaches_the_chain_s():
    text = word_chain(32)
    own = text.log_likelihood(text.draw(400, 32)) / 32
    found = [
        text.log_likelihood(drawn(text, SamplerConfig(32, 32, steps, **AT_RANDOM), 60)).mean() / 32 for steps in (32, 8, 2)
    ]
    assert abs(found[0] - own.mean()) < 4 * own.std() / 60**0.5, "Z = L: within the error of the mean"
    assert found[0] > found[1] + 0.1 and found[1] > found[2] + 0.1


def test_a_chain_draws_itself():
    text = chain(2, seed=1)
    assert chi_square(text, text.draw(4000, 4)) < 37.7
    assert text.draw(5, 9, seed=3).equal(text.draw(5, 9, seed=3)) and text.draw(5, 9).shape == (5, 9)
    assert not text.draw(5, 9, seed=3).equal(text.draw(5, 9, seed=4))


# The text with the shape of text.


def test_the_words_are_frequent_and_rare_and_hardly_ever_repeat():
    text = word_chain(40, function_words=4, smoothing=1e-3)
    assert text.transition.diagonal().max() <= 1e-3 / 40 + 1e-9
    torch.testing.assert_close(text.start @ text.transition, text.start, atol=1e-8, rtol=0)
    assert text.start.argmax() == 0 and text.start[0] > 3 * text.start[4:].max()
    drawn_words = text.draw(200, 64)
    assert (drawn_words[:, 1:] == drawn_words[:, :-1]).double().mean() < 1e-3
    assert text.transition.equal(word_chain(40, function_words=4, smoothing=1e-3).transition)


def test_an_all_masked_place_is_best_guessed_as_the_most_frequent_word_everywhere():
    text = word_chain(40)
    assert (text.marginals(torch.full((1, 16), 40)).argmax(-1) == 0).all()


@pytest.mark.parametrize(
    "options", [{"function_words": 0}, {"function_words": 8}, {"branches": 0}, {"smoothing": 1.0}, {"smoothing": -0.1}]
)
def test_a_chain_that_cannot_be_is_refused(options):
    with pytest.raises(ValueError, match="states with"):
        word_chain(8, **({"function_words": 2} | options))


def test_evidence_hints_at_the_text_in_some_blocks_more_than_in_others():
    text = word_chain(40)
    tokens = text.draw(50, 64)
    evidence = blurred_evidence(text, tokens, block_length=16)
    hinted = (evidence != 1).any(dim=-1)  # [B, L]
    shares = hinted.double().unflatten(1, (4, 16)).mean(dim=-1)
    assert 0.4 < hinted.double().mean() < 0.6 and shares.std() > 0.2
    right = (evidence.argmax(-1) == tokens)[hinted].double().mean()
    assert 0.77 < right < 0.84, "0.8, and now and then by chance"
    without, aware = (text.marginals(torch.full_like(tokens, 40), e) for e in (None, evidence))
    truth = tokens[..., None]
    assert aware.gather(-1, truth).log().mean() > without.gather(-1, truth).log().mean() + 0.5
