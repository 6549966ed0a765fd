"""The short form of `fuzz`: hostile files end every command in time, with a sentence, and change nothing that is not ours."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

FUZZ = Path(__file__).with_name("fuzz.py")


def test_hostile_files_end_in_one_sentence_and_change_nothing():
    """`MEDV_FUZZ_MINUTES=20` runs the long form."""
    minutes = os.environ.get("MEDV_FUZZ_MINUTES")
    line = [sys.executable, FUZZ, *(["--minutes", minutes, "--examples", "100"] if minutes else ["--examples", "8"])]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
