#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Fine-tune a Gaussian anomaly detector on the normal images of a category.

    python train.py --data mvtec/ --category screw
    python train.py --data mvtec/ --category all
    torchrun --nproc-per-node 8 train.py --data mvtec/ --category all
    python train.py --normal photos/ --out runs/mine
    python train.py --demo

Writes runs/<category>/detector.pt, and history.json for people; never opens the category's test
folder. The same command goes on where an interrupted run stopped and skips a finished one; other
settings, or --force, begin anew. --demo draws a small data set, trains on it and evaluates.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import distributed
from torch.utils.data import DataLoader

try:
    import fcntl
except ImportError:  # Windows, where two runs at once are not told
    fcntl = None

from gaussad import (AUGMENTATIONS, COVARIANCES, LOCAL, Check, FeatureExtractor, GaussianAD,
                     atomic_path, error_line, fine_tune, hold_out, list_categories, list_images,
                     list_samples, load_images, load_plain, pick_device, save_plain,
                     without_copies)  # fmt: skip


ELSEWHERE = {"out", "device", "workers", "force", "demo"}  # options that change no result
DEMO = {"backbone": "mobilenet_v2", "levels": [3, 4, 7], "image_size": 128, "steps": 64,
        "category": ["demo"]}  # early levels, which see something with random weights too


def main(argv: Sequence[str] | None = None) -> int:
    warnings.formatwarning = lambda message, *_: f"train.py: {message}\n"
    args = parse(argv)
    device = pick_device(args.device)
    if args.demo:
        args.data = args.out / "data"
        draw_demo(args.data)
    todo = {str(args.normal): args} if args.normal else categories(args)
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun's: this process takes its share
        distributed.init_process_group("gloo", timeout=timedelta(days=365))
        rank, world = distributed.get_rank(), distributed.get_world_size()
        todo = dict(list(todo.items())[rank::world])
    failed = 0
    for name, one in todo.items():
        try:
            train(one, device)
        except Exception as error:
            failed += 1
            print(f"train.py: error: {name}: {error_line(error)}", file=sys.stderr)
    if distributed.is_initialized():
        distributed.barrier()  # torchrun ends all processes when one has failed
        distributed.destroy_process_group()
    if args.demo and not failed:
        script = Path(__file__).with_name("evaluate.py")
        options = ["--data", args.data, "--category", "demo", "--out", args.out]
        options += ["--device", args.device]
        return subprocess.run([sys.executable, script, *options]).returncode
    return 2 if failed else 0


def parse(argv: Sequence[str] | None) -> Namespace:
    head, _, rest = __doc__.partition("\n")
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=head, epilog=rest,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument  # without a usage, an error is one line
    add("--data", type=Path, help="folder of the categories, in the MVTec AD layout")
    add("--category", nargs="+", metavar="NAME", help="folders in --data; all: every one")
    add("--normal", type=Path, metavar="FOLDER",
        help="train on the images in it, in place of --data and --category")
    add("--demo", action="store_true", help="draw data, train and evaluate on it")
    add("--out", type=Path, help="folder of the run (default: runs/<category>); of several "
                                 "categories, the folder of their runs (default: runs)")
    add("--force", action="store_true", help="begin anew what is there with the same settings")
    add("--backbone", default="efficientnet_b4", metavar="NAME",
        help="torchvision's name of an EfficientNet, MobileNet or ResNet (efficientnet_b4)")
    add("--weights", default="imagenet", metavar="imagenet|random|PATH",
        help="torchvision's, downloaded on first use; random; or a state dict (imagenet)")
    add("--levels", type=int, nargs="+", metavar="L",
        help="feature levels, from 1 (those of stride 16 and more)")
    add("--map-levels", type=int, nargs="+", metavar="L",
        help="levels that make the anomaly map (those of stride 16)")
    add("--covariance", choices=COVARIANCES, default="full",
        help="for comparison: diagonal, or identity, a Euclidean distance (full)")
    add("--image-size", type=int, default=380, metavar="PX",
        help="side of the square that images are resized to (380)")
    add("--steps", type=int, default=512, metavar="N", help="at most; 0: the frozen network (512)")
    add("--patience", type=int, default=3, metavar="N",
        help="stop after N checks without a gain; they are after 32, 64, 128, … steps (3)")
    add("--lr", type=float, default=1e-4, help="learning rate of Adam (1e-4)")
    add("--augmentations", nargs="+", choices=list(AUGMENTATIONS), default=list(LOCAL),
        metavar="NAME", help=f"what the validator judges by ({' '.join(LOCAL)})")
    add("--seed", type=int, default=0, metavar="N",
        help="of the split, the batches and the validator (0)")
    add("--batch-size", type=int, default=16, metavar="N", help="images in a batch (16)")
    add("--workers", type=int, default=2, metavar="N", help="threads that decode images (2)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(auto: a GPU if any)")
    if parser.parse_args(argv).demo:
        parser.set_defaults(**DEMO, out=Path("runs/demo"))  # what the user gives still comes first
    args = parser.parse_args(argv)
    if args.demo and (args.data or args.normal or args.category != ["demo"]):
        parser.error("--demo draws its own data: leave out --data, --category and --normal")
    if args.normal and (args.data or args.category or not args.out):
        parser.error("--normal goes with --out, and without --data and --category")
    if not args.demo and not args.normal and (args.data is None or args.category is None):
        parser.error("--data and --category are needed, or --normal, or --demo")
    return args


