"""The benchmark compares what it says it compares, and the agreement of caches is measured against the exact run."""

import json
from dataclasses import replace

import pytest
import torch
from command import run
from tiny import examples, model, processor

from medv.companion.bench.baseline import official_run
from medv.companion.bench.cache_agreement import cache_agreement
from medv.companion.bench.loss import LossShape, bench_loss
from medv.companion.bench.machine import peak_memory
from medv.companion.bench.sampler import BenchShape, bench_sampler, random_network
from medv.companion.bench.training import bench_training
from medv.diffusion.config import SamplerConfig
from medv.diffusion.official import sample as official_sample
from medv.evaluation.answering import Answerer

SHAPE = BenchShape(
    hidden_size=32, intermediate_size=64, layers=2, heads=2, vocab_size=1500, prompt_length=20, gen_length=16, block_length=8
)
CPU = torch.device("cpu")


def test_the_baseline_writes_what_the_official_algorithm_writes():
    network, prompt = random_network(SHAPE, CPU, 1), torch.arange(20)[None]
    written, forwards = official_run(network, prompt, SamplerConfig(16, 8, 8))
    own = network.config
    official = SamplerConfig.official(gen_length=16, block_length=8, steps=8, suppress_tokens=tuple(own.suppress_token_ids))
    expected = official_sample(
        lambda canvas, columns: network(canvas).logits[:, columns],
        prompt,
        official,
        mask_token_id=own.mask_token_id,
        fill_token_id=own.fill_token_id,
    )
    assert forwards == 8 and len(written) == 16
    assert set(written) == {(c.step, c.position, c.token) for c in expected.trace.commits}
    assert official_run(network, prompt, SamplerConfig(16, 8, 8), forwards=3) == (written[:6], 3)


def test_a_small_benchmark_measures_every_mode():
    result = bench_sampler(SHAPE, device="cpu", baseline_forwards=None)
    official, exact, prefix, dual, fast = result.measurements
    assert official.ratio == 1 and official.measured_forwards is None
    assert [m.forwards for m in result.measurements] == [16, 16, 16, 16, 4]
    assert [m.refreshes for m in (exact, prefix, dual, fast)] == [0, 2, 2, 2]
    assert official.agreement == exact.agreement == 1.0 and fast.agreement is None
    assert result.to_dict()["shape"]["vocab_size"] == 1500 and result.device


def test_a_stopped_benchmark_goes_on_from_its_own_journal_alone(tmp_path):
    journal = tmp_path / "x.part.jsonl"
    for text in ("my notes", '{"run": 1}\n'):
        journal.write_text(text)
        with pytest.raises(ValueError, match="was not made by"):
            bench_sampler(SHAPE, device="cpu", journal=journal)
        assert journal.read_text() == text
    journal.unlink()
    first = bench_sampler(SHAPE, device="cpu", journal=journal)
    assert bench_sampler(SHAPE, device="cpu", journal=journal).measurements == first.measurements
    with pytest.raises(ValueError, match="seed 0, now 1"):
        bench_sampler(SHAPE, device="cpu", journal=journal, seed=1)
    with pytest.raises(ValueError, match=r"baseline_forwards 8, now 4"):
        bench_sampler(SHAPE, device="cpu", journal=journal, baseline_forwards=4)
    assert json.loads(journal.read_text().split("\n")[0])["run"]["threads"] == torch.get_num_threads()


@pytest.mark.slow
def test_the_command_prints_json_and_a_table(tmp_path):
    sizes = {"vocab-size": 1500, "hidden-size": 32, "layers": 1, "prompt-length": 8, "gen-length": 8, "block-length": 4}
    options = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    done = run("bench", "sampler", "--json", "--baseline-forwards", "2", "--out", str(tmp_path / "x.json"), *options)
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    assert printed == json.loads((tmp_path / "x.json").read_text())
    assert printed["measurements"][0]["measured_forwards"] == 2
    shown = run("bench", "sampler", *options).stdout
    assert "ratio" in shown and "official algorithm" in shown and "…" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert run("bench", "sampler", "--preset", "tpu").exit_code == 2


def test_peak_memory_sees_a_large_tensor():
    with peak_memory(CPU) as peak:
        torch.ones(64, 2**20)
    if peak.bytes is None:
        pytest.skip("this system does not tell how much memory is in use")
    assert 200 * 2**20 < peak.bytes < 400 * 2**20


def test_an_exact_cache_agrees_and_a_stale_one_does_not():
    config = SamplerConfig(gen_length=16, block_length=8, steps=16)
    frame = cache_agreement(Answerer(model(), processor()), examples(3), config, intervals=(1, None))
    assert frame["interval"].isna().tolist() == [False, True] * 2
    fresh, stale = frame[frame["interval"] == 1], frame[frame["interval"].isna()]
    assert (fresh["identity"] == 1).all() and (fresh["same_answers"] == 1).all() and (fresh["kl"].abs() < 1e-9).all()
    assert (fresh["refreshes"] == 1).all() and (stale["refreshes"] < 0.2).all()
    assert (stale["kl"] > 1e-4).all() and (stale["identity"] < 1).all()
    assert (stale["first_divergence"] < fresh["first_divergence"].min()).all()


# The loss and the training step.


def test_the_loss_benchmark_compares_equal_gradients():
    result = bench_loss(LossShape(hidden_size=16, vocab_size=9000, positions=40, masked=10), device="cpu", repeats=1)
    frozen, learns = result.cases
    assert (frozen.head_learns, learns.head_learns) == (False, True)
    for case in result.cases:
        assert case.loss_error < 1e-6 and case.gradient_error < 1e-6 and case.seconds > 0
    assert frozen.head_gradient_bytes == 0 and learns.head_gradient_bytes == 9000 * 16 * 4
    with pytest.raises(ValueError, match="50 of 40 positions cannot be masked"):
        bench_loss(LossShape(positions=40, masked=50), device="cpu")


@pytest.mark.slow
def test_the_loss_holds_a_small_part_of_the_full_logits():
    shape = LossShape(hidden_size=16, vocab_size=126464, positions=512, masked=32)
    (frozen, _) = bench_loss(shape, device="cpu", repeats=1).cases
    assert frozen.full_bytes > 4 * 512 * 126464 and frozen.memory_ratio > 8


def test_every_way_of_the_training_benchmark_takes_the_same_step():
    result = bench_training(replace(SHAPE, gen_length=40), device="cpu", rows=2, repeats=1)
    reference, ours, saving = result.measurements
    assert result.rows == 2 and 0 < result.masked < 80
    for way in (ours, saving):
        assert way.loss == pytest.approx(reference.loss, rel=1e-5)
        assert way.gradient_norm == pytest.approx(reference.gradient_norm, rel=1e-4)
    assert reference.time_ratio == 1 and reference.mfu is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "sizes", "key"),
    [
        ("loss", {"vocab-size": 900, "hidden-size": 8, "positions": 20, "masked": 4}, "cases"),
        ("training", {"vocab-size": 1500, "hidden-size": 32, "layers": 1, "rows": 1}, "measurements"),
    ],
)
def test_the_benchmarks_of_training_print_json_and_a_table(tmp_path, what, sizes, key):
    options = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    file = tmp_path / "x.json"
    done = run("bench", what, "--json", "--repeats", "1", "--out", str(file), *options)
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    assert printed == json.loads(file.read_text()) and printed[key] and printed["device"]
    shown = run("bench", what, "--repeats", "1", *options).stdout
    assert "medv" in shown and "…" not in shown and max(map(len, shown.splitlines())) <= 80
    assert run("bench", what, "--preset", "tpu").exit_code == 2
