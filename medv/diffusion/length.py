"""The setting of a chosen length: every answer gets one of its own before its text is written (`medv.model.length`)."""

from dataclasses import dataclass

from medv import limits


@dataclass(frozen=True)
class ChosenLength:
    """The number of positions at which an end is less probable than `threshold`, but at least `shortest` tokens and at most
    gen_length - 1: the canvas always holds an end.

    block_length and steps are those of the whole canvas; a block behind the end takes no forwards. A lower threshold chooses
    shorter answers. `shortest` = gen_length leaves the canvas open and costs no forward.
    """

    threshold: float = 0.5
    shortest: int = 1

    def __post_init__(self):
        limits.real("threshold", self.threshold, 0, 1, open_ends="least, most")
        limits.whole("shortest", self.shortest, 1)


LENGTHS: dict[str, ChosenLength | None] = {"canvas": None, "auto": ChosenLength()}


def length_named(name: str) -> ChosenLength | None:
    """One of LENGTHS. Raises ValueError for an unknown name."""
    limits.named("length", name, LENGTHS)
    return LENGTHS[name]
