#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Score the test images of categories, or any images, with the detectors that train.py saved.

    python evaluate.py --data mvtec/ --category screw --pictures
    python evaluate.py --data mvtec/ --category all
    python evaluate.py --model runs/screw/detector.pt --images photos/new

Reads runs/<category>/detector.pt; writes metrics.json, scores.csv, report.html and if asked for a
folder of pictures beside it, and of several categories runs/results.json and results.csv. Of your
own --images, scores and pictures go to runs/<category>/scored."""

from __future__ import annotations

import csv
import io
import json
import sys
import warnings
from argparse import SUPPRESS, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from base64 import b64encode
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from html import escape
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gaussad import (NORMAL, GaussianAD, Sample, atomic_path, aupro, auroc, error_line,
                     list_categories, list_images, list_samples, load_image, load_mask, load_plain,
                     pick_device)  # fmt: skip

RESULTS = ("image_auroc", "image_auroc_from_map", "image_auroc_both", "pixel_auroc", "aupro",
           "false_alarm_rate", "miss_rate", "f1")  # what is averaged over categories
COLUMNS = ("path", "defect", "label", "verdict", "anomaly_score", "paper_score", "map_maximum")
SHOWN = 6  # pictures of a kind in the report
GREEN, BLUE = (0, 200, 60), (40, 90, 255)  # outlines: the true defect, the predicted one


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line asks for. Returns the exit code."""
    args = parse(argv)
    warnings.formatwarning = lambda message, *_: f"evaluate.py: {' '.join(str(message).split())}\n"
    sys.stdout.reconfigure(errors="backslashreplace")  # for names a terminal has no letters for
    args.device = pick_device(args.device)
    if args.images:
        return score_own(args)
    names = list_categories(args.data) if args.category == ["all"] else args.category
    several = len(names) > 1 or args.category == ["all"]
    root, metrics = args.out or Path("runs"), {}
    for name in names:
        try:
            metrics[name] = evaluate(args, name, root / name if several or not args.out else root)
        except Exception as error:
            tell(f"{name}: {error_line(error)}")
    if metrics and several:
        write_results(root, metrics)
    return 0 if metrics.keys() == set(names) else 2


