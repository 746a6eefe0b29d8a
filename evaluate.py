#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Score the test images of categories, or any images, with the detectors that train.py saved.

    python evaluate.py --data mvtec/ --category screw
    python evaluate.py --data mvtec/ --category all
    python evaluate.py --model runs/screw/detector.pt --images photos/

Reads runs/<category>/detector.pt; writes metrics.json and scores.csv beside it, and with
--pictures a folder of pictures. Of several categories it also writes runs/results.json and
results.csv. Of your own --images, the scores and pictures go to runs/<category>/scored.
"""

from __future__ import annotations

import argparse
import base64
import csv
import html
import io
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from gaussad import (
    NORMAL,
    GaussianAD,
    Images,
    Sample,
    atomic_path,
    aupro,
    auroc,
    list_categories,
    list_images,
    list_samples,
    load_image,
    load_mask,
)

# ------------------------------------------------------------------------------------------------
# What both command lines share
# ------------------------------------------------------------------------------------------------

T = TypeVar("T")
OUT_OF_MEMORY = re.compile("out of memory|(can't allocate|not enough) memory")  # GPU; CPU


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong; --help has the rest. Help texts show the defaults."""

    def __init__(self, description: str) -> None:
        head, _, rest = description.partition("\n")
        super().__init__(
            description=head, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(kind: type, low: float, high: float) -> Callable[[str], float]:
    """An argparse type: a number from `low` to `high`."""

    def parse(text: str) -> float:
        if not low <= (value := kind(text)) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    parse.__name__ = kind.__name__  # argparse names it in "invalid int value"
    return parse


def add_common_options(parser: Parser) -> None:
    """The options of both scripts: data, output, machine."""
    data = parser.add_argument_group("data")
    data.add_argument("--data", type=Path, help="folder of the categories, in the MVTec AD layout")
    data.add_argument("--category", nargs="+", metavar="NAME",
                      help="folders in --data, such as screw; all: every one")
    data.add_argument("--out", type=Path,
                      help="folder of the run (default: runs/<category>); of several categories, "
                           "the folder of their runs (default: runs)")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto",
                         help="auto is the GPU where there is one (default: auto)")
    machine.add_argument("--workers", type=number(int, 1, 256), default=2, metavar="N",
                         help="threads that decode images (default: 2)")
    machine.add_argument("--batch-size", type=number(int, 1, 4096), default=16, metavar="N",
                         help="images in a batch (default: 16)")


def pick_device(name: str) -> torch.device:
    """The device of that name, computing in full float32: TF32 would drown what scores rest on."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("no CUDA device was found; use --device cpu")
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    rank = int(os.environ.get("LOCAL_RANK", "0"))  # torchrun's
    return torch.device("cuda", rank % torch.cuda.device_count())


def progress(batches: Iterable[Tensor], total: int, what: str) -> Iterator[Tensor]:
    """Pass batches on and tell how far they are: live on a terminal, else a line in 30 seconds."""
    live, start, done = sys.stderr.isatty(), time.perf_counter(), 0
    told = start
    for images in batches:
        yield images
        done, now = done + len(images), time.perf_counter()
        if live or now - told > 30:
            told, rate = now, done / (now - start)
            line = f"{what} {done}/{total}, {rate:.1f} images/s, {(total - done) / rate:.0f} s left"
            print(f"\r\033[K{line}" if live else line, end="" if live else "\n", file=sys.stderr,
                  flush=True)
    if live:
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def runs(args: argparse.Namespace) -> dict[str, argparse.Namespace]:
    """The categories asked for: by name, the arguments with that category and its run folder."""
    names = list_categories(args.data) if args.category == ["all"] else args.category
    if not names:
        raise ValueError(f"no category in {args.data}: one is a folder with train/good in it")
    several = args.category == ["all"] or len(names) > 1
    root = args.out or Path("runs")
    folders = {name: root / name if several or not args.out else root for name in names}
    return {name: argparse.Namespace(**{**vars(args), "category": name, "out": folder})
            for name, folder in folders.items()}


def for_each(todo: dict[str, argparse.Namespace], work: Callable[[argparse.Namespace], T],
             alone: bool = True) -> dict[str, T]:
    """The result of the work on each category; where one of several fails, it is told, and the
    others go on. Of `alone`, a single category is all there is, and raises what it raises."""
    done = {}
    for name, args in todo.items():
        try:
            done[name] = work(args)
        except Exception as error:
            if alone and len(todo) == 1:
                raise
            tell(f"{name}: {explain(error)}")
    return done


def make_folder(path: Path) -> None:
    """Make the folder that --out names, if need be. Raises ValueError where none can be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder {path}: {error.strerror}; choose one by --out")
    if not os.access(path, os.W_OK):
        raise ValueError(f"cannot write to the folder {path}; choose another by --out")


