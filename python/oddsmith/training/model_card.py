"""The model card that is saved with each checkpoint."""

from collections.abc import Iterable
from typing import Any

import torch
import transformers

from ..config import ORPOConfig

CITATION = """\
@article{hong2024orpo,
    title        = {{ORPO: Monolithic Preference Optimization without Reference Model}},
    author       = {Jiwoo Hong and Noah Lee and James Thorne},
    year         = 2024,
    eprint       = {arXiv:2403.07691}
}"""


def model_card(
    args: ORPOConfig,
    model_name: str | None,
    base_model: str | None,
    dataset_name: str | None,
    tags: Iterable[str],
) -> str:
    """
    The text of a model card: model, data, settings and citation.

    Args:
        args ([`ORPOConfig`]): Arguments of the run.
        model_name (`str`, *optional*): Name of the trained model.
        base_model (`str`, *optional*): Id of the model that training started from.
        dataset_name (`str`, *optional*): Id of the dataset.
        tags (`Iterable[str]`): Tags.
    """
    front: dict[str, Any] = {"library_name": "transformers", "model_name": model_name}
    front |= {"base_model": base_model, "datasets": dataset_name}
    lines = [f"{key}: {value}" for key, value in front.items() if value]
    lines += ["tags:", *(f"- {tag}" for tag in sorted(tags))]
    start = (
        f"[{base_model}](https://huggingface.co/{base_model})" if base_model else "its base model"
    )
    data = f" on {dataset_name}" if dataset_name else ""
    beta = f"{args.beta:g}"
    if args.beta_schedule != "constant":
        beta += f", {args.beta_schedule} to {args.beta_end:g}"
    return "\n".join(
        [
            "---",
            *lines,
            "---",
            "",
            f"# {model_name or 'Model'}",
            "",
            f"Trained from {start}{data} with ORPO (odds ratio preference optimization, "
            "[arXiv 2403.07691](https://arxiv.org/abs/2403.07691)) by oddsmith.",
            "",
            "| | |",
            "|---|---|",
            f"| beta | {beta} |",
            f"| likelihood over | {args.nll_scope} |",
            f"| odds ratio link | {args.odds_ratio_link} |",
            f"| learning rate | {args.learning_rate:g} ({_value(args.lr_scheduler_type)}) |",
            f"| optimizer | {_value(args.optim)} |",
            f"| longest sequence | {args.max_length} |",
            f"| transformers, torch | {transformers.__version__}, {torch.__version__} |",
            "",
            "```bibtex",
            CITATION,
            "```",
            "",
        ]
    )


def _value(choice: Any) -> Any:
    return getattr(choice, "value", choice)
