"""Small data in the shape of ultrafeedback_binarized."""

from oddsmith.demo.tasks import make_pairs


def ultrafeedback_rows(count: int, seed: int) -> list[dict]:
    """Rows with a bare prompt beside whole conversations."""
    return [
        {
            "prompt": row["prompt"][0]["content"],
            "prompt_id": f"{seed}-{index}",
            "chosen": row["prompt"] + row["chosen"],
            "rejected": row["prompt"] + row["rejected"],
            "messages": row["prompt"] + row["chosen"],
            "score_chosen": 8.0,
            "score_rejected": 3.5,
        }
        for index, row in enumerate(make_pairs(count, seed))
    ]
