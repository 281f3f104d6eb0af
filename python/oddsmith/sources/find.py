"""Loads preference pairs from the hub, files, folders of files or saved datasets."""

import json
from pathlib import Path
from typing import Any, cast

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from ..errors import UserError
from .image_paths import LocatedPictures
from .json_records import LONGEST
from .records import DECOMPRESSORS, find_damage
from .row_count import count_rows

# The `datasets` builder of each kind of file; it also decompresses .gz and similar files.
BUILDERS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet"}
COMPRESSIONS = tuple(DECOMPRESSORS)
# Files next to data files that are not data.
METADATA = ("dataset_info.json", "dataset_infos.json", "summary.json")
SUMMARY_SUFFIX = ".summary.json"
# UltraFeedback's names first: its `train` split is for supervised training and has no pairs.
TRAIN_SPLITS = ("train_prefs", "train")
TEST_SPLITS = ("test_prefs", "test", "validation", "valid", "eval", "dev")


def file_kind(path: Path) -> str | None:
    """Builder of a data file, by its name; `None` if it is not a data file."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return BUILDERS.get(suffixes[-1]) if suffixes else None


def is_path(name: str) -> bool:
    """Whether a dataset's name must be a path: a hub id looks like `owner/name`."""
    return (
        name.startswith(("/", "./", "../", "~"))
        or name.endswith("/")
        or name.count("/") > 1
        or file_kind(Path(name)) is not None
    )


def load_source(name: str, config: str | None = None, longest: int = LONGEST) -> DatasetDict:
    """Loads a dataset with all its splits.

    Args:
        name (`str`):
            Path of a `.jsonl`, `.json` or `.parquet` file (compressed or not), of a folder of such
            files, of a folder that `save_to_disk` wrote, or id of a dataset on the hub.
        config (`str`, *optional*):
            Configuration of a hub dataset.
        longest (`int`, *optional*, defaults to 64 MB):
            Most bytes of a row of a JSON file.

    Returns:
        `DatasetDict`: The splits; a single file or saved dataset is the split `train`.

    Raises:
        UserError: If there is no such dataset, or it cannot be read.
    """
    path = Path(name).expanduser()
    if path.exists():
        try:
            loaded = load_local(path, longest)
        except UserError:
            raise
        except Exception as error:  # pyarrow, json, datasets: no common exception type
            # Arrow and datasets do not report the line; read the files again to find it.
            damage = find_damage([file for files in local_splits(path).values() for file in files])
            raise UserError(f"dataset {name} cannot be read: {damage or reason(error)}") from error
    elif is_path(name):
        raise UserError(f"dataset {name}: no such file or folder")
    else:
        try:
            loaded = cast(DatasetDict, load_dataset(name, config))
        except Exception as error:
            raise UserError(
                f"dataset {name} is not a local path and cannot be loaded from the hub: "
                f"{reason(error)}"
            ) from error
    return loaded if isinstance(loaded, DatasetDict) else DatasetDict({"train": loaded})


