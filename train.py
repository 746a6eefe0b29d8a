#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Fine-tune a Gaussian anomaly detector on the normal images of a category.

    python train.py --data mvtec/ --category screw
    torchrun --nproc-per-node 8 train.py --data mvtec/ --category all
    python train.py --normal photos/good --out runs/mine
    python train.py --demo

Writes detector.pt and history.json to runs/<category>; never opens the test folder. The same
command resumes a run that was interrupted and leaves a finished one alone; other settings, other
images or --force train from scratch."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import sys
import time
import warnings
from argparse import SUPPRESS, ArgumentParser, Namespace
from argparse import RawDescriptionHelpFormatter as Formatter
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor, distributed
from torch.utils.data import DataLoader

import gaussad
from gaussad import AUGMENTATIONS, BLANKS, Check, FeatureExtractor, GaussianAD

NO_SETTINGS = {"data", "normal", "out", "device", "workers", "force", "demo"}  # make no other run
DEMO = {"backbone": "mobilenet_v2", "weights": "random", "levels": [3, 4, 7], "image_size": 128}
DEMO |= {"steps": 64, "out": Path("runs/demo")}  # no download; early levels help even at random
LIMITS = {"image_size": (32, 4096), "steps": (0, 10**9), "lr": (0, 1e38), "seed": (0, 2**63 - 1)}
LIMITS |= dict.fromkeys(("patience", "batch_size", "workers"), (1, 10**9))
FOLDERS = ("train", "test", "ground_truth")  # of a category
EVALUATION = ("metrics.json", "scores.csv", "report.html")  # what evaluate.py writes


def main(argv: Sequence[str] | None = None) -> int:
    """Train what the command line asks for. Returns the exit code."""
    args = parse(sys.argv[1:] if argv is None else argv)
    device = gaussad.pick_device(args.device)
    if args.demo:
        args.data, args.category = args.out / "data", ["demo"]
        draw_demo(args.data)
    runs, failed = list_runs(args), False
    if distributed.is_torchelastic_launched():  # by torchrun: this process takes its share
        runs = runs[int(os.environ["RANK"]) :: int(os.environ["WORLD_SIZE"])]
    for run in runs:
        try:
            train(run, device)
        except Exception as error:
            failed = True
            print_error(error, run.category or run.normal)
    if distributed.is_torchelastic_launched():  # torchrun ends all processes when one has failed
        distributed.init_process_group("gloo", timeout=timedelta(days=365))
        distributed.barrier()
    if args.demo and runs and not failed:
        import evaluate  # which imports this module

        return evaluate.main([*evaluate_options(runs[0]), "--device", args.device])
    return 2 if failed else 0


def parse(argv: Sequence[str]) -> Namespace:
    """The options; a wrong one ends the program with one line and exit code 2."""
    kind = {"formatter_class": Formatter, "allow_abbrev": False}
    parser = ArgumentParser(usage=SUPPRESS, description=__doc__, **kind)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, help="folder of categories in the MVTec AD layout")
    source.add_argument("--normal", type=Path, help="a plain folder of normal images")
    source.add_argument("--demo", action="store_true", help="draw data, train and evaluate on it")
    add = parser.add_argument
    add("--category", nargs="+", help="folders in --data; all: every one")
    add("--out", type=Path, help="folder of the run, or of the runs of several categories (runs)")
    add("--force", action="store_true", help="retrain from scratch")
    add("--backbone", default="efficientnet_b4", help="torchvision's, or a .py file")
    add("--weights", default="imagenet", help="imagenet, random, or the path of a state dict")
    add("--levels", type=int, nargs="+", help="levels to use, from 1 (stride 16 or more)")
    add("--map-levels", type=int, nargs="+", help="levels of the anomaly map (stride 16)")
    add("--covariance", default="full", help="full; diagonal and identity to compare (full)")
    add("--image-size", type=int, default=380, help="images are resized to squares (380)")
    add("--steps", type=int, default=512, help="at most; 0: the frozen network (512)")
    add("--patience", type=int, default=3, help="stop after so many checks not kept (3)")
    add("--lr", type=float, default=1e-4, help="learning rate of Adam (1e-4)")
    add(
        "--augmentations", nargs="+", choices=AUGMENTATIONS, default=[*BLANKS], help="(cutout scar)"
    )
    add("--seed", type=int, default=0, help="of split, batches and validator (0)")
    add("--batch-size", type=int, default=16, help="images in a batch (16)")
    add("--workers", type=int, default=2, help="threads that decode images (2)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: a GPU if any")
    if "--demo" in argv:
        parser.set_defaults(**DEMO)
    args = parser.parse_args(argv)
    for name, (low, high) in LIMITS.items():
        if not low <= getattr(args, name) <= high:
            parser.error(f"--{name.replace('_', '-')} must be from {low} to {high}")
    if args.data and not args.category or args.category and not args.data:
        parser.error("--data and --category go together: name a folder in --data, or all")
    if args.normal and not args.out:
        parser.error("--normal needs --out, the folder of the run")
    return args


