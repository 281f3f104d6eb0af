"""The loss from logits: by hand, and where the naive formula fails."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from oddsmith.head import logits as plain
from oddsmith.training.loss_hooks import LossHooks


def test_log_odds_by_hand():
    # p = 1/2 has odds 1, p = 1/4 has odds 1/3: log(1 / (1/3)) = log 3.
    chosen = torch.tensor([math.log(0.5)], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([math.log(0.25)], dtype=torch.float64, requires_grad=True)
    odds = plain.log_odds(chosen, rejected)
    assert odds.item() == pytest.approx(math.log(3.0))
    odds.sum().backward()
    assert chosen.grad.item() == pytest.approx(1 / (1 - 0.5))
    assert rejected.grad.item() == pytest.approx(-1 / (1 - 0.25))


def test_log_odds_gradient():
    chosen, rejected = (
        torch.tensor(x, dtype=torch.float64, requires_grad=True)
        for x in ([-0.01, -0.7, -3.0, -40.0], [-2.0, -0.69, -0.1, -9.0])
    )
    assert gradcheck(plain.log_odds, (chosen, rejected))


@pytest.mark.parametrize("value", [0.0, -1e-45, -1e-8, -3e-8, -1e-4, -100.0, -1e4])
@pytest.mark.parametrize("side", [0, 1])
def test_log_odds_stays_finite(value, side):
    logps = [torch.tensor([-1.5], requires_grad=True) for _ in range(2)]
    logps[side] = torch.tensor([value], requires_grad=True)
    loss = -torch.nn.functional.logsigmoid(plain.log_odds(*logps)).sum()
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logps[0].grad).all() and logps[0].grad <= 0
    assert torch.isfinite(logps[1].grad).all() and logps[1].grad >= 0


def test_certain_chosen_side_keeps_a_gradient_of_order_one():
    # odds(p) -> 1 / -log p; sigmoid(-log odds) * d log odds / d log p -> odds(1/2) = 1.
    chosen = torch.tensor([-1e-30], requires_grad=True)
    rejected = torch.tensor([math.log(0.5)])
    torch.nn.functional.logsigmoid(plain.log_odds(chosen, rejected)).backward()
    assert chosen.grad.item() == pytest.approx(1.0, rel=1e-5)


def test_sequence_logps_by_hand():
    # Two tokens of equal logits: each label has probability 1/2; the masked one does not count.
    logits = torch.zeros(2, 3, 2)
    logits[1, 0] = torch.tensor([0.0, math.log(3.0)])  # probabilities 1/4, 3/4
    labels = torch.tensor([[0, 1, -100], [1, -100, -100]])
    total = plain.sequence_logps(logits, labels, average=False)
    average = plain.sequence_logps(logits, labels, average=True)
    torch.testing.assert_close(total, torch.tensor([2 * math.log(0.5), math.log(0.75)]))
    torch.testing.assert_close(average, torch.tensor([math.log(0.5), math.log(0.75)]))


def test_sequence_without_labels_has_zero_and_no_gradient():
    logits = torch.randn(2, 3, 5, requires_grad=True)
    labels = torch.tensor([[1, 2, 3], [-100, -100, -100]])
    logps = plain.sequence_logps(logits, labels, average=True)
    logps.sum().backward()
    assert logps[1] == 0.0
    assert torch.isfinite(logits.grad).all() and (logits.grad[1] == 0).all()


def test_get_batch_logps_shifts_for_decoders_only():
    torch.manual_seed(2)
    logits, labels = torch.randn(2, 4, 7), torch.tensor([[-100, 3, 4, 5], [-100, -100, 6, -100]])
    logps = torch.log_softmax(logits, -1)
    shifted = LossHooks.get_batch_logps(logits, labels)
    by_hand = logps[0, 0, 3] + logps[0, 1, 4] + logps[0, 2, 5]
    torch.testing.assert_close(shifted, torch.stack([by_hand, logps[1, 1, 6]]))
    aligned = LossHooks.get_batch_logps(logits, labels, True, is_encoder_decoder=True)
    by_hand = (logps[0, 1, 3] + logps[0, 2, 4] + logps[0, 3, 5]) / 3
    torch.testing.assert_close(aligned, torch.stack([by_hand, logps[1, 2, 6]]))


def test_get_batch_logps_names_the_shapes():
    with pytest.raises(ValueError, match=r"labels have shape \(2, 3\).*\(2, 4\)"):
        LossHooks.get_batch_logps(torch.zeros(2, 4, 5), torch.zeros(2, 3, dtype=torch.int64))


def test_token_nll_is_a_mean_over_tokens():
    logits = torch.zeros(2, 2, 2)
    logits[0, 0] = torch.tensor([0.0, math.log(3.0)])
    labels = torch.tensor([[1, 0], [-100, -5]])
    expected = -(math.log(0.75) + math.log(0.5)) / 2
    assert plain.token_nll(logits, labels).item() == pytest.approx(expected)
    assert plain.token_nll(logits, torch.full((2, 2), -100)) == 0.0


def test_shift_right():
    labels = torch.tensor([[4, 5, -100], [6, -100, -100]])
    assert plain.shift_right(labels, start=9, pad=0).tolist() == [[9, 4, 5], [9, 6, 0]]
    assert labels[0, 0] == 4
    for start, pad, name in ((None, 0, "decoder_start_token_id"), (9, None, "pad_token_id")):
        with pytest.raises(ValueError, match=f"{name} is None"):
            plain.shift_right(labels, start, pad)


def test_concatenate_decoder():
    batch = {
        "chosen_input_ids": torch.tensor([[1, 2]]),
        "chosen_attention_mask": torch.tensor([[1, 1]]),
        "chosen_labels": torch.tensor([[-100, 2]]),
        "rejected_input_ids": torch.tensor([[1, 3, 4]]),
        "rejected_attention_mask": torch.tensor([[1, 1, 1]]),
        "rejected_labels": torch.tensor([[-100, 3, 4]]),
        "prompt_input_ids": torch.tensor([[1]]),
        "chosen": ["text"],
    }
    both = LossHooks.concatenated_inputs(batch, padding_value=7)
    assert {name: x.tolist() for name, x in both.items()} == {
        "concatenated_input_ids": [[1, 2, 7], [1, 3, 4]],
        "concatenated_attention_mask": [[1, 1, 0], [1, 1, 1]],
        "concatenated_labels": [[-100, 2, -100], [-100, 3, 4]],
    }


def test_concatenate_encoder_decoder():
    batch = {
        "chosen_labels": torch.tensor([[5]]),
        "rejected_labels": torch.tensor([[6, 7]]),
        "prompt_input_ids": torch.tensor([[1, 2, 3]]),
        "prompt_attention_mask": torch.tensor([[1, 1, 1]]),
    }
    both = LossHooks.concatenated_inputs(batch, is_encoder_decoder=True, padding_value=9)
    assert both["concatenated_labels"].tolist() == [[5, -100], [6, 7]]
    assert both["concatenated_input_ids"].tolist() == [[1, 2, 3], [1, 2, 3]]
    assert both["concatenated_attention_mask"].shape == (2, 3)
