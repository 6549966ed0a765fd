"""What all tests share: no network, untouched global generators, the root of the source tree and a model folder."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parent.parent


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
