"""The README that is saved beside a trained model."""

from typing import Any

from . import __version__

_CITATION = """@article{hong2024orpo,
  title   = {{ORPO: Monolithic Preference Optimization without Reference Model}},
  author  = {Hong, Jiwoo and Lee, Noah and Thorne, James},
  year    = 2024,
  journal = {arXiv preprint arXiv:2403.07691}
}"""


def model_card(model_name: str | None, base: str | None, dataset: str | None, args: Any) -> str:
    """
    Text of a model card.

    Args:
        model_name (`str`, *optional*): Name of the trained model.
        base (`str`, *optional*): Hub id of the model it was trained from.
        dataset (`str`, *optional*): Hub id of the dataset.
        args (`ORPOConfig`): Arguments of the run.
    """
    header = ["---", "library_name: transformers", "tags: [oddsmith, orpo]"]
    header += [f"base_model: {base}"] if base else []
    header += [f"datasets: [{dataset}]"] if dataset else []
    source = f" from {base}" if base else ""
    data = f" on {dataset}" if dataset else ""
    return "\n".join(
        [
            *header,
            "---",
            "",
            f"# {model_name or 'ORPO model'}",
            "",
            f"Trained{source}{data} with ORPO (odds-ratio preference optimisation) by oddsmith "
            f"{__version__}: beta {args.beta}, learning rate {args.learning_rate}.",
            "",
            "## Citation",
            "",
            "```bibtex",
            _CITATION,
            "```",
            "",
        ]
    )
