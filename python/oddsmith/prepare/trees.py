"""OpenAssistant's message trees: prompts are conversations, and answers have ranks.

Both forms of oasst1: flat (one message per row, with `parent_id`) and ready trees (one tree per
row, with `replies`). In both forms the counted rows are messages.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from ..sources.records import Record
from .pair import (
    BadRow,
    Unit,
    assistant,
    bad_unit,
    fields_of,
    number_of,
    required,
    shown,
    text_of,
    user,
)
from .ready import language_of
from .scored import Answer, draw_pairs, pair_of
from .scratch import scratch_database

_ROLES = {"prompter": user, "assistant": assistant}
READY = "ready_for_export"


@dataclass(slots=True)
class Node:
    """A message, its result and its replies."""

    text: str
    role: str
    lang: str | None = None
    rank: float | None = None
    quality: float | None = None
    reason: str | None = None
    # Why it is not in a pair with its siblings, and why a pair with it was dropped.
    unpaired: str | None = None
    dropped: str | None = None
    replies: list["Node"] = field(default_factory=list)
    kept: bool = False


@dataclass(slots=True)
class TreeUnit(Unit):
    """A tree: each message is kept as part of a pair, or has a reason why not."""

    nodes: list[Node] = field(default_factory=list)
    # The messages of each pair: the conversation, then both answers.
    parts: list[list[Node]] = field(default_factory=list)

    def fates(self, outcomes: Sequence[str | None]) -> Iterator[tuple[str | None, int]]:
        """As `Unit.fates`, for each message separately."""
        for parts, outcome in zip(self.parts, outcomes, strict=True):
            for node in parts:
                node.kept = node.kept or outcome is None
                node.dropped = node.dropped or outcome
        for node in self.nodes:
            # The message's reason comes first, then that of a dropped pair with it.
            reason = node.reason or node.dropped or node.unpaired or "no two answers to pair"
            yield (None if node.kept else reason), 1


def parse_message(fields: Mapping[str, Any]) -> Node:
    """
    A message without its replies.

    Raises:
        BadRow: If text or role is missing or of another type.
    """
    text = text_of(required(fields, "text"), "text")
    role = required(fields, "role")
    if role not in _ROLES:
        raise BadRow(f"field role is {shown(role)}; must be 'prompter' or 'assistant'")
    node = Node(
        text,
        role,
        language_of(fields),
        number_of(fields.get("rank"), "rank"),
        _quality(fields.get("labels")),
    )
    if fields.get("deleted"):
        node.reason = "message deleted"
    elif fields.get("review_result") is False:
        node.reason = "failed review"
    elif not text.strip():
        node.reason = "empty message"
    return node


def _quality(labels: Any) -> float | None:
    # {"name": [..], "value": [..]} on the hub, {"quality": {"value": ..}} in the ready trees.
    if not isinstance(labels, Mapping):
        return None
    if isinstance(labels.get("name"), list) and isinstance(labels.get("value"), list):
        return number_of(
            dict(zip(labels["name"], labels["value"], strict=False)).get("quality"), "quality"
        )
    quality = labels.get("quality")
    return number_of(quality.get("value"), "quality") if isinstance(quality, Mapping) else None


def tree_unit(where: str, root: Node, pairing: str) -> TreeUnit:
    """
    The pairs of a tree: for each message of a prompter, its answers by rank (0 is the best).

    Rank and quality label are two judgements, which can disagree.

    Args:
        where (`str`): Names the tree.
        root (`Node`): First message of the tree.
        pairing (`str`): `"best_worst"`, `"best_random"` or `"all"`; see `draw_pairs`.
    """
    unit = TreeUnit(where, rows=0)
    waiting: list[tuple[Node, list[Node], str | None]] = [(root, [], None)]
    while waiting:
        node, above, spoilt = waiting.pop()
        unit.rows += 1
        unit.nodes.append(node)
        path = [*above, node]
        if node.reason:
            # The conversations of its replies would lack a message.
            spoilt = spoilt or "below a dropped message"
        node.reason = node.reason or spoilt
        waiting += [(reply, path, spoilt) for reply in reversed(node.replies)]
        if node.role == "prompter" and not node.reason:
            _pair_replies(unit, path, pairing)
    return unit


def _pair_replies(unit: TreeUnit, path: list[Node], pairing: str) -> None:
    fit = [reply for reply in path[-1].replies if reply.role == "assistant" and not reply.reason]
    ranked = [(reply, reply.rank) for reply in fit if reply.rank is not None]
    drawn = draw_pairs([-rank for _, rank in ranked], pairing, path[-1].text)
    messages = [_ROLES[node.role](node.text) for node in path]
    for better, worse in drawn:
        sides = ranked[better], ranked[worse]
        first, second = (
            Answer(reply.text, -rank, reply.quality, [-rank, reply.quality])
            for reply, rank in sides
        )
        unit.pairs.append(pair_of(messages, first, second, path[-1].lang, ranked=True))
        unit.parts.append([*path, *(reply for reply, _ in sides)])
    paired = {id(ranked[place][0]) for pair in drawn for place in pair}
    for reply in fit:
        # Only for messages that are not part of another pair's conversation either.
        if id(reply) not in paired:
            reply.unpaired = (
                "no rank"
                if reply.rank is None
                else "neither best nor worst"
                if drawn
                else "no other ranked answer"
            )


def read_ready_trees(records: Iterable[Record], pairing: str, stop: bool) -> Iterator[Unit]:
    """
    Units of ready trees: `{"message_tree_id", "tree_state", "prompt": {.., "replies": [..]}}`.

    Raises:
        UserError: For a bad row, if `stop`.
    """
    for record in records:
        try:
            fields = fields_of(record)
            root = _parse_tree(required(fields, "prompt"))
        except BadRow as bad:
            # The number of messages in a bad tree is unknown, so it counts as one row.
            yield bad_unit(record, bad, stop)
            continue
        if fields.get("tree_state", READY) != READY:
            root.reason = root.reason or "tree not ready"
        yield tree_unit(record.where, root, pairing)


def _parse_tree(prompt: Any) -> Node:
    # No recursion, because trees of the input can be arbitrarily deep.
    if not isinstance(prompt, Mapping):
        raise BadRow(f"field prompt is {shown(prompt)}; must be a message with replies")
    root = parse_message(prompt)
    waiting = [(root, prompt)]
    while waiting:
        node, fields = waiting.pop()
        replies = fields.get("replies") or []
        if not isinstance(replies, list) or not all(isinstance(r, Mapping) for r in replies):
            raise BadRow(f"field replies is {shown(replies)}; must be a list of messages")
        for reply in replies:
            node.replies.append(parse_message(reply))
            waiting.append((node.replies[-1], reply))
    return root


def read_flat_messages(
    records: Iterable[Record], pairing: str, stop: bool, folder: Path | None
) -> Iterator[Unit]:
    """
    Units of trees with one message per row, in any order, grouped on disk.

    Args:
        records (`Iterable[Record]`): Rows with `message_id`, `parent_id`, `text` and `role`.
        pairing (`str`): See [`tree_unit`].
        stop (`bool`): Whether a bad row is an error.
        folder (`Path`, *optional*): Folder of the temporary file.

    Raises:
        UserError: For a bad row, if `stop`.
    """
    with scratch_database(folder) as store:
        store.execute(
            "CREATE TABLE messages (id TEXT PRIMARY KEY, parent TEXT, tree INTEGER, node, place)"
        )
        for record in records:
            try:
                fields = fields_of(record)
                name = text_of(required(fields, "message_id"), "message_id")
                parent = fields.get("parent_id") or None
                parent = None if parent is None else text_of(parent, "parent_id")
                node = parse_message(fields)
            except BadRow as bad:
                yield bad_unit(record, bad, stop)
                continue
            if parent is None and fields.get("tree_state", READY) != READY:
                node.reason = node.reason or "tree not ready"
            stored = [node.text, node.role, node.lang, node.rank, node.quality, node.reason]
            added = store.execute(
                "INSERT OR IGNORE INTO messages VALUES (?, ?, NULL, ?, ?)",
                (name, parent, json.dumps(stored), record.where),
            ).rowcount
            if not added:
                yield Unit(record.where, reason="message repeated")
        store.execute("CREATE INDEX by_parent ON messages (parent)")
        # Generation by generation: replies take the tree of their parents. Messages in a circle, or
        # under a missing parent, are never reached.
        store.execute("UPDATE messages SET tree = rowid WHERE parent IS NULL")
        store.execute("CREATE TABLE grown AS SELECT id FROM messages WHERE parent IS NULL")
        while store.execute("SELECT 1 FROM grown LIMIT 1").fetchone():
            store.execute(
                "UPDATE messages SET tree = (SELECT tree FROM messages AS up "
                "WHERE up.id = messages.parent) WHERE parent IN (SELECT id FROM grown)"
            )
            store.execute(
                "CREATE TABLE next AS SELECT id FROM messages WHERE parent IN (SELECT id FROM grown)"
            )
            store.execute("DROP TABLE grown")
            store.execute("ALTER TABLE next RENAME TO grown")
        store.execute("CREATE INDEX by_tree ON messages (tree)")
        rows = store.execute(
            "SELECT tree, id, parent, node, place FROM messages WHERE tree IS NOT NULL "
            "ORDER BY tree, rowid"
        )
        for _, members in groupby(rows, key=lambda row: row[0]):
            yield _grow(list(members), pairing)
        for (place,) in store.execute(
            "SELECT place FROM messages WHERE tree IS NULL ORDER BY rowid"
        ):
            yield Unit(place, reason="parent missing")


def _grow(members: list[tuple[Any, ...]], pairing: str) -> TreeUnit:
    nodes = {name: Node(*json.loads(stored)) for _, name, _, stored, _ in members}
    root, where = nodes[members[0][1]], members[0][4]
    for _, name, parent, _, place in members:
        if parent is None:
            root, where = nodes[name], place
        else:
            nodes[parent].replies.append(nodes[name])
    return tree_unit(where, root, pairing)
