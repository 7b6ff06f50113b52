"""Counts over plain text that several rules share: words, sentences, whether a text is English. Deterministic, no model, no download."""

import re

import regex

_WORD = regex.compile(r"\w+")  # unlike re, its \w holds combining marks, without which Hindi words fall apart
_WORD_OR_SIGN = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}]|[^\W\p{Han}\p{Hiragana}\p{Katakana}]+")
_TERMINATOR = re.compile(r"(?<![.!?…])[.!?…]+[\"'”’)\]*_]*(?=\s|$)|[。！？।]+")
_ABBREVIATION_LIST = (
    "mr mrs ms mx dr prof rev hon gen col capt sgt lt sr jr st mt ft vs etc al cf ca approx dept est fig no nos vol pp ed eds inc ltd "
    "co corp e.g i.e a.m p.m u.s u.k jan feb mar apr jun jul aug sep sept oct nov dec"
)
_TOKEN_BEFORE = re.compile(r"([\w.]+)$")
# Frequent English words that are rare or absent in the other languages of the Latin script.
_ENGLISH_LIST = (
    "the and of to is are was were that this these those with for from have has had not you your it its he she they we his her their our "
    "be been will would can could should there what which who when where how if but or by at as on about into out up than then them "
    "i my me so do does did all any some more very just because while after before"
)
_ABBREVIATIONS, _ENGLISH = frozenset(_ABBREVIATION_LIST.split()), frozenset(_ENGLISH_LIST.split())
LOOK_BACK = 60  # characters before a full stop that say whether it ends an abbreviation or a list number
MIN_WORDS_FOR_LANGUAGE = 8
ENGLISH_SHARE = 0.2  # English prose has 0.35 to 0.5 of these words; German, French, Spanish, Italian, Dutch below 0.12


def words(text: str) -> list[str]:
    r"""The words of a text: runs of `\w`, so that "don't" is two and "3.5" is two (IFEval's rule)."""
    return _WORD.findall(text)


def count_words(text: str) -> int:
    """The number of words, where Chinese and Japanese, which put no space between words, count by the character."""
    return sum(1 for _ in _WORD_OR_SIGN.finditer(text))


def _ends_sentence(before: str, mark: str, after: str, before_small: bool) -> bool:
    """Whether a terminator between two pieces of text ends a sentence."""
    if not after.strip():
        return True
    following = after.lstrip()[0]
    if mark.startswith("."):
        if following.islower() and (not before_small or mark.startswith("..")):
            return False
        token = _TOKEN_BEFORE.search(before)
        last = token[1] if token else ""
        if last.lower() in _ABBREVIATIONS or (len(last) == 1 and last.isupper() and last != "I"):
            return False
        if last.isdigit() and not before[: -len(last)].rpartition("\n")[2].strip():  # "1." that opens a list item
            return False
    return True


def sentences(text: str, before_small: bool = False) -> list[str]:
    """Splits a text into its sentences: stretches with at least one word, ended by . ! ? (or their CJK and Indic kin) or by its end.

    A full stop does not end a sentence after an abbreviation, an initial or a list number, or before a small letter. IFEval splits
    with NLTK's trained splitter, which is not used here; the two agree on ordinary prose.
    before_small: a full stop before a small letter ends a sentence too.
    """
    found, start = [], 0
    for match in _TERMINATOR.finditer(text):
        if _ends_sentence(text[max(start, match.start() - LOOK_BACK) : match.start()], match[0], text[match.end() : match.end() + 40], before_small):
            found.append(text[start : match.end()])
            start = match.end()
    found.append(text[start:])
    return [sentence.strip() for sentence in found if _WORD.search(sentence)]


def count_sentences(text: str) -> int:
    """The number of sentences, see `sentences`."""
    return len(sentences(text))


def looks_english(text: str) -> bool:
    """Whether a text may be English: its letters are Latin and, past a few words, enough of its words are English function words.

    A lenient test: texts too short to tell count as English.
    """
    letters = [char for char in text if char.isalpha()]
    if not letters:
        return True
    if sum(char.isascii() for char in letters) < 0.9 * len(letters):
        return False
    found = [word for word in words(text.lower()) if word.isalpha()]
    if len(found) < MIN_WORDS_FOR_LANGUAGE:
        return True
    return sum(word in _ENGLISH for word in found) >= ENGLISH_SHARE * len(found)
