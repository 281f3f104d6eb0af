"""The ORPO head beside its peers: loss and gradients from hidden states.

    python benches/bench_head.py [--dtype float32] [--repeats 5] [--threads 2] [--no-compile] [--record]

Two shapes (hidden 512, vocabulary 32,000; hidden 896, vocabulary 151,936), trained and frozen head, `float32` or
`bfloat16`, which is what a model has by default on a CPU with instructions for it. A batch has
two padded pairs; about a third of its rows are rejected prompts or padding. Logits are peaked, as those of a trained
model are. Peers: TRL's eager loss, Liger's fused loss, TRL's chunked log-probabilities with the ORPO formula, and
torch.compile of the naive form. `products` is the matrix products of the rows that need the head, without anything
else, timed in the same rounds. MB is the rise of resident memory during a call, less the gradients that it returns.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from oddsmith.functional import linear_orpo
from results import installed
from side_by_side import Report, flags, interleave, peak_memory

BETA = 0.1


@dataclass
class Case:
    """A padded batch as a trainer sees it: (2B, T) rows that predict, chosen first."""

    hidden: torch.Tensor  # (2B, T, D)
    weight: torch.Tensor  # (V, D)
    tokens: torch.Tensor  # (2B, T) next tokens, -100 on padding
    labels: torch.Tensor  # (2B, T) next tokens of completions, -100 elsewhere

    @property
    def needed(self) -> torch.Tensor:
        chosen = torch.arange(len(self.tokens)) < len(self.tokens) // 2
        return torch.where(chosen[:, None], self.tokens != -100, self.labels != -100)


def make_case(width: int, vocab: int, length: int, trained: bool, dtype: torch.dtype) -> Case:
    """Two pairs: prompts of 15 to 45 % of the row, answers of which some are padded."""
    torch.manual_seed(7)
    prompt = [int(length * f) for f in (0.18, 0.40, 0.18, 0.40)]
    real = [length, int(length * 0.80), int(length * 0.93), int(length * 0.72)]
    weight = torch.randn(vocab, width) * width**-0.5
    tokens = torch.randint(vocab, (4, length))
    # A trained model's hidden state points at the next token: peaked logits.
    hidden = torch.randn(4, length, width) + 12.0 * F.normalize(weight[tokens], dim=-1)
    labels = tokens.clone()
    for row in range(4):
        tokens[row, real[row] :] = -100
        labels[row, real[row] :] = -100
        labels[row, : prompt[row]] = -100
    hidden, weight = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(trained)
    return Case(hidden, weight, tokens, labels)


def odds_ratio(nll, chosen, rejected):
    log_odds = (chosen - rejected) - (
        torch.log1p(-torch.exp(chosen)) - torch.log1p(-torch.exp(rejected))
    )
    return nll - BETA * F.logsigmoid(log_odds).mean()


def gradients(case: Case, loss: torch.Tensor):
    inputs = [x for x in (case.hidden, case.weight) if x.requires_grad]
    return loss.detach(), torch.autograd.grad(loss, inputs)


def ours(case: Case):
    count, length, width = case.hidden.shape
    real = case.tokens.flatten() != -100
    rows = real.nonzero()[:, 0]
    targets = torch.where(case.needed, case.tokens, -100).flatten()[rows]
    sequence = torch.arange(count).repeat_interleave(length)[rows]
    completion = (case.labels.flatten() != -100)[rows]
    hidden = case.hidden.reshape(-1, width)[rows]
    out = linear_orpo(hidden, case.weight, targets, sequence, completion, BETA)
    return gradients(case, out.loss)


def eager(case: Case):
    """What TRL's trainer does behind the model's lm_head, with its own helper."""
    from trl.experimental.orpo import ORPOTrainer

    logits = F.linear(case.hidden, case.weight)
    half = len(logits) // 2
    nll = F.cross_entropy(
        logits[:half].contiguous().view(-1, logits.shape[-1]), case.tokens[:half].reshape(-1)
    )
    # The rows are shifted already, as they are for an encoder-decoder.
    logps = ORPOTrainer.get_batch_logps(logits, case.labels, True, is_encoder_decoder=True)
    loss = odds_ratio(nll, logps[:half], logps[half:])
    means = logits[:half].detach().mean(), logits[half:].detach().mean()
    return (*gradients(case, loss), means)


def liger(case: Case):
    from liger_kernel.chunked_loss import LigerFusedLinearORPOLoss

    loss = LigerFusedLinearORPOLoss(beta=BETA, compiled=False)
    # Copies: Liger marks what it is given as of dynamic shape, and torch.compile would obey.
    labels, tokens = case.labels.clone(), case.tokens.clone()
    return gradients(case, loss(case.weight, case.hidden, labels, nll_target=tokens)[0])


def chunked(case: Case):
    """TRL's chunked log-probabilities over all rows but the padding."""
    from trl.kernels import ChunkedLogProbFunction

    count, length, width = case.hidden.shape
    real = (case.tokens.flatten() != -100).nonzero()[:, 0]
    hidden, tokens = case.hidden.reshape(-1, width)[real], case.tokens.flatten()[real]
    logps = ChunkedLogProbFunction.apply(
        hidden, case.weight, None, tokens, 1.0, 8192, None, 1.0, ("mean_logits",)
    )[0]
    sequence = torch.arange(count).repeat_interleave(length)[real]
    answer = case.labels.flatten()[real] != -100
    half = count // 2
    means = torch.stack([logps[(sequence == s) & answer].mean() for s in range(count)])
    loss = odds_ratio(-logps[sequence < half].mean(), means[:half], means[half:])
    return gradients(case, loss)


