#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Score the test images of a category with the detector that train.py saved.

    python evaluate.py --data mvtec/ --category screw

Reads runs/<category>/detector.pt; writes metrics.json and scores.csv beside it, and with
--pictures a folder of pictures.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path

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
    list_samples,
    load_mask,
)

# ------------------------------------------------------------------------------------------------
# What both command lines share
# ------------------------------------------------------------------------------------------------

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
    data.add_argument("--category", help="folder in --data, such as screw")
    data.add_argument("--out", type=Path, help="folder of the run (default: runs/<category>)")
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
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


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


def write_json(path: Path, content: dict) -> None:
    """Write `content` atomically, to be read by programs and by people."""
    with atomic_path(path) as part:
        part.write_text(json.dumps(content, indent=2) + "\n")


def run(main: Callable[[], None]) -> None:
    """Call `main`; what the user can mend ends in one line and exit code 2, not in a traceback."""
    try:
        main()
    except (ValueError, OSError) as error:
        message = str(error)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not OUT_OF_MEMORY.search(str(error)):
            raise
        message = "out of memory; use a smaller --batch-size or --image-size"
    except KeyboardInterrupt:
        sys.exit(130)
    else:
        return
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


# ------------------------------------------------------------------------------------------------
# Evaluation
# ------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    add_common_options(parser)
    parser.add_argument("--pictures", action="store_true",
                        help="draw the anomaly map over each test image, in <out>/pictures")
    args = parser.parse_args(argv)
    if args.data is None or args.category is None:
        parser.error("--data and --category are needed")
    device = pick_device(args.device)
    out = args.out or Path("runs") / args.category
    if not (out / "detector.pt").is_file():
        raise ValueError(f"no detector.pt in {out}: run train.py first, or point --out to it")
    history = read_history(out)
    trained_on = history.get("settings", {}).get("category", args.category)
    if trained_on != args.category:
        raise ValueError(f"{out} holds the detector of {trained_on!r}, not of {args.category!r}")
    detector = GaussianAD.load(out / "detector.pt", device)
    if not detector.image_size or len(set(detector.image_size)) > 1:
        raise ValueError(f"{out / 'detector.pt'} was not fitted to square images")
    samples = list_samples(args.data, args.category, "test")
    masks = read_masks(samples, detector.image_size[0])
    images = Images([sample.path for sample in samples], detector.image_size[0], args.workers)
    scores, maps = score(detector, images, args.batch_size, device)
    maxima = maps.amax((1, 2))
    metrics = {**measure(samples, scores, maxima), **measure_maps(maps, masks),
               "best_step": history.get("best_step")}
    write_scores(out / "scores.csv", samples, scores, maxima)
    write_json(out / "metrics.json", metrics)
    print(table(args.category, samples, metrics))
    print(f"metrics.json and scores.csv are in {out}")
    if args.pictures:
        decoded = chain.from_iterable(images.batches(args.batch_size))  # mostly in memory still
        write_pictures(out / "pictures", detector, samples, decoded, scores, maxima, maps, masks)
        print(f"Pictures are in {out / 'pictures'}; misses.png and false_alarms.png sum them up")


@torch.inference_mode()
def score(detector: GaussianAD, images: Images, batch_size: int,
          device: torch.device) -> tuple[Tensor, Tensor]:
    """The score (N,) float64 and the anomaly map (N, H, W) float32 of each image, on the CPU."""
    batches = progress(images.batches(batch_size), len(images), "scoring")
    found = [detector.scores_and_maps(batch.to(device)) for batch in batches]
    scores, maps = zip(*found)
    return torch.cat(scores).cpu(), torch.cat(maps).cpu()


def read_masks(samples: list[Sample], size: int) -> list[Tensor | None]:
    """Where each image is anomalous, (size, size) bool: nowhere if normal, None if not known."""
    def read(sample: Sample) -> Tensor | None:
        if sample.label and sample.mask is None:
            return None
        return load_mask(sample.mask, size) if sample.label else torch.zeros(size, size).bool()

    return [read(sample) for sample in samples]


