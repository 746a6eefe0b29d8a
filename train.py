#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Fine-tune a Gaussian anomaly detector on the normal images of a category.

    python train.py --data mvtec/ --category screw
    python train.py --data mvtec/ --category all
    torchrun --nproc-per-node 8 train.py --data mvtec/ --category all
    python train.py --normal photos/ --out runs/mine
    python train.py --demo

Writes runs/<category>/detector.pt and history.json, over those of an earlier run, unless that
was the same run and finished; never opens the category's test folder. An interrupted run goes on
from its last check with --resume, or begins anew with --force.
--demo draws a small data set, trains a small backbone on it and evaluates it.
"""

from __future__ import annotations

import os
import shutil
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain, islice
from math import ceil
from pathlib import Path
from statistics import fmean

import torch
from torch import distributed

import evaluate
from evaluate import (
    Parser,
    add_common_options,
    for_each,
    gain_text,
    make_folder,
    number,
    pick_device,
    progress,
    read_history,
    refuse_inside,
    run,
    runs,
    write_json,
)
from gaussad import (
    AUGMENTATIONS,
    COVARIANCES,
    VERSIONS,
    AugmentationValidator,
    DegenerateError,
    FeatureExtractor,
    GaussianAD,
    Images,
    Validation,
    draw_demo,
    list_images,
    list_samples,
    load_plain,
    save_plain,
    split_normal,
)

FIRST_CHECK = 32  # steps: the first few throw the features off, and what is judged then misleads
ELSEWHERE = {"out", "device", "workers", "resume", "force", "demo"}  # options that change no result
TORCHRUN = "TORCHELASTIC_RUN_ID"  # in the environment of processes that torchrun started
DEMO = {"backbone": "mobilenet_v2", "image_size": 128, "steps": 32, "category": ["demo"]}


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    device = pick_device(args.device)
    if args.demo:
        args.data = args.out / "data"
        make_folder(args.data)
        draw_demo(args.data, args.image_size)
    todo = {str(args.normal): args} if args.normal else runs(args)
    if TORCHRUN in os.environ:
        return train_share(todo, device)
    done = for_each(todo, lambda args: train(args, device))
    if args.demo:
        evaluate.main(["--data", str(args.data), "--category", "demo", "--out", str(args.out),
                       "--device", args.device, "--workers", str(args.workers),
                       "--batch-size", str(args.batch_size)])
    return 0 if len(done) == len(todo) else 2


def train_share(todo: dict[str, Namespace], device: torch.device) -> int:
    """Train what is this process's of those that torchrun started, and wait for the others, as
    torchrun ends all of them when one has failed."""
    distributed.init_process_group("gloo", timeout=timedelta(days=365))
    share = dict(islice(todo.items(), distributed.get_rank(), None, distributed.get_world_size()))
    done = for_each(share, lambda args: train(args, device), alone=False)
    distributed.barrier()
    distributed.destroy_process_group()
    return 0 if len(done) == len(share) else 2


def parse(argv: list[str] | None) -> Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--demo", action="store_true", help="draw data, train and evaluate on it")
    add_common_options(parser)
    parser.add_argument("--normal", type=Path, metavar="FOLDER",
                        help="train on the images in it, in place of --data and --category")
    parser.add_argument("--resume", action="store_true",
                        help="go on with an interrupted run, from its last check")
    parser.add_argument("--force", action="store_true",
                        help="train anew what was finished with the same settings")
    model = parser.add_argument_group("model")
    model.add_argument("--backbone", default="efficientnet_b4",
                       help="torchvision's name of an EfficientNet, MobileNet or ResNet "
                            "(default: efficientnet_b4)")
    model.add_argument("--weights", default="imagenet", metavar="imagenet|random|PATH",
                       help="torchvision's ImageNet weights, downloaded on first use; random "
                            "ones; or a state dict of the backbone (default: imagenet)")
    model.add_argument("--levels", type=int, nargs="+", metavar="L",
                       help="feature levels, from 1 (default: those of stride 16 or more)")
    model.add_argument("--map-levels", type=int, nargs="+", metavar="L",
                       help="levels that make the anomaly map (default: those of stride 16)")
    model.add_argument("--covariance", choices=COVARIANCES, default="full",
                       help="for comparison: diagonal, or identity, a Euclidean distance "
                            "(default: full)")
    model.add_argument("--image-size", type=number(int, 32, 4096), default=380, metavar="PX",
                       help="side of the square that images are resized to (default: 380)")
    tuning = parser.add_argument_group("fine-tuning")
    tuning.add_argument("--steps", type=number(int, 0, 10**7), default=512, metavar="N",
                        help="at most; 0 is the frozen network (default: 512)")
    tuning.add_argument("--patience", type=number(int, 1, 10**6), default=3, metavar="N",
                        help="stop after N checks without a gain, those worse than the frozen "
                             "network counted twice; there is one after 32 steps and each time "
                             "their number has doubled (default: 3)")
    tuning.add_argument("--augmentations", nargs="+", choices=list(AUGMENTATIONS),
                        default=list(AUGMENTATIONS), metavar="NAME",
                        help=f"what the validator judges by (default: {' '.join(AUGMENTATIONS)})")
    tuning.add_argument("--lr", type=number(float, 0, 1e6), default=1e-4,
                        help="learning rate of Adam (default: 1e-4)")
    tuning.add_argument("--seed", type=number(int, 0, 2**32), default=0, metavar="N",
                        help="of the split, the batches and the validator (default: 0)")
    if parser.parse_args(argv).demo:
        parser.set_defaults(**DEMO)  # what the user gives still comes first
    args = parser.parse_args(argv)
    if args.demo and (args.data or args.normal or args.category != ["demo"]):
        parser.error("--demo draws its own data: leave out --data, --category and --normal")
    if args.demo and TORCHRUN in os.environ:
        parser.error("--demo is for one process: start it without torchrun")
    if args.normal and (args.data or args.category or not args.out):
        parser.error("--normal goes with --out, and without --data and --category")
    if not args.demo and not args.normal and (args.data is None or args.category is None):
        parser.error("--data and --category are needed, or --normal, or --demo")
    if args.demo:
        args.out = args.out or Path("runs/demo")
    args.augmentations = list(dict.fromkeys(args.augmentations))  # each once
    return args


def make_extractor(args: Namespace) -> FeatureExtractor:
    torch.manual_seed(args.seed)  # for random weights
    try:
        return FeatureExtractor(args.backbone, args.levels, args.weights)
    except ConnectionError as error:
        if not args.demo:
            raise
        print(f"{error}.\nThe demo goes on with random weights: its figures mean nothing.")
        return FeatureExtractor(args.backbone, args.levels, "random")


@dataclass(frozen=True)
class Fold:
    """A detector, the normal images it is fitted to, and a validator by those held out."""

    detector: GaussianAD
    images: Images
    validator: AugmentationValidator


def make_folds(paths: list[Path], args: Namespace, device: torch.device) -> list[Fold]:
    splits = split_normal(paths, args.seed)
    detector = GaussianAD(make_extractor(args), args.map_levels, args.covariance).to(device)
    augmentations = {name: AUGMENTATIONS[name] for name in args.augmentations}
    folds = []
    for fit, held_out in splits:
        normal = Images(held_out, args.image_size, args.workers).batches(args.batch_size)
        validator = AugmentationValidator(torch.cat(list(normal)), args.seed + len(folds),
                                          ceil(VERSIONS / len(splits)), augmentations)
        images = Images(fit, args.image_size, args.workers)
        folds.append(Fold(deepcopy(detector), images, validator))
    return folds


def train(args: Namespace, device: torch.device) -> None:
    """Fine-tune and keep the check the validator likes best; the first is the frozen network.

    The best detector is on disk as soon as it is known, its Gaussians fitted to all images. Few
    images are cross-fitted: a detector for each fold is trained, all are judged together, and the
    first is kept.
    """
    paths = normal_images(args)
    settings = {key: str(value.resolve()) if isinstance(value, Path) else value
                for key, value in vars(args).items() if key not in ELSEWHERE}
    settings["images"] = len(paths)  # more or fewer of them are another run
    if is_finished(args.out, settings) and not args.force:
        print(f"{args.out} is finished; --force trains it anew")
        return
    if (args.out / "checkpoint.pt").exists() and not (args.resume or args.force):
        raise ValueError(f"{args.out} holds an interrupted run: --resume goes on with it, --force "
                         "trains anew")
    state = read_checkpoint(args.out, settings) if args.resume else None
    folds = make_folds(paths, args, device)
    make_run_folder(args.out)
    first = folds[0]
    history = {"settings": settings, "levels": first.detector.extractor.levels,
               "map_levels": first.detector.map_levels, "finished": False}
    print(f"{args.out}: {len(first.images)} images to fit, {len(first.validator.normal)} held out"
          + f", in turn all: {len(folds)} folds" * (len(folds) > 1))
    print(heading(args.augmentations))
    try:
        select(folds, args, device, state, history)
    except KeyboardInterrupt:
        if state or "checks" in history:
            print(f"Interrupted: the same command with --resume goes on from the last check in "
                  f"{args.out}")
        raise
    step = history["best_step"]
    print(f"Step {step}{' (the frozen network)' if step == 0 else ''} is the validator's choice; "
          f"its detector is {args.out / 'detector.pt'}")


def normal_images(args: Namespace) -> list[Path]:
    if args.normal:
        paths = list_images([args.normal])
    else:
        paths = [sample.path for sample in list_samples(args.data, args.category, "train")]
    refuse_inside(args.out / "pictures", paths)
    return paths


def is_finished(out: Path, settings: dict) -> bool:
    history = read_history(out)
    return (history.get("finished", False) and history["settings"] == settings
            and (out / "detector.pt").is_file())


def read_checkpoint(out: Path, settings: dict) -> dict | None:
    """What `select` saved at the last check; None if there is nothing to go on with."""
    history, state = read_history(out), None
    if (out / "checkpoint.pt").is_file() and (out / "detector.pt").is_file():
        state = load_plain(out / "checkpoint.pt")
        if state.keys() != {"settings", "checks", "kept", "since", "training"}:
            raise ValueError(f"{out / 'checkpoint.pt'} was not saved by this train.py: leave out "
                             "--resume to start anew")
    for found in (history, state):
        if found and found["settings"] != settings:
            raise ValueError(f"{out} is of a run with other settings: leave out --resume to start "
                             "anew, or give the same")
    return state


def make_run_folder(out: Path) -> None:
    """Make the folder, or take over that of an earlier run, which has a history or a detector."""
    make_folder(out)
    ours = ("detector.pt", "checkpoint.pt", "history.json", "metrics.json", "scores.csv",
            "report.html", "pictures")
    there = [out / name for name in ours if (out / name).exists()]
    if there and not is_run(out):
        raise ValueError(f"{there[0]} would be replaced, and is not of an earlier run: remove it, "
                         "or choose another --out")


def is_run(out: Path) -> bool:
    try:
        return bool(read_history(out)) or "settings" in load_plain(out / "detector.pt")
    except ValueError:
        return False


def select(folds: list[Fold], args: Namespace, device: torch.device, state: dict | None,
           history: dict) -> None:
    """Judge each check, and save the detector if it is the best, the history and a checkpoint.

    The best is better than each that was the best before: nor may the AUROC fall little by little.
    """
    state = state or {"settings": history["settings"], "checks": [], "kept": [], "since": 0,
                      "training": [{} for _ in folds]}
    checks, kept = state["checks"], [Validation(**found) for found in state["kept"]]
    trainings = [fine_tune(fold, args, device, past, len(checks))
                 for fold, past in zip(folds, state["training"])]
    for at_check in zip(*trainings):
        records, found, state["training"] = zip(*at_check)
        found = Validation.pooled(found)
        if better := all(found.is_better_than(earlier) for earlier in kept):
            kept.append(found)
            fit_to_all(folds, args, device)
            save(folds[0].detector, args.out, new=not checks)
        checks.append(summary(records, found, kept[0]) | {"kept": better})
        print(line(checks[-1]), flush=True)
        worse = kept[0].is_better_than(found)  # than the frozen network: counts twice
        state["since"] = 0 if better else state["since"] + 1 + worse
        if state["since"] >= args.patience or checks[-1]["step"] == args.steps:
            break
        write_history(args.out, history, checks, finished=False)
        state["kept"] = [vars(found) for found in kept]
        save_plain(state, args.out / "checkpoint.pt")
    write_history(args.out, history, checks, finished=True)
    killed = [args.out / "detector.new", *args.out.glob(".*.part")]  # while they were saved
    for path in (args.out / "checkpoint.pt", *killed):
        path.unlink(missing_ok=True)


def write_history(out: Path, history: dict, checks: list[dict], finished: bool) -> None:
    best_step = [check["step"] for check in checks if check["kept"]][-1]
    history |= {"checks": checks, "best_step": best_step, "finished": finished}
    write_json(out / "history.json", history)


def save(detector: GaussianAD, out: Path, new: bool) -> None:
    """Save the detector; remove what tells of the one that was there, of a `new` run its history.

    A full disk fails while all that was there is there still, and a kill at any moment leaves no
    finished history beside another detector.
    """
    detector.save(out / "detector.new")
    if (out / "scores.csv").exists():  # else evaluate.py was not here: the pictures are not its
        shutil.rmtree(out / "pictures", ignore_errors=True)
    for name in ("metrics.json", "scores.csv", "report.html",
                 *["history.json", "checkpoint.pt"] * new):
        (out / name).unlink(missing_ok=True)
    os.replace(out / "detector.new", out / "detector.pt")


def fine_tune(fold: Fold, args: Namespace, device: torch.device, past: dict, n_checks: int
              ) -> Iterator[tuple[dict, Validation, dict]]:
    """Yield a record and the validation of each check, the detector refitted and judged by then,
    and what is needed to go on from there, as `past`; n_checks are over already.

    Training pulls the features to the Gaussian of the pre-trained network, which stays fixed;
    what is judged has the Gaussian of the features as they are now.
    """
    detector, step = fold.detector, past.get("step", 0)
    pretrained = fit(fold, args, device).gaussians
    optimizer = torch.optim.Adam(detector.parameters(), lr=args.lr)
    if past:
        detector.extractor.load_state_dict(past["network"])
        optimizer.load_state_dict(past["optimizer"])
    stream = endless(fold.images, args.batch_size, torch.Generator().manual_seed(args.seed))
    stream = islice(stream, step, None)  # what was trained on already is drawn again and dropped
    for check in islice(check_steps(args.steps), n_checks, None):
        start, detector.gaussians = time.perf_counter(), pretrained
        todo = progress(islice(stream, check - step), (check - step) * args.batch_size,
                        f"training to step {check}")
        try:
            losses = [train_step(detector, optimizer, batch.to(device)) for batch in todo]
            if check:
                fit(fold, args, device)
            found = fold.validator(lambda batch: detector(batch.to(device)).cpu(), args.batch_size)
        except DegenerateError as error:
            if check == 0:
                raise
            print(f"Step {check}: training diverged and stops ({error}); try a smaller --lr")
            return
        step = check
        record = {"step": check, "loss": fmean(losses) if losses else None,
                  "seconds": time.perf_counter() - start}
        yield record, found, {"step": check, "network": detector.extractor.state_dict(),
                              "optimizer": optimizer.state_dict()}


def fit(fold: Fold, args: Namespace, device: torch.device) -> GaussianAD:
    batches = progress(fold.images.batches(args.batch_size), len(fold.images), "fitting")
    return fold.detector.fit(batch.to(device) for batch in batches)


def summary(records: Sequence[dict], found: Validation, frozen: Validation) -> dict:
    """The record of a check of all folds: seconds of all, the mean loss, gains over frozen."""
    losses = [record["loss"] for record in records if record["loss"] is not None]
    gain, error = found.gain_over(frozen)
    auroc_gain, auroc_error = found.auroc_gain_over(frozen)
    return {"step": records[0]["step"], "loss": fmean(losses) if losses else None,
            "seconds": sum(record["seconds"] for record in records), "auroc": found.auroc,
            "auroc_gain": auroc_gain, "auroc_standard_error": auroc_error,
            "gain": gain, "standard_error": error}


def check_steps(last: int) -> Iterator[int]:
    """0, 32, 64, 128, ... and the last: what training gains, it gains ever more slowly."""
    step = 0
    while step < last:
        yield step
        step = max(FIRST_CHECK, 2 * step)
    yield last


def endless(images: Images, batch_size: int, shuffle: torch.Generator) -> Iterator[torch.Tensor]:
    """Batches of one epoch after the other."""
    while True:
        yield from images.batches(batch_size, shuffle)


def train_step(detector: GaussianAD, optimizer: torch.optim.Optimizer,
               batch: torch.Tensor) -> float:
    """One step; the loss before it. Raises DegenerateError where that is NaN or infinite."""
    optimizer.zero_grad()
    loss = detector.loss(batch)
    if not loss.isfinite():
        raise DegenerateError(f"the loss is {loss.item()}")
    loss.backward()
    optimizer.step()
    return loss.item()


def fit_to_all(folds: list[Fold], args: Namespace, device: torch.device) -> None:
    """Take the thresholds from the held-out images, then fit the first detector to those as well.

    More images make better Gaussians, of maps above all. They also bring a normal image a little
    nearer, so that the thresholds err on the side of fewer false alarms.
    """
    first, scores = folds[0], []
    for fold in folds:
        held_out = fold.validator.normal.split(args.batch_size)
        scores.append(fold.detector.held_out_scores(batch.to(device) for batch in held_out))
    first.detector.calibrate(torch.cat(scores))
    held_out = first.validator.normal.split(args.batch_size)
    everything = chain(first.images.batches(args.batch_size), held_out)
    total = len(first.images) + len(first.validator.normal)
    everything = progress(everything, total, "fitting to all")
    first.detector.fit(batch.to(device) for batch in everything)


def heading(augmentations: list[str]) -> str:
    names = "".join(f"{name:>9}" for name in augmentations)
    return (f" step     loss  seconds{names}    gain of AUROC         of J"
            "   (over step 0; of names the AUROC; all in %)")


def line(record: dict) -> str:
    loss = "-" if record["loss"] is None else f"{record['loss']:.2f}"
    aurocs = "".join(f"{100 * value:9.2f}" for value in record["auroc"].values())
    return (f"{record['step']:5d} {loss:>8} {record['seconds']:8.1f}{aurocs}"
            f"{gain_text(record, 'auroc_'):>17}{gain_text(record):>17}"
            + "  best so far" * record["kept"])


if __name__ == "__main__":
    run(main)
