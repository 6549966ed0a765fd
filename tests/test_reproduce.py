"""The driver on toy notebooks: what runs, what is cached, and what survives a failure or a kill."""

import dataclasses
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from rich.console import Console

from medv.companion.reproduction.cache import code_cells, library_of
from medv.companion.reproduction.registry import EXHIBITS, Node, all_nodes, chain_lengths, counterpart, makers, ordered
from medv.companion.reproduction.reproduce import reproduce
from medv.profiles import PROFILES

PARAMETERS = "profile = 'tiny'\nseed = 0\nout = None"
SETUP = """
from pathlib import Path
out = Path(out)
def note(name):
    with (out / 'log.txt').open('a') as log:
        log.write(name + '\\n')
def artifact(name, text):
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_text(text)
def result(name):
    for suffix in ('svg', 'csv', 'json'):
        artifact(f'figures/{name}.{suffix}', '{"about": {"caption": "a <b>"}, "seed": 0}' if suffix == 'json' else 'x\\n1\\n')
    from PIL import Image
    Image.new('RGB', (4, 4)).save(out / f'figures/{name}.png')
"""
FIRST = Node("first", "first.ipynb", "Makes weights", makes=("models/first",), heavy=True)
SECOND = Node("second", "second.ipynb", "Draws", needs=("models/first",), results=("fig03",))
ALONE = Node("alone", "alone.ipynb", "Needs nobody", results=("alone",))
TOYS = (ALONE, SECOND, FIRST)
BODIES = {
    "first": "note('first'); artifact('models/first', 'w')",
    "second": "note('second'); result('fig03')",
    "alone": "note('alone'); result('alone')",
}


def write_notebook(folder: Path, name: str, body: str, parameters: str = PARAMETERS) -> Path:
    cells = [nbformat.v4.new_code_cell(text) for text in (parameters, SETUP, body)]
    cells[0].metadata.tags = ["parameters"]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    path = folder / f"{name}.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)
    return path


@pytest.fixture
def toys(tmp_path):
    folder = tmp_path / "notebooks"
    folder.mkdir()
    for name, body in BODIES.items():
        write_notebook(folder, name, body)
    return folder


@pytest.fixture
def in_process(monkeypatch):
    """Notebooks run in this process, without a kernel: for tests of what runs and when."""

    def execute(source, executed, parameters, **_options):
        names = {}
        for number, cell in enumerate(code_cells(source)):
            exec(cell["source"], names)
            names |= {} if number else parameters
        executed.parent.mkdir(exist_ok=True)
        shutil.copyfile(source, executed)

    monkeypatch.setattr("medv.companion.reproduction.execute.execute", execute)


def drive(toys: Path, nodes=TOYS, **options) -> tuple[int, str, list[str]]:
    """Reproduce the toys; the exit code, what was printed, and the notebooks that really ran, in order."""
    out = toys.parent / "run"
    log = out / "log.txt"
    log.unlink(missing_ok=True)
    console = Console(file=io.StringIO(), width=200)
    code = reproduce("smoke", out=out, nodes=nodes, notebooks=toys, console=console, **options)
    return code, console.file.getvalue(), log.read_text().split() if log.exists() else []


def test_a_run_of_another_seed_or_profile_is_never_replaced(toys, in_process):
    assert drive(toys)[0] == 0
    kept = {file: file.read_bytes() for file in (toys.parent / "run").rglob("*") if file.is_file()}
    for options in ({"seed": 1}, {"seed": 1, "dry_run": True}, {"seed": 1, "force": True}):
        with pytest.raises(ValueError, match=r"holds profile smoke, seed 0: choose another --out"):
            drive(toys, **options)
    with pytest.raises(ValueError, match=r"holds profile smoke, seed 0: choose another --out"):
        reproduce("tiny", out=toys.parent / "run", nodes=TOYS, notebooks=toys)
    log = toys.parent / "run" / "log.txt"  # `drive` removes it
    assert kept == {file: file.read_bytes() for file in kept if file != log} | {log: kept[log]}


@pytest.mark.slow
def test_a_run_is_ordered_then_cached_then_stale_with_a_reason(toys):
    code, printed, ran = drive(toys, jobs=2)
    assert (code, sorted(ran)) == (0, ["alone", "first", "second"]) and ran.index("first") < ran.index("second"), printed
    page = (toys.parent / "run" / "index.html").read_text()
    assert "a &lt;b&gt;" in page and "a <b>" not in page
    assert all(name in page for name in EXHIBITS) and "not yet" in page
    assert "http" not in page

    code, printed, ran = drive(toys)
    assert (code, ran) == (0, []) and printed.count("cached") >= 3

    changed = [dataclasses.replace(FIRST, parameters={"steps": 128}), SECOND, ALONE]
    with pytest.raises(ValueError, match=r"first\.ipynb has no parameter 'steps': .* profile, seed, out"):
        drive(toys, changed)

    write_notebook(toys, "alone", BODIES["alone"] + "\n# once more")
    code, printed, ran = drive(toys)
    assert (code, ran) == (0, ["alone"]) and "stale: notebook changed" in printed

    (toys.parent / "run" / "models" / "first").write_text("changed by hand")
    _, printed, ran = drive(toys, dry_run=True)
    assert ran == [] and "changed by something else" in printed and "needs first, which will run" in printed