def list_runs(args: Namespace) -> list[Namespace]:
    """The arguments of each run: one for a folder of normal images, or one for each category."""
    if args.normal:
        return [args]
    every = "all" in args.category
    names = gaussad.list_categories(args.data) if every else list(dict.fromkeys(args.category))
    root = args.out or Path("runs")
    alone = args.out and len(names) == 1 and not every
    outs = {name: root if alone else root / name for name in names}
    return [Namespace(**{**vars(args), "category": name, "out": outs[name]}) for name in names]


def train(args: Namespace, device: torch.device) -> None:
    """Train one detector, or resume; bad input creates no folder."""
    category = [args.data / args.category / name for name in FOLDERS] if args.data else []
    check_output(args.out, category or [args.normal])
    images = normal_images(args)
    training = load_progress(args, images)
    if training["finished"]:
        print(f"{args.out} is finished; --force retrains from scratch")
        return
    torch.manual_seed(args.seed)  # for random weights
    extractor = FeatureExtractor(args.backbone, args.levels, args.weights)
    detector = GaussianAD(extractor, args.map_levels, args.covariance).to(device)
    parts = gaussad.hold_out(list(images.values()), args.seed)
    fit, held_out = (gaussad.load_images(x, args.image_size, args.workers) for x in parts)
    if len(fit) < 50:
        warnings.warn(f"only {len(fit)} images to fit: thresholds are unreliable; 100 are better")
    with lock(args.out):
        checks = ", ".join(map(str, gaussad.schedule(args.steps)))
        print(f"{args.out}: {len(fit)} images to fit, {len(held_out)} held out; checks at {checks}")
        batches = DataLoader(fit, args.batch_size, shuffle=True)
        fine_tune_and_save(detector, batches, held_out, args, training)


def normal_images(args: Namespace) -> dict[str, Path]:
    """The normal images by the digest of their content, each once: a held-out copy of a fitted
    image would seem more normal than any other."""
    if args.data:
        paths = [x.path for x in gaussad.list_samples(args.data, args.category, "train")]
    else:
        if args.normal.is_file():
            raise ValueError(f"--normal {args.normal} is a file: give a folder")
        paths = gaussad.list_images([args.normal])
        folders = sorted({path.parent.relative_to(args.normal).as_posix() for path in paths})
        if any({"test", "ground_truth"} & set(folder.split("/")) for folder in folders):
            raise ValueError(f"{args.normal} looks like a data set: give --data, not --normal")
        if folders != ["."]:
            warnings.warn(f"images in all these folders are taken as normal: {', '.join(folders)}")
    images = {}
    for path in paths:
        images.setdefault(digest(path), path)
    if copies := len(paths) - len(images):
        warnings.warn(f"{copies} of {len(paths)} normal images are copies and are left out")
    return images


def load_progress(args: Namespace, images: dict[str, Path]) -> dict:
    """The saved progress of training with the same settings; else its beginning."""
    settings = {key: value for key, value in vars(args).items() if key not in NO_SETTINGS}
    settings["images"] = hashlib.sha256("".join(images).encode()).hexdigest()
    for name in ("weights", "backbone"):  # files by their content
        if Path(settings[name]).is_file():
            settings[name] = digest(Path(settings[name]))
    path = args.out / "detector.pt"
    if path.exists() and not args.force:
        training = gaussad.load_plain(path).get("training")
        if training is None:
            raise ValueError(
                f"{path} was not written by train.py: choose another --out, or --force"
            )
        changed = [key for key in settings if training["settings"].get(key) != settings[key]]
        if not changed:
            return training
        print(f"{args.out} is trained from scratch, as these changed: {', '.join(changed)}")
    return {"settings": settings, "checks": [], "finished": False, "state": None}


