"""The demo's preference pairs: small tasks whose answers a function can check.

Every instruction is generated from a template and solved by code, so the chosen answer is correct
by construction, each rejected answer is a plausible mistake (a dropped letter, an off-by-one, a
descending sort), and any answer of a model can be graded with [`is_correct`].
"""

import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

# Capitals: the instructions are in small letters, so the merges that byte-level BPE learns from
# them never include letters of a word, and reversing a word reverses its tokens.
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Task:
    """One kind of instruction.

    Args:
        name (`str`): Short name, used as the row's label in the demo's table.
        templates (`tuple[str, ...]`): Phrasings, each with the field `{x}` (and `{y}`).
        draw (`Callable`): Takes a `random.Random`, returns the values of the fields as strings.
        solve (`Callable`): Takes the values, returns the correct answer.
        spoil (`Callable`): Takes a `random.Random` and the values, returns a plausible wrong
            answer.
    """

    name: str
    templates: tuple[str, ...]
    draw: Callable[[random.Random], tuple[str, ...]]
    solve: Callable[..., str]
    spoil: Callable[..., str]


def draw_word(rng: random.Random) -> tuple[str, ...]:
    # Letters without repetition: swapping letters of a word such as "AAA" does not change it.
    return ("".join(rng.sample(LETTERS, rng.randint(3, 5))),)


def draw_digits(rng: random.Random) -> tuple[str, ...]:
    return (" ".join(rng.sample("0123456789", rng.randint(3, 5))),)


def draw_numbers(rng: random.Random) -> tuple[str, ...]:
    x, y = rng.sample(range(10, 100), 2)
    return str(x), str(y)


def draw_addends(rng: random.Random) -> tuple[str, ...]:
    return str(rng.randint(10, 89)), str(rng.randint(1, 9))


def draw_letters(rng: random.Random) -> tuple[str, ...]:
    return ("".join(rng.choice(LETTERS) for _ in range(rng.randint(2, 9))),)


def swap_neighbours(rng: random.Random, items: str | list[str]) -> list[str]:
    spoiled = list(items)
    i = rng.randrange(len(spoiled) - 1)
    spoiled[i], spoiled[i + 1] = spoiled[i + 1], spoiled[i]
    return spoiled


def misspell(rng: random.Random, word: str) -> str:
    """Swaps, drops, doubles or replaces one letter of a word without repeated letters."""
    i = rng.randrange(len(word))
    other = rng.choice([letter for letter in LETTERS if letter != word[i]])
    return rng.choice(
        [
            "".join(swap_neighbours(rng, word)),
            word[:i] + word[i + 1 :],
            word[: i + 1] + word[i:],
            word[:i] + other + word[i + 1 :],
        ]
    )


def spoil_reversed(rng: random.Random, word: str) -> str:
    # The unchanged word is the first mistake of a model, because it learns to copy first.
    return rng.choice([word, misspell(rng, word[::-1]), misspell(rng, word[::-1])])


def spoil_sorted(rng: random.Random, digits: str) -> str:
    right = sorted(digits.split())
    wrong = [right[::-1], swap_neighbours(rng, right)]
    if digits.split() != right:
        wrong.append(digits.split())
    return " ".join(rng.choice(wrong))


def spoil_sum(rng: random.Random, x: str, y: str) -> str:
    right = int(x) + int(y)
    # The difference, and a sum with a missing or extra carry.
    return str(rng.choice([int(x) - int(y), right + 1, right - 1, right + 10, right - 10]))


def spoil_count(rng: random.Random, text: str) -> str:
    return str(len(text) + rng.choice([-1, 1]))


TASKS = (
    Task(
        "copy",
        ('Repeat the word "{x}".', 'Write "{x}" once more.'),
        draw_word,
        lambda word: word,
        misspell,
    ),
    Task(
        "reverse",
        ('Reverse the word "{x}".', 'Spell "{x}" backwards.'),
        draw_word,
        lambda word: word[::-1],
        spoil_reversed,
    ),
    Task(
        "sort",
        ("Sort these digits: {x}.", "Put {x} in ascending order."),
        draw_digits,
        lambda digits: " ".join(sorted(digits.split())),
        spoil_sorted,
    ),
    Task(
        "larger",
        ("Which is larger, {x} or {y}?", "Name the larger of {x} and {y}."),
        draw_numbers,
        lambda x, y: str(max(int(x), int(y))),
        lambda rng, x, y: str(min(int(x), int(y))),
    ),
    Task(
        "add",
        ("What is {x} + {y}?", "Add {x} and {y}."),
        draw_addends,
        lambda x, y: str(int(x) + int(y)),
        spoil_sum,
    ),
    Task(
        "count",
        ('How many letters are in "{x}"?', 'Count the letters of "{x}".'),
        draw_letters,
        lambda text: str(len(text)),
        spoil_count,
    ),
)


def template_pattern(template: str) -> re.Pattern[str]:
    pattern = re.escape(template)
    for field in ("x", "y"):
        pattern = pattern.replace(re.escape("{" + field + "}"), f"(?P<{field}>[A-Z0-9 ]+?)")
    return re.compile(pattern)


PATTERNS = tuple(
    (task, template_pattern(template)) for task in TASKS for template in task.templates
)


def solve(instruction: str) -> str:
    """Returns the correct answer to an instruction that this module generated.

    Raises:
        ValueError: If the instruction matches none of the templates.
    """
    for task, pattern in PATTERNS:
        match = pattern.fullmatch(instruction)
        if match is not None:
            return task.solve(*match.groups())
    raise ValueError(f"instruction {instruction!r} matches none of the demo's templates")


def is_correct(instruction: str, answer: str) -> bool:
    """Whether `answer`, without surrounding blanks, is the correct answer to `instruction`."""
    return answer.strip() == solve(instruction)


def make_pairs(count: int, seed: int, exclude: Iterable[str] = ()) -> list[dict]:
    """Generates conversational preference pairs, alternating between the tasks.

    Args:
        count (`int`): Number of pairs.
        seed (`int`): Seed of the generator; the same seed gives the same pairs.
        exclude (`Iterable[str]`): Values of `key` (see below) to exclude, such as held-out ones.

    Returns:
        `list[dict]`: Rows with `prompt`, `chosen` and `rejected` (message lists), `task`, and
        `key`, which identifies the question in any phrasing, so that a held-out question is not
        repeated in another phrasing.
    """
    rng = random.Random(seed)
    excluded = set(exclude)
    rows = []
    while len(rows) < count:
        task = TASKS[len(rows) % len(TASKS)]
        values = task.draw(rng)
        key = f"{task.name}: {' '.join(values)}"
        if key in excluded:
            continue
        template = rng.choice(task.templates)
        instruction = template.format(**dict(zip(("x", "y"), values, strict=False)))
        rows.append(
            {
                "prompt": [{"role": "user", "content": instruction}],
                "chosen": [{"role": "assistant", "content": task.solve(*values)}],
                "rejected": [{"role": "assistant", "content": task.spoil(rng, *values)}],
                "task": task.name,
                "key": key,
            }
        )
    return rows


def make_splits(train_count: int, test_count: int, seed: int) -> tuple[list[dict], list[dict]]:
    """Generates training rows and held-out rows without common questions."""
    test = make_pairs(test_count, seed + 1)
    train = make_pairs(train_count, seed, exclude=(row["key"] for row in test))
    return train, test