@pytest.mark.slow
def test_a_changed_parameter_is_shown_old_to_new(toys):
    write_notebook(toys, "alone", BODIES["alone"], PARAMETERS + "\nsteps: int = 1")
    steps = [[dataclasses.replace(ALONE, parameters={"steps": count})] for count in (64, 128)]
    assert drive(toys, steps[0])[0] == 0
    _, printed, ran = drive(toys, steps[1], dry_run=True)
    assert "stale: parameter steps 64 -> 128" in printed and ran == []
    assert (toys.parent / "run" / "notebooks" / "alone.ipynb").exists()
    assert "steps = 64" in (toys.parent / "run" / "notebooks" / "alone.ipynb").read_text()


@pytest.mark.slow
def test_a_failure_blocks_its_dependants_and_nobody_else(toys):
    write_notebook(toys, "first", "note('first')\nraise ValueError('no [weights] today')")
    code, printed, ran = drive(toys)
    assert code == 1 and sorted(ran) == ["alone", "first"]
    assert "ValueError: no [weights] today" in printed and "| raise ValueError" in printed
    assert "blocked" in printed and "needs first" in printed
    notebooks = toys.parent / "run" / "notebooks"
    assert (notebooks / "first.failed.ipynb").exists() and not (notebooks / "first.ipynb").exists()

    write_notebook(toys, "first", "note('first')")
    code, printed, _ = drive(toys, only=["first"])
    assert code == 1 and "models/first was not made" in printed

    write_notebook(toys, "first", BODIES["first"])
    code, _, ran = drive(toys)
    assert (code, ran) == (0, ["first", "second"]) and not (notebooks / "first.failed.ipynb").exists()


