#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Fine-tune a Gaussian anomaly detector on the normal images of a category.

    python train.py --data mvtec/ --category screw
    torchrun --nproc-per-node 8 train.py --data mvtec/ --category all
    python train.py --normal photos/good --out runs/mine
    python train.py --demo

Writes detector.pt and history.json to runs/<category>; never opens the test folder. Run again, it
goes on where it was interrupted or skips what is finished; other settings or --force begin anew."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
import warnings
from argparse import SUPPRESS, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor, distributed
from torch.utils.data import DataLoader

from gaussad import (AUGMENTATIONS, LOCAL, Check, FeatureExtractor, GaussianAD, atomic_path,
                     error_line, fine_tune, hold_out, list_categories, list_images, list_samples,
                     load_images, load_plain, pick_device, save_plain, without_copies)  # fmt: skip

ELSEWHERE = {"data", "normal", "out", "device", "workers", "force", "demo"}  # change no result
DEMO = {"backbone": "mobilenet_v2", "weights": "random", "levels": [3, 4, 7], "image_size": 128,
        "steps": 64, "out": Path("runs/demo")}  # no download; early levels see something even so
COLUMNS = {"loss": "loss", "seconds": "seconds", "separation": "s", "gain": "gain",
           "standard_error": "std error", "effective_rank": "rank"}  # of the table that is printed


def main(argv: Sequence[str] | None = None) -> int:
    """Train what the command line asks for. Returns the exit code."""
    warnings.formatwarning = lambda message, *_: f"train.py: {message}\n"
    args = parse(argv)
    device = pick_device(args.device)
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
            print(f"train.py: error: {run.out}: {error_line(error)}", file=sys.stderr)
    if distributed.is_torchelastic_launched():  # torchrun ends all processes when one has failed
        distributed.init_process_group("gloo", timeout=timedelta(days=365))
        distributed.barrier()
    if args.demo and not failed:
        command = [sys.executable, Path(__file__).with_name("evaluate.py"), "--data", args.data,
                   "--category", "demo", "--out", args.out, "--device", args.device]  # fmt: skip
        return subprocess.run(command).returncode
    return 2 if failed else 0


def parse(argv: Sequence[str] | None) -> Namespace:
    """The options; wrong ones are told in one line, and end the program with exit code 2."""
    parser = ArgumentParser(usage=SUPPRESS, description=__doc__,
                            formatter_class=RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, help="folder of categories in the MVTec AD layout")
    source.add_argument("--normal", type=Path, help="folder of normal images, of no data set")
    source.add_argument("--demo", action="store_true", help="draw data, train and evaluate on it")
    add = parser.add_argument  # without a usage, an error is one line
    add("--category", nargs="+", help="folders in --data; all: every one")
    add("--out", type=Path, help="folder of the run, or of the runs of several categories (runs)")
    add("--force", action="store_true", help="begin anew what is there with the same settings")
    add("--backbone", default="efficientnet_b4", help="an EfficientNet, MobileNet or ResNet")
    add("--weights", default="imagenet", help="imagenet, random, or a state dict's path")
    add("--levels", type=int, nargs="+", help="from 1 (those of stride 16 and more)")
    add("--map-levels", type=int, nargs="+", help="of the anomaly map (those of stride 16)")
    add("--covariance", default="full", help="or, for comparison, diagonal or identity (full)")
    add("--image-size", type=int, default=380, help="side of the square of an image (380)")
    add("--steps", type=int, default=512, help="at most; 0: the frozen network (512)")
    add("--patience", type=int, default=3, help="ends after so many checks without a gain (3)")
    add("--lr", type=float, default=1e-4, help="learning rate of Adam (1e-4)")
    add("--augmentations", nargs="+", choices=AUGMENTATIONS, default=list(LOCAL), metavar="NAME",
        help=f"of {', '.join(AUGMENTATIONS)}: what the validator judges by ({' '.join(LOCAL)})")
    add("--seed", type=int, default=0, help="of the split, the batches and the validator (0)")
    add("--batch-size", type=int, default=16, help="images in a batch (16)")
    add("--workers", type=int, default=2, help="threads that decode images (2)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: a GPU if any")
    if parser.parse_args(argv).demo:
        parser.set_defaults(**DEMO)  # what the user gives still comes first
    args = parser.parse_args(argv)
    if bool(args.data) != bool(args.category) or args.normal and not args.out:
        parser.error("--data goes with --category, and --normal with --out")
    if args.steps < 0 or not 0 <= args.lr < float("inf") or not 0 <= args.seed < 2**63:
        parser.error("--steps, --lr and --seed are 0 or more, and all are finite")
    if args.image_size < 32 or min(args.patience, args.batch_size, args.workers) < 1:
        parser.error("--image-size is 32 or more, --patience, --batch-size, --workers 1 or more")
    return args


def list_runs(args: Namespace) -> list[Namespace]:
    """The arguments of each run: one for a folder of normal images, or one for each category."""
    if args.normal:
        return [args]
    names = list_categories(args.data) if args.category == ["all"] else args.category
    alone = args.out and len(names) == 1 and args.category != ["all"]
    root = args.out or Path("runs")
    return [Namespace(**{**vars(args), "category": name, "out": root if alone else root / name})
            for name in names]  # fmt: skip


