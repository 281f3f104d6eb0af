"""The model card: what was trained, how, and whom to cite."""


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