@pytest.mark.slow
def test_heavy_notebooks_share_the_machine_where_the_profile_says_so_and_never_with_one_that_compares_speeds(toys):
    body = "import os; note('+{0}'); {1}; note('-{0}'); artifact('threads/{0}', os.environ['OMP_NUM_THREADS'])"
    meet = (
        "import time; end = time.time() + 60\nwhile '+{}' not in (out / 'log.txt').read_text():\n    assert time.time() < end"
    )
    for name, other in (("one", "two"), ("two", "one"), ("speed", "speed")):
        write_notebook(toys, name, body.format(name, "pass").replace("; pass; ", f"\n{meet.format(other)}\n"))
    one, two = (Node(name, f"{name}.ipynb", "Trains", makes=(f"threads/{name}",), heavy=True) for name in ("one", "two"))
    speed = Node("speed", "speed.ipynb", "Compares speeds", makes=("threads/speed",), alone=True)
    code, printed, ran = drive(toys, (one, two, speed), jobs=2)
    assert code == 0, printed
    assert {ran[0], ran[1]} == {"+one", "+two"}, f"heavy notebooks of the smoke profile did not overlap: {ran}"
    assert ran.index("-speed") == ran.index("+speed") + 1, f"something ran beside the comparison of speeds: {ran}"
    cores = len(os.sched_getaffinity(0))
    threads = {name: int((toys.parent / "run" / "threads" / name).read_text()) for name in ("one", "two", "speed")}
    if "OMP_NUM_THREADS" not in os.environ:
        assert threads == {"one": max(1, cores // 2), "two": max(1, cores // 2), "speed": cores}


def test_only_the_profiles_of_small_models_let_heavy_notebooks_share():
    assert {name for name, profile in PROFILES.items() if profile.side_by_side} == {"tiny", "smoke"}


def test_the_longest_chain_of_notebooks_is_begun_first():
    lengths = chain_lengths(all_nodes())
    assert max(lengths, key=lengths.get) == "stage1" and lengths["stage3"] == 2 and lengths["confidence"] == 1
    assert chain_lengths(TOYS) == {"first": 2, "second": 1, "alone": 1}


def test_a_last_notebook_runs_after_all_others_even_failed_ones_and_again_when_a_result_changes(toys, in_process):
    last = Node("last", "last.ipynb", "Reads what there is", results=("summary",), last=True)
    nodes = (last, *TOYS)
    write_notebook(toys, "last", "note('last'); result('summary')")
    write_notebook(toys, "second", "note('second')\nraise ValueError('no')")
    code, printed, ran = drive(toys, nodes, jobs=2)
    assert code == 1 and ran[-1] == "last" and sorted(ran) == ["alone", "first", "last", "second"], printed
    assert ordered(nodes)[-1] == last

    write_notebook(toys, "second", BODIES["second"])
    _, printed, ran = drive(toys, nodes, dry_run=True)
    assert ran == [] and "needs second, which will run" in " ".join(printed.split())
    assert drive(toys, nodes)[2] == ["second", "last"]
    assert drive(toys, nodes)[2] == []


def test_only_takes_a_figure_with_what_it_needs(toys, in_process):
    code, _, ran = drive(toys, only=["fig03"])
    assert (code, ran) == (0, ["first", "second"])
    with pytest.raises(ValueError, match="not reproduced yet"):
        drive(toys, only=["fig09"])
    with pytest.raises(ValueError, match="nothing is called 'stage9': choose one of alone, second, first"):
        drive(toys, only=["stage9"])
    code, printed, ran = drive(toys, only=["second"], publish=True)
    published = sorted(path.name for path in (toys.parent / "figures" / "smoke").iterdir())
    assert ran == [] and published == ["fig03.csv", "fig03.json", "fig03.png", "fig03.svg"], printed


def test_a_result_that_a_changed_notebook_saves_no_more_is_not_taken_for_its_own(toys, in_process):
    assert drive(toys, only=["alone"])[0] == 0
    write_notebook(toys, "alone", "note('alone')")
    code, printed, _ = drive(toys, only=["alone"])
    assert code == 1 and "every cell ran, but alone was not made" in printed
    write_notebook(toys, "alone", BODIES["alone"])
    assert drive(toys, only=["alone"])[0] == 0


CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_reproduce import TOYS
from medv.companion.reproduction.reproduce import reproduce
sys.exit(reproduce("smoke", out=Path(sys.argv[2]), nodes=TOYS, notebooks=sys.argv[3]))
"""


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_a_killed_run_continues_where_it_was(toys):
    out = toys.parent / "run"
    slow = "import os, time; note('second'); artifact('half', str(os.getpid())); time.sleep(600)"
    write_notebook(toys, "second", slow)
    command = [sys.executable, "-c", CHILD, str(Path(__file__).parent), str(out), str(toys)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline, half = time.monotonic() + 300, out / "half"
    while not (half.exists() and half.read_text()) and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert half.exists(), child.communicate(timeout=5)[0]
    with pytest.raises(ValueError, match=rf"process \({child.pid}\) is working on"):
        drive(toys)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    kernel = int(half.read_text())
    while alive(kernel) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(kernel), "a killed driver left its kernel running"
    assert not (out / "notebooks" / "second.ipynb").exists()

    write_notebook(toys, "second", BODIES["second"])
    code, printed, ran = drive(toys)
    assert code == 0 and ran == ["second"], printed


def test_every_exhibit_of_the_paper_is_made():
    nodes = all_nodes()
    assert set(EXHIBITS) == {f"table{n}" for n in range(1, 9)} | {f"fig{n:02}" for n in range(1, 13)} <= set(makers(nodes))
    assert [counterpart(name) for name in ("table2", "fig03", "pareto")] == ["Table 2", "Figure 3", None]
    assert {node.name for node in ordered(nodes, only=["table2"])} == {"stage1", "stage2", "stage3"}
    assert len({node.notebook for node in nodes}) == len(nodes)


def test_a_graph_with_a_hole_a_double_or_a_circle_is_refused():
    a = Node("a", "a.ipynb", "", needs=("y",), makes=("x",))
    b = Node("b", "b.ipynb", "", needs=("x",), makes=("y",))
    with pytest.raises(ValueError, match="circle"):
        ordered([a, b])
    with pytest.raises(ValueError, match="needs 'y', which no notebook makes"):
        ordered([a])
    with pytest.raises(ValueError, match="made twice, by 'a' and 'c'"):
        ordered([a, b, Node("c", "c.ipynb", "", makes=("x",))])


def test_a_notebook_feels_only_the_library_that_it_imports(tmp_path):
    felt = library_of(
        ["from medv.diffusion import loss\nimport numpy", "def later():\n    from medv.phantoms.scene import Scene"]
    )
    assert {"__init__.py", "diffusion/__init__.py", "diffusion/loss.py", "phantoms/scene.py"} <= set(felt)
    assert not [name for name in felt if name.startswith(("training/", "evaluation/", "companion/", "paper/"))]
    assert "paper/tables/table2.csv" in library_of(["import medv.paper"])
    opened = library_of(["from medv.companion.reproduction.run import open_run"])
    assert "companion/studies/node.py" in opened and "companion/studies/lora.py" not in opened
    everything = library_of(["from medv import MedVConfig"])
    assert everything == library_of(["!medv doctor"]) and "training/stages.py" in everything
    assert "companion/reproduction/run.py" in everything
    assert not {"cli.py", "companion/reproduction/registry.py"} & set(everything)


def test_a_folder_of_others_is_refused_and_stays_but_what_was_made_by_hand_goes_on(toys, in_process):
    out = toys.parent / "run"
    (out / "notebooks").mkdir(parents=True)
    (out / "notebooks" / "alone.ipynb").write_text("my own")
    with pytest.raises(ValueError, match=r"holds other files \(notebooks\)"):
        drive(toys)
    assert (out / "notebooks" / "alone.ipynb").read_text() == "my own" and not (out / "state").exists()
    (out / "notebooks").rename(toys.parent / "elsewhere")
    (out / "figures").mkdir()
    (out / "models").mkdir()
    assert drive(toys, only=["alone"])[0] == 0
