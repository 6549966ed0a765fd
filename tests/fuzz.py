"""Hostile input to every command that reads files; the seeds are fixed, so that a failure can be had again.

A case is a folder of files and a command line. The command must end within 10 s with exit code 0 (1 where a judge left
questions unjudged) or with 2 and one sentence, without a traceback, and must leave every file that was there as it was and
make none but its `--out`.

    python tests/fuzz.py --minutes 20          # every surface in turn; prints counts and each kind of failure once
    python tests/fuzz.py --examples 20         # so many cases of each surface (what CI runs)
    python tests/fuzz.py --surface vqa --examples 500 --keep FOLDER    # keep the files of the failures
"""

import argparse
import faulthandler
import hashlib
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "200"}

import fuzz_cases
import fuzz_dicom
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from stub_judge import StubJudge
from typer.testing import CliRunner

from medv.cli import app

LONGEST = 10.0
"""Seconds for one case."""
MEMORY = 12 << 30
"""Bytes that the process may map, so that a hostile size ends here and not with the machine."""


class Hang(BaseException):
    """The case took too long."""


@dataclass
class Surface:
    """What is fuzzed: a strategy of cases (see `fuzz_cases`), and what has come of them."""

    name: str
    cases: st.SearchStrategy
    codes: tuple[int, ...] = (0, 2)
    count: int = 0
    ended: dict[int, int] = field(default_factory=dict)
    failures: dict[str, list[str]] = field(default_factory=dict)
    slowest: float = 0.0


SURFACES = (
    Surface("questions", fuzz_cases.questions()),
    Surface("config", fuzz_cases.checkpoint()),
    Surface("vqa", fuzz_cases.vqa()),
    Surface("text", fuzz_cases.text()),
    Surface("judgements", fuzz_cases.judgements()),
    Surface("judged", fuzz_cases.judged(), codes=(0, 1, 2)),
    Surface("replies", fuzz_cases.replies(), codes=(0, 1, 2)),
    Surface("data", fuzz_cases.data()),
    Surface("dicom", fuzz_dicom.dicom()),
)


def warm_up():
    """Load what the commands import, which is no part of a case's time."""
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder, "i.png")
        picture.write_bytes(fuzz_cases.IMAGE)
        done = CliRunner().invoke(app, ["ask", str(picture), "What is it?", *fuzz_cases.SHORT])
        assert done.exit_code == 0, done.stderr
    import medv.companion.audit.check
    import medv.evaluation.benchmark
    import medv.evaluation.judging
    import medv.evaluation.vqa  # noqa: F401


def digest(folder):
    """The sha256 of each file, without the ones that the command is to make."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not {"out", "judge_cache"} & set(path.relative_to(folder).parts)
    }


def invoke(line):
    """The command's result, or Hang after `LONGEST` seconds; a hang in native code ends the process with its stacks."""

    def too_long(_, frame):
        raise Hang(f"hang at {Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}")

    signal.signal(signal.SIGALRM, too_long)
    faulthandler.dump_traceback_later(6 * LONGEST, exit=True)
    signal.setitimer(signal.ITIMER_REAL, LONGEST)
    try:
        return CliRunner().invoke(app, line)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()


def trouble(surface, done):
    """What is wrong with a result, in a few words that are the same for each case of the kind; None where nothing is."""
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        where = traceback.extract_tb(done.exception.__traceback__)[-1]
        return f"{type(done.exception).__name__} at {Path(where.filename).name}:{where.lineno}"
    if "Traceback" in done.stderr:
        lines = done.stderr.strip().splitlines()
        frames = re.findall(r'File "[^"]*/([^/"]+)", line (\d+)', done.stderr)
        kind = next((line for line in reversed(lines) if re.match(r"[\w.]+(Error|Exception)\b", line)), lines[-1])
        return f"traceback: {kind.split(':')[0]} at {':'.join(frames[-1]) if frames else '?'}"
    if done.exit_code not in surface.codes:
        return f"exit code {done.exit_code}"
    said = [line for line in done.stderr.splitlines() if line.startswith("medv: ")]
    if done.exit_code == 2 and len(said) != 1 and "Usage:" not in done.stderr:
        return f"exit code 2 with {len(said)} sentences"
    if re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", done.stdout + done.stderr.replace("\r", "")):
        return "a control character reaches the terminal"
    return None


def play(surface, case, stub, keep=None):
    """Run one case; the kind of its failure, or None."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name, content in case["files"].items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content) if isinstance(content, bytes) else shutil.copyfile(content, path)
        before, started = digest(folder), time.monotonic()
        stub.plan = lambda *_: case.get("reply", "8 7")
        line = [part.format(folder=folder, url=stub.url) for part in case["line"]]
        try:
            done = invoke(line)
            found = trouble(surface, done)
            surface.ended[done.exit_code] = surface.ended.get(done.exit_code, 0) + 1
        except Hang as hang:
            done, found = None, str(hang)
        surface.slowest = max(surface.slowest, time.monotonic() - started)
        after = digest(folder)
        if found is None and after != before:
            changed = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
            found = f"changed or made: {re.sub('[0-9a-f]{8,}', '*', changed[0])}"
        if found:
            told = f"medv {' '.join(line)}\n{(done.stderr if done else '')[-1500:]}"
            surface.failures.setdefault(found, []).append(told.replace(place, "FOLDER"))
            if keep and len(surface.failures[found]) == 1:
                kept = keep / f"{surface.name}-{re.sub(r'[^a-zA-Z0-9]+', '-', found)[:80]}"
                shutil.copytree(folder, kept, dirs_exist_ok=True)
    surface.count += 1
    return found


def fuzz(surface, examples, round_, until, stub, keep):
    """So many cases of one surface, with the seed of the round; no more after `until`."""

    @seed(round_)
    @settings(
        max_examples=examples, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(surface.cases)
    def run(case):
        if time.monotonic() < until:
            play(surface, case, stub, keep)

    run()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, help="for all surfaces together")
    parser.add_argument("--examples", type=int, default=20, help="of each surface; with --minutes: of each round")
    parser.add_argument("--surface", choices=[surface.name for surface in SURFACES], action="append")
    parser.add_argument("--seed", type=int, default=0, help="of the first round")
    parser.add_argument("--keep", type=Path, help="folder for the files of the first failure of each kind")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    chosen = [surface for surface in SURFACES if options.surface is None or surface.name in options.surface]
    round_ = options.seed
    with StubJudge(None) as stub:
        warm_up()
        started = time.monotonic()
        until = started + 60 * options.minutes if options.minutes else float("inf")
        while True:
            for surface in chosen:
                fuzz(surface, options.examples, round_, until, stub, options.keep)
            round_ += 1
            if not options.minutes or time.monotonic() > until:
                break
    for surface in chosen:
        codes = ", ".join(f"{count} x {code}" for code, count in sorted(surface.ended.items()))
        failed = sum(map(len, surface.failures.values()))
        print(
            f"{surface.name:11}{surface.count:6} cases; exit codes: {codes}; slowest {surface.slowest:.1f} s; {failed} failed"
        )
    total = sum(surface.count for surface in chosen)
    kinds = [(surface, kind, told) for surface in chosen for kind, told in surface.failures.items()]
    for surface, kind, told in kinds:
        print(f"\n{surface.name}: {kind} ({len(told)} times)\n{min(told, key=len)}")
    spent, seeds = time.monotonic() - started, f"{options.seed} to {round_ - 1}"
    print(f"{total} cases in {spent:.0f} s, seeds {seeds}; {len(kinds)} kinds of failure")
    sys.exit(1 if kinds else 0)


if __name__ == "__main__":
    main()