def refuse_inside(pictures: Path, images: Iterable[Path]) -> None:
    """Raise ValueError where images lie in the folder that pictures are written to."""
    if any(pictures.resolve() in path.resolve().parents for path in images):
        raise ValueError(f"the images are in {pictures}, where evaluate.py writes its own; choose "
                         "another --out")


def gain_text(check: dict, of: str = "") -> str:
    """The gain of J, or `of` the AUROC by its prefix in history.json, with its standard error."""
    return f"{100 * check[of + 'gain']:+.2f} ± {100 * check[of + 'standard_error']:.2f}"


def write_json(path: Path, content: dict) -> None:
    """Write `content` atomically, to be read by programs and by people."""
    with atomic_path(path) as part:
        part.write_text(json.dumps(content, indent=2) + "\n")


def printable(text: str) -> str:
    """On one line, and as text whatever bytes a file's name has."""
    escape = lambda letter: letter.encode("unicode_escape").decode()
    return "".join(letter if letter.isprintable() else escape(letter) for letter in text)


def tell(message: str) -> None:
    one_line = " ".join(message.split())
    print(f"{Path(sys.argv[0]).name}: error: {printable(one_line)}", file=sys.stderr)


def explain(error: Exception) -> str:
    """What the user can mend; any other error is raised again, for its traceback."""
    if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)):
        return "out of memory; use a smaller --batch-size or --image-size"
    if not isinstance(error, (ValueError, OSError)):
        raise error
    return str(error)


def run(main: Callable[[], int | None]) -> None:
    """Exit with what `main` returns; what the user can mend ends in one line and exit code 2."""
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a letter stops no training
        stream.reconfigure(errors="backslashreplace")
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        tell(explain(error))
        sys.exit(2)


# ------------------------------------------------------------------------------------------------
# Evaluation
# ------------------------------------------------------------------------------------------------


RESULTS = ["image_auroc", "image_auroc_from_map", "pixel_auroc", "aupro",
           "false_alarm_rate", "miss_rate", "f1"]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    device = pick_device(args.device)
    if args.images:
        score_own(args, device)
        return 0
    todo = runs(args)
    metrics = for_each(todo, lambda args: evaluate(args, device))
    if len(todo) > 1 and metrics:
        write_results(args.out or Path("runs"), metrics)
    return 0 if len(metrics) == len(todo) else 2


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_common_options(parser)
    parser.add_argument("--pictures", action="store_true",
                        help="draw the anomaly map over each image, in <out>/pictures")
    own = parser.add_argument_group("your own images, in place of --data and --category")
    own.add_argument("--model", type=Path, metavar="FILE", help="a detector.pt that train.py saved")
    own.add_argument("--images", type=Path, nargs="+", metavar="PATH", help="files, or folders")
    args = parser.parse_args(argv)
    if bool(args.model) != bool(args.images) or args.images and (args.data or args.category):
        parser.error("--model and --images go together, and without --data and --category")
    if not args.images and (args.data is None or args.category is None):
        parser.error("--data and --category are needed, or --model and --images")
    return args


def load_detector(path: Path, device: torch.device) -> GaussianAD:
    detector = GaussianAD.load(path, device)
    if not detector.image_size or len(set(detector.image_size)) > 1:
        raise ValueError(f"{path} was not fitted to square images")
    return detector


