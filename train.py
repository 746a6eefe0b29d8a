#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Fine-tune a Gaussian anomaly detector on the normal images of a category.

    python train.py --data mvtec/ --category screw                 # runs/screw
    torchrun --nproc-per-node 8 train.py --data mvtec/ --category all
    python train.py --normal photos/good --category mine           # runs/mine
    python train.py --demo                                         # runs/demo

Writes detector.pt and checkpoint.pt to <runs>/<category>; never opens the test folder. The same
command resumes a run that was interrupted and leaves a finished one alone."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
import warnings
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import distributed
from torch.utils.data import DataLoader

import gaussad
from gaussad import AUGMENTATIONS, DEFAULT_AUGMENTATIONS, Check, FeatureExtractor, GaussianAD

# What makes another run; beside them the images.
SETTINGS = ("backbone", "weights", "levels", "map_levels", "covariance", "image_size", "steps")
SETTINGS += ("patience", "lr", "augmentations", "seed", "batch_size")
LIMITS = {"image_size": (32, 4096), "steps": (0, 10**9), "lr": (0, 1e38), "seed": (0, 2**63 - 1)}
LIMITS |= dict.fromkeys(("patience", "batch_size", "workers"), (1, 10**9))
DEMO = {"backbone": "mobilenet_v2", "weights": "random", "levels": [3, 4, 7], "image_size": 128}
DEMO |= {"steps": 64, "category": ["demo"]}  # no download; early levels help even at random


def main(argv: Sequence[str] | None = None) -> int:
    """Train what the command line asks for. Returns the exit code."""
    args, failed = parse(sys.argv[1:] if argv is None else argv), False
    device = gaussad.pick_device(args.device)
    if args.demo:
        args.data = args.runs / "demo/data"
        draw_demo(args.data)
    names = gaussad.category_names(args.category, args.data)
    if distributed.is_torchelastic_launched():  # by torchrun: this process takes its share
        names = names[int(os.environ["RANK"]) :: int(os.environ["WORLD_SIZE"])]
    for name in names:
        try:
            train_run(Namespace(**vars(args) | {"category": name, "run": args.runs / name}), device)
        except Exception as error:
            failed = True
            gaussad.print_error(error, name)
    if distributed.is_torchelastic_launched():  # torchrun ends all processes when one has failed
        distributed.init_process_group("gloo", timeout=timedelta(days=365))
        distributed.barrier()
    if args.demo and names and not failed:
        import evaluate

        given = ["--data", args.data, "--category", "demo", "--runs", args.runs]
        return evaluate.main([*map(str, given), "--device", args.device])
    return 2 if failed else 0


def parse(argv: Sequence[str]) -> Namespace:
    """The options; a wrong one ends the program with one line and exit code 2."""
    kind = {"formatter_class": gaussad.HelpFormatter, "allow_abbrev": False}
    parser = ArgumentParser(usage=SUPPRESS, description=__doc__, **kind)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, help="folder of categories in the MVTec AD layout")
    source.add_argument("--normal", type=Path, help="a plain folder of normal images")
    source.add_argument("--demo", action="store_true", help="draw data, train and evaluate on it")
    add = parser.add_argument
    add("--category", nargs="+", help="folders in --data, and names of the runs; all: every one")
    add("--runs", type=Path, default="runs", help="folder of the runs")
    add("--force", action="store_true", help="train anew")
    add("--backbone", default="efficientnet_b4", help="torchvision's, or a .py file")
    add("--weights", default="imagenet", help="imagenet, random, or the path of a state dict")
    add("--levels", type=int, nargs="+", help="from 1; if left out, those of stride 16 or more")
    add("--map-levels", type=int, nargs="+", help="of the map; if left out, those of stride 16")
    kinds = ["full", "diagonal", "identity"]
    add("--covariance", choices=kinds, default="full", help="full; the others to compare")
    add("--image-size", type=int, default=380, help="images are resized to squares")
    add("--steps", type=int, default=512, help="at most; 0: the frozen network")
    add("--patience", type=int, default=3, help="end after so many checks in a row not kept")
    add("--lr", type=float, default=1e-4, help="learning rate of Adam")
    given = {"choices": AUGMENTATIONS, "default": [*DEFAULT_AUGMENTATIONS]}
    add("--augmentations", nargs="+", **given, help="that decide which step is kept")
    add("--seed", type=int, default=0, help="random seed")
    add("--batch-size", type=int, default=16, help="images in a batch")
    add("--workers", type=int, default=gaussad.CORES, help="threads that decode images")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: a GPU if any")
    if "--demo" in argv:
        parser.set_defaults(**DEMO)
    args = parser.parse_args(argv)
    for name, (low, high) in LIMITS.items():
        if not low <= getattr(args, name) <= high:
            parser.error(f"--{name.replace('_', '-')} must be from {low} to {high}")
    if args.backbone.endswith(".py") and args.weights != "imagenet":
        parser.error("--weights is for torchvision's networks: load your own in the .py file")
    if not args.category:
        parser.error("--category is missing: name a folder in --data, or your own run")
    if args.normal and (len(args.category) > 1 or args.category == ["all"]):
        parser.error("--normal needs one --category, the name of the run")
    return args