def train(args: Namespace, device: torch.device) -> None:
    """Train one detector, or go on with it; a mistake of the user's leaves no folder behind."""
    paths = ([sample.path for sample in list_samples(args.data, args.category, "train")]
             if args.data else list_images([args.normal]))  # fmt: skip
    if args.normal and any({"test", "ground_truth"} & {*x.relative_to(args.normal).parts}
                           for x in paths):  # fmt: skip
        raise ValueError("--normal holds normal images alone: of a data set give --data")
    training = earlier_training(args, paths)
    if training["finished"]:
        print(f"{args.out} is finished; --force trains it anew")
        return
    torch.manual_seed(args.seed)  # for random weights
    extractor = FeatureExtractor(args.backbone, args.levels, args.weights)
    detector = GaussianAD(extractor, args.map_levels, args.covariance).to(device)
    images = without_copies(load_images(paths, args.image_size, args.workers))
    fit, held_out = map(torch.stack, hold_out(images, args.seed))
    batches = DataLoader(fit, args.batch_size, shuffle=True)
    with lock(args.out):
        print(f"{args.out}: {len(fit)} images to fit, {len(held_out)} held out")
        fine_tune_and_save(detector, batches, held_out, args, training)


def earlier_training(args: Namespace, images: Sequence[Path]) -> dict:
    """What training with the same settings has come to in the run's folder; else its beginning."""
    settings = {key: value for key, value in vars(args).items() if key not in ELSEWHERE}
    digest = lambda path: hashlib.sha256(path.read_bytes()).hexdigest()  # files by their content
    settings["images"] = hashlib.sha256("".join(map(digest, images)).encode()).hexdigest()
    if Path(args.weights).is_file():
        settings["weights"] = digest(Path(args.weights))
    path = args.out / "detector.pt"
    if path.exists() and not args.force:
        training = load_plain(path).get("training")
        if training is None:
            raise ValueError(f"{path} is not of train.py: choose another --out, or --force")
        if training["settings"] == settings and (training["finished"] or training["state"]):
            return training
        changed = [key for key in settings if training["settings"].get(key) != settings[key]]
        print(f"{args.out} begins anew; what is different: {', '.join(changed) or 'nothing'}")
    return {"settings": settings, "checks": [], "finished": False, "state": None}


def lock(out: Path) -> TextIO:
    """Make the folder of a run; it is this process's alone until the file returned is closed."""
    out.mkdir(parents=True, exist_ok=True)
    file = (out / ".lock").open("w")
    try:
        import fcntl  # not on Windows, where a second run is not told

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass
    except BlockingIOError as error:
        raise ValueError(f"another train.py is at work in {out}") from error
    return file


def fine_tune_and_save(detector: GaussianAD, batches: DataLoader, held_out: Tensor,
                       args: Namespace, training: dict) -> None:  # fmt: skip
    """Fine-tune; the best detector so far is on disk after each check, with the way on from it."""
    print("  step" + "".join(f"{title:>10}" for title in COLUMNS.values()) + "  AUROC in %")
    for check in training["checks"]:  # of before an interruption
        print(table_row(check))
    augmentations = {name: AUGMENTATIONS[name] for name in args.augmentations}
    start = time.perf_counter()
    for check in fine_tune(detector, batches, held_out, args.steps, args.lr, args.patience,
                           args.seed, training["state"], augmentations):  # fmt: skip
        training["checks"].append(record(check, time.perf_counter() - start))
        print(table_row(training["checks"][-1]), flush=True)
        if not check.failure:
            training["state"], start = check.state, time.perf_counter()
            save(args.out, training, detector if check.kept else None)
    training |= {"finished": True, "state": None}
    save(args.out, training)
    print(f"The best of them is in {args.out / 'detector.pt'}")


def record(check: Check, seconds: float) -> dict:
    """A check as plain numbers, for detector.pt and history.json."""
    gain, error = check.gain or (None, None)
    found = check.validation
    return {"step": check.step, "kept": check.kept, "failure": check.failure, "loss": check.loss,
            "seconds": seconds, "gain": gain, "standard_error": error,
            "separation": found and found.separation, "auroc": found.auroc if found else {},
            "effective_rank": check.effective_rank}  # fmt: skip


def table_row(check: dict) -> str:
    values = ("-" if check[key] is None else f"{check[key]:.3f}" for key in COLUMNS)
    numbers = "".join(f"{value:>10}" for value in values)
    aurocs = "".join(f"  {name} {100 * value:.1f}" for name, value in check["auroc"].items())
    word = check["failure"] or "best so far" * check["kept"]
    return f"{check['step']:6d}{numbers}{aurocs}  {word}".rstrip()


def save(out: Path, training: dict, detector: GaussianAD | None = None) -> None:
    """Write the detector, or keep the one that is there, with what training has come to."""
    path = out / "detector.pt"
    if detector:
        detector.save(path, training=training)
    else:
        save_plain(load_plain(path) | {"training": training}, path)
    kept = [check["step"] for check in training["checks"] if check["kept"]]
    history = {**training, "best_step": kept[-1], "state": None}
    with atomic_path(out / "history.json") as part:
        part.write_text(json.dumps(history, indent=2) + "\n")


def draw_demo(root: Path, size: int = 128) -> None:
    """Draw a small data set in the MVTec AD layout at `root`: category "demo", a metal disc."""
    rng = np.random.default_rng(0)
    for name, count in {"train/good": 48, "test/good": 16, "test/hole_missing": 8,
                        "test/scratch": 8, "test/stain": 8}.items():  # fmt: skip
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
    bad = {"good": holes[0] & False, "hole_missing": holes[0], "stain": abs(spot) < 0.05,
           "scratch": (abs(spot) < 0.12) & (abs(spot.imag) < 0.01)}[kind]  # fmt: skip
    pixels = np.where((abs(plane) < 0.42) & ~np.any(holes, axis=0), 170, 40)
    pixels[bad] = 170 if kind == "hole_missing" else 110
    return (pixels + rng.normal(0, 4) + rng.normal(0, 4, (size, size))).astype(np.uint8), bad


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)  # the same command goes on from the last check
    except Exception as error:
        print(f"train.py: error: {error_line(error)}", file=sys.stderr)
        sys.exit(2)