def categories(args: Namespace) -> dict[str, Namespace]:
    """The arguments of each category that is asked for, with its run folder."""
    names = list_categories(args.data) if args.category == ["all"] else args.category
    alone = len(names) == 1 and args.category != ["all"]
    root = args.out or Path("runs")
    folders = {name: root if alone and args.out else root / name for name in names}
    return {name: Namespace(**{**vars(args), "category": name, "out": out})
            for name, out in folders.items()}  # fmt: skip


def train(args: Namespace, device: torch.device) -> None:
    """Fine-tune one detector; the best so far is on disk after each check."""
    paths = ([sample.path for sample in list_samples(args.data, args.category, "train")]
             if args.data else list_images([args.normal]))  # fmt: skip
    with locked(args.out):
        path, settings = args.out / "detector.pt", settings_of(args, len(paths))
        training = {"settings": settings, "checks": [], "finished": False, "state": None}
        if path.exists() and not args.force:
            training = earlier(path, training)
        if training["finished"]:
            print(f"{args.out} is finished; --force trains it anew")
            return
        detector = GaussianAD(extractor(args), args.map_levels, args.covariance).to(device)
        fit, held_out = map(torch.stack, hold_out(
            without_copies(load_images(paths, args.image_size, args.workers)), args.seed))
        batches = Counted(DataLoader(fit, args.batch_size, shuffle=True))
        print(f"{args.out}: {len(fit)} images to fit, {len(held_out)} held out")
        print(" step     loss  seconds       s  gain over best   AUROC in %")
        start = time.perf_counter()
        augmentations = {name: AUGMENTATIONS[name] for name in args.augmentations}
        for check in fine_tune(detector, batches, held_out, args.steps, args.lr, args.patience,
                               args.seed, training["state"], augmentations):  # fmt: skip
            training["checks"].append(record(check, time.perf_counter() - start))
            batches.clear()
            print(line(training["checks"][-1]), flush=True)
            training["state"], start = check.state, time.perf_counter()
            save(path, training, detector if check.kept else None)
        training |= {"finished": True, "state": None}
        save(path, training)
        step = best_step(training)
        print(f"Step {step}{' (the frozen network)' * (step == 0)} is kept; its detector is {path}")


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Make the folder of a run, for this process alone; the lock goes with the process."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".lock").touch()
    except OSError as error:
        raise ValueError(f"cannot write to {out}: {error.strerror}; choose an --out") from error
    with open(out / ".lock") as lock:
        if fcntl:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(f"another train.py is at work in {out}") from error
        yield


def settings_of(args: Namespace, images: int) -> dict:
    """All that the result rests on, plain: paths absolute, a file of weights by its content."""
    settings = {key: str(value.resolve()) if isinstance(value, Path) else value
                for key, value in vars(args).items() if key not in ELSEWHERE}  # fmt: skip
    if Path(args.weights).is_file():
        settings["weights"] = hashlib.sha256(Path(args.weights).read_bytes()).hexdigest()
    return {**settings, "images": images}


def earlier(path: Path, new: dict) -> dict:
    """How far the run with the same settings has come whose detector is there; else the new one."""
    training = load_plain(path).get("training")
    if training is None:
        raise ValueError(f"{path} is not of train.py: choose another --out, or --force")
    return training if training["settings"] == new["settings"] else new


def extractor(args: Namespace) -> FeatureExtractor:
    torch.manual_seed(args.seed)  # for random weights
    try:
        return FeatureExtractor(args.backbone, args.levels, args.weights)
    except ConnectionError as error:
        if not args.demo:
            raise
        print(f"{error}.\nThe demo goes on with random weights.")
        return FeatureExtractor(args.backbone, args.levels, "random")


