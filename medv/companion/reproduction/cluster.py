"""`medv reproduce --on slurm`: each notebook is a job of a scheduler, submitted through submitit once its inputs are there.

The process that submits holds the run folder, polls, and may die: a job finishes by itself, and the next `medv reproduce --on`
waits for the jobs that are still in the queue. Scripts and logs of the jobs are in `OUT/jobs`. `local` starts processes of this
machine instead.
"""

import importlib.util
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medv.artifacts import write_json
from medv.companion.studies.machine import Machine
from medv.companion.studies.node import Node
from medv.profiles import Profile
from medv.reading import read_json

if TYPE_CHECKING:
    from submitit import Job

SCHEDULERS = ("slurm", "local")
OPTIONS = ("account", "constraint", "cpus_per_task", "exclude", "gpus_per_node", "mail_type", "mail_user", "mem", "nodelist")
OPTIONS += ("partition", "qos", "reservation", "time")
"""Options of sbatch that `--slurm KEY=VALUE` passes on, with - or _ in their names."""
QUEUE_SECONDS = 15  # between two questions about a job
LATE_SECONDS = 10  # in which a shared file system shows a result


def asked_for(node: Node, profile: Profile, machine: Machine) -> dict[str, Any]:
    """What the job of a notebook asks of sbatch (minutes, cores, memory of the host, GPUs), on one node of the cluster.

    Where the profile's models need a GPU, a heavy notebook gets one for each process of its trainings.
    """
    gpus = machine.processes if (node.heavy or node.alone) and not profile.side_by_side else 0
    memory = 64 * gpus or (8 if profile.side_by_side else 32)
    cores = gpus * max(4, machine.workers + 1) or 2
    asked = {"time": 60 * (48 if gpus else 8), "cpus_per_task": cores, "mem": f"{memory}G"}
    return asked | ({"gpus_per_node": gpus} if gpus else {}) | ({"exclusive": True} if node.alone else {})


def check_scheduler(on: str | None, slurm: Iterable[str], out: Path) -> dict[str, str]:
    """The options of `--slurm`: {"partition": "gpu"} for ["partition=gpu"].

    Raises ValueError where `--on` and `--slurm` cannot be followed, or jobs of an earlier run may still write to `out`.
    """
    if on not in (None, *SCHEDULERS):
        raise ValueError(f"--on {on!r} is no scheduler: use one of {', '.join(SCHEDULERS)}")
    options = {}
    for text in slurm:
        key, _, value = text.partition("=")
        if on != "slurm" or not value or value != value.strip() or not value.isprintable():
            raise ValueError(f"--slurm {text!r} must be KEY=VALUE, as partition=gpu, and beside `--on slurm`")
        if key.replace("-", "_") not in OPTIONS:
            raise ValueError(f"--slurm has no option {key!r}: choose from {', '.join(OPTIONS)}")
        options[key.replace("-", "_")] = value
    if on and importlib.util.find_spec("submitit") is None:
        raise ValueError("--on needs the library submitit: pip install 'medv[slurm]'")
    if on == "slurm" and not (shutil.which("sbatch") and shutil.which("squeue")):
        raise ValueError("--on slurm needs the commands sbatch and squeue on the PATH: run it on a login node of the cluster")
    for record in sorted((out / "jobs").glob("*.json")):
        job, where = (read_json(record)[key] for key in ("job", "on"))
        if where != on:
            mend = f"go on with --on {where}, or cancel the job and delete {record}"
            raise ValueError(f"job {job} of an earlier --on {where} may still write to {out}: {mend}")
    return options


class Jobs:
    """The jobs of one run. `submit_and_wait` may be called from several threads."""

    def __init__(self, on: str, folder: Path, options: Mapping[str, str]):
        from submitit import LocalExecutor, SlurmExecutor

        self.on, self.folder, self.options = on, folder, options
        self.executor = (SlurmExecutor if on == "slurm" else LocalExecutor)(folder)
        self.running: dict[str, Job] = {}
        self.submitting = threading.Lock()  # the executor holds the parameters of the next job

    def submit_and_wait(self, name: str, key: str, asked: dict[str, Any], function: Callable, *arguments: Any) -> Any:
        """What `function(*arguments)` returns in a job, or in one that an earlier process submitted for the same key.

        Raises RuntimeError where a job ends without a result, and where one of another key is still in the queue.
        """
        record = self.folder / f"{name}.json"
        with self.submitting:
            left = read_json(record) if record.exists() else {}
            job = self.executor.job_class(self.folder, left["job"]) if left else None
            if job is None or job.paths.result_pickle.exists() or not self._is_queued(job):
                if self.on == "local":
                    self.executor.update_parameters(timeout_min=asked["time"], gpus_per_node=asked.get("gpus_per_node", 0))
                else:  # without srun: a notebook that starts torchrun must not look like a process of MPI
                    given = {"additional_parameters": {**asked, **self.options}, "use_srun": False}
                    self.executor.update_parameters(job_name=f"medv-{name}", **given)
                job = self.executor.submit(function, *arguments)
                write_json(record, {"on": self.on, "job": job.job_id, "key": key})
            elif left["key"] != key:
                raise RuntimeError(f"job {job.job_id} of an earlier run still makes it from other inputs: cancel that first")
            self.running[name] = job
        result, waits = job.paths.result_pickle, 0
        while not result.exists() and (waits % QUEUE_SECONDS or self._is_queued(job)):
            time.sleep(1)
            waits += 1
        if not result.exists():
            time.sleep(LATE_SECONDS)
        del self.running[name]
        record.unlink(missing_ok=True)
        if not result.exists():
            why = "ended without a result (cancelled, or out of time or memory)"
            raise RuntimeError(f"job {job.job_id} {why}: see {job.paths.stderr}")
        return job.result()

    def cancel(self) -> list[str]:
        """Submit no more, cancel the jobs that wait or run, and report each in a sentence."""
        self.submitting.acquire()
        said = []
        for name, job in list(self.running.items()):
            try:
                if self.on == "slurm":
                    job.cancel()
                else:
                    with suppress(ProcessLookupError):  # Ctrl-C in a terminal reaches it by itself
                        os.kill(int(job.job_id), signal.SIGINT)
                (self.folder / f"{name}.json").unlink(missing_ok=True)
                said.append(f"job {job.job_id} ({name}) was cancelled")
            except (subprocess.CalledProcessError, OSError) as error:
                said.append(f"job {job.job_id} ({name}) could not be cancelled and may still run: {error}")
        return said

    def _is_queued(self, job: "Job") -> bool:
        """Whether a job waits or runs. Asks squeue: submitit would ask sacct, which needs an accounting data base."""
        if self.on == "slurm":
            command = ["squeue", "--noheader", "--jobs", job.job_id]
            asked = subprocess.run(command, capture_output=True, text=True)
            return bool(asked.stdout.strip()) or (asked.returncode != 0 and "Invalid job id" not in asked.stderr)
        if not job.done():
            return True
        with suppress(OSError):  # a process of an earlier run, no child of this one
            os.kill(int(job.job_id), 0)
            return True
        return False
