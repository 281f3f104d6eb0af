"""Flags of `oddsmith prepare` and `oddsmith inspect`. Imports no slow library, for fast help."""

import argparse
import json
from typing import Any

from .flags import add, positive
from .near_misses import Parser

FORMATS = (
    "auto",
    "pairs",
    "hh",
    "comparisons",
    "ultrafeedback",
    "oasst",
    "oasst_trees",
    "scored",
    "responses",
)


def prepare_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="oddsmith prepare",
        description="Make preference pairs from UltraFeedback, OpenAssistant trees, HH-RLHF "
        "dialogues, or any scored or ranked answers; drop pairs that are not useful; report what "
        "happened to every row.",
        epilog="Input is streamed: files may be larger than memory.",
    )
    parser.add_argument(
        "datasets",
        nargs="+",
        metavar="DATASET",
        help=".jsonl, .json or .parquet file (.gz too), folder, or hub id",
    )
    add(
        parser,
        "output",
        required=True,
        metavar="FILE",
        help=".jsonl, .jsonl.gz or .parquet; a summary is written next to it as NAME.summary.json",
    )
    add(parser, "overwrite", action="store_true", help="replace FILE if it exists")
    _add_source(parser)
    add(parser, "temp_dir", metavar="DIR", help="for temporary files, up to the size of the input")
    _add_input(parser.add_argument_group("input"))
    _add_rules(parser.add_argument_group("rules"))
    return parser


def _add_source(parser: argparse.ArgumentParser) -> None:
    add(parser, "dataset_config", metavar="NAME", help="configuration of a hub dataset")
    add(parser, "split", metavar="NAME", help="default: train_prefs or train, or the only split")
    add(
        parser,
        "max_line_mb",
        type=positive,
        default=64,
        metavar="N",
        help="longest row of a JSON file, in megabytes (default: %(default)s)",
    )


def _add_input(group: Any) -> None:
    add(
        group,
        "format",
        choices=FORMATS,
        default="auto",
        help="pairs: chosen and rejected, as in UltraFeedback-binarized; hh: HH-RLHF dialogues; "
        "comparisons: two answers and a verdict, as in SHP and Chatbot Arena; "
        "ultrafeedback: prompts with rated completions; oasst, oasst_trees: OpenAssistant messages "
        "or ready trees; scored: a list of answers per row; responses: one answer per row "
        "(default: detected from the first row)",
    )
    add(
        group,
        "pairing",
        choices=("best_worst", "best_random", "all"),
        default="best_worst",
        help="which answers form pairs (default: %(default)s)",
    )
    add(
        group,
        "prompt_column",
        default="prompt",
        metavar="NAME",
        help="default: %(default)s, or one of the usual names",
    )
    add(group, "responses_column", metavar="NAME", help="list of answers: texts or objects")
    add(group, "response_column", metavar="NAME", help="one answer; rows of a prompt are joined")
    add(
        group,
        "scores_column",
        metavar="NAME",
        help="scores, higher is better; a list for an answer has one score per annotator",
    )
    add(group, "ranks_column", metavar="NAME", help="ranks, lower is better; lists as for scores")
    add(group, "text_key", metavar="KEY", help="text of an answer that is an object")
    add(group, "score_key", metavar="KEY", help="score of an answer that is an object")
    add(group, "rank_key", metavar="KEY", help="rank of an answer that is an object")
    add(
        group,
        "lang_column",
        metavar="NAME",
        help="language code of a row (default: lang or language, if any)",
    )
    add(
        group,
        "bad_rows",
        choices=("stop", "drop"),
        default="stop",
        help="lines that are not JSON, missing or mistyped fields: stop and name the line, or drop "
        "and count (default: %(default)s)",
    )


def _add_rules(group: Any) -> None:
    add(
        group,
        "min_score",
        type=float,
        metavar="X",
        help="drop pairs whose chosen answer scores lower than this (UltraFeedback's mean "
        "ratings: 1 to 5; OpenAssistant's quality: 0 to 1)",
    )
    add(
        group,
        "min_gap",
        type=float,
        default=0.0,
        metavar="X",
        help="drop pairs whose scores differ by less than this (default: drop equal scores)",
    )
    add(group, "keep_ties", action="store_true", help="keep pairs of equal scores")
    add(
        group,
        "min_agreement",
        type=float,
        default=0.6,
        metavar="SHARE",
        help="drop pairs where a smaller share of annotators, or of rated aspects, prefers "
        "the chosen answer; 0 keeps all (default: %(default)s)",
    )
    add(
        group,
        "languages",
        nargs="+",
        default=[],
        metavar="CODE",
        help="keep these languages, such as en de: by the row's language code, else by script and "
        "frequent words; uncertain rows are kept",
    )
    add(group, "keep_duplicates", action="store_true", help="keep repeated prompts")
    add(
        group,
        "near_duplicates",
        type=float,
        metavar="SIMILARITY",
        help="drop prompts this similar to an earlier one, such as 0.8 (MinHash estimate of shared "
        "5-character pieces; default: count them only)",
    )