class Counted:
    """Batches that tell on a terminal how many images have gone by."""

    def __init__(self, batches: Iterable) -> None:
        self.batches, self.seen, self.start = batches, 0, time.perf_counter()
        self.live = sys.stderr.isatty()

    def __iter__(self) -> Iterator[torch.Tensor]:
        for images in self.batches:
            yield images
            self.seen += len(images)
            rate = self.seen / (time.perf_counter() - self.start)
            self.clear(f"{self.seen} images to fit and train on, {rate:.1f} a second")

    def clear(self, text: str = "") -> None:
        """Put this text in place of what was told."""
        if self.live:
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def record(check: Check, seconds: float) -> dict:
    """A check as plain numbers, for detector.pt and history.json."""
    gain, error = check.gain or (None, None)
    found = check.validation
    return {"step": check.step, "loss": check.loss, "seconds": seconds,
            "separation": found and found.separation, "gain": gain, "standard_error": error,
            "auroc": found.auroc if found else {}, "kept": check.kept,
            "failure": check.failure}  # fmt: skip


def line(check: dict) -> str:
    """A row of the table that is printed."""
    if check["failure"]:
        return f"Step {check['step']}: training has failed and ends: {check['failure']}"
    loss, s, gain, error = ("-" if check[key] is None else format(check[key], ".3f")
                            for key in ("loss", "separation", "gain", "standard_error"))
    aurocs = ", ".join(f"{name} {100 * value:.1f}" for name, value in check["auroc"].items())
    return (f"{check['step']:5d} {loss:>8} {check['seconds']:8.1f} {s:>7} {gain:>8} ± {error:<6} "
            + f"  {aurocs}" + "  best so far" * check["kept"])  # fmt: skip


def save(path: Path, training: dict, detector: GaussianAD | None = None) -> None:
    """Write the detector, or keep the one that is there, with what training has come to."""
    if detector:
        detector.save(path, training=training)
    else:
        save_plain(load_plain(path) | {"training": training}, path)
    history = {**training, "best_step": best_step(training)}
    del history["state"]
    with atomic_path(path.with_name("history.json")) as part:
        part.write_text(json.dumps(history, indent=2) + "\n")


def best_step(training: dict) -> int:
    return [check["step"] for check in training["checks"] if check["kept"]][-1]


# ------------------------------------------------------------------------------------------------
# The demo: a perforated disc
# ------------------------------------------------------------------------------------------------


def draw_demo(root: Path, size: int = 128, seed: int = 0) -> None:
    """Draw a small data set in the MVTec AD layout at `root`, category "demo".

    48 normal images to train; to test, 16 normal ones and 8 of each of three defects, with masks.
    """
    rng = np.random.default_rng(seed)
    plan = {"train/good": 48, "test/good": 16, "test/hole_missing": 8, "test/scratch": 8,
            "test/stain": 8}  # fmt: skip
    for name, count in plan.items():
        folder = root / "demo" / name
        masks = root / "demo/ground_truth" / folder.name
        for path in (folder, masks):
            path.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            image, mask = draw_disc(size, folder.name, rng)
            image.save(folder / f"{i:03d}.png")
            if folder.name != "good":
                mask.save(masks / f"{i:03d}_mask.png")


def draw_disc(size: int, defect: str, rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """A disc with six holes, turned and lit a little differently each time, and where it is bad."""
    metal, dark = (int(grey + rng.normal(0, 4)) for grey in (170, 40))
    image, mask = Image.new("L", (size, size), dark), Image.new("L", (size, size), 0)
    disc, bad = ImageDraw.Draw(image), ImageDraw.Draw(mask)
    centre = size / 2 + rng.normal(0, size / 100, 2)
    angles = rng.normal(0, 0.02) + np.arange(6) * np.pi / 3
    holes = centre + 0.26 * size * np.stack([np.cos(angles), np.sin(angles)], 1)
    disc.circle(tuple(centre), 0.42 * size, fill=metal)
    for hole in holes:
        disc.circle(tuple(hole), 0.07 * size, fill=dark)
    place = centre + rng.uniform(-0.15, 0.15, 2) * size
    if defect == "hole_missing":
        bad.circle(tuple(holes[0]), 0.07 * size, fill=255)
    if defect == "scratch":
        end = place + rng.uniform(0.1, 0.2, 2) * rng.choice([-1, 1], 2) * size
        bad.line([*place, *end], fill=255, width=max(1, size // 64))
    if defect == "stain":
        bad.circle(tuple(place), rng.uniform(0.03, 0.06) * size, fill=255)
    image.paste(metal if defect == "hole_missing" else metal - 50, mask=mask)
    pixels = np.asarray(image) + rng.normal(0, 4, (size, size))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), mask


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on from the last check", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        print(f"train.py: error: {error_line(error)}", file=sys.stderr)
        sys.exit(2)