def evaluate(args: argparse.Namespace, device: torch.device) -> dict:
    """Score and measure a category; write and print what is found, and return the metrics."""
    out = args.out
    if not (out / "detector.pt").is_file():
        raise ValueError(f"no detector.pt in {out}: run train.py first, or point --out to it")
    history = read_history(out)
    trained_on = history.get("settings", {}).get("category")
    if trained_on not in (None, args.category):
        raise ValueError(f"{out} holds the detector of {trained_on!r}, not of {args.category!r}")
    detector = load_detector(out / "detector.pt", device)
    samples = list_samples(args.data, args.category, "test")
    masks = read_masks(samples, detector.image_size[0])
    images = Images([sample.path for sample in samples], detector.image_size[0], args.workers)
    if args.pictures:
        refuse_inside(out / "pictures", images.paths)
    scored = score(detector, images, args.batch_size, device)
    labels = torch.tensor([sample.label for sample in samples])
    metrics = {**measure(samples, labels, scored), **measure_maps(scored.maps, masks),
               **measure_verdicts(labels, scored.map_ratios),
               "best_step": history.get("best_step")}
    columns = {"defect": [sample.defect for sample in samples], "label": labels.tolist()}
    write_scores(out / "scores.csv", images.paths, columns, scored)
    write_json(out / "metrics.json", metrics)
    print(table(args.category, samples, metrics))
    names = picture_names([f"{sample.defect}_{sample.path.stem}" for sample in samples])
    misses, false_alarms = worst(labels.tolist(), scored.map_ratios.tolist())
    pictures = {i: captioned(detector, names[i], load_image(images.paths[i], images.size), scored,
                             i, masks[i]) for i in misses + false_alarms}
    shown = {"Worst misses": [pictures[i] for i in misses],
             "Worst false alarms": [pictures[i] for i in false_alarms]}
    write_report(out / "report.html", args.category, metrics, history.get("checks", []), labels,
                 scored, shown)
    print(f"metrics.json, scores.csv and report.html are in {out}")
    if args.pictures:
        files = write_pictures(out / "pictures", detector, names, images, scored, masks)
        write_sheet(out / "pictures/misses.png", [files[i] for i in misses])
        write_sheet(out / "pictures/false_alarms.png", [files[i] for i in false_alarms])
        print(f"Pictures are in {out / 'pictures'}; misses.png and false_alarms.png sum them up")
    return metrics


def score_own(args: argparse.Namespace, device: torch.device) -> None:
    """Score images of no data set: path, the map's maximum over its threshold, and the verdict."""
    detector = load_detector(args.model, device)
    images = Images(list_images(args.images), detector.image_size[0], args.workers)
    out = args.out or args.model.parent / "scored"
    if args.pictures:
        refuse_inside(out / "pictures", images.paths)
    make_folder(out)
    scored = score(detector, images, args.batch_size, device, keep_maps=args.pictures)
    write_scores(out / "scores.csv", images.paths, {}, scored)
    for path, ratio, verdict in zip(images.paths, scored.map_ratios.tolist(), scored.verdicts):
        print(f"{ratio:8.3f} {verdict:<9} {printable(str(path))}")
    print(f"(1 is the threshold.) scores.csv is in {out}")
    if args.pictures:
        names = picture_names([path.stem for path in images.paths])
        write_pictures(out / "pictures", detector, names, images, scored, [None] * len(images))
        print(f"Pictures are in {out / 'pictures'}")


@dataclass(frozen=True)
class Scored:
    """What a detector says of N images, on the CPU; verdicts go by the map's maximum."""

    scores: Tensor  # (N,) float64
    maps: Tensor | None  # (N, H, W) float32, unless they were not kept
    maxima: Tensor  # (N,) of the maps
    score_ratios: Tensor  # (N,) scores over their threshold
    map_ratios: Tensor  # (N,) maxima over their threshold

    @property
    def verdicts(self) -> list[str]:
        """"anomalous", "normal", or "-" for a detector without a threshold."""
        words = {True: "anomalous", False: "normal"}
        return ["-" if ratio != ratio else words[ratio > 1] for ratio in self.map_ratios.tolist()]


@torch.inference_mode()
def score(detector: GaussianAD, images: Images, batch_size: int, device: torch.device,
          keep_maps: bool = True) -> Scored:
    """Score images; their maps take 4 H W bytes each, which many images have no room for."""
    found = []
    for batch in progress(images.batches(batch_size), len(images), "scoring"):
        scores, maps = detector.scores_and_maps(batch.to(device))
        found.append((scores.cpu(), maps.amax((1, 2)).cpu(), maps.cpu() if keep_maps else None))
    scores, maxima, maps = zip(*found)
    scores, maxima = torch.cat(scores), torch.cat(maxima)
    return Scored(scores, torch.cat(maps) if keep_maps else None, maxima,
                  scores / detector.threshold.cpu(), maxima / detector.map_threshold.cpu())


