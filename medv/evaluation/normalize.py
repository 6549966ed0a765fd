"""Answer normalization of the official evaluation.

The rules are those of the VQA challenge in the form that LLaVA-Med v1.0.0 applies, oddities included, because the published
closed accuracies and open recalls depend on them. No stemming and no Unicode folding take place.
"""

import re

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_GROUPED_DIGITS = re.compile(r"\d,\d")
_FREE_STOP = re.compile(r"\.(?!\d)")
_MAX_STOPS = 32  # the official call passes re.UNICODE (32) where the number of replacements belongs
_ARTICLES = frozenset(("a", "an", "the"))
_UP_TO_TEN = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0", "zero": "0"} | {word: str(number) for number, word in enumerate(_UP_TO_TEN, start=1)}
# A token that lacks exactly one apostrophe of one of these forms gets it back: "cant", "couldnt've".
_CONTRACTED = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's
    isn't it'd it'll ma'am might've mightn't must've mustn't needn't not've o'clock oughtn't shan't should've
    shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're
    there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd
    where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're
    you've couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've
    something'd've there'd've they'd've we'd've who'd've wouldn't've you'd've y'all'll y'all'd've 'ow's'at
"""
_CONTRACTIONS = {
    form[:place] + form[place + 1 :]: form for form in _CONTRACTED.split() for place, letter in enumerate(form) if letter == "'"
} | {"somebody'd": "somebodyd"}  # the official map has this one the wrong way round


def normalize(text: str) -> str:
    """The comparable form of an answer: lower case, marks resolved, number words as digits, no articles; possibly empty.

    A mark is deleted throughout when it touches a space anywhere in the text or when the text has a comma between digits
    ("1,000"), and is replaced by a space otherwise: "x-ray" becomes "x ray", "T2-weighted - image" "t2weighted image".
    """
    text = original = text.lower()
    grouped = _GROUPED_DIGITS.search(original) is not None
    for mark in _MARKS:
        delete = grouped or mark + " " in original or " " + mark in original
        text = text.replace(mark, "" if delete else " ")
    text = _FREE_STOP.sub("", text, count=_MAX_STOPS)
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
