"""`oddsmith inspect`: checks a dataset without training on it or loading it into memory."""

import json
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm

from ..data.chat import TEXT_FIELDS, is_messages, row_text
from ..data.image_rows import ImageRows
from ..data.pictures import IMAGE_COLUMNS
from ..data.processor import load_processor, template_source, tokenizer_of
from ..data.rows import RowBuilder
from ..data.rust_rows import OVERLENGTH, FastRows, fast_rows_for
from ..data.tokenizer import FALLBACK_CHAT_TEMPLATE, ensure_pad_token
from ..errors import UserError, user_errors
from ..sources.json_records import LONGEST
from ..sources.records import Record
from ..sources.stream import RecordStream
from .histogram import draw_bars, save_histogram
from .pair_reader import PairReader
from .path import find_path
from .report import SAMPLE, DataReport, repeats_prompt
from .token_stats import Finding, Ragged, TokenRows, TokenStats, needed

# Rows tokenised at once, by all cores.
_BATCH = 1000
# Rows whose images are opened at once.
_IMAGE_ROWS = 16
_NO_TOKENS = {
    **dict.fromkeys(TEXT_FIELDS, ""),
    **{name: [] for name in ("chosen_input_ids", "chosen_labels", "rejected_labels")},
}
# Rows at the start on which Rust and the tokenizer must agree.
_COMPARED = 16


def run_inspect(
    dataset: str,
    model: str,
    *,
    config: str | None = None,
    split: str | None = None,
    rows: int | None = None,
    max_length: int = 1024,
    max_prompt_length: int | None = None,
    overlength: str = "truncate",
    batch_size: int = 2,
    chat_template: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    as_json: bool = False,
    histogram: str | None = None,
    column_mapping: Mapping[str, str] | None = None,
    args: Any = None,
    peft_config: Any = None,
    longest: int = LONGEST,
) -> DataReport:
    """
    Prints the report of a dataset, with a histogram of its lengths, and how its batches would go
    through the model.

    Args:
        dataset (`str`): File, folder or hub id.
        model (`str`): Folder or hub id of the tokenizer, and of the model's configuration if any.
        config (`str`, *optional*): Configuration of a hub dataset.
        split (`str`, *optional*): Split; the training split if not given.
        rows (`int`, *optional*): Most rows to read.
        max_length (`int`, *optional*): As in [`ORPOConfig`].
        max_prompt_length (`int`, *optional*): As in [`ORPOConfig`].
        overlength (`str`, *optional*): As in [`ORPOConfig`].
        batch_size (`int`, *optional*): Pairs per batch, for the share of padding.
        chat_template (`str`, *optional*): File with a template to use for conversations.
        revision (`str`, *optional*): Branch, tag or commit of a hub model.
        trust_remote_code (`bool`, *optional*): Allow code from the tokenizer's repository.
        as_json (`bool`, *optional*): Print only the figures, as JSON.
        histogram (`str`, *optional*): Path of a plot to write.
        column_mapping (`Mapping[str, str]`, *optional*): Names of columns, such as
            `{"question": "prompt"}`.
        args ([`ORPOConfig`], *optional*): The arguments of a run, for its path.
        peft_config (`PeftConfig`, *optional*): The adapter of a run, for its path.
        longest (`int`, *optional*, defaults to 64 MB): Most bytes of a row of a JSON file.

    Returns:
        [`DataReport`]: The report.

    Raises:
        UserError: If dataset or tokenizer cannot be read, or a row is not a pair; the message has
            file and line.
    """
    tokenizer = load_tokenizer(model, chat_template, revision, trust_remote_code)
    with user_errors(""):
        builder = RowBuilder(tokenizer_of(tokenizer), max_length, max_prompt_length)
    if histogram is not None and not Path(histogram).suffix:
        raise UserError(f"--histogram {histogram}: needs a suffix such as .png")
    stream = RecordStream(dataset, config, split, longest)
    report = inspect_stream(
        stream,
        tokenizer,
        builder,
        rows=rows,
        overlength=overlength,
        batch_size=batch_size,
        column_mapping=column_mapping,
    )
    shared, chosen, rejected = report.stats.lengths()
    if histogram is not None:
        sides = {"prompt": shared, "prompt and chosen": chosen, "prompt and rejected": rejected}
        with user_errors(f"--histogram {histogram}"):
            save_histogram(sides, histogram, dataset, max_length)
    images = report.images is not None
    path = find_path(_place(model), revision, trust_remote_code, images, args, peft_config)
    if as_json:
        figures = report.figures()
        if path is not None:
            figures["path"] = {"batches": path.batches, "head": path.head, "reasons": path.reasons}
        print(json.dumps(figures, indent=2))
        return report
    print(report)
    print(draw_bars(chosen, "  tokens of prompt and chosen answer", max_length))
    if path is not None:
        print(f"  model: {path}")
    if histogram is not None:
        print(f"  plot: {histogram}")
    return report


