"""Notebooks as jobs: what is made and recorded is that of a run in process: by processes here, and by a stub of Slurm."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from command import run
from rich.console import Console
from test_reproduce import ALONE, BODIES, TOYS, alive, in_process, toys, write_notebook  # noqa: F401 (two fixtures)

from medv.companion.reproduction import cluster
from medv.companion.reproduction.cluster import asked_for
from medv.companion.reproduction.registry import Node
from medv.companion.reproduction.reproduce import reproduce
from medv.companion.studies.machine import Machine
from medv.profiles import get_profile

HELPERS = Path(__file__).parent
CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
from test_reproduce import TOYS
from medv.companion.reproduction.reproduce import reproduce
sys.exit(reproduce("smoke", out=sys.argv[2], nodes=TOYS, notebooks=sys.argv[3], only=["first"], on="local"))
"""
SBATCH = """#!/bin/bash
# The job begins at once, with what Slurm would set.
cp "$1" "$STUB/asked-$(sed -n 's/^#SBATCH --job-name=//p' "$1")"
[ -z "$STUB_LOST" ] || { echo "Submitted batch job 999999"; exit; }
out=$(sed -n 's/^#SBATCH --output=//p' "$1")
(export SLURM_JOB_ID=$BASHPID SLURM_LOCALID=0 SLURM_PROCID=0 SLURM_NTASKS=1 SLURM_NNODES=1 SLURM_NODEID=0
 echo "$BASHPID" > "$STUB/id"; exec bash "$1" > "${out/\\%j/$BASHPID}" 2>&1) > /dev/null &
sleep 0.2
echo "Submitted batch job $(cat "$STUB/id")"
"""


def begin(out, toys, nodes=TOYS, **options):  # noqa: F811
    console = Console(file=io.StringIO(), width=200)
    code = reproduce("smoke", out=out, nodes=nodes, notebooks=toys, console=console, **options)
    return code, console.file.getvalue()


def records(out):
    found = {path.name: json.loads(path.read_text()) for path in sorted((out / "state").glob("*.json"))}
    return {name: {key: value for key, value in record.items() if key != "seconds"} for name, record in found.items()}


