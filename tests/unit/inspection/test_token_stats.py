"""Figures of columns of tokens, by hand."""

import numpy as np

from oddsmith.inspection.token_stats import (
    Finding,
    Ragged,
    TokenRows,
    TokenStats,
    needed,
    padded_tokens,
    quantiles,
)


def test_padded_tokens():
    chosen, rejected = np.array([3, 9, 4, 4]), np.array([5, 1, 4, 2])
    assert padded_tokens(chosen, rejected, 1) == 2 * (5 + 9 + 4 + 4)
    assert padded_tokens(chosen, rejected, 9) == 2 * 4 * 9
    # Batches of three and one: the 9 is alone or with two others.
    assert padded_tokens(chosen, rejected, 3) in {2 * (3 * 5 + 9), 2 * (3 * 9 + 4), 2 * (3 * 9 + 5)}
    assert padded_tokens(chosen[:0], rejected[:0], 3) == 0
    assert quantiles(chosen[:0]) == {}


def test_ragged():
    ragged = Ragged.of_lists([[5, 6, 7], [], [8], [9, 9]])
    assert ragged.at(0).tolist() == [5, -1, 8, 9]
    assert ragged.at(1).tolist() == [6, -1, -1, 9]
    assert ragged.at(-1).tolist() == [7, -1, 8, 9]
    assert ragged.at(-2).tolist() == [6, -1, -1, 9]
    assert ragged.sums(ragged.values >= 7).tolist() == [1, 0, 1, 2]
    some = ragged.where(ragged.values != 6)
    assert (some.values.tolist(), some.lengths.tolist()) == ([5, 7, 8, 9, 9], [2, 0, 1, 2])
    assert Ragged.of_lists([]).at(0).tolist() == []


def rows_of(*pairs):
    """Rows of `(prompt, chosen answer, rejected answer)`."""
    return TokenRows.of_rows(
        [
            {
                "chosen_input_ids": prompt + chosen,
                "chosen_labels": [-100] * len(prompt) + chosen,
                "rejected_labels": [-100] * len(prompt) + rejected,
            }
            for prompt, chosen, rejected in pairs
        ]
    )


def test_columns_of_rows():
    rows = rows_of(([1, 5], [6, 2], [7, 8, 2]), ([1, 5, 6], [2], []))
    assert rows.prompt.values.tolist() == [1, 5, 1, 5, 6]
    assert rows.chosen.values.tolist() == [6, 2, 2]
    assert rows.rejected.lengths.tolist() == [3, 0]
    assert rows.chosen_prompt.tolist() == rows.rejected_prompt.tolist() == [2, 3]
    assert not rows.encoder_decoder
    columns = {"prompt_input_ids": [5], "chosen_labels": [6, 2], "rejected_labels": [7]}
    assert needed([*columns, "text"]) == list(columns)
    both = TokenRows.of_rows([columns])
    assert both.encoder_decoder and both.chosen_prompt.tolist() == [1]


def test_a_finding_keeps_the_first_row():
    finding = Finding()
    numbers = np.array([10, 11, 12])
    finding.add(np.array([False, False, False]), numbers)
    assert (finding.count, finding.first) == (0, None)
    finding.add(np.array([False, True, True]), numbers)
    finding.add(np.array([True, False, False]), numbers + 90)
    assert (finding.count, finding.first) == (3, 11)


def test_faults_of_tokens_by_hand():
    # BOS 1, EOS 2.
    stats = TokenStats(bos=1, eos=2, max_length=5)
    stats.add(
        rows_of(
            ([1, 5, 6], [7, 2], [8, 2]),
            ([1, 5, 7], [8, 2], [8, 2]),  # the same answers
            ([1, 5, 8], [2], [8, 2]),  # an empty one
            ([1, 6, 5], [1, 2], [8, 2]),  # a second BOS
            ([1, 6, 7], [7], [8, 2]),  # four tokens, and no EOS
            ([1, 6, 8], [7, 9], [8, 2]),  # five, so it may have been cut
            ([1, 6, 8], [7, 9, 2], [8, 2]),  # six; and a repeated prompt
        )
    )
    stats.close()
    found = {
        name: (getattr(stats, name).count, getattr(stats, name).first)
        for name in ("identical", "empty", "double_bos", "missing_eos", "too_long", "repeated")
    }
    assert found == {
        "identical": (1, 1), "empty": (1, 2), "double_bos": (1, 3), "missing_eos": (1, 4),
        "too_long": (1, 6), "repeated": (1, 6),
    }  # fmt: skip
    shared, chosen, rejected = stats.lengths()
    assert shared.tolist() == [3] * 7
    assert chosen.tolist() == [5, 5, 4, 5, 4, 5, 6]
    assert rejected.tolist() == [5] * 7


def test_quantiles_are_values_that_occur():
    values = np.array([7, 1, 3, 5])
    assert quantiles(values) == {
        "min": 1, "p10": 1, "p50": 3, "p90": 7, "p99": 7, "max": 7, "mean": 4.0
    }  # fmt: skip