def _place(model: str) -> str:
    path = Path(model).expanduser()
    return str(path) if path.exists() else model


def load_tokenizer(
    model: str, chat_template: str | None, revision: str | None, trust_remote_code: bool
) -> Any:
    """
    Load only the tokenizer, or the processor of an image-text model, not the model's weights.

    Raises:
        UserError: If there is no tokenizer, or the template cannot be read.
    """
    path = Path(model).expanduser()
    if not path.exists() and (model.startswith(("/", "./", "../", "~")) or model.count("/") > 1):
        raise UserError(f"--model {model}: no such folder")
    with user_errors(f"--model {model}"):
        tokenizer = load_processor(_place(model), revision, trust_remote_code)
        ensure_pad_token(tokenizer_of(tokenizer))
    if chat_template is not None:
        with user_errors("--chat_template"):
            template = Path(chat_template).expanduser()
            tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer


def inspect_stream(
    stream: RecordStream,
    tokenizer: Any,
    builder: RowBuilder,
    *,
    rows: int | None = None,
    overlength: str = "truncate",
    batch_size: int = 2,
    column_mapping: Mapping[str, str] | None = None,
) -> DataReport:
    """
    Tokenises a dataset chunk by chunk and keeps figures, not tokens.

    Args:
        stream ([`RecordStream`]): The rows.
        tokenizer (`PreTrainedTokenizerBase` or `ProcessorMixin`): The tokenizer or processor; gets
            the fallback template of `oddsmith train` if necessary.
        builder ([`RowBuilder`]): Makes tokens from text.
        rows (`int`, *optional*): Most rows to read.
        overlength (`str`, *optional*): `"drop"` excludes rows that are too long.
        batch_size (`int`, *optional*): Pairs per batch.
        column_mapping (`Mapping[str, str]`, *optional*): Names of columns.

    Returns:
        [`DataReport`]: The report.

    Raises:
        UserError: If a row cannot be read or is not a pair; the message has file, line and field.
    """
    own = builder.processing_class
    stats = TokenStats(
        own.bos_token_id,
        own.eos_token_id,
        builder.max_length,
        max_prompt_length=builder.max_prompt_length,
    )
    reader = PairReader(column_mapping or {}, stream.name)
    twice, seen, too_long, sampled, fast = Finding(), 0, 0, 0, None
    image_rows: ImageRows | None = None
    images: list[int] = []
    with closing(stats), closing(_batches(stream, rows)) as batches:
        for batch in batches:
            pairs = reader.read(batch)
            if seen == 0:
                _ensure_template(template_source(tokenizer), pairs[0])
                if any(pairs[0].get(name) is not None for name in IMAGE_COLUMNS):
                    with user_errors(batch[0].where):
                        image_rows = ImageRows(tokenizer, builder)
            reader.notes.look_for_repeats(enumerate(pairs, seen))
            where = [record.where for record in batch]
            if image_rows is not None:
                texts, columns, flags, counts = _image_tokens(
                    image_rows, pairs, where, overlength == "drop"
                )
                images += counts
            else:
                texts = [
                    _text(pair, place, tokenizer) for pair, place in zip(pairs, where, strict=True)
                ]
                if seen == 0:
                    sample = texts[:: -(-len(texts) // _COMPARED)]
                    fast = fast_rows_for(builder, sample, stream.name)
                columns, flags = _tokens(builder, fast, texts, where)
            too_long += int(flags.sum())
            kept = np.flatnonzero(~flags) if overlength == "drop" else np.arange(len(batch))
            if len(kept):
                chosen = {name: Ragged.of_arrow(part.take(kept)) for name, part in columns.items()}
                stats.add(TokenRows.of_columns(chosen), seen + kept, cut=flags[kept])
            # Check texts of all rows up to the sample size, then of a few rows in each chunk.
            step = 1 if sampled < SAMPLE else 20
            for index in range(0, len(texts), step):
                row = dict(zip(TEXT_FIELDS, texts[index], strict=True))
                sampled += 1
                if repeats_prompt(row):
                    twice.count += 1
                    twice.first = seen + index if twice.first is None else twice.first
            seen += len(batch)
    if not seen:
        raise UserError(f"dataset {stream.name} has no rows")
    repeated = reader.notes.repeated
    if len(repeated) > twice.count:
        twice, sampled = Finding(len(repeated), repeated[0]), reader.notes.repeated_of
    return DataReport(
        stream.name,
        stats,
        batch_size,
        {"prompt_twice": twice},
        sampled,
        too_long,
        overlength,
        partial=rows is not None and seen == rows,
        unused=reader.notes.unused,
        images=images if image_rows is not None else None,
    )


def _image_tokens(
    rows: ImageRows, pairs: Sequence[Mapping[str, Any]], where: Sequence[str], drop: bool
) -> tuple[list[tuple[str, str, str]], dict[str, pa.Array], np.ndarray, list[int]]:
    """
    Texts, columns of tokens, which rows are too long, and images of each other row. With `drop`,
    those that are too long are empty.
    """
    made: list[dict[str, Any]] = []
    flags, images = np.zeros(len(pairs), bool), []
    with user_errors(""):
        # A few at a time: their pixel values are in memory together.
        for start in range(0, len(pairs), _IMAGE_ROWS):
            part = range(start, min(start + _IMAGE_ROWS, len(pairs)))
            if drop:
                flags[part] = [not rows.fits(pairs[i], where[i]) for i in part]
            kept = [i for i in part if not (drop and flags[i])]
            built = rows.build([pairs[i] for i in kept], [where[i] for i in kept])
            images += built.images
            found = dict(zip(kept, zip(built.rows, built.overlength, strict=True), strict=True))
            for index in part:
                row, flags[index] = found.get(index, (_NO_TOKENS, True))
                made.append(row)
    prompt, chosen, rejected = TEXT_FIELDS
    texts = [(row[prompt], row[chosen], row[rejected]) for row in made]
    columns = {
        name: pa.array([row[name] for row in made], pa.list_(pa.int64()))
        for name in needed(_NO_TOKENS)
    }
    return texts, columns, flags, images


def _tokens(
    builder: RowBuilder,
    fast: FastRows | None,
    texts: list[tuple[str, str, str]],
    where: Sequence[str],
) -> tuple[dict[str, pa.Array], np.ndarray]:
    """Columns of tokens for the figures, and which rows are too long."""
    prompts, chosen, rejected = zip(*texts, strict=True)
    if fast is not None:
        try:
            parts = (prompts, chosen, rejected)
            made = fast.columns(*(pa.array(part, pa.large_string()) for part in parts))
            return {name: made[name] for name in needed(made)}, np.asarray(made[OVERLENGTH])
        except ValueError:
            pass  # the builder reports the file and line of the row
    with user_errors(""):
        rows, flags = builder.tokenize_batch(prompts, chosen, rejected, where)
    columns = {name: pa.array([row[name] for row in rows]) for name in needed(rows[0])}
    return columns, np.array(flags, bool)


def _batches(stream: RecordStream, rows: int | None) -> Generator[list[Record], None, None]:
    records = islice(iter(stream), rows)
    known = stream.size is not None and rows is None
    with tqdm(
        total=stream.size if known else rows,
        desc="tokenizing",
        unit="B" if known else "rows",
        unit_scale=True,
        delay=1.0,
    ) as bar:
        count = 0
        while batch := list(islice(records, _BATCH)):
            yield batch
            count += len(batch)
            bar.update((stream.done if known else count) - bar.n)


def _ensure_template(tokenizer: Any, pair: Mapping[str, Any]) -> None:
    # As `oddsmith train` does for base models, so that the figures match its rows.
    if is_messages(pair["chosen"]) and tokenizer.chat_template is None:
        tokenizer.chat_template = FALLBACK_CHAT_TEMPLATE


def _text(pair: Mapping[str, Any], where: str, tokenizer: Any) -> tuple[str, str, str]:
    with user_errors(""):
        return row_text(pair, tokenizer, where)