def made(out):
    files = [path for path in out.rglob("*") if path.suffix in (".csv", ".png", ".svg") or path.parent.name == "models"]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """Commands of Slurm that start a job at once, on this machine; the folder where they note what was asked."""
    place = tmp_path / "stub"
    place.mkdir()
    commands = {"sbatch": SBATCH, "squeue": '#!/bin/bash\nkill -0 "$3" 2> /dev/null && echo "$3" || true\n'}
    commands |= {"srun": '#!/bin/bash\nprintf "%s\\n" "$*"\n', "scontrol": "#!/bin/bash\nprintf 'node7\\nnode8\\n'\n"}
    for name, text in commands.items():
        (place / name).write_text(text)
        (place / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    monkeypatch.setenv("STUB", str(place))
    return place


@pytest.mark.slow
def test_jobs_make_what_the_run_in_process_makes(toys, tmp_path, in_process):  # noqa: F811
    here, there = tmp_path / "here", tmp_path / "there"
    assert begin(here, toys, jobs=2)[0] == 0
    code, printed = begin(there, toys, on="local", jobs=2)
    assert code == 0, printed
    assert made(there) == made(here) and "figures/fig03.csv" in made(here)
    assert records(there) == records(here)
    assert list((there / "jobs").glob("*_log.out")) and not list((there / "jobs").glob("*.json"))

    code, printed = begin(there, toys, on="local")
    assert code == 0 and printed.count("cached") >= 3

    write_notebook(toys, "first", "raise ValueError('no weights today')")
    code, printed = begin(there, toys, on="local")
    assert code == 1 and "first.ipynb failed: ValueError: no weights today" in printed and "| raise ValueError" in printed
    assert "blocked  second: needs first" in printed and "cached   alone" in printed


def listen_to_ctrl_c():
    """In a child: Ctrl-C ends it also where the tests were told to ignore it (nohup in a script, &), which children inherit."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_cancels_its_jobs_and_a_killed_one_finds_them_again(toys, tmp_path, sent):  # noqa: F811
    out, go = tmp_path / "run", tmp_path / "go"
    waits = "import os, time\nartifact('half', str(os.getpid()))\nwait = iter(range(1200))\n"
    waits += f"while not Path({str(go)!r}).exists() and next(wait, None) is not None:\n    time.sleep(0.1)\n"
    write_notebook(toys, "first", f"{waits}{BODIES['first']}")
    command = [sys.executable, "-c", CHILD, str(HELPERS), str(out), str(toys)]
    said = tmp_path / "said"  # a file: jobs that go on would keep a pipe open
    with said.open("w") as stream:
        child = subprocess.Popen(command, stdout=stream, preexec_fn=listen_to_ctrl_c)
    deadline = time.monotonic() + 300
    half = out / "half"
    while not (half.exists() and half.read_text()) and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    job, kernel = json.loads((out / "jobs" / "first.json").read_text())["job"], int(half.read_text())
    child.send_signal(sent)
    child.wait(300)
    if sent == signal.SIGINT:
        assert child.returncode == 130 and f"job {job} (first) was cancelled" in said.read_text()
        while alive(kernel) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not alive(kernel) and not (out / "jobs" / "first.json").exists()
    else:
        assert alive(kernel)
        with pytest.raises(ValueError, match=rf"job {job} of an earlier --on local may still write"):
            begin(out, toys, only=["first"])
    go.touch()
    code, printed = begin(out, toys, only=["first"], on="local")
    assert code == 0, printed
    assert (out / "log.txt").read_text().split() == ["first"]


@pytest.mark.slow
def test_a_job_of_slurm_asks_for_what_it_needs(toys, tmp_path, stub):  # noqa: F811
    out, given = tmp_path / "run", ("partition=gpu", "mem=3G", "mail-type=END")
    code, printed = begin(out, toys, [replace(ALONE, alone=True)], on="slurm", slurm=given)
    assert code == 0 and (out / "figures" / "alone.csv").exists(), printed
    asked = (stub / "asked-medv-alone").read_text()
    for line in ("partition=gpu", "mem=3G", "mail-type=END", "exclusive", "cpus-per-task=2", "time=480"):
        assert f"\n#SBATCH --{line}\n" in asked
    assert "gpus" not in asked and "srun" not in asked


def test_a_job_that_is_lost_is_a_failure(toys, tmp_path, stub, monkeypatch):  # noqa: F811
    monkeypatch.setenv("STUB_LOST", "1")
    monkeypatch.setattr(cluster, "LATE_SECONDS", 0)
    code, printed = begin(tmp_path / "run", toys, [ALONE], on="slurm")
    assert code == 1 and "job 999999 ended without a result" in printed and "999999_0_log.err" in printed


def test_heavy_notebooks_ask_for_gpus_where_models_are_large():
    light, heavy = Node("a", "a.ipynb", ""), Node("b", "b.ipynb", "", heavy=True)
    paper, machine = get_profile("paper"), Machine(processes=4, workers=7)
    asked = {"time": 2880, "cpus_per_task": 32, "mem": "256G", "gpus_per_node": 4}
    assert asked_for(heavy, paper, machine) == asked and asked_for(replace(light, alone=True), paper, machine)["exclusive"]
    assert "gpus_per_node" not in asked_for(light, paper, machine) | asked_for(heavy, get_profile("tiny"), machine)


def test_what_cannot_be_followed_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    def refused(*arguments):
        result = run("reproduce", "--profile", "smoke", "--out", tmp_path / "run", *arguments)
        assert result.exit_code == 2 and not (tmp_path / "run").exists()
        return result.stderr

    assert "'pbs' is no scheduler: use one of slurm, local" in refused("--on", "pbs")
    assert "beside `--on slurm`" in refused("--slurm", "partition=a")
    assert "'partition' must be KEY=VALUE" in refused("--on", "slurm", "--slurm", "partition")
    assert "no option 'partitoin': choose from account" in refused("--on", "slurm", "--slurm", "partitoin=a")
    assert "must be KEY=VALUE" in refused("--on", "slurm", "--slurm", "partition=a\n#SBATCH --wrap=x")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "needs the commands sbatch and squeue" in refused("--on", "slurm")
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'medv[slurm]'" in refused("--on", "slurm")


def test_the_slurm_file_of_a_training_starts_torchrun_on_every_node(stub, root):
    environment = os.environ | {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "12"}
    for script in ("slurm.sh", "slurm_one_node.sh"):
        subprocess.run(["bash", "-n", root / "benchmarks" / script], check=True)

    def printed(*arguments, **more):
        command = ["bash", root / "benchmarks/slurm.sh", *arguments]
        return subprocess.run(command, env=environment | more, capture_output=True, text=True, check=True).stdout

    usual = printed()
    assert "torchrun --nnodes 2 --nproc_per_node 4 --rdzv_backend c10d --rdzv_id 12 --rdzv_endpoint node7:29500" in usual
    assert "-m medv train instruct --profile paper --deepspeed zero3 --data llava_med_instruct" in usual
    other = printed("vqa", "--profile", "paper", SLURM_GPUS_ON_NODE="8")
    assert "--nproc_per_node 8" in other and other.endswith("-m medv train vqa --profile paper\n")
