"""The model card: model, data, settings and citation."""

from oddsmith import ORPOConfig
from oddsmith.training.model_card import CITATION, model_card


def test_model_card(make, tmp_path):
    trainer = make()
    trainer.create_model_card(model_name="mine", dataset_name="org/pairs", tags="extra")
    text = (tmp_path / "README.md").read_text()
    assert "2403.07691" in text and "| beta | 0.3 |" in text and "datasets: org/pairs" in text
    assert [line for line in text.splitlines() if line.startswith("- ")] == [
        "- extra",
        "- oddsmith",
        "- orpo",
    ]


def test_the_card_of_arguments(tmp_path):
    args = ORPOConfig(
        str(tmp_path), beta=0.25, beta_end=0.05, beta_schedule="cosine", learning_rate=8e-6,
        nll_scope="completion", max_length=640, use_cpu=True,
    )  # fmt: skip
    text = model_card(args, "mine", "org/base", "org/pairs", ["orpo", "extra"])
    head, body = text.split("---\n")[1:]
    assert head == (
        "library_name: transformers\nmodel_name: mine\nbase_model: org/base\n"
        "datasets: org/pairs\ntags:\n- extra\n- orpo\n"
    )
    assert "# mine\n" in body
    assert "Trained from [org/base](https://huggingface.co/org/base) on org/pairs" in body
    for row in (
        "| beta | 0.25, cosine to 0.05 |",
        "| likelihood over | completion |",
        "| learning rate | 8e-06 (linear) |",
        "| longest sequence | 640 |",
    ):
        assert row in body
    assert CITATION in body and text.endswith("```\n")


def test_the_card_without_names(tmp_path):
    text = model_card(ORPOConfig(str(tmp_path), use_cpu=True), None, None, None, ["orpo"])
    head, body = text.split("---\n")[1:]
    assert head == "library_name: transformers\ntags:\n- orpo\n"
    assert "# Model\n" in body and "Trained from its base model with ORPO" in body
    assert "| beta | 0.1 |" in body