def read_masks(samples: list[Sample], size: int) -> list[Tensor | None]:
    """Where each image is anomalous, (size, size) bool: nowhere if normal, None if not known."""
    def read(sample: Sample) -> Tensor | None:
        if sample.label and sample.mask is None:
            return None
        return load_mask(sample.mask, size) if sample.label else torch.zeros(size, size).bool()

    return [read(sample) for sample in samples]


def measure(samples: list[Sample], labels: Tensor, scored: Scored) -> dict:
    """AUROC over all test images, by score and by the map's maximum, and of each defect against
    all normal ones.

    In [0, 1]; None where one of the two classes is missing.
    """
    n_anomalous = int(labels.sum())
    n_normal = len(samples) - n_anomalous
    both = n_normal and n_anomalous
    per_defect = {}
    for defect in sorted({sample.defect for sample in samples if sample.label}):
        chosen = torch.tensor([sample.defect in (NORMAL, defect) for sample in samples])
        per_defect[defect] = auroc(scored.scores[chosen], labels[chosen]) if n_normal else None
    return {
        "image_auroc": auroc(scored.scores, labels) if both else None,
        "image_auroc_from_map": auroc(scored.maxima, labels) if both else None,
        "image_auroc_per_defect": per_defect,
        "n_normal": n_normal,
        "n_anomalous": n_anomalous,
    }


def measure_verdicts(labels: Tensor, ratios: Tensor) -> dict:
    """How often images labelled 0 or 1 (N,) are classified wrongly by ratios to a threshold (N,).

    The share of normal images classified as anomalous, of anomalous ones as normal, and
    F1 = 2 hits / (2 hits + misses + false alarms); in [0, 1], None where there are no such images,
    and where the detector has no threshold.
    """
    if ratios.isnan().any():
        return {"false_alarm_rate": None, "miss_rate": None, "f1": None}
    anomalous, above = labels == 1, ratios > 1
    misses, alarms = int((anomalous & ~above).sum()), int((~anomalous & above).sum())
    hits = int((anomalous & above).sum())
    n = int(anomalous.sum())
    return {
        "false_alarm_rate": alarms / (len(labels) - n) if n < len(labels) else None,
        "miss_rate": misses / n if n else None,
        "f1": 2 * hits / (2 * hits + misses + alarms) if n else None,
    }


def measure_maps(maps: Tensor, masks: list[Tensor | None]) -> dict:
    """Pixel AUROC and AU-PRO over the images whose mask is known.

    In [0, 1]; None where no pixel is anomalous, or none normal.
    """
    known = [i for i, mask in enumerate(masks) if mask is not None]
    truth = torch.stack([masks[i] for i in known]) if known else torch.zeros(0)
    both = truth.any() and not truth.all()
    return {
        "pixel_auroc": auroc(maps[known], truth) if both else None,
        "aupro": aupro(maps[known], truth) if both else None,
        "n_without_mask": len(masks) - len(known),
    }


def read_history(out: Path) -> dict:
    """What train.py wrote to history.json; empty where that is missing or something else."""
    def is_check(check: dict) -> bool:
        keys = "step", "auroc_gain", "auroc_standard_error", "gain", "standard_error"
        numbers = [check[key] for key in keys] + [*check["auroc"].values(), check["loss"] or 0]
        return all(isinstance(number, (int, float)) for number in numbers)

    try:
        history = json.loads((out / "history.json").read_text())
        known = all(map(is_check, history.get("checks", [])))
        return history if known and isinstance(history["settings"], dict) else {}
    except (OSError, ValueError, AttributeError, TypeError, KeyError, RecursionError):
        return {}


def write_scores(path: Path, paths: list[Path], columns: dict[str, list], scored: Scored) -> None:
    """One line per image: its path, the columns given, and its scores in full precision."""
    columns = {"path": [image.as_posix() for image in paths], **columns,
               "score": scored.scores.tolist(), "map_maximum": scored.maxima.tolist(),
               "score_of_threshold": scored.score_ratios.tolist(),
               "map_of_threshold": scored.map_ratios.tolist(), "verdict": scored.verdicts}
    write_csv(path, list(columns), zip(*columns.values()))


