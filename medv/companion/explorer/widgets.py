"""The explorer as ipywidgets: choose a picture, ask, watch the canvas, and drag Z over a cached sweep.

`explorer.session` computes and remembers, `explorer.view` draws. A run has a thread of its own, so that Cancel is heard; errors
become messages. Nothing is fetched from the network.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict

import ipywidgets as widgets
from PIL import Image

from medv.companion.explorer import view
from medv.companion.explorer.keeping import KeepWords
from medv.companion.explorer.looked import WhereItLooked
from medv.companion.explorer.session import REVISIONS, Cancelled, Outcome, Session, Setting, gallery, read_upload
from medv.companion.figures.lessons import questions_about
from medv.companion.figures.traces import word_of
from medv.data.example import Example, load_image
from medv.diffusion.filters import FILTERS
from medv.diffusion.length import LENGTHS
from medv.diffusion.schedules import SCHEDULES
from medv.diffusion.trace import Events
from medv.evaluation.answering import Answerer

FULL = widgets.Layout(width="100%")
NAMES = {"chest_xray": "chest X-ray", "ct": "CT", "mri": "MRI"}
PAUSE = 0.1  # seconds between two movements of the progress bar


class Explorer(view.Background, widgets.VBox):
    """The whole explorer. `answerer` answers; `examples` fill the gallery.

    It begins with the `setting` and the picture of that number (0-based). `session` holds the runs, `outcome` is the one shown
    and `pinned` the one beside it; `wait` is for programs.
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
        self._stop, self._muted = threading.Event(), False
        self.chart = widgets.HTML(view.chart_html([]), layout=FULL)
        parts = [self._picture_part(), self._question_part(), self._answer_part(), _part([self.chart])]
        super().__init__([widgets.HTML(view.style(), layout={"display": "none"}), *parts], layout=FULL)
        self.add_class("medv")
        with self._mute():
            for name, value in asdict(setting or Setting()).items():
                self.fields[name].value = value
        self.choose(picture)

    # --- Parts ---

    def _picture_part(self) -> widgets.Widget:
        self.thumbs, cards = [], []
        for number, example in enumerate(self.examples):
            text = f"{number + 1} {NAMES.get(example.domain, example.domain)}"
            pick = _button(text, f"Ask about phantom {number + 1}", lambda number=number: self.choose(number), width="120px")
            thumb = widgets.Image(value=view.png(load_image(example), 84), format="png", width=84, height=84)
            thumb.add_class("medv-thumb")
            self.thumbs.append(thumb)
            cards.append(widgets.VBox([thumb, pick], layout={"align_items": "center"}))
        self.upload = widgets.FileUpload(accept=".png,.jpg,.jpeg,.dcm", description="Upload", multiple=False)
        self.upload.observe(lambda change: self._uploaded(change["new"]), "value")
        return _part([widgets.HBox([*cards, self.upload], layout={"flex_flow": "row wrap", "align_items": "flex-end"})])

    def _question_part(self) -> widgets.Widget:
        wide = {"style": {"description_width": "70px"}, "layout": {"width": "98%"}}
        self.question = widgets.Textarea(value="Describe the image in detail.", description="Question", rows=2, **wide)
        self.question.layout.height = "58px"
        self.suggestions = widgets.Dropdown(description="or one of", options=[("...", "")], **wide)
        self.suggestions.observe(lambda change: self._suggested(change["new"]), "value")
        style, row = {"description_width": "84px"}, {"flex_flow": "row wrap", "align_items": "center"}
        self.fields: dict[str, widgets.Widget] = {}  # by the names of a Setting
        for name, text in {"gen_length": "L, length", "block_length": "B, block", "steps": "Z, steps", "seed": "seed"}.items():
            self.fields[name] = widgets.IntText(description=text, layout={"width": "150px"}, style=style)
        named = {"schedule": SCHEDULES, "filter": ["none", *FILTERS], "revision": REVISIONS, "length": LENGTHS}
        for name, options in named.items():
            field = widgets.Dropdown(options=list(options), description=name, layout={"width": "220px"}, style=style)
            self.fields[name] = field
        slider = {"description": "temperature", "layout": {"width": "300px"}, "style": style}
        self.fields["temperature"] = widgets.FloatSlider(0.0, min=0, max=2, step=0.1, **slider)
        for field in (*self.fields.values(), self.question):
            field.observe(lambda _: self._changed(), "value")
        self.answer_button = _button("Answer", "one run at this Z", self.answer, "primary")
        self.sweep_button = _button("Sweep Z", "a run at every Z; then drag", self.sweep)
        self.pin_button = _button("Pin", "keep this run beside the next ones; again to let it go", self.pin)
        self.cancel_button = _button("Cancel", "end the run after this forward", self.cancel)
        self.cancel_button.disabled = True
        self.progress = widgets.FloatProgress(0, min=0, max=1, layout={"width": "200px"})
        self.progress.add_class("medv-progress")
        self.message = widgets.HTML(layout=FULL)
        buttons = [self.answer_button, self.sweep_button, self.pin_button, self.cancel_button, self.progress]
        rows = [widgets.HBox(children, layout=row) for children in (list(self.fields.values()), buttons)]
        asking = widgets.VBox([self.question, self.suggestions, *rows, self.message], layout={"flex": "1 1 480px"})
        self.large = widgets.Image(value=view.png(self.picture, 8), format="png", width=150, layout={"max_height": "190px"})
        self.large.add_class("medv-thumb")
        return _part([widgets.HBox([self.large, asking], layout={"flex_flow": "row wrap"})])

    def _answer_part(self) -> widgets.Widget:
        style = {"description_width": "70px"}
        wide = {"style": style, "layout": {"width": "min(640px, 98%)"}}
        self.drag = widgets.SelectionSlider(options=[64], description="drag Z", disabled=True, **wide)
        self.drag.add_class("medv-drag-z")
        self.drag.observe(lambda change: self._dragged(change["new"]), "value")
        self.play = widgets.Play(min=0, max=1, interval=150, show_repeat=False)
        wide = {"style": style, "layout": {"width": "min(520px, 80%)"}}
        self.frame = widgets.IntSlider(0, min=0, max=1, description="forward", **wide)
        self.frame.add_class("medv-drag-step")
        widgets.jslink((self.play, "value"), (self.frame, "value"))
        self.frame.observe(lambda _: self._draw_canvas(), "value")
        self.text, self.canvas, self.pinned_text, self.pinned_canvas = (widgets.HTML(layout=FULL) for _ in range(4))
        half = {"flex": "1 1 380px", "min_width": "0"}
        self.left = widgets.VBox([self.text, self.canvas], layout=half)
        self.right = widgets.VBox([self.pinned_text, self.pinned_canvas], layout={**half, "display": "none"})
        both = widgets.HBox([self.left, self.right], layout={"flex_flow": "row wrap", "grid_gap": "18px"})
        self.looked = WhereItLooked(self.session.answerer, self.word)
        self.keeping = KeepWords(self.session, self.word, self._show)
        legend = widgets.HTML(str(view.HTML.legend()))
        return _part([self.drag, widgets.HBox([self.play, self.frame]), both, legend, self.keeping, self.looked])

    # --- Actions of the user ---

    def choose(self, number: int) -> None:
        """Ask about the picture `number` of the gallery from now on."""
        example = self.examples[number]
        scene = example.meta.get("scene")
        self._show_picture(load_image(example), f"{'phantom' if scene else 'image'} {number + 1}", number)
        questions = [example.question, *(each.question for each in (questions_about(scene) if scene else ()))]
        self.suggestions.options = [("...", ""), *((text, text) for text in questions)]

    def setting(self) -> Setting:
        """The setting in the fields; `Setting.config` says whether it can be run."""
        return Setting(**{name: field.value for name, field in self.fields.items()})

    def answer(self) -> None:
        """Start one run."""
        self._start(lambda setting: [setting])

    def sweep(self) -> None:
        """Start a run at every Z that this L and B allow."""
        self._start(Setting.sweep)

    def cancel(self) -> None:
        """End the present run after its present forward."""
        self._stop.set()

    def pin(self) -> None:
        """Keep the outcome that is shown beside the next ones, or let the kept one go."""
        self.pinned = self.outcome if self.pinned is None else None
        self.pin_button.description = "Pin" if self.pinned is None else "Unpin"
        self.right.layout.display = "none" if self.pinned is None else "flex"
        self.pinned_text.value = "" if self.pinned is None else view.answer_html(self.pinned, "pinned: ")
        self._show_frames()

    def _uploaded(self, files: Sequence[dict]) -> None:
        if not files:
            return
        name = str(files[0]["name"])
        try:
            self._show_picture(read_upload(name, bytes(files[0]["content"])), name, None)
        except ValueError as error:
            self._say(str(error), "error")

    def _suggested(self, text: str) -> None:
        if text:
            self.question.value = text

    def _changed(self) -> None:
        """A field has changed: say at once if it cannot be run, and offer the runs that are kept for it."""
        if self._muted:
            return
        try:
            self.setting().config()
        except ValueError as error:
            self._say(str(error), "error")
            return
        self._say("")
        self._offer()

    def _dragged(self, steps: int) -> None:
        kept = self._kept()
        if not self._muted and steps in kept:
            self._show(kept[steps])

    # --- Runs ---

    def _start(self, plan: Callable[[Setting], Sequence[Setting]]) -> None:
        """Run the settings that `plan` makes of the fields, in a thread."""
        if self._busy():
            self._say("a run is under way: wait for it, or cancel it", "error")
            return
        try:
            settings = list(plan(self.setting()))
            total = sum(setting.config().steps for setting in settings)
        except ValueError as error:
            self._say(str(error), "error")
            return
        self._stop.clear()
        self.answer_button.disabled = self.sweep_button.disabled = True
        self.cancel_button.disabled, self.cancel_button.button_style = False, "warning"
        work = (self.picture, self.name, self.question.value, settings, total)
        self._begin(self._run, *work)

    def _run(self, picture: Image.Image, name: str, question: str, settings: Sequence[Setting], total: int) -> None:
        """Ask with each setting; `total` is the number of forwards that they may take."""
        started, finished, done, drawn = time.monotonic(), 0, 0, 0.0

        def on_step(_: Events) -> None:
            nonlocal done, drawn
            done += 1
            if self._stop.is_set():
                raise Cancelled
            if time.monotonic() - drawn > PAUSE:
                drawn = time.monotonic()
                self.progress.value = min(done / total, 1)
                self._say(f"forward {done} of {total} ...")

        try:
            for setting in settings:
                done += setting.steps if self.session.found(picture, question, setting) else 0
                outcome = self.session.ask(picture, question, setting, name=name, on_step=on_step)
                finished += 1
                self._show(outcome) if finished == 1 or outcome.setting == self.setting() else self._draw_chart()
            self._say(f"{finished} {'run' if finished == 1 else 'runs'} in {time.monotonic() - started:.1f} s")
        except Cancelled:
            self._say(f"cancelled: {finished} finished {'run is' if finished == 1 else 'runs are'} kept")
        except ValueError as error:
            self._say(str(error), "error")
        except Exception as error:  # beware: without this a thread dies unseen
            self._say(f"this run failed, {type(error).__name__}: {error}", "error")
        finally:
            self.answer_button.disabled = self.sweep_button.disabled = False
            self.cancel_button.disabled, self.cancel_button.button_style = True, ""
            self.progress.value = 0
            self._offer()

    # --- Display ---

    def _say(self, text: str, kind: str = "note") -> None:
        self.message.value = view.message(text, kind)

    @contextmanager
    def _mute(self) -> Iterator[None]:
        """Inside, a value that is set moves no other widget."""
        self._muted = True
        try:
            yield
        finally:
            self._muted = False

    def _show_picture(self, picture: Image.Image, name: str, number: int | None) -> None:
        self.picture, self.name = picture, name
        self.large.value = view.png(picture, 300)
        for place, thumb in enumerate(self.thumbs):
            (thumb.add_class if place == number else thumb.remove_class)("chosen")
        self._say(f"{name}: {picture.width} x {picture.height} pixels")
        self._offer()

    def _kept(self) -> dict[int, Outcome]:
        """The runs of these fields at any Z, by Z."""
        return self.session.known(self.picture, self.question.value, self.setting())

    def _offer(self) -> None:
        """Let Z be dragged over the runs that are kept for these fields, and show the run at this Z if there is one."""
        kept = self._kept()
        self.drag.disabled = len(kept) < 2
        if not kept:
            return
        with self._mute():
            self.drag.options = list(kept)
        if (steps := self.fields["steps"].value) in kept:
            self._show(kept[steps])

    def _show(self, outcome: Outcome) -> None:
        """Make `outcome` the one that is shown, everywhere."""
        self.outcome = outcome
        with self._mute():
            if outcome.setting.steps in self.drag.options:
                self.drag.value = outcome.setting.steps
            self.fields["steps"].value = outcome.setting.steps
        self.text.value = view.answer_html(outcome)
        self.looked.show(outcome)
        self.keeping.show(outcome)
        self._show_frames()
        self._draw_chart()

    def _show_frames(self) -> None:
        """Let the step slider go over the forwards of the runs that are shown, and stand at the last one."""
        last = max((outcome.frames for outcome in (self.outcome, self.pinned) if outcome is not None), default=1)
        with self._mute():
            self.frame.max = self.play.max = last
            self.frame.value = last
        self._draw_canvas()

    def _draw_canvas(self) -> None:
        if not self._muted:
            for outcome, canvas in ((self.outcome, self.canvas), (self.pinned, self.pinned_canvas)):
                canvas.value = "" if outcome is None else view.canvas_html(outcome, self.frame.value, self.word)

    def _draw_chart(self) -> None:
        runs = list(self.session.outcomes.values())
        self.chart.value = view.chart_html(runs, self.outcome if self.outcome in runs else None)


def _button(text: str, tip: str, act: Callable[[], None], look: str = "", width: str = "100px") -> widgets.Button:
    button = widgets.Button(description=text, tooltip=tip, button_style=look, layout={"width": width})
    button.on_click(lambda _: act())
    return button


def _part(children: Sequence[widgets.Widget]) -> widgets.VBox:
    box = widgets.VBox(list(children))
    box.add_class("medv-part")
    return box