def parse(argv: Sequence[str] | None) -> Namespace:
    """The options; wrong ones are told in one line, and end the program with exit code 2."""
    parser = ArgumentParser(usage=SUPPRESS, description=__doc__,
                            formatter_class=RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument  # without a usage, an error is one line
    add("--data", type=Path, help="folder of the categories, in the MVTec AD layout")
    add("--category", nargs="+", metavar="NAME", help="folders in --data; all: every one")
    add("--images", type=Path, nargs="+", metavar="PATH", help="your own images, files or folders")
    add("--model", type=Path, help="detector, or folder of <category>/detector.pt (--out or runs)")
    add("--out", type=Path, help="folder of the results (default: that of the detector)")
    add("--pictures", action="store_true", help="draw the anomaly map of each image")
    add("--false-alarms", type=float, default=0.05, help="expected share, 0 to 1 (0.05)")
    add("--batch-size", type=int, default=16, metavar="N", help="images in a batch (16)")
    add("--workers", type=int, default=2, metavar="N", help="threads that decode images (2)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(auto: a GPU if any)")
    args = parser.parse_args(argv)
    if not 0 < args.false_alarms < 1 or min(args.batch_size, args.workers) < 1:
        parser.error("--false-alarms is between 0 and 1, --batch-size and --workers 1 or more")
    own = args.images and args.model and not args.data and not args.category
    labelled = args.data and args.category and not args.images
    if not own and not labelled:
        parser.error("give --data and --category, or --images and --model")
    return args


def tell(error: str) -> None:
    sys.stderr.write(f"evaluate.py: error: {error}\n")  # in one piece, as threads tell too


def find_detector(model: Path | None, category: str, out: Path) -> Path:
    """Where the detector of a category is; ValueError where there is none."""
    places = ([model, model / category / "detector.pt", model / "detector.pt"] if model else
              [out / "detector.pt", Path("runs", category, "detector.pt")])  # fmt: skip
    for path in filter(Path.is_file, places):
        return path
    raise ValueError(f"no detector at {places[0]}: run train.py first, or name it by --model")


class Scored(NamedTuple):
    """An image and what a detector says of it; tensors are on the CPU."""

    sample: Sample
    anomalous: bool  # as its folder says
    image: Tensor  # (3, H, W) uint8
    mask: Tensor  # (H, W) bool, where it is known to be anomalous
    anomaly_score: float
    paper_score: float
    map_maximum: float
    verdict: str  # "anomalous" or "normal"
    map: Tensor  # (H, W)
    limits: list[float]  # of the map: where it is drawn yellow, where outlined, and where red


@torch.inference_mode()
def score(detector: GaussianAD, samples: list[Sample], args: Namespace) -> Iterator[Scored]:
    """The images that can be read, in order."""
    threshold, size = detector.threshold(args.false_alarms), detector.image_size[0]
    limits = [detector.map_threshold(rate) for rate in (0.5, args.false_alarms, 0.01)]
    read = lambda sample: load(sample, size, strict=args.data is not None)
    with ThreadPoolExecutor(args.workers) as pool:
        for start in range(0, len(samples), args.batch_size):
            batch = [x for x in pool.map(read, samples[start : start + args.batch_size]) if x]
            if not batch:
                continue
            images = torch.stack([image for _, _, image, _ in batch]).to(args.device)
            scores, maps = detector.scores_and_maps(images)
            both = detector.anomaly_score(scores, maps)
            values = [x.tolist() for x in (both, scores, maps.amax((1, 2)))]
            called = ["anomalous" if above else "normal" for above in both > threshold]
            yield from map(Scored, *zip(*batch), *values, called, maps.cpu(), [limits] * len(batch))


def load(sample: Sample, size: int, strict: bool) -> tuple | None:
    """(sample, anomalous, image, mask); of a bad file ValueError if `strict`, or else None."""
    empty = torch.zeros(size, size, dtype=torch.bool)
    try:
        mask = load_mask(sample.mask, size, sample.path) if sample.mask else empty
        return sample, sample.defect != NORMAL, load_image(sample.path, size), mask
    except ValueError as error:
        if strict:
            raise
        tell(error_line(error))
        return None


def score_all(out: Path, detector: GaussianAD, samples: list, args: Namespace) -> list[Scored]:
    """Write scores.csv, and pictures numbered as its rows. Returns the images that can be read;
    one's own without tensors, as there may be many."""
    images, rows = [], [COLUMNS]
    for number, x in enumerate(score(detector, samples, args), start=1):
        label = int(x.anomalous) if args.data else None
        rows.append((x.sample.path.as_posix(), x.sample.defect, label, x.verdict, x.anomaly_score,
                     x.paper_score, x.map_maximum))  # fmt: skip
        if args.pictures:
            name = f"{number:03d}_{x.sample.path.parent.name}_{x.sample.path.stem}"[:50]
            (out / "pictures").mkdir(parents=True, exist_ok=True)
            with atomic_path(out / f"pictures/{name}.png") as part:
                picture(x).save(part, "PNG")
        images.append(x if args.data else x._replace(image=None, mask=None, map=None))
    if not images:
        raise ValueError("none of these images can be read")
    write_csv(out / "scores.csv", rows)
    return images


def score_own(args: Namespace) -> int:
    """Score images of no data set; print score, verdict and path of each. Returns the exit code."""
    path = find_detector(args.model, "", Path())
    out = args.out or path.parent / "scored"
    detector = GaussianAD.load(path, args.device)
    samples = [Sample(image, "", None) for image in list_images(args.images)]
    images = score_all(out, detector, samples, args)
    for x in images:
        print(f"{x.anomaly_score:8.2f} {x.verdict:<9} {x.sample.path}")
    print(f"The threshold is {detector.threshold(args.false_alarms):.2f}. scores.csv is in {out}")
    return 0 if len(images) == len(samples) else 2


def evaluate(args: Namespace, category: str, out: Path) -> dict:
    """Score and measure a category; write and print what is found. Returns the metrics."""
    path = find_detector(args.model, category, out)
    out = out if args.out else path.parent
    training = {"settings": {}, "checks": [], **load_plain(path).get("training", {})}
    trained_on = training["settings"].get("category")
    if trained_on not in (None, category):
        raise ValueError(f"{path} is the detector of {trained_on!r}, not of {category!r}")
    detector = GaussianAD.load(path, args.device)
    images = score_all(out, detector, list_samples(args.data, category, "test"), args)
    metrics = measure(images, detector, args.false_alarms)
    if n := metrics["n_without_mask"]:
        warnings.warn(f"{category}: pixel figures leave out anomalous images without a mask, or "
                      f"with an empty one: {n}. It is ground_truth/<defect>/<stem>_mask.png")
    metrics["best_step"] = max((c["step"] for c in training["checks"] if c["kept"]), default=None)
    rows = [(key, value) for key, value in metrics.items() if not isinstance(value, dict)]
    rows += [(f"image_auroc_both, {k}", v) for k, v in metrics["image_auroc_per_defect"].items()]
    title = category if training.get("finished", True) else f"{category}: training is not finished"
    figures = table(rows)
    write(out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    write(out / "report.html", report(title, figures, metrics, training["checks"], images))
    print(title, figures, f"metrics.json, scores.csv and report.html are in {out}", sep="\n")
    return metrics


def measure(images: list[Scored], detector: GaussianAD, false_alarms: float) -> dict:
    """All of metrics.json but the best step; None for what there are no images for."""
    scores = [(x.paper_score, x.map_maximum, x.anomaly_score) for x in images]
    paper, maxima, both = torch.tensor(scores, dtype=torch.float64).T
    labels = torch.tensor([x.anomalous for x in images])
    masks = torch.stack([x.mask for x in images])
    known = ~labels | masks.any((1, 2))
    maps, masks = torch.stack([x.map for x in images])[known], masks[known]
    if_any = lambda metric, x, truth: metric(x, truth) if truth.any() and not truth.all() else None
    of_defect = {}
    for defect in sorted({x.sample.defect for x in images if x.anomalous}):
        chosen = torch.tensor([x.sample.defect in (NORMAL, defect) for x in images])
        of_defect[defect] = if_any(auroc, both[chosen], labels[chosen])
    return {"image_auroc": if_any(auroc, paper, labels),
            "image_auroc_from_map": if_any(auroc, maxima, labels),
            "image_auroc_both": if_any(auroc, both, labels), "image_auroc_per_defect": of_defect,
            "pixel_auroc": if_any(auroc, maps, masks), "aupro": if_any(aupro, maps, masks),
            **judge(both, labels, detector.threshold(false_alarms)),
            "at_false_alarms": {str(rate): judge(both, labels, detector.threshold(rate))
                                for rate in (0.01, 0.05, 0.1)},
            "n_normal": int((~labels).sum()), "n_anomalous": int(labels.sum()),
            "n_without_mask": int((~known).sum())}  # fmt: skip


def judge(scores: Tensor, labels: Tensor, threshold: float) -> dict:
    """What a threshold gives; F1 = 2 hits / (2 hits + misses + false alarms)."""
    above = scores > threshold
    hits, alarms = above[labels], above[~labels]
    share = lambda part: part.double().mean().item() if len(part) else None
    f1 = 2 * int(hits.sum()) / (int(above.sum()) + len(hits)) if len(hits) else None
    return dict(threshold=threshold, false_alarm_rate=share(alarms), miss_rate=share(~hits), f1=f1)


def write_results(root: Path, metrics: dict[str, dict]) -> None:
    """Write results.json and results.csv: categories, their mean and its standard error."""
    found = {name: {key: values[key] for key in RESULTS} for name, values in metrics.items()}
    mean, error = {}, {}
    for key in RESULTS:
        known = [row[key] for row in found.values() if row[key] is not None]
        mean[key] = fmean(known) if known else None
        error[key] = stdev(known) / len(known) ** 0.5 if len(known) > 1 else None
    of_all = {"mean": mean, "standard_error": error}
    write(root / "results.json", json.dumps({"categories": found, **of_all}, indent=2) + "\n")
    rows = [(name, *row.values()) for name, row in [*found.items(), *of_all.items()]]
    write_csv(root / "results.csv", [("category", *RESULTS), *rows])
    print(table([("category", *RESULTS), *rows]))
    print(f"results.json and results.csv are in {root}")


def table(rows: list[tuple]) -> str:
    """Rows in columns of text, "-" for None."""
    shown = lambda x: f"{x:.3f}" if isinstance(x, float) else "-" if x is None else str(x)
    rows = [[shown(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) + 2 for column in zip(*rows)]
    return "\n".join(row[0].ljust(widths[0]) + "".join(map(str.rjust, row[1:], widths[1:]))
                     for row in rows)  # fmt: skip


def write(path: Path, content: str) -> None:
    """Write a file, and make the folder that it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as part:  # names of files are written as the file system has them
        part.write_text(content, encoding="utf-8", errors="surrogateescape", newline="")


def write_csv(path: Path, rows: Iterable[Sequence]) -> None:
    content = io.StringIO(newline="")
    csv.writer(content).writerows(rows)
    write(path, content.getvalue())


def picture(x: Scored) -> Image.Image:
    """The image, and beside it the same under its map, with the true and the predicted outline."""
    yellow, limit, red = x.limits
    heat = ((x.map.double() - yellow) / (red - yellow)).clamp(0, 1).numpy()[..., None]
    plain = x.image.permute(1, 2, 0).numpy()
    colour = np.concatenate([0 * heat + 255, 255 * (1 - heat), 0 * heat], -1)
    painted = plain + (colour - plain) * 0.7 * heat**0.5
    for region, colour in ((x.map > limit, BLUE), (x.mask, GREEN)):
        inner = -torch.nn.functional.max_pool2d(-region[None].float(), 3, stride=1, padding=1)[0]
        painted[(region & (inner == 0)).numpy()] = colour
    return Image.fromarray(np.concatenate([plain, painted.round().astype(np.uint8)], 1))


STYLE = """body { font: 16px/1.5 system-ui; max-width: 1100px; margin: auto; padding: 1em }
pre { font-size: min(14px, 2.8vw); overflow-x: auto } p, figcaption { overflow-wrap: break-word }
figure { display: inline-block; width: 540px; max-width: 100%; margin: 0 6px 1em 0 }
img, svg { width: 100% } svg { height: 20px; overflow: visible } path + path { stroke: black }
path { stroke: #c43c00; stroke-width: 2; vector-effect: non-scaling-stroke }"""


def report(title: str, figures: str, metrics: dict, checks: list, images: list[Scored]) -> str:
    """All that was found of a category, as a page of HTML that needs no other file."""
    thresholds = [("expected", "threshold", "false alarms", "misses", "F1")]
    thresholds += [(rate, *found.values()) for rate, found in metrics["at_false_alarms"].items()]
    keys = ("step", "loss", "separation", "gain", "standard_error", "effective_rank")
    steps = [keys, *([check.get(key) for key in keys] for check in checks)]
    ranked = sorted(images, key=lambda x: -x.anomaly_score)
    near = sorted(ranked, key=lambda x: abs(x.anomaly_score - metrics["threshold"]))
    kinds = {"Worst misses": [x for x in ranked[::-1] if x.anomalous and x.verdict == "normal"],
             "Worst false alarms": [x for x in ranked if not x.anomalous and x.verdict != "normal"],
             "Most anomalous": ranked,
             "Normal, nearest to the threshold": [x for x in near if not x.anomalous]}  # fmt: skip
    pictures = "".join(f"<h3>{kind}</h3>{''.join(map(figure, chosen[:SHOWN]))}"
                       for kind, chosen in kinds.items() if chosen)  # fmt: skip
    return f"""<!doctype html><html lang=en><meta charset=utf-8>
<meta name=viewport content="width=device-width"><title>{escape(title)}</title>
<style>{STYLE}</style><h1>{escape(title)}</h1><pre>{escape(figures)}</pre>
<p>Images are ranked by the paper's score, by the map's maximum (from_map) and by both, the anomaly
score. AU-PRO is up to 30 % false positives. Pixel figures leave out anomalous images without a mask
or with an empty one (n_without_mask).<h2>Thresholds</h2>
<p>The share of false alarms expected from held-out normal images, and what each threshold gives.
<pre>{table(thresholds)}</pre><h2>Anomaly scores</h2>
<p>Each mark is an image; those to the right of the black one, the threshold
{metrics["threshold"]:.2f}, are called anomalous. {strips(images, metrics["threshold"])}
<h2>Training</h2><p>The separation s is how far augmented images score above held-out normal ones;
its gain, with a standard error, is over the best before. <pre>{table(steps)}</pre><h2>Pictures</h2>
<p>Beside each image the same under its anomaly map, yellow above the maximum of half of the normal
maps, red above that of all but 1&nbsp;%. Outlined are the predicted defect (blue) and the true one
(green). {pictures}"""


def figure(x: Scored) -> str:
    """A picture with its caption, in HTML."""
    path, buffer = x.sample.path, io.BytesIO()
    picture(x).save(buffer, "JPEG", quality=90)
    data = b64encode(buffer.getvalue()).decode()
    caption = escape(f"{path.parent.name}/{path.name}: {x.anomaly_score:.1f}, called {x.verdict}")
    return (f'<figure><img src="data:image/jpeg;base64,{data}" alt="">'
            f"<figcaption>{caption}</figcaption></figure>")  # fmt: skip


def strips(images: list[Scored], threshold: float) -> str:
    """A row for each kind of image, a mark in it for each image, and one at the threshold: SVG."""
    values = [threshold, *(x.anomaly_score for x in images)]
    box = f"{min(values)} 0 {max(values) - min(values)} 1"
    rows = ""
    for _, kind in sorted({(x.anomalous, x.sample.defect) for x in images}):
        marks = "".join(f"M{x.anomaly_score} 0v1" for x in images if x.sample.defect == kind)
        rows += (f"<p>{escape(kind)}<svg viewBox='{box}' preserveAspectRatio=none>"
                 f"<path d='{marks}' /><path d='M{threshold} 0v1' /></svg>")  # fmt: skip
    return rows


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        tell(error_line(error))
        sys.exit(2)