def reason(error: BaseException) -> str:
    """The innermost message of an error, its first line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__


def load_local(path: Path, longest: int = LONGEST) -> Dataset | DatasetDict:
    if path.is_dir() and is_saved(path):
        return load_from_disk(str(path))
    files = data_files(path)
    if path.is_file():
        return DatasetDict({"train": _load_files([str(path)], path, longest)})
    # One by one: datasets requires the same columns in all splits of a call, but UltraFeedback's
    # supervised splits have other columns than its preference splits.
    return DatasetDict(
        {split: _load_files(group, path, longest) for split, group in group_by_split(files).items()}
    )


def _load_files(names: list[str], path: Path, longest: int) -> Dataset:
    """The rows of data files of one kind, all of them."""
    files = [Path(name) for name in names]
    kind = file_kind(files[0]) or "json"
    rows = None
    if kind == "json":
        try:
            rows = count_rows(files, longest)
        except UserError as error:
            raise UserError(f"dataset {path} cannot be read: {error}") from error
    loaded = cast(Dataset, load_dataset(kind, data_files=names, split="train"))
    if rows is not None and len(loaded) != rows:
        raise UserError(
            f"dataset {path} cannot be read: it has {rows:,} rows, of which datasets reads {len(loaded):,}; "
            "oddsmith prepare writes a file that it reads"
        )
    return LocatedPictures({file.parent for file in files}, str(path)).of(loaded)


def data_files(path: Path) -> list[Path]:
    """
    The data files of a path: the file itself, or those of a folder, all of one kind.

    Raises:
        UserError: If the path is not a data file, or the folder has none, or files of two kinds.
    """
    if path.is_file():
        if file_kind(path) is None:
            raise UserError(
                f"dataset {path}: files can be .jsonl, .json or .parquet, or these with "
                f"{', '.join(COMPRESSIONS)} appended"
            )
        if path.stat().st_size == 0:
            raise UserError(f"dataset {path} is empty")
        return [path]
    files = sorted(file for file in path.rglob("*") if file.is_file() and file_kind(file))
    # Many folders also have metadata such as dataset_info.json, or the report of `oddsmith
    # prepare`.
    files = [
        file
        for file in files
        if file.name not in METADATA and not file.name.endswith(SUMMARY_SUFFIX)
    ]
    if not files:
        raise UserError(
            f"dataset {path}: the folder has no .jsonl, .json or .parquet file and is not a saved "
            "dataset"
        )
    kinds = {file_kind(file) for file in files if file.suffix != ".json"} or {"json"}
    if len(kinds) > 1:
        raise UserError(f"dataset {path}: the folder mixes json and parquet files; name one file")
    return [file for file in files if file_kind(file) in kinds]


def is_saved(path: Path) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def saved_files(path: Path) -> dict[str, list[Path]]:
    """
    The Arrow files of a folder that `save_to_disk` wrote, by split, in order.

    Raises:
        UserError: If its list of files cannot be read.
    """
    try:
        if (path / "dataset_dict.json").is_file():
            splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
            folders = {split: path / split for split in splits}
        else:
            folders = {"train": path}
        return {
            split: [
                folder / file["filename"]
                for file in json.loads((folder / "state.json").read_text())["_data_files"]
            ]
            for split, folder in folders.items()
        }
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"dataset {path} cannot be read: {reason(error)}") from error


def local_splits(path: Path) -> dict[str, list[Path]]:
    """Data files of a path by split."""
    if path.is_dir() and is_saved(path):
        return saved_files(path)
    files = data_files(path)
    if path.is_file():
        return {"train": files}
    return {split: [Path(file) for file in group] for split, group in group_by_split(files).items()}


def group_by_split(files: list[Path]) -> dict[str, list[str]]:
    """Groups files by the split in their names: `test.jsonl`, `test_prefs-00000-of-00001.parquet`.

    Files that name no split are training data.
    """
    groups: dict[str, list[str]] = {}
    # The longest name first: `test` is a beginning of `test_prefs`.
    known = sorted({*TRAIN_SPLITS, *TEST_SPLITS}, key=len, reverse=True)
    for file in files:
        split = "train"
        for name in known:
            if file.name == name or file.name.startswith((f"{name}.", f"{name}-", f"{name}_")):
                split = name
                break
        groups.setdefault(split, []).append(str(file))
    return groups


def pick_split(
    splits: DatasetDict, wanted: str | None, candidates: tuple[str, ...], flag: str
) -> Dataset | None:
    """Picks a split by name, or the first of `candidates` that exists.

    Raises:
        UserError: If `wanted` is given and absent.
    """
    if wanted is not None:
        if wanted not in splits:
            raise UserError(f"{flag} is {wanted!r}; the dataset has {', '.join(map(str, splits))}")
        return splits[wanted]
    for name in candidates:
        if name in splits:
            return splits[name]
    return None


def check_rows(dataset: Dataset, what: str) -> Dataset:
    """
    Check that a dataset has rows; the trainer looks for the pairs in them.

    Raises:
        UserError: If it is empty.
    """
    if len(dataset) == 0:
        raise UserError(f"{what} has no rows")
    return dataset


def load_pairs(run: Any, evaluates: bool) -> tuple[Dataset, Dataset | None]:
    """Loads the training and evaluation rows of `oddsmith train`.

    Args:
        run (`RunArguments`): The names of datasets and splits.
        evaluates (`bool`): Whether the run evaluates, so that evaluation rows are required.

    Returns:
        `tuple[Dataset, Dataset | None]`: Training rows, and evaluation rows if the run has them.

    Raises:
        UserError: If anything is missing.
    """
    longest = run.max_line_mb << 20
    splits = load_source(run.dataset_name, run.dataset_config, longest)
    single = tuple(map(str, splits)) if len(splits) == 1 else ()
    train = pick_split(
        splits, run.dataset_train_split, TRAIN_SPLITS + single, "--dataset_train_split"
    )
    if train is None:
        raise UserError(
            f"dataset {run.dataset_name} has the splits {', '.join(map(str, splits))}; name the one to "
            "train on with --dataset_train_split"
        )
    train = check_rows(train, f"dataset {run.dataset_name}")
    if not (evaluates or run.eval_dataset_name or run.dataset_test_split):
        return train, None
    test_splits = TEST_SPLITS
    if run.eval_dataset_name:
        splits = load_source(run.eval_dataset_name, longest=longest)
        # A separate dataset: any split is for evaluation, even the `train` of a single file.
        test_splits += TRAIN_SPLITS + tuple(map(str, splits))
    test = pick_split(splits, run.dataset_test_split, test_splits, "--dataset_test_split")
    if test is None:
        raise UserError(
            f"--eval_strategy needs rows to evaluate on, and dataset {run.dataset_name} only has "
            f"{', '.join(map(str, splits))}; give --eval_dataset or --dataset_test_split"
        )
    name = run.eval_dataset_name or run.dataset_name
    return train, check_rows(test, f"dataset {name} (evaluation)")
