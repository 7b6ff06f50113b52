"""Counting as IFEval's published verdicts count: sentences (after Punkt) and words in capitals (after the Penn Treebank's tokens).

Punkt (Kiss & Strunk 2006, doi:10.1162/coli.2006.32.4.485) asks of each . ? ! before white space or punctuation whether it ends a sentence:
not after a known abbreviation or a row of dots, unless the next word is one that starts sentences; not after an initial or a number
that a small letter or a name follows. Its trained English model is not shipped here; the lists below stand for it, and
docs/constraints.md says where the two part. `text_measures.sentences` is what constraints of our own count.
"""

from __future__ import annotations

import re

_CLOSERS = "\"')]}‘’“”«»"
_NON_WORD = ")\";}]*:@'({[!?‘’“”«»"
_MARK = re.compile(rf"[.?!](?=(?P<after>[{re.escape(_NON_WORD)}]|\s+(?P<next>\S+)))")
_NOT_FIRST = re.escape("(\"`{[:;&#*@)}]-,")
_TOKEN = re.compile(
    rf"-{{2,}}|\.{{2,}}|(?=[^{_NOT_FIRST}])\S+?(?=\s|$|[{re.escape(_NON_WORD)}]|-{{2,}}|\.{{2,}}|,(?:$|\s|[{re.escape(_NON_WORD)}]))|\S"
)
_REALIGN = re.compile(rf"[{re.escape(_CLOSERS)}]+(?:\s+|(?=--)|$)")
_NUMBER = re.compile(r"-?[.,]?\d[\d,.-]*\.?")
_INITIAL = re.compile(r"[^\W\d]\.")
LONGEST_CONTEXT = 200  # characters of one word before a mark that are looked at
_KNOWN = (
    "mr mrs ms dr prof gen sen rep reps maj lt col adm messrs jr sr st ave ft mg vs vt ph.d u.s u.k u.n u.s.a u.s.s.r p.m a.m d.c n.y n.j n.c "
    "n.d n.h n.m n.v s.c l.a w.va v va co cos corp inc ltd cie bros jan feb aug sep sept oct nov dec mon tues wed fri calif colo conn fla "
    "ga ill ind kan ky mich minn nev okla ok ore pa tenn tex wash wis ariz ala yr ct c d e f g h k l m n p r s t w"
)
_STARTERS = (
    "according although among both but despite even he however i if in indeed instead it many meanwhile moreover most nevertheless "
    "nonetheless nor separately similarly since so some the there these they this though thus under when while yet"
)
# Words that are small within a sentence: after an abbreviation their capital starts one.
_SMALL = (
    "she we you that those then after before because once where what who why how here their his her its our your my not no yes do does did is "
    "are was were will would can could should may might must have has had let please also finally first next during without with by from to"
)
_ABBREVIATIONS, _SENTENCE_STARTERS = frozenset(_KNOWN.split()), frozenset(_STARTERS.split())
_SMALL_WORDS = frozenset(_SMALL.split()) | _SENTENCE_STARTERS


def _ends(token: str, following: str) -> bool:
    """Whether a token that is followed by another in the same context ends a sentence."""
    if token in ("?", "!", "."):
        return True
    if not token.endswith("."):
        return False
    dots, kind = set(token) == {"."}, "##" if _NUMBER.fullmatch(token) else token[:-1].lower()
    abbreviation = not dots and not token.endswith("..") and (kind in _ABBREVIATIONS or kind.rpartition("-")[2] in _ABBREVIATIONS)
    ends, initial = not (dots or abbreviation or token.endswith("..")), _INITIAL.fullmatch(token) is not None
    word = following.rstrip(".").lower()
    if (dots or abbreviation) and not initial and following[:1].isupper() and word in _SMALL_WORDS:
        return True
    if initial or kind == "##":
        name = initial and following[:1].isupper() and word not in _SMALL_WORDS
        if following in ";:,.!?" or following[:1].islower() or name:
            return False
    return ends


def _breaks(context: str) -> bool:
    tokens = _TOKEN.findall(context)
    return any(_ends(token, following) for token, following in zip(tokens, tokens[1:], strict=False))


def count_sentences(text: str) -> int:
    """The number of sentences as Punkt counts: a text without any mark is one, an empty one has none."""
    starts, pending = [0], None  # where sentences start; the last mark of the word that is being read
    word_start = stop = 0
    for match in _MARK.finditer(text):
        space = max(map(text[stop : match.start()].rfind, " \n\t\r\v\f"))
        start = stop + space + 1 if space >= 0 else word_start
        if pending is not None and stop <= start:
            _close(text, word_start, pending, starts)
        pending, word_start, stop = match, start, match.start()
    if pending is not None:
        _close(text, word_start, pending, starts)
    return _count_pieces(text.rstrip(), starts)


def _close(text: str, start: int, match: re.Match, starts: list[int]) -> None:
    context = text[max(start, match.start() - LONGEST_CONTEXT) : match.end()] + match["after"][:LONGEST_CONTEXT]
    if _breaks(context):
        starts.append(match.start("next") if match["next"] else match.end())


def _count_pieces(text: str, starts: list[int]) -> int:
    """Pieces that are not empty after closing quotes and brackets went to the piece that they close."""
    found = moved = 0
    for start, end in zip(starts, [*starts[1:], None], strict=True):
        last = end is None
        found += bool(text[start + moved : end]) or (not last and _REALIGN.match(text, end) is not None)
        closing = None if last else _REALIGN.match(text, end)
        moved = closing.end() - end if closing is not None and end is not None else 0
    return found


_SPLIT = re.compile(r"\s|[\[\](){}<>;@#$%&?!\"*“”«»]|-{2,}|\.{2,}|[:,](?!\d)")
_TAIL = re.compile(r"(.)('s|'m|'d|'ll|'re|'ve|n't)", re.IGNORECASE | re.DOTALL)
_TWO_WORDS = frozenset(["CANNOT", "GONNA", "GOTTA", "WANNA", "GIMME", "LEMME"])


def count_capital_words(text: str) -> int:
    """Tokens all in capitals: punctuation splits, hyphens and dots do not, a contraction is two ("I'M", "DON'T")."""
    found = 0
    for token in _SPLIT.split(text):
        token = token.strip("'’‘")
        tail = _TAIL.search(token[-4:]) if "'" in token[-4:] else None
        if tail is not None and tail.end() == len(token[-4:]):
            found += tail[2].isupper()
            token = token[: len(token) - len(tail[2])]
        found += token.isupper() + (token in _TWO_WORDS)
    return found
