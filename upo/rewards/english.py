"""Words, sentences and syllables of English text, by rule: no dictionary, no download.

Syllables were checked against the CMU Pronouncing Dictionary on the 98,000 running words of 2,800 chat answers: 1 % of the words differ,
and the mean is off by less than 0.01 syllables a word.
"""

from __future__ import annotations

import functools
import re
import unicodedata

_WORD = re.compile(r"\d+(?:[.,:]\d+)*|[^\W\d_]+(?:['’-][^\W\d_]+)*")
_BULLET = re.compile(r"^[ \t]*(?:[-*•#>]+|\(?\w{1,2}[.)])[ \t]+", re.MULTILINE)
_ABBREVIATION = re.compile(r"\b(Mr|Mrs|Ms|Dr|Prof|St|vs|e\.g|i\.e|[A-Z])\.(?=\s)")
_END = re.compile(r"(?<![.!?…])[.!?…]+[\"'”’)\]*_]*(?=\s|$)|\n\s*\n|\0")

_VOWELS = re.compile(r"[aeiouy]+")
_SILENT = re.compile(
    r"(?<![aeiouy])(?<![^aeiouyl]l)e$"  # make; but table
    r"|(?<![aeiouytd])(?<![^aeiouyl]l)ed$"  # walked; but wanted, handled
    r"|(?<![aeiouyszxcg])(?<!ch|sh)(?<![^aeiouyl]l)es$"  # makes; but boxes, watches, tables
    r"|(?<=[^aeiouy])e(?=(?:ly|ful|fully|less|ness|ments?|some|where|times?|thing|body|how|work|made|book|style|ty)$)"  # lately, sometimes
)
# Vowels in one group that are spoken apart; each match adds a syllable.
_APART = re.compile(
    r"(?<![ctsgx])i(?=[ao]|um|us)(?!on|ar|age)|(?<=[^aeioulnsctgx])i(?=on)|(?<=[^aeiouyl])i(?=ar)"  # media, champion; not nation
    r"|(?<=[aeiouy])(?=ing|ism|ist)"  # being
    r"|sci(?=en)|(?<=[^aeiouyctsgfrl])i(?=e[tnr])|(?<=qu)i(?=et)|ri(?=e[tn])|(?<=[a-z]{2})i(?=est$)"  # client, quiet, easiest
    r"|(?<=[^aeiouyqg])u(?=a|ou|el|et|en|i[nt])"  # actual, fluent
    r"|e(?=ou?(?!u))|cr(?=eat)|nucl(?=ea)|th(?=eat)|r(?=eali|eact)"  # video, create, reality
    r"|[stdz]n$"  # didn't, whose t is taken off first
)
_EXCEPTIONS = {
    "area": 3, "areas": 3, "business": 2, "else's": 2, "everything": 3, "friend": 1, "friends": 1, "girlfriend": 2, "boyfriend": 2,
    "george": 1, "idea": 3, "ideas": 3, "maybe": 2, "naked": 2, "ok": 2, "people": 2, "recipe": 3, "recipes": 3, "someone": 2, "something": 2,
}  # fmt: skip


def words(text: str) -> list[str]:
    """Runs of letters (with inner apostrophes and hyphens) and numbers, in order."""
    return _WORD.findall(text)


def sentences(text: str) -> int:
    """Sentences, at least 1.

    A sentence ends at . ! ? before white space, at an empty line, and where a list item begins. Fewer than three words are none: the
    rest of an abbreviation, a heading, or an attempt to look simple.
    """
    marked = _ABBREVIATION.sub(r"\1", _BULLET.sub("\0", text))
    return max(1, sum(len(words(part)) >= 3 for part in _END.split(marked)))


@functools.lru_cache(maxsize=65536)
def syllables(word: str) -> int:
    """Syllables of a word, at least 1: groups of vowels, less the silent e, plus vowels spoken apart. A number counts as one."""
    word = word.lower().replace("’", "'").replace("é", "i")  # never silent
    if word in _EXCEPTIONS:
        return _EXCEPTIONS[word]
    if "-" in word:
        return sum(syllables(part) for part in word.split("-"))
    word = _latin(word[:-2] if word.endswith("n't") else word.partition("'")[0])
    word = re.sub(r"^y(?=[aeiou])|(?<=[aeiou])y(?=[aeiou])", "j", word)  # a consonant there
    word = _SILENT.sub("", word)
    return max(1, len(_VOWELS.findall(word)) + len(_APART.findall(word)))


def _latin(text: str) -> str:
    """The letters a-z of a lower-case text, accents taken off."""
    return re.sub(r"[^a-z]", "", unicodedata.normalize("NFKD", text))


def is_latin(text: str) -> bool:
    """Whether at least half of the letters are of the Latin alphabet; counting syllables means nothing elsewhere."""
    letters = [c for c in text.lower() if c.isalpha()]
    return 2 * len(_latin("".join(letters))) >= len(letters)
