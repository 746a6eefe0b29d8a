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
from its last check with --resume.
--demo draws a small data set, trains a small backbone on it and evaluates it.
"""

from __future__ import annotations

import os
import shutil
import time
from argparse import Namespace
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

import torch

import evaluate
from evaluate import (
    Parser,
    add_common_options,
    for_each,
    number,
    pick_device,
    progress,
    read_history,
    run,
    runs,
    write_json,
)
from gaussad import (
    AUGMENTATIONS,
    COVARIANCES,
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
ELSEWHERE = {"device", "workers", "resume", "force", "demo"}  # options that change no result
NOISE = 2.0  # standard errors that a gain must exceed
DEMO = {"backbone": "mobilenet_v2", "image_size": 128, "steps": 32, "category": ["demo"]}


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    device = pick_device(args.device)
    if args.demo:
        args.data = args.out / "data"
        make_folder(args.data)
        draw_demo(args.data, args.image_size)
    todo = {str(args.normal): args} if args.normal else shared(runs(args))
    done = for_each(todo, lambda args: train(args, device))
    if args.demo:
        evaluate.main(["--data", str(args.data), "--category", "demo", "--out", str(args.out),
                       "--device", args.device, "--workers", str(args.workers),
                       "--batch-size", str(args.batch_size)])
    return 0 if len(done) == len(todo) else 2


def shared(todo: dict[str, Namespace]) -> dict[str, Namespace]:
    """What of it this process does, of those that torchrun started."""
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    return dict(islice(todo.items(), rank, None, processes))


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
                        help="stop after N checks without a gain; there is one after 32 steps "
                             "and each time their number has doubled (default: 3)")
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
    if args.normal and (args.data or args.category or not args.out):
        parser.error("--normal goes with --out, and without --data and --category")
    if not args.demo and not args.normal and (args.data is None or args.category is None):
        parser.error("--data and --category are needed, or --normal, or --demo")
    if args.demo:
        args.out = args.out or Path("runs/demo")
    return args


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder {path}: {error.strerror}; choose one by --out")
    if not os.access(path, os.W_OK):
        raise ValueError(f"cannot write to the folder {path}; choose another by --out")


def make_validator(paths: list[Path], args: Namespace) -> AugmentationValidator:
    held_out = Images(paths, args.image_size, args.workers)
    return AugmentationValidator(
        torch.cat(list(held_out.batches(args.batch_size))), args.seed,
        augmentations={name: AUGMENTATIONS[name] for name in args.augmentations})


def make_extractor(args: Namespace) -> FeatureExtractor:
    torch.manual_seed(args.seed)  # for random weights
    try:
        return FeatureExtractor(args.backbone, args.levels, args.weights)
    except ConnectionError as error:
        if not args.demo:
            raise
        print(f"{error}.\nThe demo goes on with random weights: its figures mean nothing.")
        return FeatureExtractor(args.backbone, args.levels, "random")


def train(args: Namespace, device: torch.device) -> None:
    """Fine-tune and keep the check the validator likes best; the first is the frozen network.

    A later one must be better by more than NOISE standard errors. The best detector is on disk as
    soon as it is known, its Gaussians fitted to all images.
    """
    settings = {key: str(value) if isinstance(value, Path) else value
                for key, value in vars(args).items() if key not in ELSEWHERE}
    paths = normal_images(args)
    settings["images"] = len(paths)  # more or fewer of them are another run
    pictures = (args.out / "pictures").resolve()
    if any(pictures in path.resolve().parents for path in paths):
        raise ValueError(f"the images are in {pictures}, where evaluate.py writes its "
                         "own; choose another --out")
    past = read_history(args.out)
    finished = past.get("finished") and (args.out / "detector.pt").is_file()
    if finished and past["settings"] == settings and not args.force:
        print(f"{args.out} is finished; --force trains it anew")
        return
    fit, held_out = split_normal(paths, args.seed)
    detector = GaussianAD(make_extractor(args), args.map_levels, args.covariance).to(device)
    make_folder(args.out)
    state = read_checkpoint(args.out / "checkpoint.pt", settings) if args.resume else None
    images = Images(fit, args.image_size, args.workers)
    validator = make_validator(held_out, args)
    history = {"settings": settings, "levels": detector.extractor.levels,
               "map_levels": detector.map_levels, "finished": False}
    print(f"{args.out}: {len(fit)} images to fit, {len(held_out)} held out")
    print(heading(validator))
    try:
        select(detector, images, validator, args, device, state, history)
    except KeyboardInterrupt:
        print(f"Interrupted: the same command with --resume goes on from the last check in "
              f"{args.out}")
        raise
    step = history["best_step"]
    print(f"Step {step}{' (the frozen network)' if step == 0 else ''} is the validator's choice; "
          f"its detector is {args.out / 'detector.pt'}")


def normal_images(args: Namespace) -> list[Path]:
    if args.normal:
        return list_images([args.normal])
    return [sample.path for sample in list_samples(args.data, args.category, "train")]


def read_checkpoint(path: Path, settings: dict) -> dict | None:
    """What `select` saved at the last check; None if there is nothing to go on with."""
    if not path.is_file() or not path.with_name("detector.pt").is_file():
        return None
    state = load_plain(path)
    if state.get("settings") != settings:
        raise ValueError(f"{path} is of a run with other settings: leave out --resume to start "
                         "anew, or give the same")
    return state


def select(detector: GaussianAD, images: Images, validator: AugmentationValidator, args: Namespace,
           device: torch.device, state: dict | None, history: dict) -> None:
    """Judge each check, and save the detector if it is the best, the history and a checkpoint."""
    state = state or {"settings": history["settings"], "checks": [], "since": 0}
    best, checks = Validation({}, state.get("best")), state["checks"]
    for record, found, training in fine_tune(detector, images, validator, args, device, state):
        frozen = state.setdefault("frozen", found.separation)
        record["gain"], record["standard_error"] = found.gain_over(Validation({}, frozen))
        if better := not checks or is_gain(*found.gain_over(best)):
            best, state["best"], state["best_step"] = found, found.separation, record["step"]
            fit_to_all(detector, images, validator.normal, args, device)
            save(detector, args.out, new=not checks)
        checks.append(record)
        print(line(record) + ("  best so far" if better else ""), flush=True)
        state["since"] = 0 if better else state["since"] + 1
        history |= {"checks": checks, "best_step": state["best_step"],
                    "finished": state["since"] >= args.patience or record["step"] == args.steps}
        write_json(args.out / "history.json", history)
        if history["finished"]:
            break
        save_plain(state | training | {"step": record["step"]}, args.out / "checkpoint.pt")
    history |= {"checks": checks, "best_step": state["best_step"], "finished": True}
    write_json(args.out / "history.json", history)  # once more, where training diverged
    for name in ("checkpoint.pt", "detector.new"):  # the latter of a kill while it was saved
        (args.out / name).unlink(missing_ok=True)


def is_gain(gain: float, standard_error: float) -> bool:
    return gain > NOISE * standard_error


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


def fine_tune(detector: GaussianAD, images: Images, validator: AugmentationValidator,
              args: Namespace, device: torch.device, state: dict
              ) -> Iterator[tuple[dict, Validation, dict]]:
    """Yield a record and the validation of each check, the detector refitted and judged by then,
    and what is needed to go on from there; the checks in `state` are over already.

    Training pulls the features to the Gaussian of the pre-trained network, which stays fixed;
    what is judged has the Gaussian of the features as they are now.
    """
    def fit() -> GaussianAD:
        batches = progress(images.batches(args.batch_size), len(images), "fitting")
        return detector.fit(batch.to(device) for batch in batches)

    start, step, pretrained = time.perf_counter(), state.get("step", 0), fit().gaussians
    optimizer = torch.optim.Adam(detector.parameters(), lr=args.lr)
    if "network" in state:
        detector.extractor.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
    stream = endless(images, args.batch_size, torch.Generator().manual_seed(args.seed))
    stream = islice(stream, step, None)  # what was trained on already is drawn again and dropped
    for check in islice(check_steps(args.steps), len(state["checks"]), None):
        detector.gaussians = pretrained
        todo = progress(islice(stream, check - step), (check - step) * args.batch_size,
                        f"training to step {check}")
        try:
            losses = [train_step(detector, optimizer, batch.to(device)) for batch in todo]
            if check:
                fit()
            found = validator(lambda batch: detector(batch.to(device)).cpu(), args.batch_size)
        except DegenerateError as error:
            if check == 0:
                raise
            print(f"step {check}: training diverged and stops ({error}); try a smaller --lr")
            return
        loss, step = sum(losses) / len(losses) if losses else None, check
        record = {"step": check, "loss": loss, "seconds": time.perf_counter() - start,
                  "auroc": found.auroc}
        yield record, found, {"network": detector.extractor.state_dict(),
                              "optimizer": optimizer.state_dict()}
        start = time.perf_counter()


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


def fit_to_all(detector: GaussianAD, images: Images, held_out: torch.Tensor, args: Namespace,
               device: torch.device) -> None:
    """Take the thresholds from the held-out images, then fit to those as well.

    More images make better Gaussians, of maps above all. They also bring a normal image a little
    nearer, so that the thresholds err on the side of fewer false alarms.
    """
    detector.calibrate(batch.to(device) for batch in held_out.split(args.batch_size))
    everything = chain(images.batches(args.batch_size), held_out.split(args.batch_size))
    total = len(images) + len(held_out)
    detector.fit(batch.to(device) for batch in progress(everything, total, "fitting to all"))


def heading(validator: AugmentationValidator) -> str:
    names = "".join(f"{name:>9}" for name in validator.augmented)
    return f" step     loss  seconds{names}     gain   (of names the AUROC; all in %)"


def line(record: dict) -> str:
    loss = "-" if record["loss"] is None else f"{record['loss']:.2f}"
    aurocs = "".join(f"{100 * value:9.2f}" for value in record["auroc"].values())
    gain = f"{100 * record['gain']:+7.2f} ± {100 * record['standard_error']:.2f}"
    return f"{record['step']:5d} {loss:>8} {record['seconds']:8.1f}{aurocs}  {gain}"


if __name__ == "__main__":
    run(main)