def lock(out: Path) -> TextIO:
    """Make the folder of a run; it is this process's alone until the file returned is closed."""
    out.mkdir(parents=True, exist_ok=True)
    file = (out / ".lock").open("w")
    try:
        import fcntl  # not on Windows, where a second run is not noticed

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass
    except BlockingIOError as error:
        raise ValueError(f"another train.py is running in {out}") from error
    for part in out.glob(".*.[0-9]*.part"):  # of a run that was killed
        part.unlink(missing_ok=True)
    return file


def fine_tune_and_save(
    detector: GaussianAD, batches: DataLoader, held_out: Tensor, args: Namespace, training: dict
) -> None:
    """Fine-tune; after each check the best detector so far is on disk, with what resuming needs."""
    checks, start = training["checks"], time.perf_counter()
    first = checks[-1]["step"] if checks else 0

    def show_step(step: int, loss: float) -> None:
        left = (time.perf_counter() - start) / (step - first) * (args.steps - step) / 60
        progress(f"step {step} of {args.steps}, loss {loss:.2f}, at most {left:.0f} minutes left")

    options = {name: getattr(args, name) for name in ("steps", "lr", "patience", "seed")}
    options |= {"state": training["state"], "on_step": show_step}
    options["augmentations"] = {name: AUGMENTATIONS[name] for name in args.augmentations}
    print("AUROC: how well held-out images are told from augmented versions of them, in %")
    print(f"{'step':>6}{'loss':>9}{'seconds':>9}{'AUROC':>8}", *map(table_row, checks), sep="\n")
    if checks:
        print(f"resumed from step {first}")
    last, saved = start, f"from step {first}" if checks else "from the beginning"
    try:
        for check in gaussad.fine_tune(detector, batches, held_out, **options):
            checks.append(record(check, time.perf_counter() - last))
            progress("")
            print(table_row(checks[-1]), flush=True)
            training["state"] = check.state
            save(args.out, training, detector if check.kept else None)
            last, saved = time.perf_counter(), f"from step {check.step}"
    except KeyboardInterrupt:
        again = "the same command without --force" if args.force else "the same command"
        print(f"\ninterrupted; {again} goes on {saved}", file=sys.stderr)
        raise
    training |= {"finished": True, "state": None}
    save(args.out, training)
    command = shlex.join(["python", "evaluate.py", *evaluate_options(args)])
    print(summary(checks), f"evaluate it: {command}", sep="\n")


def record(check: Check, seconds: float) -> dict:
    """A check as plain numbers, for detector.pt and history.json."""
    names = ("step", "kept", "loss", "gain", "standard_error")
    numbers = {name: getattr(check, name) for name in names} | {"seconds": seconds}
    aurocs = check.validation.aurocs
    return {**numbers, "auroc": check.validation.auroc, "auroc_per_augmentation": aurocs}


def table_row(check: dict) -> str:
    """A check as a line of text."""
    loss = "" if check["loss"] is None else f"{check['loss']:.2f}"
    row = f"{check['step']:6d}{loss:>9}{check['seconds']:9.1f}{100 * check['auroc']:8.1f}"
    if check["gain"] is None:
        return f"{row}  the frozen network"
    gain, error = 100 * check["gain"], 100 * check["standard_error"]
    return f"{row}  gained {gain:.1f} ± {error:.1f}: {'kept' if check['kept'] else 'not kept'}"


def summary(checks: list[dict]) -> str:
    """What came of training, in words."""
    best = [check for check in checks if check["kept"]][-1]
    if len(checks) == 1:
        return "fitted the frozen network, without fine-tuning"
    if best["step"] == 0:
        return "no step beat the frozen network by more than one standard error: it is kept"
    rise = f"from {100 * checks[0]['auroc']:.1f} to {100 * best['auroc']:.1f}"
    return f"kept step {best['step']}: the AUROC against augmented images rose {rise}"


def evaluate_options(args: Namespace) -> list[str]:
    """The options of evaluate.py for a run."""
    own = ["--backbone", args.backbone] if args.backbone.endswith(".py") else []
    if args.normal:
        return ["--model", str(args.out / "detector.pt"), "--images", "PATH", *own]
    return ["--data", str(args.data), "--category", args.category, "--out", str(args.out), *own]