def train_run(args: Namespace, device: torch.device) -> None:
    """Train one detector, or resume; bad input changes nothing on disk."""
    images = normal_images(args)
    checkpoint = read_checkpoint(args, list(images))
    if checkpoint["checks"] and checkpoint["state"] is None:
        gaussad.say(f"{args.run} is finished; --force trains anew")
        return
    torch.manual_seed(args.seed)  # for random weights
    extractor = FeatureExtractor(args.backbone, args.levels, args.weights)
    detector = GaussianAD(extractor, args.map_levels, args.covariance).to(device)
    if checkpoint["checks"]:
        detector = GaussianAD.load(args.run / "detector.pt", device, extractor)
    fit, held_out = gaussad.hold_out(list(images.values()), args.seed)
    if len(fit) < 50:
        warnings.warn(f"only {len(fit)} images to fit: thresholds are unreliable; 100 are better")
    gaussad.say(f"{args.run}: {len(fit)} images to fit, {len(held_out)} held out")
    fine_tune_and_save(args, detector, fit, held_out, checkpoint)
    gaussad.say(summary(checkpoint["checks"]))
    source = ["--images", "PATH"] if args.normal else ["--data", args.data]
    own = ["--backbone", args.backbone] if args.backbone.endswith(".py") else []
    command = ["python", "evaluate.py", *source, "--category", args.category, *own]
    gaussad.say(f"evaluate it: {shlex.join(map(str, [*command, '--runs', args.runs]))}")


def normal_images(args: Namespace) -> dict[str, Path]:
    """The normal images by the digest of their content, each once: a held-out copy of a fitted
    image would seem more normal than any other."""
    if args.data:
        folders = [args.data / args.category / name for name in gaussad.FOLDERS]
        gaussad.check_run(args.run, folders)
        paths = [x.path for x in gaussad.list_samples(args.data, args.category, "train")]
    else:
        gaussad.check_run(args.run, [args.normal])
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
        images.setdefault(gaussad.digest(path), path)
    if copies := len(paths) - len(images):
        warnings.warn(f"{copies} of {len(paths)} normal images are copies and are left out")
    return images


def read_checkpoint(args: Namespace, images: list[str]) -> dict:
    """The checkpoint of the run, or a new one. What makes another run are the settings; images and
    other files by their content. ValueError that names those that differ from the run's."""
    settings = {name: getattr(args, name) for name in SETTINGS} | {"images": images}
    for name in ("weights", "backbone"):
        if Path(settings[name]).is_file():
            settings[name] = gaussad.digest(Path(settings[name]))
    path, new = args.run / "checkpoint.pt", {"settings": settings, "checks": [], "state": None}
    if args.force or not path.exists():
        return new
    old = gaussad.load_plain(path)
    if old.keys() != new.keys():
        raise ValueError(f"{path} is not of this version of train.py: --force trains anew")
    changed = [name for name in settings if old["settings"].get(name) != settings[name]]
    if changed:
        there = {name: old["settings"].get(name) for name in changed}
        named = (x if x == "images" else f"{x} ({there[x]}, now {settings[x]})" for x in changed)
        advice = "--force trains anew, another --category or --runs keeps both"
        raise ValueError(f"{args.run} has other settings: {', '.join(named)}; {advice}")
    return old