def naive(hidden, weight, tokens, labels):
    logps = F.linear(hidden, weight).log_softmax(-1)
    picked = logps.gather(2, tokens.clamp(min=0)[..., None])[..., 0]
    half = len(tokens) // 2
    real, answer = tokens != -100, labels != -100
    nll = -(picked * real)[:half].sum() / real[:half].sum()
    means = (picked * answer).sum(1) / answer.sum(1)
    return odds_ratio(nll, means[:half], means[half:])


def products(case: Case):
    """The bare matrix products of the rows that need the head."""
    hidden = case.hidden.detach()[case.needed]
    weight, trained = case.weight.detach(), case.weight.requires_grad
    logits = hidden.new_empty(len(hidden), len(weight))
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def run():
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=d_hidden)
        if trained:
            torch.mm(logits.T, hidden, out=d_weight)

    return run


def runs_of(case: Case, compiled: bool) -> dict:
    """oddsmith and the peers that are installed."""
    runs = {"oddsmith": lambda: ours(case)}
    if installed("trl"):
        runs["trl"] = lambda: eager(case)
    if installed("liger-kernel"):
        runs["liger"] = lambda: liger(case)
    if installed("trl"):
        runs["trl_chunked"] = lambda: chunked(case)
    if compiled:
        function = torch.compile(naive, dynamic=False)
        inputs = case.hidden, case.weight, case.tokens, case.labels
        runs["compile"] = lambda: gradients(case, function(*inputs))
    return runs


def check(case: Case, runs: dict) -> None:
    """Beside `float32`; in `bfloat16` logits have 8 bits, and with them the peers' losses."""
    wide = Case(
        case.hidden.detach().float().requires_grad_(),
        case.weight.detach().float().requires_grad_(case.weight.requires_grad),
        case.tokens,
        case.labels,
    )
    truth = gradients(wide, naive(wide.hidden, wide.weight, wide.tokens, wide.labels))
    slack = 1.0 if case.hidden.dtype == torch.float32 else 100.0
    for name, run in runs.items():
        loss, grads = run()[:2]
        worst = max((a - b).abs().max() / b.abs().max() for a, b in zip(grads, truth[1]))
        off = abs(loss.float() - truth[0])
        if case.hidden.dtype != torch.float32:
            print(f"{name}: loss off by {off:.1e}, gradients by {worst:.1e}")
        assert off < 1e-4 * slack * max(1.0, truth[0].item()), (
            f"{name}: loss {loss}, should be {truth[0]}"
        )
        assert worst < 1e-3 * slack, f"{name}: gradients off by {worst}"


def main() -> None:
    parser = flags(__doc__, repeats=5)
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="torch.compile of the naive form among the peers (default: yes)",
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    name_of_dtype = "" if dtype == torch.float32 else f"_{args.dtype}"
    torch.set_num_threads(args.threads)
    report = Report("bench_head", args, ("trl", "liger-kernel"))
    shapes = [(16, 64, 40)] if args.tiny else [(512, 32_000, 517), (896, 151_936, 172)]
    for width, vocab, length in shapes:
        for trained in (True, False):
            case = make_case(width, vocab, length, trained, dtype)
            runs = runs_of(case, args.compile)
            check(case, runs)
            returned = sum(x.nbytes for x in (case.hidden, case.weight) if x.requires_grad)
            memory = {name: peak_memory(run) - returned for name, run in runs.items()}
            runs["products"] = products(case)
            head = "trained" if trained else "frozen"
            rows = f"{case.tokens.numel()} rows, {int(case.needed.sum())} needed"
            title = f"hidden {width}, vocabulary {vocab}, {rows}, {head} head{name_of_dtype.replace('_', ', ')}"
            seconds = interleave(runs, args.repeats)
            report.case(
                f"head_{width}x{vocab}_{head}{name_of_dtype}", title, seconds, "oddsmith", memory
            )


if __name__ == "__main__":
    main()