def write_csv(path: Path, header: list[str], rows: Iterable) -> None:
    names = {"encoding": "utf-8", "errors": "surrogateescape"}  # as the file system has them
    with atomic_path(path) as part, part.open("w", newline="", **names) as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def write_results(root: Path, metrics: dict[str, dict]) -> None:
    """results.json and results.csv, a row each category, and at the end the mean over them with
    its standard error; the same printed in %."""
    rows = {name: [found[key] for key in RESULTS] for name, found in metrics.items()}
    mean, error = [], []
    for values in zip(*rows.values()):
        known = torch.tensor([value for value in values if value is not None], dtype=torch.float64)
        mean.append(known.mean().item() if len(known) else None)
        error.append((known.std() / len(known)**0.5).item() if len(known) > 1 else None)
    named = {name: dict(zip(RESULTS, values)) for name, values in rows.items()}
    write_json(root / "results.json", {"categories": named, "mean": dict(zip(RESULTS, mean)),
                                       "standard_error": dict(zip(RESULTS, error))})
    rows = [*rows.items(), ("mean", mean), ("standard_error", error)]
    write_csv(root / "results.csv", ["category", *RESULTS],
              ([name, *values] for name, values in rows))
    for name, cells in [("in %", RESULTS), *rows]:
        texts = (cell if isinstance(cell, str) else percent(cell) for cell in cells)
        print(f"{name:<16}" + "".join(f"{text:>21}" for text in texts))
    print(f"results.json and results.csv are in {root}")


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def table(category: str, samples: list[Sample], metrics: dict) -> str:
    """The metrics as a table."""

    def row(name: str, images: int, value: float | None) -> str:
        return f"{name:<24} {images:>6} {percent(value):>11}"

    lines = [f"{category:<24} images        in %"]
    for defect, value in metrics["image_auroc_per_defect"].items():
        n = sum(sample.defect == defect for sample in samples)
        lines.append(row(f"{defect}, AUROC", n, value))
    lines.append(row("all anomalous, AUROC", metrics["n_anomalous"], metrics["image_auroc"]))
    lines.append(row("  by the map's maximum", metrics["n_anomalous"],
                     metrics["image_auroc_from_map"]))
    lines.append(row("pixels, AUROC", len(samples) - metrics["n_without_mask"],
                     metrics["pixel_auroc"]))
    lines.append(row("pixels, AU-PRO to 30 %", len(samples) - metrics["n_without_mask"],
                     metrics["aupro"]))
    lines.append(row("false alarms", metrics["n_normal"], metrics["false_alarm_rate"]))
    lines.append(row("misses", metrics["n_anomalous"], metrics["miss_rate"]))
    lines.append(row("F1 of the verdicts", len(samples), metrics["f1"]))
    if metrics["image_auroc"] is None:
        lines.append("No AUROC: it needs normal (test/good) and anomalous images, both.")
    if metrics["n_without_mask"]:
        lines.append(f"{metrics['n_without_mask']} anomalous images have no mask in ground_truth/ "
                     "and are left out of the pixel figures.")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------------------------

SHEET = 12  # pictures on a contact sheet
CAPTION = 28  # height of the caption in pixels


def write_pictures(folder: Path, detector: GaussianAD, names: list[str], images: Images,
                   scored: Scored, masks: list[Tensor | None]) -> list[Path]:
    """A picture <name>.png of each image; the files. Mostly, the images are in memory still."""
    folder.mkdir(exist_ok=True)
    files = [folder / f"{name}.png" for name in names]
    decoded = chain.from_iterable(images.batches(SHEET))
    for i, image in enumerate(decoded):
        with atomic_path(files[i]) as part:
            captioned(detector, names[i], image, scored, i, masks[i]).save(part, "PNG")
    return files


def picture_names(names: list[str]) -> list[str]:
    """Cut, as a file's name is 255 bytes at most, and numbered where two would be the same."""
    taken, unique = {"misses", "false_alarms"}, []
    for name in (name[:50] for name in names):
        numbered = chain([name], (f"{name}_{i}" for i in count(2)))
        unique.append(next(n for n in numbered if n.lower() not in taken))
        taken.add(unique[-1].lower())
    return unique


