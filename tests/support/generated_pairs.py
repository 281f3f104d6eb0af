"""Preference rows made up from a seed, in every form that TRL's ORPOTrainer takes."""

import random
from typing import Any

from .tokenizer_zoo import random_words

Row = dict[str, Any]


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def string_rows(count: int, seed: int, implicit: bool) -> list[Row]:
    """Strings; an implicit prompt is the common beginning, which often ends inside a word."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        prompt = random_words(rng, rng.randint(1, 30))
        glue = rng.choice(["", " ", "\n", "\n\nAssistant: ", "</s>"])
        chosen, rejected = (random_words(rng, rng.randint(1, 25)) for _ in range(2))
        if rng.random() < 0.1:
            rejected = chosen[: len(chosen) // 2]  # one side the beginning of the other
        if implicit:
            rows.append({"chosen": prompt + glue + chosen, "rejected": prompt + glue + rejected})
        else:
            rows.append({"prompt": prompt + glue, "chosen": chosen, "rejected": rejected})
    return rows


def conversation_rows(count: int, seed: int, implicit: bool) -> list[Row]:
    """Conversations of one turn or more, some with a system message."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        turns = [_message("system", random_words(rng, 4))] if rng.random() < 0.4 else []
        for _ in range(rng.randint(0, 2)):
            turns.append(_message("user", random_words(rng, rng.randint(1, 12))))
            turns.append(_message("assistant", random_words(rng, rng.randint(1, 12))))
        turns.append(_message("user", random_words(rng, rng.randint(1, 12))))
        chosen, rejected = (
            [_message("assistant", random_words(rng, rng.randint(1, 20)))] for _ in range(2)
        )
        if implicit:
            row = {"chosen": turns + chosen, "rejected": turns + rejected}
            if rng.random() < 0.5:
                row["prompt"] = turns[-1]["content"]  # as in UltraFeedback; not used
        else:
            row = {"prompt": turns, "chosen": chosen, "rejected": rejected}
        rows.append(row)
    return rows
