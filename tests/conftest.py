"""Shared by all tests: no network, untouched global generators, the root of the source tree and a model folder."""

import gc
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parent.parent
HERE = [str(ROOT / "tests" / "light"), str(ROOT)]
"""Where this process and those that it starts look first: what is slow to import and needed by nobody, and this source tree."""
sys.path[:0] = HERE
os.environ["PYTHONPATH"] = os.pathsep.join([*HERE, *filter(None, [os.environ.get("PYTHONPATH")])])


def pytest_collection_finish():
    """The modules that are loaded by now stay: no garbage collection has to walk through them again."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def untouched_generators():
    """medv draws from generators of its own: after a test torch's and numpy's global ones are as before.

    Used by whole modules (`pytestmark`), except where a Trainer seeds the global generators.
    """
    import numpy as np
    import torch

    before = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002 (the legacy state is what is checked)
    yield
    state = np.random.get_state()  # noqa: NPY002
    assert torch.get_rng_state().equal(before[0]), "the test changed torch's global generator"
    assert (state[1] == before[1][1]).all() and state[2] == before[1][2], "the test changed numpy's global generator"


@pytest.fixture
def few_resamples(monkeypatch):
    """Two-level bootstraps of 200 resamples, for tests whose intervals are far from the verdict's bounds."""
    monkeypatch.setattr("medv.intervals.RESAMPLES", 200)


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the source tree."""
    return ROOT


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A folder with the small test model."""
    import tiny

    folder = tmp_path_factory.mktemp("model")
    tiny.model().save_pretrained(folder)
    tiny.processor().save_pretrained(folder)
    return folder