def run_prepare(argv: list[str]) -> int:
    """`oddsmith prepare`; returns the exit code."""
    flags = prepare_parser().parse_args(argv)
    from ..errors import UserError
    from ..prepare.curation import Rules
    from ..prepare.formats import ReadOptions
    from ..prepare.run import run_prepare as run
    from ..prepare.scored import Columns

    try:
        columns = Columns(
            prompt=flags.prompt_column,
            responses=flags.responses_column,
            response=flags.response_column,
            scores=flags.scores_column,
            ranks=flags.ranks_column,
            text_key=flags.text_key,
            score_key=flags.score_key,
            rank_key=flags.rank_key,
            lang=flags.lang_column,
        )
        options = ReadOptions(
            flags.format, flags.pairing, flags.bad_rows == "stop", columns, flags.temp_dir
        )
        rules = Rules(
            flags.min_score,
            flags.min_gap,
            flags.keep_ties,
            flags.min_agreement,
            frozenset(code.lower() for code in flags.languages),
            flags.keep_duplicates,
            flags.near_duplicates,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    run(
        flags.datasets,
        flags.output,
        options,
        rules,
        config=flags.dataset_config,
        split=flags.split,
        overwrite=flags.overwrite,
        temp_dir=flags.temp_dir,
        longest=flags.max_line_mb << 20,
    )
    return 0


def inspect_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="oddsmith inspect",
        description="Check a preference dataset: token lengths, rows that are too long, repeated prompts, "
        "likely mistakes, and the cost of padding and of computing prompts twice.",
    )
    parser.add_argument(
        "dataset",
        metavar="DATASET",
        help=".jsonl, .json or .parquet file (.gz too), folder, or hub id; rows as for train",
    )
    add(
        parser,
        "model",
        required=True,
        metavar="M",
        help="folder or hub id of the tokenizer; with the model's configuration, how its batches "
        "would be computed is shown too",
    )
    add(parser, "model_revision", metavar="REV", help="branch, tag or commit of a hub model")
    add(
        parser,
        "settings",
        metavar="FILE",
        help="settings file of oddsmith train, whose options and adapter decide how batches would be "
        "computed (default: no adapter, default options)",
    )
    _add_source(parser)
    add(parser, "rows", type=positive, metavar="N", help="read the first N rows (default: all)")
    add(parser, "max_length", type=positive, default=1024, metavar="N", help="default: %(default)s")
    add(parser, "max_prompt_length", type=positive, metavar="N", help="as for train")
    add(
        parser,
        "overlength",
        choices=("truncate", "drop"),
        default="truncate",
        help="what to do with rows that are too long (default: %(default)s)",
    )
    add(
        parser,
        "batch_size",
        type=positive,
        default=2,
        metavar="N",
        help="pairs per batch, for the share of padding (default: %(default)s)",
    )
    add(parser, "chat_template", metavar="FILE", help="Jinja chat template for conversations")
    add(parser, "prompt_column", metavar="NAME", help="column that is the prompt")
    add(
        parser,
        "column_mapping",
        type=json.loads,
        metavar="JSON",
        help='names of columns, such as \'{"question": "prompt"}\'',
    )
    add(
        parser,
        "trust_remote_code",
        action="store_true",
        help="allow code from the tokenizer's repository",
    )
    add(parser, "json", action="store_true", help="print figures as JSON")
    add(parser, "histogram", metavar="FILE", help="plot of the lengths (.png, .svg, .pdf)")
    return parser


def run_inspect(argv: list[str]) -> int:
    """`oddsmith inspect`; returns the exit code."""
    flags = inspect_parser().parse_args(argv)
    from ..data.layouts import parse_column_mapping
    from ..errors import user_errors
    from ..inspection.run import run_inspect as run

    with user_errors(""):
        mapping = parse_column_mapping(flags.column_mapping, flags.prompt_column)
    args, peft_config = _settings(flags)
    run(
        flags.dataset,
        flags.model,
        args=args,
        peft_config=peft_config,
        config=flags.dataset_config,
        split=flags.split,
        rows=flags.rows,
        max_length=flags.max_length,
        max_prompt_length=flags.max_prompt_length,
        overlength=flags.overlength,
        batch_size=flags.batch_size,
        chat_template=flags.chat_template,
        revision=flags.model_revision,
        trust_remote_code=flags.trust_remote_code,
        as_json=flags.json,
        histogram=flags.histogram,
        column_mapping=mapping,
        longest=flags.max_line_mb << 20,
    )
    return 0


def _settings(flags: argparse.Namespace) -> tuple[Any, Any]:
    """The arguments and the adapter of a run of `oddsmith train`, or None for both."""
    if flags.settings is None:
        return None, None
    from .train import make_adapter, model_init_kwargs
    from .train_flags import parse_train_arguments

    names = ["--model", flags.model, "--dataset", flags.dataset]
    run, adapter, config = parse_train_arguments([flags.settings, *names])
    config.model_init_kwargs = model_init_kwargs(run, config)
    return config, make_adapter(adapter)