def save(out: Path, training: dict, detector: GaussianAD | None = None) -> None:
    """Write the detector, or keep the one that is there, with the progress of training. Results of
    an earlier detector are removed."""
    path = out / "detector.pt"
    if detector:
        detector.save(path, training=training)
        clear_evaluation(out)
        clear_evaluation(out / "scored")
    else:
        gaussad.save_plain(gaussad.load_plain(path) | {"training": training}, path)
    kept = [check["step"] for check in training["checks"] if check["kept"]]
    history = {**training, "best_step": kept[-1], "state": None}
    with gaussad.atomic_path(out / "history.json") as part:
        part.write_text(json.dumps(history, indent=2) + "\n")


def draw_demo(root: Path, size: int = 128) -> None:
    """Draw a small data set in the MVTec AD layout at `root`: category "demo", a metal disc."""
    rng = np.random.default_rng(0)
    counts = {"train/good": 48, "test/good": 16}
    counts |= {f"test/{defect}": 8 for defect in ("hole_missing", "scratch", "stain")}
    for name, count in counts.items():
        images = root / "demo" / name
        masks = root / "demo/ground_truth" / images.name
        images.mkdir(parents=True, exist_ok=True)
        masks.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            image, mask = draw_disc(size, images.name, rng)
            Image.fromarray(image).save(images / f"{i:03d}.png")
            if mask.any():
                Image.fromarray(mask).save(masks / f"{i:03d}_mask.png")


def draw_disc(size: int, kind: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A disc with six holes, a little to one side and lighter or darker, and where it is bad."""
    axis = np.linspace(-0.5, 0.5, size)
    plane = axis + 1j * axis[:, None] - complex(*rng.normal(0, 0.005, 2))  # x + iy, the centre at 0
    holes = [abs(plane - 0.26 * np.exp(1j * np.pi / 3 * k)) < 0.07 for k in range(6)]
    spot = plane - complex(*rng.uniform(-0.15, 0.15, 2))
    bad = {
        "good": np.zeros((size, size), bool),
        "hole_missing": holes[0],
        "stain": abs(spot) < 0.05,
        "scratch": (abs(spot) < 0.12) & (abs(spot.imag) < 0.01),
    }[kind]
    pixels = np.where((abs(plane) < 0.42) & ~np.any(holes, axis=0), 170, 40)
    pixels[bad] = 170 if kind == "hole_missing" else 110
    return (pixels + rng.normal(0, 4) + rng.normal(0, 4, (size, size))).astype(np.uint8), bad


# ---- Shared with evaluate.py -------------------------------------------------------------------


def digest(path: Path) -> str:
    """SHA-256 of the content of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_output(out: Path, folders: Sequence[Path]) -> None:
    """ValueError if `out` is a file, or lies in a folder whose images are read: what is written
    there would be read by the next run."""
    if out.is_file():
        raise ValueError(f"--out {out} is a file: give a folder")
    for folder in folders:
        if folder.resolve() in (out.resolve(), *out.resolve().parents):
            raise ValueError(f"{out} lies in {folder}, whose images are read: give another --out")


def clear_evaluation(out: Path, files: Sequence[str] = EVALUATION) -> None:
    """Remove what evaluate.py wrote to `out`, if it did: files, and pictures."""
    if (out / "scores.csv").is_file():
        for path in (*(out / "pictures").glob("[0-9]*_*.png"), *map(out.joinpath, files)):
            path.unlink(missing_ok=True)


def progress(line: str) -> None:
    """Rewrite the last line of a terminal; elsewhere nothing is shown."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)


def print_error(error: Exception, where: object = "") -> None:
    """Print an error that a user can fix as one line; raise others again, for their traceback."""
    message = str(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate mem" in message:
        message = "out of memory: use smaller batches or images"
    elif not isinstance(error, (ValueError, OSError)):
        raise error
    elif isinstance(error, OSError) and error.filename:
        message = f"{error.strerror}: {error.filename}: check this path, or give another"
    line = " ".join(f"{where}: {message}".removeprefix(": ").split())  # names may hold line breaks
    progress("")
    sys.stderr.write(f"{Path(sys.argv[0]).name}: error: {line}\n")


def run_program(main: Callable[[], int]) -> None:
    """Run a script: what a user can fix ends in one line and exit code 2."""
    script = Path(sys.argv[0]).name
    warnings.formatwarning = lambda message, *_: f"{script}: {' '.join(str(message).split())}\n"
    sys.stdout.reconfigure(errors="backslashreplace")  # for names that a terminal cannot print
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        print_error(error)
        sys.exit(2)


if __name__ == "__main__":
    run_program(main)