def captioned(detector: GaussianAD, name: str, image: Tensor, scored: Scored, i: int,
              mask: Tensor | None) -> Image.Image:
    """The picture of image i, its verdict above."""
    usual, threshold = detector.map_usual.item(), detector.map_threshold.item()
    text = (f"{printable(name)}: {scored.verdicts[i].upper()}, map "
            f"{scored.map_ratios[i]:.2f}, score {scored.score_ratios[i]:.2f} (of threshold)")
    strength = (scored.maps[i] - usual) / (threshold - usual) / 2
    return draw_picture(image, strength.clamp(0, 1).nan_to_num(0), mask, text)


def worst(labels: list[int], ratios: list[float]) -> tuple[list[int], list[int]]:
    """The first SHEET misses and false alarms, worst first, by map over threshold."""
    order = sorted(range(len(labels)), key=lambda i: ratios[i])
    misses = [i for i in order if labels[i] and ratios[i] <= 1]
    false_alarms = [i for i in order[::-1] if not labels[i] and ratios[i] > 1]
    return misses[:SHEET], false_alarms[:SHEET]


def draw_picture(image: Tensor, strength: Tensor, mask: Tensor | None, text: str) -> Image.Image:
    """The image; beside it the same under its map, the true defect outlined in green.

    image (3, H, W) uint8; strength (H, W) in [0, 1]: 0 is transparent, for what is usual in normal
    images, 0.5 the threshold, 1 red. One scale for all images of a detector.
    """
    heat = strength.double().numpy()[..., None]
    plain = image.permute(1, 2, 0).numpy()
    colour = np.concatenate([0 * heat + 255, 255 * (1 - heat), 0 * heat], -1)  # yellow to red
    painted = plain + (colour - plain) * 0.8 * heat**0.5
    if mask is not None:
        inner = -torch.nn.functional.max_pool2d(-mask[None].float(), 3, stride=1, padding=1)[0]
        painted[mask.numpy() & (inner == 0).numpy()] = (0, 255, 0)
    height, width = strength.shape
    picture = Image.new("RGB", (2 * width, height + CAPTION))
    picture.paste(Image.fromarray(plain), (0, CAPTION))
    picture.paste(Image.fromarray(painted.round().astype(np.uint8)), (width, CAPTION))
    font = ImageFont.load_default(min(15, width // 18))
    ImageDraw.Draw(picture).text((6, 5), text, fill="white", font=font)
    return picture


def write_sheet(path: Path, files: list[Path]) -> None:
    """A contact sheet, two pictures a row; none where there are none."""
    path.unlink(missing_ok=True)  # of an earlier run
    pictures = [Image.open(file) for file in files]
    if not pictures:
        return
    width, height = pictures[0].size
    sheet = Image.new("RGB", (2 * width, (len(pictures) + 1) // 2 * height))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % 2 * width, i // 2 * height))
    with atomic_path(path) as part:
        sheet.save(part, "PNG")


# ------------------------------------------------------------------------------------------------
# Report
# ------------------------------------------------------------------------------------------------

STYLE = """body { font: 15px sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse } td, th { padding: 2px 12px; text-align: right }
tr :first-child { text-align: left } svg { width: 480px; max-width: 100% } img { width: 49% }
.normal { fill: #2a7; color: #2a7 } .anomalous { fill: #c33; color: #c33 }
.curve { fill: none; stroke-width: 2 } .axis { fill: none; stroke: #999 } rect { opacity: 0.5 }"""


def write_report(path: Path, category: str, metrics: dict, checks: list[dict], labels: Tensor,
                 scored: Scored, pictures: dict[str, list[Image.Image]]) -> None:
    """All that was found of a category in one file of HTML that needs no other."""
    figures = [[key, percent(metrics[key])] for key in RESULTS]
    figures += [[f"image_auroc of {defect}", percent(value)]
                for defect, value in metrics["image_auroc_per_defect"].items()]
    training = [[check["step"], "-" if check["loss"] is None else f"{check['loss']:.2f}",
                 *(percent(value) for value in check["auroc"].values()),
                 gain_text(check, "auroc_"), gain_text(check)]
                for check in checks]
    names = list(checks[0]["auroc"]) if checks else []
    parts = [
        f"<h1>{html.escape(category)}</h1>",
        html_table(["", "%"], figures),
        "<h2>Map maximum over its threshold</h2><p>Share of the <b class=normal>normal</b> and of "
        "the <b class=anomalous>anomalous</b> images; the line is the threshold, 1.</p>",
        histogram(scored.map_ratios, labels),
        "<h2>ROC curve</h2><p>True-positive rate over false-positive rate; by the "
        "map's maximum (solid) and by the score (dashed). The dot is the threshold.</p>",
        roc_curve(scored, labels, metrics),
        f"<h2>Training</h2><p>Best step: {metrics['best_step']}. AUROCs and gains in %.</p>",
        html_table(["step", "loss", *names, "gain of AUROC", "of J"], training),
    ]
    for title, images in pictures.items():
        parts += [f"<h2>{title}</h2>", *map(inline, images)] if images else []
    page = (f"<!doctype html><meta charset=utf-8><title>{html.escape(category)}</title>"
            f"<style>{STYLE}</style>" + "\n".join(parts))
    with atomic_path(path) as part:
        part.write_text(page, encoding="utf-8", errors="backslashreplace")


def html_table(header: list[str], rows: list[list]) -> str:
    def row(tag: str, cells: list) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells)

    return "<table>" + row("th", header) + "".join(row("td", cells) for cells in rows) + "</table>"


def svg(*shapes: str) -> str:
    """A drawing of the unit square, y upwards, in a frame."""
    frame = '<rect class=axis x=0 y=0 width=400 height=250 style="opacity:1"/>'
    return f'<svg viewBox="-5 -5 410 260">{frame}{"".join(shapes)}</svg>'


def polyline(x: Tensor, y: Tensor, style: str) -> str:
    points = " ".join(f"{400 * a:.1f},{250 - 250 * b:.1f}" for a, b in zip(x.tolist(), y.tolist()))
    return f'<polyline class=curve points="{points}" style="{style}"/>'


def histogram(ratios: Tensor, labels: Tensor, bins: int = 40) -> str:
    """Bars of the share of normal and anomalous images in each bin, and a line at 1."""
    if not ratios.isfinite().all():
        return "<p>The detector has no threshold.</p>"
    end = max(1.2, 1.02 * ratios.max().item())
    counts = [torch.histc(ratios[labels == label].double(), bins, 0, end) for label in (0, 1)]
    shares = [count / count.sum().clamp(min=1) for count in counts]
    highest = max(share.max().item() for share in shares)
    shapes = []
    for share, name in zip(shares, ("normal", "anomalous")):
        heights = (240 * share / highest).tolist()
        shapes += [f'<rect class={name} x={400 * i / bins:.1f} y={250 - height:.1f} '
                   f"width={400 / bins:.1f} height={height:.1f} />"
                   for i, height in enumerate(heights) if height]
    at = torch.tensor([1 / end, 1 / end])
    return svg(*shapes, polyline(at, torch.tensor([0.0, 1.0]), "stroke: black"))


def roc_curve(scored: Scored, labels: Tensor, metrics: dict) -> str:
    if not metrics["n_normal"] or not metrics["n_anomalous"]:
        return "<p>It needs normal and anomalous images, both.</p>"
    shapes = []
    for values, dash in ((scored.maxima, "none"), (scored.scores, "6")):
        values, order = values.sort(descending=True)
        last = torch.cat([values[1:] != values[:-1], torch.tensor([True])])  # of equal values
        rates = [torch.cat([torch.zeros(1), (labels[order] == label).cumsum(0)[last].float()])
                 for label in (0, 1)]
        x, y = (rate / rate[-1] for rate in rates)
        shapes.append(polyline(x, y, f"stroke: #36c; stroke-dasharray: {dash}"))
    if metrics["f1"] is not None:
        x, y = 400 * metrics["false_alarm_rate"], 250 * metrics["miss_rate"]
        shapes.append(f"<circle cx={x:.1f} cy={y:.1f} r=5 />")
    return svg(*shapes)


def inline(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return f'<img src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


if __name__ == "__main__":
    run(main)
