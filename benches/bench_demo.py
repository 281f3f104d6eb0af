"""What `oddsmith demo` learns: scores on the held-out pairs before and after training.

    python benches/bench_demo.py [--steps 900] [--seed 0] [--threads 2] [--record]

Accuracy is the share of pairs whose chosen answer is more likely than the rejected one. Exact is the share of answers that
the model writes without an error.
"""

from __future__ import annotations

import tempfile

import torch

from oddsmith.demo import run as demo
from side_by_side import Report, flags


def main() -> None:
    parser = flags(__doc__, repeats=1)
    parser.add_argument("--steps", type=int, help=f"of training (default {demo.STEPS})")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    steps = args.steps or (2 if args.tiny else demo.STEPS)
    if args.tiny:
        demo.TRAIN_ROWS, demo.TEST_ROWS = 480, 48
    report = Report("bench_demo", args, ("transformers",))
    with tempfile.TemporaryDirectory() as folder:
        results = demo.run_demo(folder, steps=steps, seed=args.seed)
    for moment in ("before", "after"):
        for task, scores in results[moment].items():
            case = f"oddsmith demo, {steps} steps, held-out pairs of {task}, {moment} training"
            for metric in ("accuracy", "margin", "exact"):
                value, unit = scores[metric], "nats" if metric == "margin" else "%"
                values = [value if metric == "margin" else 100 * value]
                report.add(f"demo_{task}_{metric}_{moment}", case, "oddsmith", metric, unit, values)
    case = f"oddsmith demo, {steps} steps, all of it"
    report.add("demo_time", case, "oddsmith", "time", "s", [results["seconds"]])


if __name__ == "__main__":
    main()
