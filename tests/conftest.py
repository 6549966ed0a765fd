"""What all tests share: no network, and the root of the source tree."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Test functions that tests/test_reference.py imports; without this their failed comparisons would not be explained.
pytest.register_assert_rewrite("reference_images", "reference_text", "reference_weights")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the source tree."""
    return ROOT


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> Path:
    """The folder of a small model with random weights; to be read only."""
    import tiny

    folder = tmp_path_factory.mktemp("model")
    tiny.model().save_pretrained(folder)
    tiny.processor().save_pretrained(folder)
    return folder
