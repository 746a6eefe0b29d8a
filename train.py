#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Fine-tune a Gaussian anomaly detector on the normal images of categories.

    python train.py --demo                                   # drawn data, to runs/demo/
    python train.py --data mvtec/ --category screw           # to runs/screw/
    torchrun --nproc-per-node 8 train.py --data mvtec/ --category all

Never opens the test folder. A run that was killed is trained anew, a finished one with --force."""

import json
import os
import shlex
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from PIL import Image
from torch.distributed import is_torchelastic_launched

import evaluate
import gaussad
from gaussad import AUGMENTATIONS, DEFAULT_AUGMENTATIONS, Check, FeatureExtractor, GaussianAD

DEMO = {"category": ["demo"], "force": True, "backbone": "mobilenet_v2", "weights": "random"}
DEMO |= {"image_size": 128, "steps": 64, "levels": [3, 4, 7], "map_levels": [7]}  # early levels


def main() -> None:
    parser = ArgumentParser(formatter_class=ArgumentDefaultsHelpFormatter)
    demo = "--demo" in sys.argv
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, help="folder of categories in the MVTec AD layout")
    source.add_argument("--demo", action="store_true", help="draw data, train and evaluate on it")
    add = parser.add_argument
    add("--category", nargs="+", required=not demo, help="folders in --data; all: every one")
    add("--runs", type=Path, default="runs", help="folder of the runs")
    add("--force", action="store_true", help="train anew what is finished; its results go, too")
    add("--backbone", default="efficientnet_b4", help="torchvision's name of a network")
    add("--weights", default="imagenet", help="imagenet, random, or the path of a state dict")
    add("--covariance", choices=["full", "diagonal", "identity"], default="full", help="ablation")
    augmentations = {"choices": AUGMENTATIONS, "default": [*DEFAULT_AUGMENTATIONS]}
    add("--augmentations", nargs="+", **augmentations, help="that decide which step is kept")
    add("--image-size", type=int, default=380, help="images are resized to squares")
    add("--steps", type=int, default=512, help="at most; 0: the frozen network")
    add("--patience", type=int, default=3, help="end after so many checks in a row not kept")
    add("--lr", type=float, default=1e-4, help="learning rate of Adam")
    add("--batch-size", type=int, default=16, help="images in a batch")
    add("--seed", type=int, default=0, help="random seed")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: a GPU if any")
    parser.set_defaults(**{"levels": None, "map_levels": None} | (DEMO if demo else {}))
    args, where = parser.parse_args(), ""
    try:
        device, names = gaussad.pick_device(args.device), args.category
        if args.demo:
            args.data = args.runs / "demo/data"
            draw_demo(args.data / "demo")
        if names == ["all"]:
            names = gaussad.list_categories(args.data)
        if is_torchelastic_launched():  # by torchrun: this process takes its share
            names = names[int(os.environ["RANK"]) :: int(os.environ["WORLD_SIZE"])]
        for name in names:
            where = f"{name}: "
            train(args, name, device)
    except (OSError, ValueError, torch.linalg.LinAlgError) as error:
        parser.exit(2, f"train.py: error: {where}{error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\ninterrupted\n")
    command = ["--data", str(args.data), "--category", *args.category, "--runs", str(args.runs)]
    print("evaluate it:  python evaluate.py", shlex.join(command))
    if args.demo:
        evaluate.main(command)


def train(args: Namespace, category: str, device: torch.device) -> None:
    """Train the detector of a category; what an earlier run wrote stays until the first check."""
    run = args.runs / category
    if is_finished(run) and not args.force:
        if args.category == ["all"]:
            print(f"{run} is finished and skipped; --force trains it anew")
            return
        raise ValueError(f"{run} is finished: --force trains it anew, other --runs keep both")
    samples = gaussad.list_samples(args.data, category, "train")
    fit, held_out = gaussad.hold_out([x.path for x in samples if x.defect == "good"], args.seed)
    print(f"{category}: {len(fit)} images to fit, {len(held_out)} held out, on {device}")
    torch.manual_seed(args.seed)  # of random weights
    extractor = FeatureExtractor(args.backbone, args.weights, args.levels, args.map_levels)
    detector = GaussianAD(extractor, args.covariance).to(device)
    settings = {x: getattr(args, x) for x in ("steps", "lr", "batch_size", "patience", "seed")}
    settings["augmentations"] = {name: AUGMENTATIONS[name] for name in args.augmentations}
    images = [gaussad.load_images(paths, args.image_size) for paths in (fit, held_out)]

    def show_step(step: int, loss: float) -> None:
        if sys.stderr.isatty():  # a line that the next one overwrites
            print(f"step {step}, loss {loss:.2f}\x1b[K", end="\r", file=sys.stderr, flush=True)

    record = {"arguments": vars(args), "device": device, "finished": False, "checks": []}
    print("  step  AUROC of held-out images against augmented ones, %")
    for check in gaussad.fine_tune(detector, *images, **settings, on_step=show_step):
        record["checks"].append(check._asdict())
        run.mkdir(parents=True, exist_ok=True)
        write_json(run / "training.json", record)  # first, as the run is not finished
        if check.kept:
            remove_results(run)
            detector.save(run / "detector.pt")
        print(in_words(check), flush=True)
    write_json(run / "training.json", record | {"finished": True})
    for path, outlier in zip(held_out, detector.outliers(), strict=True):
        if outlier:
            print(f"{path} scores far above other normal images and does not count: is it normal?")


def in_words(check: Check) -> str:
    """A check as a line of text."""
    aurocs = ", ".join(f"{name} {100 * x:.1f}" for name, x in check.aurocs.items())
    line = f"{check.step:6d}  {100 * fmean(check.aurocs.values()):.1f} ({aurocs}): "
    if check.step == 0:
        return f"{line}the frozen network, kept"
    gain = f"gain {100 * check.gain:.1f} ± {100 * check.standard_error:.1f}"
    return f"{line}{gain}, {'kept' if check.kept else 'not kept'}; loss {check.loss:.2f}"


def is_finished(run: Path) -> bool:
    """Whether there is a detector, unless training.json says that training is not finished."""
    path = run / "training.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"finished": True}
    return record["finished"] and (run / "detector.pt").exists()


def remove_results(run: Path) -> None:
    """Remove what was found with an earlier detector."""
    (run.parent / "results.csv").unlink(missing_ok=True)
    for name in ("results", "scored"):
        evaluate.remove_results(run / name)


def write_json(path: Path, content: dict) -> None:
    """Write a file that is whole at any time."""
    Path(f"{path}.new").write_text(json.dumps(content, indent=2, default=str), encoding="utf-8")
    Path(f"{path}.new").replace(path)


def draw_demo(root: Path, size: int = 128) -> None:
    """Draw a category in the MVTec AD layout: washers; some have a stain, a scratch, or no hole."""
    rng = np.random.default_rng(0)
    for name in ("train/good", "test/good", "test/stain", "test/scratch", "test/no_hole"):
        images, masks = root / name, root / "ground_truth" / Path(name).name
        images.mkdir(parents=True, exist_ok=True)
        masks.mkdir(parents=True, exist_ok=True)
        for i in range(48 if name == "train/good" else 12):
            axis, (dx, dy) = np.linspace(-0.5, 0.5, size), rng.uniform(-0.25, 0.25, 2)
            x, y = np.meshgrid(axis - rng.normal(0, 0.005), axis - rng.normal(0, 0.005))
            radius = np.hypot(x, y)
            defects = {"good": radius < 0, "no_hole": radius < 0.15}
            defects["stain"] = np.hypot(x - dx, y - dy) < 0.05
            defects["scratch"] = (abs(x - dx) < 0.12) & (abs(x - dx + 3 * (y - dy)) < 0.03)
            defect, washer = defects[images.name], (radius > 0.15) & (radius < 0.42)
            pixels = np.where(washer, 170, 40) + rng.normal(0, 4) + rng.normal(0, 4, x.shape)
            pixels[defect] = 170 if name == "test/no_hole" else 80
            Image.fromarray(pixels.astype(np.uint8)).save(images / f"{i:03d}.png")
            Image.fromarray(defect).save(masks / f"{i:03d}_mask.png")


if __name__ == "__main__":
    main()
