"""Detects the language of a text by its script and its most frequent words.

A heuristic, only for filtering: it knows the scripts below and eleven languages in Latin letters,
and gives no answer for texts with too little evidence (a formula, a name, code).
"""

import re
import unicodedata
from collections import Counter

# Languages of scripts with few languages; other languages count as the first.
SCRIPTS = {
    "CYRILLIC": ("ru", "uk", "bg"),
    "GREEK": ("el",),
    "HEBREW": ("he",),
    "ARABIC": ("ar", "fa", "ur"),
    "DEVANAGARI": ("hi", "mr", "ne"),
    "BENGALI": ("bn",),
    "TAMIL": ("ta",),
    "THAI": ("th",),
    "HANGUL": ("ko",),
    "HIRAGANA": ("ja",),
    "KATAKANA": ("ja",),
    "CJK": ("zh",),
    "GEORGIAN": ("ka",),
    "ARMENIAN": ("hy",),
}

_WORDS = {
    "en": "the of and to in is that it for you with on are as this be was have not what how can from "
    "an your or by do does i my we they which who why when a write give me please",
    "de": "der die das und ist nicht ein eine zu den mit von für auf ich sie es wie was kann dem im "
    "des auch werden sind wir oder als bei einer einen warum bitte schreibe",
    "fr": "le la les des et est une un que pour dans qui pas sur avec vous je il au du ce en par son "
    "sont plus ou comment quel quelle pourquoi être écris",
    "es": "el la los las de y que en un una es por con para no se del al como su lo qué más cuál "
    "cómo puede son escribe o pero está",
    "it": "il la le di che e un una per non con sono del della è come più i gli nel si da in alla "
    "cosa perché quale scrivi anche",
    "pt": "o a os as de que e em um uma para com não do da no na por é mais como se dos das qual "
    "são você escreva ou foi",
    "nl": "de het een en van is dat niet in op te met voor zijn ik je hoe wat er aan ook als maar "
    "wordt kan waarom schrijf",
    "pl": "i w na nie się z jest do że to jak o co po dla są czy od przez który jakie dlaczego",
    "sv": "och att det som en är på för av med den inte till jag om har ett hur vad kan de skriv",
    "vi": "là và của có không được cho một trong với các này người những để khi như",
    "id": "yang dan di dari untuk dengan ini itu adalah pada tidak apa bagaimana dalam akan saya",
}
STOP_WORDS = {code: frozenset(words.split()) for code, words in _WORDS.items()}
LATIN = tuple(STOP_WORDS)

_LETTERS = re.compile(r"[^\W\d_]+")
# This is enough; longer texts are judged by their beginning.
_CHARACTERS = 2000
# Ukrainian and Bulgarian are not distinguished from Russian.
_KANA_SHARE = 0.1


def guess_language(text: str) -> str | None:
    """
    Guess the language of a text.

    Args:
        text (`str`): Any text; its first 2,000 characters count.

    Returns:
        `str` or `None`: ISO 639-1 code, `"latin"` for Latin letters without enough known words, or
        `None` if there are no letters of a known script.
    """
    words = _LETTERS.findall(text[:_CHARACTERS].lower())
    scripts = Counter(script for word in words for script in map(_script, word))
    total = sum(scripts.values())
    if not total:
        return None
    # Japanese mixes kana with Chinese characters.
    kana = scripts["HIRAGANA"] + scripts["KATAKANA"]
    if kana and kana >= _KANA_SHARE * (kana + scripts["CJK"]) and kana + scripts["CJK"] > total / 2:
        return "ja"
    script, count = scripts.most_common(1)[0]
    if count <= total / 2:
        return None
    if script != "LATIN":
        return SCRIPTS[script][0] if script in SCRIPTS else None
    scores = {code: sum(word in known for word in words) for code, known in STOP_WORDS.items()}
    best, second = sorted(scores, key=scores.__getitem__, reverse=True)[:2]
    # Ordinary prose has several times this share of words from its language's list.
    if scores[best] * 12 < len(words) or scores[best] == scores[second]:
        return "latin"
    return best


def may_be(guess: str | None, languages: frozenset[str]) -> bool:
    """
    Whether a guess is compatible with one of the wanted languages.

    Without evidence (`None`, or `"latin"` if one of them uses Latin letters) it is: only texts
    known to be in another language are excluded.
    """
    if guess is None:
        return True
    if guess == "latin":
        return not languages.isdisjoint(LATIN)
    for codes in SCRIPTS.values():
        if guess == codes[0]:
            return not languages.isdisjoint(codes)
    return guess in languages


def _script(letter: str) -> str:
    # The first word of a letter's Unicode name is its script.
    if letter.isascii():
        return "LATIN"
    return unicodedata.name(letter, "UNKNOWN").split(" ", 1)[0]
