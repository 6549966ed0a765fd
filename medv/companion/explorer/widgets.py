"""The explorer as ipywidgets: choose a picture, ask, watch the canvas, and drag Z over a cached sweep.

What is computed and remembered is `explorer.session`; what is drawn, `explorer.view`. Long work runs in one
thread, so that Cancel is heard; errors come back as words. Nothing is fetched from anywhere.
"""

import contextvars
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, fields

import ipywidgets as widgets
from PIL import Image

from medv.companion.explorer import view
from medv.companion.explorer.session import REVISIONS, Cancelled, Outcome, Session, Setting, gallery, read_upload
from medv.companion.figures.lessons import questions_about
from medv.companion.figures.traces import word_of
from medv.data.example import Example, load_image
from medv.diffusion.schedules import SCHEDULES
from medv.diffusion.trace import Events
from medv.evaluation.answering import Answerer

FULL = widgets.Layout(width="100%")
THUMB = 84  # pixels
NAMES = {"chest_xray": "chest X-ray", "ct": "CT", "mri": "MRI"}
PAUSE = 0.1  # seconds between two movements of the progress bar


class Explorer(widgets.VBox):
    """The whole explorer. `answerer` answers; `examples` (with scenes) fill the gallery.

    It begins with the `setting` and the picture of that number (0-based). `session` holds the runs, `outcome` what is shown
    and `pinned` what stands beside it; `wait` is for programs.
    """

    def __init__(
        self, answerer: Answerer, examples: Sequence[Example] | None = None, *, setting: Setting | None = None, picture: int = 0
    ):
        self.session = Session(answerer)
        self.word = word_of(answerer.processor.tokenizer)
        self.examples = list(gallery() if examples is None else examples)
        self.outcome: Outcome | None = None
        self.pinned: Outcome | None = None
        self.picture, self.name = Image.new("RGB", (8, 8)), ""
        self._thread, self._stop, self._quiet = None, threading.Event(), False
        parts = [self._picture_part(), self._question_part(), self._answer_part(), self._chart_part()]
        super().__init__([widgets.HTML(view.style(), layout={"display": "none"}), *parts], layout=FULL)
        self.add_class("medv")
        self._set(setting or Setting())
        self.choose(picture)

    # --- Parts ---

    def _picture_part(self) -> widgets.Widget:
        self.thumbs, self.picks = [], []
        for number, example in enumerate(self.examples):
            scene = example.meta["scene"]
            pick = widgets.Button(
                description=f"{number + 1} {NAMES.get(scene.domain, scene.domain)}", layout={"width": "120px"}
            )
            pick.tooltip = f"Ask about phantom {number + 1}"
            pick.on_click(lambda _, number=number: self.choose(number))
            thumb = widgets.Image(value=view.png(load_image(example), THUMB), format="png", width=THUMB, height=THUMB)
            thumb.add_class("medv-thumb")
            self.thumbs.append(thumb)
            self.picks.append(pick)
        self.upload = widgets.FileUpload(accept=".png,.jpg,.jpeg,.dcm", description="Upload", multiple=False)
        self.upload.observe(lambda change: self._uploaded(change["new"]), "value")
        self.large = widgets.Image(value=view.png(self.picture, 8), format="png", width=150, layout={"max_height": "190px"})
        self.large.add_class("medv-thumb")
        cards = [widgets.VBox(pair, layout={"align_items": "center"}) for pair in zip(self.thumbs, self.picks, strict=True)]
        grid = widgets.HBox([*cards, self.upload], layout={"flex_flow": "row wrap", "align_items": "flex-end"})
        return _part([grid])

    def _question_part(self) -> widgets.Widget:
        wide = {"description_width": "70px"}
        self.question = widgets.Textarea(value="Describe the image in detail.", description="Question", rows=2, style=wide)
        self.question.layout = widgets.Layout(width="98%", height="58px")
        self.suggestions = widgets.Dropdown(description="or one of", options=[("...", "")], style=wide)
        self.suggestions.layout = widgets.Layout(width="98%")
        small = {"width": "150px"}
        style = {"description_width": "84px"}
        self.gen_length = widgets.IntText(64, description="L, length", layout=small, style=style)
        self.block_length = widgets.IntText(32, description="B, block", layout=small, style=style)
        self.steps = widgets.IntText(64, description="Z, steps", layout=small, style=style)
        self.seed = widgets.IntText(0, description="seed", layout=small, style=style)
        medium = {"width": "220px"}
        self.schedule = widgets.Dropdown(options=list(SCHEDULES), description="schedule", layout=medium, style=style)
        self.revision = widgets.Dropdown(options=list(REVISIONS), description="revision", layout=medium, style=style)
        self.temperature = widgets.FloatSlider(0.0, min=0, max=2, step=0.1, description="temperature", style=style)
        self.temperature.layout = widgets.Layout(width="300px")
        self.settings = [
            self.gen_length,
            self.block_length,
            self.steps,
            self.seed,
            self.schedule,
            self.revision,
            self.temperature,
        ]
        for each in (*self.settings, self.question):
            each.observe(lambda _: self._changed(), "value")
        self.suggestions.observe(lambda change: self._suggested(change["new"]), "value")
        self.answer_button = _button("Answer", "one run at this Z", self.answer, "primary")
        self.sweep_button = _button("Sweep Z", "a run at every Z; then drag", self.sweep)
        self.pin_button = _button("Pin", "keep this run beside the next ones; again to let it go", self.pin)
        self.cancel_button = _button("Cancel", "end the run after this forward", self.cancel)
        self.cancel_button.disabled = True
        self.progress = widgets.FloatProgress(0, min=0, max=1, layout={"width": "200px"})
        self.progress.add_class("medv-progress")
        self.message = widgets.HTML(layout=FULL)
        row = {"flex_flow": "row wrap", "align_items": "center"}
        boxes = [widgets.HBox(self.settings, layout=row)]
        buttons = [self.answer_button, self.sweep_button, self.pin_button, self.cancel_button, self.progress]
        boxes.append(widgets.HBox(buttons, layout=row))
        asking = widgets.VBox([self.question, self.suggestions, *boxes, self.message], layout={"flex": "1 1 480px"})
        return _part([widgets.HBox([self.large, asking], layout={"flex_flow": "row wrap"})])

    def _answer_part(self) -> widgets.Widget:
        style, wide = {"description_width": "70px"}, {"width": "min(640px, 98%)"}
        self.drag = widgets.SelectionSlider(options=[64], description="drag Z", style=style, layout=wide, disabled=True)
        self.drag.add_class("medv-drag-z")
        self.drag.observe(lambda change: self._dragged(change["new"]), "value")
        self.play = widgets.Play(min=0, max=1, interval=150, show_repeat=False)
        self.frame = widgets.IntSlider(0, min=0, max=1, description="forward", style=style)
        self.frame.layout = widgets.Layout(width="min(520px, 80%)")
        self.frame.add_class("medv-drag-step")
        widgets.jslink((self.play, "value"), (self.frame, "value"))
        self.frame.observe(lambda _: self._draw_canvas(), "value")
        self.text, self.canvas = widgets.HTML(layout=FULL), widgets.HTML(layout=FULL)
        self.pinned_text, self.pinned_canvas = widgets.HTML(layout=FULL), widgets.HTML(layout=FULL)
        half = {"flex": "1 1 380px", "min_width": "0"}
        self.left = widgets.VBox([self.text, self.canvas], layout=half)
        self.right = widgets.VBox([self.pinned_text, self.pinned_canvas], layout={**half, "display": "none"})
        both = widgets.HBox([self.left, self.right], layout={"flex_flow": "row wrap", "grid_gap": "18px"})
        return _part([self.drag, widgets.HBox([self.play, self.frame]), both, widgets.HTML(view.legend_html())])

    def _chart_part(self) -> widgets.Widget:
        self.chart = widgets.HTML(view.chart_html([]), layout=FULL)
        return _part([self.chart])

    # --- What the user does ---

    def choose(self, number: int) -> None:
        """Ask about the picture `number` of the gallery from now on."""
        example = self.examples[number]
        self._show_picture(load_image(example), f"phantom {number + 1}", number)
        asked = [each.question for each in questions_about(example.meta["scene"])]
        self.suggestions.options = [("...", ""), *((text, text) for text in [example.question, *asked])]

    def setting(self) -> Setting:
        """What the fields say; it may be a setting that nothing can be run with."""
        return Setting(**{each.name: getattr(self, each.name).value for each in fields(Setting)})

    def _set(self, setting: Setting) -> None:
        self._quiet = True
        for name, value in asdict(setting).items():
            getattr(self, name).value = value
        self._quiet = False

    def answer(self) -> None:
        """Start one run."""
        setting = self.setting()
        self._start(lambda: [setting], lambda ask: [ask(setting)])

    def sweep(self) -> None:
        """Start a run at every Z that this L and B allow."""
        setting = self.setting()
        self._start(setting.sweep, lambda ask: map(ask, setting.sweep()))

    def cancel(self) -> None:
        """End the run that is under way after the forward that is under way."""
        self._stop.set()

    def pin(self) -> None:
        """Keep the outcome that is shown beside the next ones, or let the kept one go."""
        self.pinned = self.outcome if self.pinned is None else None
        self.pin_button.description = "Pin" if self.pinned is None else "Unpin"
        self.right.layout.display = "none" if self.pinned is None else "flex"
        self.pinned_text.value = "" if self.pinned is None else view.answer_html(self.pinned, "pinned: ")
        self._frames()

    def wait(self, seconds: float | None = None) -> None:
        """Block until the run that is under way has ended."""
        if self._thread is not None:
            self._thread.join(seconds)

    def _uploaded(self, files: Sequence[dict]) -> None:
        if not files:
            return
        name = str(files[0]["name"])
        try:
            picture = read_upload(name, bytes(files[0]["content"]))
        except ValueError as error:
            self._say(str(error), "error")
            return
        self._show_picture(picture, name, None)

    def _suggested(self, text: str) -> None:
        if text:
            self.question.value = text

    def _changed(self) -> None:
        """A field has changed: say at once if it cannot be run, and offer the Z that are known for it."""
        if self._quiet:
            return
        try:
            self.setting().config()
        except ValueError as error:
            self._say(str(error), "error")
            return
        self._say("")
        self._offer()

    def _dragged(self, steps: int) -> None:
        known = {each.setting.steps: each for each in self._known()}
        if not self._quiet and steps in known:
            self._show(known[steps])

    # --- Work ---

    def _start(self, plan: Callable[[], Iterable[Setting]], work: Callable[[Callable[[Setting], Outcome]], Iterable[Outcome]]):
        """Run `work` in a thread; it asks through a function that tells of each forward."""
        if self._thread is not None and self._thread.is_alive():
            self._say("a run is under way: wait for it, or cancel it", "error")
            return
        try:
            settings = list(plan())
            total = sum(each.config().steps for each in settings)
        except ValueError as error:
            self._say(str(error), "error")
            return
        self._stop.clear()
        picture, name, question = self.picture, self.name, self.question.value
        done, told = 0, 0.0

        def on_step(_: Events) -> None:
            nonlocal done, told
            done += 1
            if self._stop.is_set():
                raise Cancelled
            if time.monotonic() - told > PAUSE:
                told = time.monotonic()
                self.progress.value = min(done / total, 1)
                self._say(f"forward {done} of {total} ...")

        def ask(setting: Setting) -> Outcome:
            nonlocal done
            already = self.session.found(picture, question, setting) is not None
            outcome = self.session.ask(picture, question, setting, name=name, on_step=on_step)
            done += setting.steps if already else 0
            return outcome

        self._busy(True)
        # The context knows to which cell the widgets belong.
        job = contextvars.copy_context().run
        self._thread = threading.Thread(target=job, args=(self._work, work, ask), daemon=True)
        self._thread.start()

    def _work(self, work: Callable[[Callable[[Setting], Outcome]], Iterable[Outcome]], ask: Callable[[Setting], Outcome]):
        started, count = time.monotonic(), 0
        try:
            for outcome in work(ask):
                count += 1
                if count == 1 or outcome.setting == self.setting():
                    self._show(outcome)
                else:
                    self._draw_chart()
            self._say(f"{count} {'run' if count == 1 else 'runs'} in {time.monotonic() - started:.1f} s")
        except Cancelled:
            self._say(f"cancelled: {count} finished {'run is' if count == 1 else 'runs are'} kept")
        except ValueError as error:
            self._say(str(error), "error")
        except Exception as error:  # beware: without this a thread dies unseen
            self._say(f"this run failed, {type(error).__name__}: {error}", "error")
        finally:
            self._busy(False)
            self._offer()

    def _busy(self, busy: bool) -> None:
        for button in (self.answer_button, self.sweep_button):
            button.disabled = busy
        self.cancel_button.disabled, self.cancel_button.button_style = not busy, "warning" if busy else ""
        self.progress.value = 0

    # --- What the user sees ---

    def _say(self, text: str, kind: str = "note") -> None:
        self.message.value = view.message(text, kind)

    def _show_picture(self, picture: Image.Image, name: str, number: int | None) -> None:
        self.picture, self.name = picture, name
        self.large.value = view.png(picture, 300)
        for place, thumb in enumerate(self.thumbs):
            (thumb.add_class if place == number else thumb.remove_class)("chosen")
        self._say(f"{name}: {picture.width} x {picture.height} pixels")
        self._offer()

    def _known(self) -> list[Outcome]:
        return self.session.known(self.picture, self.question.value, self.setting())

    def _offer(self) -> None:
        """Let Z be dragged over what is known for these fields, and show the run at this Z if there is one."""
        known = {each.setting.steps: each for each in self._known()}
        self.drag.disabled = len(known) < 2
        if not known:
            return
        self._quiet = True
        self.drag.options = list(known)
        self._quiet = False
        if self.steps.value in known:
            self._show(known[self.steps.value])

    def _show(self, outcome: Outcome) -> None:
        """Make `outcome` the one that is shown, everywhere."""
        self.outcome, self._quiet = outcome, True
        if outcome.setting.steps in self.drag.options:
            self.drag.value = outcome.setting.steps
        self.steps.value = outcome.setting.steps
        self._quiet = False
        self.text.value = view.answer_html(outcome)
        self._frames()
        self._draw_chart()

    def _frames(self) -> None:
        """The step slider goes over the forwards of what is shown, and stands at the last one."""
        shown = [outcome for outcome in (self.outcome, self.pinned) if outcome is not None]
        last = max((outcome.frames for outcome in shown), default=1)
        with self.hold_canvas():
            self.frame.max = self.play.max = last
            self.frame.value = last
        self._draw_canvas()

    def hold_canvas(self) -> "_Held":
        """A context in which a moving step slider draws nothing."""
        return _Held(self)

    def _draw_canvas(self) -> None:
        if self._quiet or self.outcome is None:
            return
        self.canvas.value = view.canvas_html(self.outcome, self.frame.value, self.word)
        kept = self.pinned
        self.pinned_canvas.value = "" if kept is None else view.canvas_html(kept, self.frame.value, self.word)

    def _draw_chart(self) -> None:
        self.chart.value = view.chart_html(list(self.session.outcomes.values()), self.outcome)


class _Held:
    def __init__(self, explorer: Explorer):
        self.explorer = explorer

    def __enter__(self) -> None:
        self.explorer._quiet = True

    def __exit__(self, *_) -> None:
        self.explorer._quiet = False


def _button(text: str, tip: str, act: Callable[[], None], look: str = "") -> widgets.Button:
    button = widgets.Button(description=text, tooltip=tip, button_style=look, layout={"width": "100px"})
    button.on_click(lambda _: act())
    return button


def _part(children: Sequence[widgets.Widget]) -> widgets.VBox:
    box = widgets.VBox(list(children))
    box.add_class("medv-part")
    return box
