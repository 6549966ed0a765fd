"""The loss against Eq. 4 written out as a sum over the logits of the whole sequence."""

import math

import pytest
import torch
from tiny import examples, model, processor, special
from torch.nn.functional import linear

from medv.diffusion import loss as loss_module
from medv.diffusion.corruption import corrupt, draw_noise
from medv.diffusion.loss import NORMALIZATIONS, full_cross_entropy, masked_cross_entropy, token_weights
from medv.training.collate import Collator, Encoder

MASK = 19


def toy(rows: int = 3, width: int = 12, seed: int = 0):
    """Hidden states, a head of 20 tokens, clean ids, targets of ragged length and a corruption of them."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, 8, generator=generator)
    head = torch.randn(20, 8, generator=generator)
    ids = torch.randint(0, 19, (rows, width), generator=generator)
    targets = torch.arange(width)[None] >= torch.tensor([[2], [5], [8]])[:rows]
    t, u = draw_noise(seed, 0, range(rows), width)
    return hidden, head, ids, targets, corrupt(ids, targets, t, u, MASK)


def brute_force(logits, ids, targets, noise, normalization):
    """Eq. 4, token by token. logits [B, L, V]."""
    rows, width = ids.shape
    total, masked_count = 0.0, int(noise.masked.sum())
    for b in range(rows):
        own_length = int(targets[b].sum())
        for i in range(width):
            if not noise.masked[b, i]:
                continue
            loss = -logits[b, i].log_softmax(-1)[ids[b, i]]
            if normalization == "sample":
                total = total + loss / noise.p_mask[b] / own_length / rows
            elif normalization == "token":
                total = total + loss / noise.p_mask[b] / int(targets.sum())
            elif normalization == "masked":
                total = total + loss / masked_count
            elif normalization == "masked_sample":
                total = total + loss / int(noise.masked[b].sum()) / rows
            else:
                raise NotImplementedError(f"write {normalization} out here")
    return total


def sparse_loss(hidden, head, ids, targets, noise, normalization, **options):
    weights = token_weights(noise.masked, targets, noise.p_mask, normalization)
    return masked_cross_entropy(
        hidden[noise.masked], lambda states: linear(states, head), ids[noise.masked], weights, **options
    )


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("chunk", [1024, 4])
def test_loss_and_gradients_equal_the_brute_force_sum(normalization, chunk):
    hidden, head, ids, targets, noise = toy()
    assert noise.masked.sum() > 4, "the chunked case needs several chunks"
    hidden.requires_grad_(), head.requires_grad_()
    expected = brute_force(hidden @ head.T, ids, targets, noise, normalization)
    expected_grads = torch.autograd.grad(expected, [hidden, head])
    loss = sparse_loss(hidden, head, ids, targets, noise, normalization, chunk=chunk)
    grads = torch.autograd.grad(loss, [hidden, head])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for grad, want in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-6, atol=1e-6)


def test_chunks_change_neither_loss_nor_gradients():
    hidden, head, ids, targets, noise = toy()
    results = []
    for chunk in (1000, 7, 1):
        states = hidden.clone().requires_grad_()
        loss = sparse_loss(states, head, ids, targets, noise, "sample", chunk=chunk)
        results.append((loss.detach(), *torch.autograd.grad(loss, states)))
    for loss, grad in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=1e-6, atol=0)
        torch.testing.assert_close(grad, results[0][1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("chunk", [1024, 40])
@pytest.mark.parametrize("head_learns", [True, False])
def test_a_large_vocabulary_gives_the_loss_and_gradients_of_full_logits(normalization, chunk, head_learns):
    generator = torch.Generator().manual_seed(1)
    head = torch.nn.Linear(24, 50_000, bias=False).requires_grad_(head_learns)
    hidden = torch.randn(2, 90, 24, generator=generator)
    ids, targets = torch.randint(0, 50_000, (2, 90), generator=generator), torch.ones(2, 90, dtype=torch.bool)
    noise = corrupt(ids, targets, torch.tensor([0.5, 0.7]), torch.rand(2, 90, generator=generator), 50_000)
    assert noise.masked.sum() * 50_000 > loss_module.SMALL, "several pieces are what this is about"
    weights = token_weights(noise.masked, targets, noise.p_mask, normalization)
    learns = [head.weight] if head_learns else []
    states = hidden.clone().requires_grad_()
    full = full_cross_entropy(states, head, ids, noise.masked, weights)
    wanted = torch.autograd.grad(full, [states, *learns])
    sparse = masked_cross_entropy(states[noise.masked], head, ids[noise.masked], weights, chunk=chunk)
    assert sparse.item() == pytest.approx(full.item(), rel=1e-6)
    for grad, want in zip(torch.autograd.grad(sparse, [states, *learns]), wanted, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-6, atol=1e-6 * want.abs().max().item())


def test_the_cross_entropy_of_pieces_has_the_derivatives_of_its_definition(monkeypatch):
    monkeypatch.setattr(loss_module, "PIECE", 8)
    logits = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ids, scale = torch.arange(7) % 5, torch.linspace(-1, 2, 7)
    results = []
    for make in (loss_module._CrossEntropy.apply, lambda a, b: torch.nn.functional.cross_entropy(a, b, reduction="none")):
        leaf = logits.clone().requires_grad_()
        losses = make(leaf * 1, ids)
        results.append((losses.detach().float(), torch.autograd.grad((losses * scale).sum(), leaf)[0].float()))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_a_second_backward_pass_is_refused_and_never_wrong(monkeypatch):
    monkeypatch.setattr(loss_module, "SMALL", 8)
    hidden, head, ids, targets, noise = toy()
    states = hidden.requires_grad_()
    loss = sparse_loss(states, head, ids, targets, noise, "sample")
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_with_nothing_masked_the_loss_is_a_zero_of_the_graph(normalization):
    hidden, head, ids, targets, noise = toy()
    hidden.requires_grad_()
    none = torch.zeros_like(noise.masked)
    weights = token_weights(none, targets, noise.p_mask, normalization)
    loss = masked_cross_entropy(hidden[none], lambda states: linear(states, head), ids[none], weights)
    loss.backward()
    assert loss.item() == 0 and hidden.grad.abs().sum() == 0


def test_a_sample_without_targets_adds_nothing_but_counts_in_the_mean():
    *_, targets, noise = toy()
    targets, masked = targets.clone(), noise.masked.clone()
    targets[2], masked[2] = False, False
    weights = token_weights(masked, targets, noise.p_mask)
    assert weights.isfinite().all()
    alone = token_weights(masked[:2], targets[:2], noise.p_mask[:2])
    torch.testing.assert_close(weights, alone * 2 / 3)


def test_an_unknown_normalization_is_refused_with_the_choices():
    _, _, _, targets, noise = toy()
    with pytest.raises(ValueError, match=r"'mean'.*sample, token, masked"):
        token_weights(noise.masked, targets, noise.p_mask, "mean")


# The same through the model: hidden states of a real network, the corruption inside forward.


def encoded(count: int = 3, padding: str = "none") -> list[dict]:
    encode = Encoder(processor(), loss_tokens="official", max_length=200)
    return [encode(example) | {"noise": (0, 0, i), "stratum": (0, 1)} for i, example in enumerate(examples(count))]


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_model_loss_and_gradients_equal_the_full_logits_version(normalization):
    network = model(loss_normalization=normalization)
    batch = Collator(special(), padding="batch")(encoded())
    output = network(**batch)
    targets = batch["labels"] != -100
    noise = corrupt(batch["input_ids"], targets, batch["t"], batch["u"], special().mask)
    assert output.masked.equal(noise.masked)
    logits = network(noise.ids, batch["attention_mask"], batch["pixel_values"]).logits
    expected = brute_force(logits, batch["input_ids"], targets, noise, normalization)
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    parameters = [p for p in network.parameters() if p.requires_grad]
    grads = torch.autograd.grad(output.loss, parameters, retain_graph=True, allow_unused=True)
    expected_grads = torch.autograd.grad(expected, parameters, allow_unused=True)
    for grad, want in zip(grads, expected_grads, strict=True):
        assert (grad is None) == (want is None)
        if grad is not None:
            torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-6 * max(1.0, want.abs().max().item()))


@pytest.mark.parametrize("padding", ["none", "fixed:12"])
@pytest.mark.parametrize("normalization", [name for name in NORMALIZATIONS if name.endswith("sample")])
def test_loss_of_a_batch_is_the_mean_of_its_samples(padding, normalization):
    network, items = model(loss_normalization=normalization), encoded(2)
    collate = Collator(special(), padding=padding)
    with torch.no_grad():
        together = network(**collate(items)).loss.item()
        single = [network(**collate([item])).loss.item() for item in items]
    assert len(items[0]["input_ids"]) != len(items[1]["input_ids"]), "the rows must be padded for this to say anything"
    assert together == pytest.approx(sum(single) / 2, rel=1e-5)


def test_loss_at_random_weights_is_near_the_logarithm_of_the_vocabulary():
    network = model()
    network.lm_head.weight.data.mul_(0.01)
    batch = Collator(special(), padding="none")(encoded()) | {"t": torch.ones(3)}  # everything masked: p = 1
    assert network(**batch).loss.item() == pytest.approx(math.log(network.config.text_config.vocab_size), rel=0.02)


def test_without_noise_given_the_loss_draws_from_the_global_generator():
    network, batch = model(), Collator(special(), padding="none")(encoded())
    batch = {key: value for key, value in batch.items() if key not in ("t", "u")}
    torch.manual_seed(3)
    first = network(**batch).loss
    torch.manual_seed(3)
    assert network(**batch).loss.equal(first)
    assert not network(**batch).loss.equal(first)
    with pytest.raises(ValueError, match="t and u belong together"):
        network(**batch, t=torch.rand(3))


# Padding policies: what the fill after an answer is to the loss and to the attention.


def padded(policy: str) -> tuple[list[dict], dict[str, torch.Tensor]]:
    items = encoded(4)
    return items, Collator(special(), padding=policy)(items)


def test_padding_batch_is_visible_and_scored_up_to_the_longest_row():
    items, batch = padded("batch")
    width = max(len(item["input_ids"]) for item in items)
    assert batch["input_ids"].shape == (4, width) and batch["attention_mask"].all()
    for item, ids, labels in zip(items, batch["input_ids"], batch["labels"], strict=True):
        tail = slice(len(item["input_ids"]), None)
        assert (ids[tail] == special().end_of_text).all() and (labels[tail] == special().end_of_text).all()
        assert labels[: tail.start].tolist() == item["labels"]


def test_padding_none_is_invisible_and_never_scored():
    items, batch = padded("none")
    for item, labels, seen in zip(items, batch["labels"], batch["attention_mask"], strict=True):
        length = len(item["input_ids"])
        assert seen.tolist() == [1] * length + [0] * (len(seen) - length)
        assert (labels[length:] == -100).all()


def test_padding_fixed_extends_every_answer_to_the_same_length_whatever_the_batch():
    size = 12
    items, batch = padded(f"fixed:{size}")
    collate = Collator(special(), padding=f"fixed:{size}")
    for row, item in enumerate(items):
        length = len(item["input_ids"]) + max(0, size - item["answer_length"])
        alone = collate([item])
        assert alone["input_ids"].shape[1] == length and alone["attention_mask"].all()
        for key in ("input_ids", "labels", "u"):
            assert batch[key][row, :length].equal(alone[key][0]), key
        assert not batch["attention_mask"][row, length:].any() and (batch["labels"][row, length:] == -100).all()
        scored = alone["labels"][0, len(item["input_ids"]) :]
        assert (scored == special().end_of_text).all() and len(scored) == max(0, size - item["answer_length"])


@pytest.mark.parametrize("policy", ["eos", "fixed", "fixed:", "fixed:0", "fixed:-3", "fixed:x", "batch:4", ""])
def test_an_unknown_padding_is_refused_with_the_value(policy):
    with pytest.raises(ValueError, match=f"unknown padding '{policy}'"):
        Collator(special(), padding=policy)