def fine_tune_and_save(
    args: Namespace, detector: GaussianAD, fit: list[Path], held_out: list[Path], checkpoint: dict
) -> None:
    """Fine-tune; after each check the kept detector is on disk, and what resuming needs."""
    checks, last = checkpoint["checks"], time.perf_counter()
    start, first = last, checks[-1]["step"] if checks else 0

    def show_step(step: int, loss: float) -> None:
        left = (time.perf_counter() - start) / (step - first) * (args.steps - step) / 60
        line = f"step {step} of {args.steps}, loss {loss:.2f}"
        gaussad.progress(f"{line}, at most {left:.0f} minutes left")

    options = {x: getattr(args, x) for x in ("steps", "lr", "patience", "seed", "batch_size")}
    options["augmentations"] = {name: AUGMENTATIONS[name] for name in args.augmentations}
    options |= {"state": checkpoint["state"], "names": held_out, "on_step": show_step}
    images = gaussad.load_images(fit, args.image_size, args.workers)
    others = gaussad.load_images(held_out, args.image_size, args.workers)
    batches = DataLoader(images, args.batch_size, shuffle=True)
    args.run.mkdir(parents=True, exist_ok=True)
    gaussad.say("AUROC, %: held-out images against augmented ones; a gain above its ± is kept")
    gaussad.say(f"{'step':>6}{'loss':>9}{'seconds':>9}{'AUROC':>8}", *map(table_row, checks))
    try:
        for check in gaussad.fine_tune(detector, batches, others, **options):
            checks.append(record(check, time.perf_counter() - last))
            gaussad.progress("")
            gaussad.say(table_row(checks[-1]))
            if check.kept:
                with gaussad.replacing(args.run / "detector.pt") as new:
                    detector.save(new)
                    for name in ("results", "scored"):  # of an earlier detector
                        shutil.rmtree(args.run / name, ignore_errors=True)
                    if check.step == 0:  # so would an earlier checkpoint be
                        (args.run / "checkpoint.pt").unlink(missing_ok=True)
            gaussad.save_plain(checkpoint | {"state": check.state}, args.run / "checkpoint.pt")
            last = time.perf_counter()
    except KeyboardInterrupt:
        step = f"the same command goes on from step {checks[-1]['step']}" if checks else ""
        where = step or "nothing is saved yet"
        sys.stderr.write(f"\ninterrupted; {where}{', without --force' * args.force}\n")
        raise
    gaussad.save_plain(checkpoint | {"state": None}, args.run / "checkpoint.pt")


def record(check: Check, seconds: float) -> dict:
    """A check as plain numbers."""
    names = ("step", "kept", "loss", "gain", "standard_error")
    numbers = {name: getattr(check, name) for name in names}
    aurocs = check.validation.aurocs
    numbers |= {"auroc": check.validation.auroc, "auroc_per_augmentation": aurocs}
    return numbers | {"seconds": seconds}


def table_row(check: dict) -> str:
    """A check as a line of text."""
    loss = "" if check["loss"] is None else f"{check['loss']:.2f}"
    row = f"{check['step']:6d}{loss:>9}{check['seconds']:9.1f}{100 * check['auroc']:8.1f}"
    if check["gain"] is None:
        return f"{row}  the frozen network"
    gain, error = 100 * check["gain"], 100 * check["standard_error"]
    return f"{row}  gained {gain:.1f} ± {error:.1f}: {'kept' if check['kept'] else 'not kept'}"


def summary(checks: list[dict]) -> str:
    """What training ended in, in words."""
    kept = [check for check in checks if check["kept"]]
    if len(kept) == 1:
        why = "" if len(checks) == 1 else ", as no step gained more than its error"
        return f"the detector is that of the frozen network{why}"
    gain, error = 100 * kept[-1]["gain"], 100 * kept[-1]["standard_error"]
    over = f"its AUROC gained {gain:.1f} ± {error:.1f} over step {kept[-2]['step']}"
    return f"step {kept[-1]['step']} is kept: {over} ({100 * checks[0]['auroc']:.1f} at step 0)"


# ---- The demo ----------------------------------------------------------------------------------


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
    plane = axis + 1j * axis[:, None] - rng.normal(0, 0.005, 2) @ [1, 1j]  # x + iy, centred
    holes = [abs(plane - 0.26 * np.exp(1j * np.pi / 3 * k)) < 0.07 for k in range(6)]
    spot = plane - rng.uniform(-0.15, 0.15, 2) @ [1, 1j]
    bad = {
        "good": np.zeros((size, size), bool),
        "hole_missing": holes[0],
        "stain": abs(spot) < 0.05,
        "scratch": (abs(spot) < 0.12) & (abs(spot.imag) < 0.01),
    }[kind]
    pixels = np.where((abs(plane) < 0.42) & ~np.any(holes, axis=0), 170, 40)
    pixels[bad] = 170 if kind == "hole_missing" else 110
    return (pixels + rng.normal(0, 4) + rng.normal(0, 4, (size, size))).astype(np.uint8), bad


if __name__ == "__main__":
    gaussad.run_program(main)
