"""The tutorials and the explorer in a real browser: JupyterLab and the Voila app, as `make lab` and `make explorer` start them.

Needs Playwright and a Chromium; skipped, with the reason, where one is missing. The servers run the Makefile's own commands on
copies of the notebooks, at profile smoke, and no request may leave this machine.
"""

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medv.companion.explorer.looked import looked_html
from medv.companion.explorer.view import style
from medv.companion.figures.overlays import WordMap

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")]

MODEL = (Path(__file__).parent.parent / "medv" / "weights" / "tiny_model").as_posix()
LOCAL = ("http://127.0.0.1:", "ws://127.0.0.1:", "data:", "blob:", "about:")
PATIENCE = 90_000  # milliseconds; a busy machine may need them, a free one a tenth
NOTEBOOKS = [path for n in ("00", "33", "50") for path in (Path(__file__).parent.parent / "notebooks").glob(f"{n}_*.ipynb")]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, root):
    """The notebooks as they are but for profile, folder and model to start from, and the app's template."""
    place = tmp_path_factory.mktemp("workplace")
    shutil.copytree(root / "notebooks", place / "notebooks", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    app = Path("medv/companion/explorer/app")
    shutil.copytree(root / app, place / app)
    for path in (place / "notebooks").glob("*.ipynb"):
        text = path.read_text(encoding="utf-8").replace('profile = \\"tiny\\"', 'profile = \\"smoke\\"')
        text = text.replace('"out = None', '"out = \\"../out\\"').replace('"init = None', f'"init = \\"{MODEL}\\"')
        path.write_text(text, encoding="utf-8")
    return place


def environment(place: Path, root: Path) -> dict[str, str]:
    """Nothing of this machine's Jupyter settings, no news popup, one thread."""
    own = place / "jupyter"
    notify = own / "config" / "lab" / "user-settings" / "@jupyterlab" / "apputils-extension"
    notify.mkdir(parents=True, exist_ok=True)
    (notify / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
    folders = {"CONFIG_DIR": "config", "DATA_DIR": "data", "RUNTIME_DIR": "runtime"}
    isolated = {f"JUPYTER_{name}": str(own / folder) for name, folder in folders.items()}
    isolated["JUPYTERLAB_SETTINGS_DIR"] = str(own / "config" / "lab" / "user-settings")
    return os.environ | isolated | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A target of the Makefile, started on a free port with a token."""

    def __init__(self, target: str, place: Path, root: Path, options: str, ready: str):
        self.port, self.token, self.log = free_port(), secrets.token_hex(16), place / f"{target}.log"
        arguments = options.format(port=self.port, token=self.token)
        made = ["BIN=" + str(Path(sys.executable).parent), "READY=README.md", f"ARGS={arguments}"]
        bare = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
        asked = ["make", "-n", "-o", "README.md", target, *made]  # -o: the environment is here, however old the file is
        dry = subprocess.run(asked, cwd=root, env=bare, capture_output=True, text=True, check=True)
        line = dry.stdout.strip().splitlines()[-1]
        with self.log.open("w") as stream:
            self.process = subprocess.Popen(
                f"exec env {line}",  # the process to stop is the server, not a shell
                shell=True,
                cwd=place,
                env=environment(place, root),
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
        self.wait(ready)

    def url(self, path: str = "") -> str:
        return f"http://127.0.0.1:{self.port}/{path}"

    def wait(self, ready: str) -> None:
        deadline = time.monotonic() + PATIENCE / 1000
        while time.monotonic() < deadline and self.process.poll() is None:
            if ready in self.log.read_text(errors="replace"):
                return
            time.sleep(0.2)
        self.stop()
        pytest.fail(f"the server did not start:\n{self.log.read_text(errors='replace')[-3000:]}")

    def stop(self) -> None:
        for how in (signal.SIGTERM, signal.SIGKILL):
            if self.process.poll() is None:
                os.killpg(self.process.pid, how)
                try:
                    self.process.wait(5)
                except subprocess.TimeoutExpired:
                    continue


@pytest.fixture(scope="module")
def lab(workplace, root):
    server = Server(
        "lab",
        workplace,
        root,
        "--no-browser --ServerApp.port={port} --ServerApp.port_retries=0 --IdentityProvider.token={token} "
        "--ServerApp.shutdown_no_activity_timeout=600",
        "is running at",
    )
    yield server
    server.stop()


@pytest.fixture(scope="module")
def app(workplace, root):
    server = Server("explorer", workplace, root, "--no-browser --port={port} --token={token}", "is running at")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as play:
        rules = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
        opened = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", rules])
        yield opened
        opened.close()


@contextmanager
def visiting(browser):
    """A context for pages, with a cache of its own; at the end, every request that they made must have stayed here."""
    context = browser.new_context(viewport={"width": 1400, "height": 1000}, reduced_motion="reduce")
    asked = []
    context.set_default_timeout(PATIENCE)
    context.on("request", lambda request: asked.append(request.url))
    context.on("page", lambda page: page.on("websocket", lambda socket: asked.append(socket.url)))
    yield context
    context.close()
    assert asked and [url for url in asked if not url.startswith(LOCAL)] == []
    assert any(url.startswith("ws:") for url in asked)


@pytest.fixture(scope="module")
def lab_context(browser):
    with visiting(browser) as context:
        yield context


@pytest.fixture
def page(lab_context):
    opened = lab_context.new_page()
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def app_page(app, browser):
    """The app, with its first sweep done: one kernel for both of its tests."""
    with visiting(browser) as context:
        opened = context.new_page()
        opened.goto(app.url(f"?token={app.token}"))
        opened.wait_for_selector(".medv-note:has-text('runs in')")
        yield opened


def snap(page, name: str) -> None:
    """Keep a screenshot where SCREENS says so."""
    if os.environ.get("SCREENS"):
        page.screenshot(path=f"{os.environ['SCREENS']}/{name}.png")


def drag(page, name: str, share: float) -> None:
    """Drag the handle of a slider to a share of its width, with the mouse."""
    slider = page.locator(f".{name} .noUi-target")
    slider.scroll_into_view_if_needed()
    box, handle = slider.bounding_box(), slider.locator(".noUi-handle").bounding_box()
    page.mouse.move(handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + share * box["width"], box["y"] + box["height"] / 2, steps=8)
    page.mouse.up()


def shown(page) -> dict[str, str]:
    """What the explorer shows: the answer, its marks, the canvas, and where the chart has its ring."""
    return {
        "z": page.locator(".medv-answer h4").first.inner_text().split("L")[0],
        "answer": page.locator(".medv-answer > p:not(.medv-asked)").first.inner_html(),
        "marks": "|".join(page.locator(".medv-answer mark").all_inner_texts()),
        "canvas": page.locator(".medv-canvas").first.inner_text(),
        "ring": page.locator("svg.forwards circle.now").get_attribute("cx"),
        "points": str(page.locator("svg.repetition circle:not(.now)").count()),
    }


def changed(page, before: dict[str, str], *names: str) -> dict[str, str]:
    """Wait until all of these differ from `before`."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        after, dragged = shown(page), page.locator(".medv-drag-z .widget-readout").inner_text()
        # Beware of what is shown on the way: the slider is ahead of the kernel.
        if after["z"] == f"Z = {dragged} " and all(after[name] != before[name] for name in names):
            return after
        page.wait_for_timeout(100)
    pytest.fail(f"of {names}, these did not change: {[name for name in names if after[name] == before[name]]}")


def settled(page, wanted: dict[str, str], *names: str) -> None:
    """Wait until all of these are as `wanted` again: what was computed once comes back."""
    for name in names:
        until = time.monotonic() + 30
        while shown(page)[name] != wanted[name]:
            assert time.monotonic() < until, f"{name} is {shown(page)[name]!r}, not {wanted[name]!r}"
            page.wait_for_timeout(100)


def use_the_explorer(page, name: str) -> None:
    """Drag Z, drag the forward, ask once more: text, chart, marks and canvas follow."""
    page.wait_for_selector(".medv-note:has-text('runs in')")
    page.locator(".medv-drag-z").scroll_into_view_if_needed()
    many = shown(page)
    assert int(many["points"]) >= 4
    drag(page, "medv-drag-z", 0.0)
    few = changed(page, many, "answer", "marks", "canvas", "ring")
    snap(page, f"{name}_few")
    page.locator(".medv-drag-z .noUi-handle").press("ArrowRight")
    changed(page, few, "answer", "ring")
    drag(page, "medv-drag-z", 1.0)
    settled(page, many, "answer", "ring")
    page.get_by_role("button", name="Where it looked").click()
    look_at_the_words(page)
    snap(page, f"{name}_looked")
    drag(page, "medv-drag-step", 0.3)
    assert changed(page, many, "canvas")["answer"] == many["answer"]
    assert page.locator(".medv-canvas .open").count() > 0
    page.get_by_role("button", name="Pin").click()
    page.locator(".widget-dropdown:has-text('revision') select").select_option("remdm")
    page.get_by_role("button", name="Answer").click()
    after = changed(page, many, "points")
    assert int(after["points"]) == int(many["points"]) + 1
    page.wait_for_selector(".medv-note:has-text('1 run in')")
    assert page.locator(".medv-answer").count() == 2
    page.locator(".medv-drag-z").scroll_into_view_if_needed()
    snap(page, f"{name}_pinned")
    keep_a_word(page)
    snap(page, f"{name}_kept")


def keep_a_word(page) -> None:
    """Words are checked by keyboard and by mouse, and stay when the rest is filled."""
    page.get_by_role("button", name="Keep words").click()
    boxes = page.locator(".medv-keep").get_by_role("checkbox")
    boxes.nth(1).focus()
    page.keyboard.press("Space")
    page.keyboard.press("Tab")
    playwright.expect(boxes.nth(2)).to_be_focused()
    page.locator(".medv-keep .widget-label-basic").nth(3).click()
    checked = [boxes.nth(place) for place in (1, 3)]
    for box in checked:
        playwright.expect(box).to_be_checked()
    labels = [page.locator(".medv-keep .widget-label-basic").nth(place).inner_text() for place in (1, 3)]
    page.get_by_role("button", name="Fill the rest").click()
    page.wait_for_selector(".medv-note:has-text('2 words kept')")
    kept = page.locator(".medv-keep .widget-label-basic:has(:checked)")
    assert kept.all_inner_texts() == labels
    assert page.locator(".medv-canvas .fixed").count() >= 2


def look_at_the_words(page) -> None:
    """Each word shows its own map over the picture, pointed at or focused, and nothing is shown otherwise."""
    words, maps = page.locator(".medv-look"), page.locator(".medv-look-map")
    words.first.wait_for()
    words.first.scroll_into_view_if_needed()
    picture = page.locator(".medv-look-picture").bounding_box()
    page.mouse.move(picture["x"] + 5, picture["y"] + 5)
    playwright.expect(page.locator(".medv-look-map:visible")).to_have_count(0)
    words.nth(1).hover()
    playwright.expect(page.locator(".medv-look-map:visible")).to_have_count(1)
    over = maps.nth(1).bounding_box()
    assert all(abs(over[side] - picture[side]) < 1 for side in picture), "the map lies on the picture"
    page.mouse.move(picture["x"] + 5, picture["y"] + 5)
    words.first.focus()
    for number in (1, 0):
        page.keyboard.press("Tab" if number else "Shift+Tab")
        playwright.expect(words.nth(number)).to_be_focused()
        playwright.expect(maps.nth(number)).to_be_visible()
        playwright.expect(page.locator(".medv-look-told:visible")).to_have_text(words.nth(number).get_attribute("aria-label"))
    words.nth(1).hover()  # the mouse comes first
    playwright.expect(page.locator(".medv-look-map:visible")).to_have_count(1)
    playwright.expect(maps.nth(1)).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_word_shows_its_map_by_mouse_and_keyboard_without_a_script(browser, tmp_path, scheme):
    cross = np.eye(3, dtype=np.float32)
    maps = [WordMap("a", (0,), 0 * cross), WordMap("<b>mass", (1,), cross), WordMap("left", (2,), -cross)]
    ink, ground = {"light": ("#1b1b1b", "white"), "dark": ("#f1f1f1", "#1b1b1b")}[scheme]
    body = f"<body class='medv' style='--jp-ui-font-color1:{ink};background:{ground}'>"
    page = looked_html(Image.new("RGB", (48, 32), "gray"), maps)
    (tmp_path / "page.html").write_text(f"<meta charset=utf-8>{style()}{body}{page}", encoding="utf-8")
    context = browser.new_context(java_script_enabled=False, color_scheme=scheme)
    opened = context.new_page()
    opened.goto((tmp_path / "page.html").as_uri())
    look_at_the_words(opened)
    label = opened.locator(".medv-look").nth(1).get_attribute("aria-label")
    assert label == "<b>mass: most from the upper left, row 1 column 1 (+1.00 nats); all regions from +0.00"
    assert "no region matters" in opened.locator(".medv-look").first.get_attribute("aria-label")
    playwright.expect(opened.locator(".medv-look-scale")).to_have_text(re.compile(r"-1\.00\s*\+1\.00 nats"))
    context.close()


def test_servers_listen_here_only_and_ask_for_a_token(lab, app):
    for server, path in ((lab, "api/contents"), (app, "")):
        request = urllib.request.Request(server.url(path))
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                assert "login" in answer.url, f"{answer.url} was served without a token"
        except urllib.error.HTTPError as error:
            assert error.code == 403
        others = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
        for address in others - {"127.0.0.1", "127.0.1.1"}:
            with socket.socket() as probe:
                assert probe.connect_ex((address, server.port)) != 0, f"listens on {address} too"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_jupyterlab_runs_a_tutorial_from_top_to_bottom(lab, page, notebook):
    page.goto(lab.url(f"lab/tree/{notebook.name}?token={lab.token}&reset"))
    page.wait_for_selector("#jp-main-statusbar >> text=| Idle")
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    page.wait_for_function(
        "count => [...document.querySelectorAll('.jp-CodeCell .jp-InputArea-prompt')]"
        ".filter(prompt => /\\[\\d+\\]/.test(prompt.textContent)).length >= count",
        arg=sum(cell["cell_type"] == "code" for cell in cells),  # a cell that fails stops the cells after it
        polling=500,  # by itself it asks at every frame
    )
    assert page.get_by_text("Traceback (most recent call last)").count() == 0
    if notebook.name.startswith("50"):
        use_the_explorer(page, "lab")


def test_the_app_runs_without_code_and_follows_the_mouse(app_page):
    assert app_page.locator(".jp-CodeCell .jp-InputArea-editor").count() == 0
    use_the_explorer(app_page, "app")
    app_page.evaluate("window.scrollTo(0, 0)")
    snap(app_page, "app_top")


def test_hostile_and_impossible_input_is_answered_in_words(app_page):
    page = app_page
    page.evaluate("window.hurt = 0")
    error = page.locator(".medv-error")
    bad = '<script>window.hurt = 1</script><img src=x onerror="window.hurt = 1">.png'
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Upload").click()
    chooser.value.set_files({"name": bad, "mimeType": "image/png", "buffer": b"not a picture"})
    playwright.expect(error).to_contain_text("is not a readable JPEG, PNG or DICOM file")
    field = page.locator(".widget-textarea textarea")
    field.fill("why " * 1250)
    page.get_by_role("button", name="Answer").click()
    playwright.expect(error).to_contain_text("shorten the question")
    field.fill('<script>window.hurt = 1</script><img src=x onerror="window.hurt = 1">')
    page.get_by_role("button", name="Answer").click()
    page.wait_for_selector(".medv-note:has-text('1 run in')")
    playwright.expect(page.locator(".medv-asked").first).to_contain_text("<script>")
    steps = page.locator(".widget-text:has-text('Z, steps') input")
    steps.fill("3")
    steps.press("Tab")
    playwright.expect(error).to_contain_text(re.compile("steps 3 is not a multiple of the 2 blocks"))
    assert page.evaluate("window.hurt") == 0