def measure(samples: list[Sample], scores: Tensor, maxima: Tensor) -> dict:
    """AUROC over all test images, by score and by the map's maximum, and of each defect against
    all normal ones.

    In [0, 1]; None where one of the two classes is missing.
    """
    labels = torch.tensor([sample.label for sample in samples])
    n_anomalous = int(labels.sum())
    n_normal = len(samples) - n_anomalous
    per_defect = {}
    for defect in sorted({sample.defect for sample in samples if sample.label}):
        chosen = torch.tensor([sample.defect in (NORMAL, defect) for sample in samples])
        per_defect[defect] = auroc(scores[chosen], labels[chosen]) if n_normal else None
    return {
        "image_auroc": auroc(scores, labels) if n_normal and n_anomalous else None,
        "image_auroc_from_map": auroc(maxima, labels) if n_normal and n_anomalous else None,
        "image_auroc_per_defect": per_defect,
        "n_normal": n_normal,
        "n_anomalous": n_anomalous,
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
    """What train.py wrote to history.json; empty for a detector that was saved without one."""
    try:
        history = json.loads((out / "history.json").read_text())
    except (OSError, ValueError):
        return {}
    well_formed = isinstance(history, dict) and isinstance(history.get("settings"), dict)
    return history if well_formed else {}


def write_scores(path: Path, samples: list[Sample], scores: Tensor, maxima: Tensor) -> None:
    """One line per image: path, defect, label, score and the map's maximum in full precision."""
    with atomic_path(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "defect", "label", "score", "map_maximum"])
        for sample, *values in zip(samples, scores.tolist(), maxima.tolist()):
            writer.writerow([sample.path.as_posix(), sample.defect, sample.label, *values])


def table(category: str, samples: list[Sample], metrics: dict) -> str:
    """The metrics as a table, AUROC in percent."""

    def row(name: str, images: int, value: float | None) -> str:
        return f"{name:<24} {images:>6} {'-' if value is None else f'{100 * value:.1f}':>11}"

    lines = [f"{category:<24} images  AUROC in %"]
    for defect, value in metrics["image_auroc_per_defect"].items():
        lines.append(row(defect, sum(sample.defect == defect for sample in samples), value))
    lines.append(row("all anomalous", metrics["n_anomalous"], metrics["image_auroc"]))
    lines.append(row("  by the map's maximum", metrics["n_anomalous"],
                     metrics["image_auroc_from_map"]))
    lines.append(row("normal", metrics["n_normal"], None))
    lines.append(row("pixels, AUROC", len(samples) - metrics["n_without_mask"],
                     metrics["pixel_auroc"]))
    lines.append(row("pixels, AU-PRO to 30 %", len(samples) - metrics["n_without_mask"],
                     metrics["aupro"]))
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


def write_pictures(folder: Path, detector: GaussianAD, samples: list[Sample],
                   images: Iterable[Tensor], scores: Tensor, maxima: Tensor, maps: Tensor,
                   masks: list[Tensor | None]) -> None:
    """A picture of each image, <defect>_<name>.png, and sheets of the worst misses and alarms.

    The verdict is by the map's maximum, which is the more reliable of the two image scores.
    """
    folder.mkdir(exist_ok=True)
    usual, threshold = detector.map_usual.item(), detector.map_threshold.item()
    ratios = (maxima / threshold).tolist()
    score_ratios = (scores / detector.threshold.cpu()).tolist()
    files = [folder / f"{sample.defect}_{sample.path.stem}.png" for sample in samples]
    for i, (file, sample, image) in enumerate(zip(files, samples, images)):
        verdict = "ANOMALOUS" if ratios[i] > 1 else "normal"
        text = (f"{sample.defect} {sample.path.stem}: {verdict}, map {ratios[i]:.2f}, "
                f"score {score_ratios[i]:.2f} (of threshold)")
        strength = (maps[i] - usual) / (threshold - usual) / 2
        with atomic_path(file) as part:
            draw_picture(image, strength.clamp(0, 1), masks[i], text).save(part, "PNG")
    ranked = sorted(zip(ratios, [sample.label for sample in samples], files))
    misses = [file for ratio, label, file in ranked if label and ratio <= 1]
    false_alarms = [file for ratio, label, file in ranked[::-1] if not label and ratio > 1]
    write_sheet(folder / "misses.png", misses)
    write_sheet(folder / "false_alarms.png", false_alarms)


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
    """A contact sheet, two pictures a row, of the first SHEET files; none where there are none."""
    path.unlink(missing_ok=True)  # of an earlier run
    pictures = [Image.open(file) for file in files[:SHEET]]
    if not pictures:
        return
    width, height = pictures[0].size
    sheet = Image.new("RGB", (2 * width, (len(pictures) + 1) // 2 * height))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % 2 * width, i // 2 * height))
    with atomic_path(path) as part:
        sheet.save(part, "PNG")


if __name__ == "__main__":
    run(main)
