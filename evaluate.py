#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Score the test images of categories, or any images, with the detectors that train.py saved.

    python evaluate.py --data mvtec/ --category screw --pictures
    python evaluate.py --data mvtec/ --category all
    python evaluate.py --model runs/screw/detector.pt --images photos/new

Reads runs/<category>/detector.pt; writes metrics.json, scores.csv and report.html, and if asked for
a folder of pictures, beside it; for several categories also results.json, .csv and .html.
For your own --images, all but the metrics goes to a folder `scored` beside the detector."""

from __future__ import annotations

import csv
import io
import json
import warnings
from argparse import SUPPRESS, ArgumentParser, Namespace
from argparse import RawDescriptionHelpFormatter as Formatter
from base64 import b64encode
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from html import escape
from itertools import repeat
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple
from urllib.parse import quote

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import gaussad
import train
from gaussad import NORMAL, FeatureExtractor, GaussianAD, Sample, aupro, auroc

FIGURES = {
    "image_auroc_both": "image AUROC, anomaly score (decides)",
    "image_auroc": "image AUROC, pooled score",
    "image_auroc_from_map": "image AUROC, maximum of the map",
    "pixel_auroc": "pixel AUROC",
    "aupro": "AU-PRO up to 30 % FPR",
}
RESULTS = (*FIGURES, "false_alarm_rate", "miss_rate", "f1")  # what is averaged over categories
COLUMNS = ("path", "defect", "label", "verdict", "anomaly_score", "pooled_score", "map_maximum")
SHOWN = 6  # pictures of a kind in the report
TRUE, PREDICTED = (0, 235, 235), (255, 255, 255)  # outlines: cyan and white, visible on the heat


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line asks for. Returns the exit code."""
    args = parse(argv)
    args.device = gaussad.pick_device(args.device)
    if args.images:
        return score_own(args)
    every = "all" in args.category
    names = gaussad.list_categories(args.data) if every else list(dict.fromkeys(args.category))
    several = len(names) > 1 or every
    if several and args.model and not args.model.is_dir():
        raise ValueError(f"--model {args.model} is no folder of <category>/detector.pt")
    root, metrics = args.out or args.model or Path("runs"), {}
    for name in names:
        try:
            metrics[name] = evaluate(args, name, root / name if several else args.out, several)
        except Exception as error:
            train.print_error(error, name)
    if metrics and several:
        write_results(root, metrics)
    return 0 if metrics.keys() == set(names) else 2


def parse(argv: Sequence[str] | None) -> Namespace:
    """The options; a wrong one ends the program with one line and exit code 2."""
    kind = {"formatter_class": Formatter, "allow_abbrev": False}
    parser = ArgumentParser(usage=SUPPRESS, description=__doc__, **kind)
    add = parser.add_argument
    add("--data", type=Path, help="folder of the categories, in the MVTec AD layout")
    add("--category", nargs="+", metavar="NAME", help="folders in --data; all: every one")
    add("--images", type=Path, nargs="+", metavar="PATH", help="your own images, files or folders")
    add("--model", type=Path, help="detector, or folder of <category>/detector.pt (--out or runs)")
    add("--backbone", metavar="FILE", help="the .py file of your own network, as for train.py")
    add("--out", type=Path, help="folder of the results (default: that of the detector)")
    add("--pictures", action="store_true", help="draw the anomaly map of each image")
    add("--false-alarms", type=float, default=0.05, help="expected fraction, 0 to 1 (0.05)")
    add("--batch-size", type=int, default=16, metavar="N", help="images in a batch (16)")
    add("--workers", type=int, default=2, metavar="N", help="threads that decode images (2)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(auto: a GPU if any)")
    add("--image-size", help=SUPPRESS)
    args = parser.parse_args(argv)
    if args.image_size:
        parser.error("--image-size is an option of train.py: the detector knows its size")
    if not 0 < args.false_alarms < 1:
        parser.error("--false-alarms must be between 0 and 1")
    if min(args.batch_size, args.workers) < 1:
        parser.error("--batch-size and --workers must be at least 1")
    own = args.images and args.model and not args.data and not args.category
    labelled = args.data and args.category and not args.images
    if not own and not labelled:
        parser.error("give --data and --category, or --images and --model")
    return args


def find_detector(args: Namespace, category: str = "", several: bool = False) -> Path:
    """Where the detector of a category, perhaps of several, is; ValueError if there is none."""
    homes = [args.model] if args.model else [*filter(None, [args.out]), Path("runs")]
    for home in homes:
        alone = [] if several else [home / "detector.pt", home]
        for path in (home / category / "detector.pt", *alone):
            if path.is_file():
                return path
    there = sorted(path.parent.name for home in homes for path in home.glob("*/detector.pt"))
    hint = f"; there are: {', '.join(there)}" if there else ": run train.py first, or give --model"
    places = " or ".join(map(str, homes))
    raise ValueError(f"no detector {category and f'of {category!r} '}in {places}{hint}")


def load_detector(path: Path, args: Namespace) -> tuple[GaussianAD, dict]:
    """A detector and its training (no settings and checks if train.py did not make it)."""
    content, extractor = gaussad.load_plain(path), None
    if args.backbone:
        levels = content.get("detector", {}).get("levels")
        extractor = FeatureExtractor(args.backbone, levels, "random")  # replaced by the detector's
    training = {"settings": {}, "checks": [], "finished": True, **content.get("training", {})}
    return gaussad.detector_from(content, path, extractor).to(args.device), training


class Scored(NamedTuple):
    """An image and its results; tensors are on the CPU."""

    sample: Sample
    anomalous: bool  # as its folder says
    image: Tensor  # (3, H, W) uint8
    mask: Tensor  # (H, W) bool, where it is known to be anomalous
    anomaly_score: float
    pooled_score: float
    map_maximum: float
    map: Tensor  # (H, W)
    threshold: float  # of the anomaly score
    limits: list[float]  # of the map: where heat begins, yellow; the outline; where heat is red

    @property
    def scores(self) -> tuple[float, float, float]:
        return self.anomaly_score, self.pooled_score, self.map_maximum

    @property
    def verdict(self) -> str:
        return "anomalous" if self.anomaly_score > self.threshold else "normal"


@torch.inference_mode()
def score(detector: GaussianAD, samples: list[Sample], args: Namespace) -> Iterator[Scored]:
    """The images, in order; your own only if they can be read."""
    threshold, maxima = detector.threshold(args.false_alarms), detector.held_out_scores[:, 1]
    limits = [gaussad.tail_quantile(maxima, 1 - rate) for rate in (0.5, args.false_alarms, 0.01)]
    read = lambda sample: load(sample, detector.image_size, strict=args.data is not None)
    with ThreadPoolExecutor(args.workers) as pool:
        for start in range(0, len(samples), args.batch_size):
            batch = [x for x in pool.map(read, samples[start : start + args.batch_size]) if x]
            if not batch:
                continue
            scores, maps = detector.scores_and_maps(torch.stack([x[2] for x in batch]))
            anomaly_scores = detector.anomaly_score(scores, maps)
            values = (x.tolist() for x in (anomaly_scores, scores, maps.amax((1, 2))))
            rest = maps.cpu(), repeat(threshold), repeat(limits)
            yield from map(Scored, *zip(*batch), *values, *rest)
            train.progress(f"{start + len(batch)} of {len(samples)} images scored")
    train.progress("")


def load(sample: Sample, size: list[int], strict: bool) -> tuple | None:
    """(sample, anomalous, image, mask); of a bad file ValueError if `strict`, or else None."""
    anomalous, mask = sample.defect != NORMAL, torch.zeros(size, dtype=torch.bool)
    try:
        if sample.mask and anomalous:
            mask = gaussad.load_mask(sample.mask, size, sample.path)
        return sample, anomalous, gaussad.load_image(sample.path, size), mask
    except ValueError as error:
        if strict:
            raise
        train.print_error(error)
        return None


def score_all(out: Path, detector: GaussianAD, samples: list, args: Namespace) -> list[Scored]:
    """Write scores.csv, and pictures numbered as its rows. Returns the images that can be read;
    your own without tensors, as there may be many."""
    images, rows = [], [COLUMNS]
    for number, x in enumerate(score(detector, samples, args), start=1):
        label, path = int(x.anomalous) if args.data else None, x.sample.path.absolute()
        rows.append((path.as_posix(), x.sample.defect, label, x.verdict, *x.scores))
        if number == 1:
            train.clear_evaluation(out, files=())  # pictures that belong to other scores
        if args.pictures:
            (out / "pictures").mkdir(parents=True, exist_ok=True)
            name = f"{number:03d}_{path.parent.name}_{path.stem}"[:50]
            with gaussad.atomic_path(out / f"pictures/{name}.png") as part:
                picture(x).save(part, "PNG")
        images.append(x if args.data else x._replace(image=None, mask=None, map=None))
    if not images:
        raise ValueError("none of these images can be read")
    write_csv(out / "scores.csv", rows)
    return images


def score_own(args: Namespace) -> int:
    """Score images of no data set, most anomalous first. Returns the exit code."""
    path = find_detector(args)
    out = args.out or path.parent / "scored"
    train.check_output(out, filter(Path.is_dir, args.images))
    samples = [Sample(image, "", None) for image in gaussad.list_images(args.images)]
    detector, _ = load_detector(path, args)
    images = sorted(score_all(out, detector, samples, args), key=lambda x: -x.anomaly_score)
    for x in images:
        print(f"{x.anomaly_score:8.2f} {x.verdict:<9} {x.sample.path}")
    n, threshold = sum(x.verdict != "normal" for x in images), detector.threshold(args.false_alarms)
    words = f"{n} of {len(images)} images are called anomalous (score above {threshold:.2f})."
    if unread := len(samples) - len(images):
        words += f" {unread} images could not be read."
    images[:SHOWN] = score(detector, [x.sample for x in images[:SHOWN]], args)  # with tensors
    body = f"<p class=lead>{words}</p>{histogram({'images': images}, threshold)}"
    write(out / "report.html", page("Scored images", body + pictures({"most anomalous": images})))
    print(f"{words} Report: {out / 'report.html'}")
    return 0 if len(images) == len(samples) else 2


def evaluate(args: Namespace, category: str, out: Path | None, several: bool) -> dict:
    """Score and measure a category; write and print what is found. Returns the metrics."""
    path = find_detector(args, category, several)
    near = [folder.resolve() for folder in path.parents[:2]]
    if not args.out or not args.model and args.out.resolve() in near:
        out = path.parent  # beside the detector, unless --out leads elsewhere
    train.check_output(out, [args.data / category / name for name in train.FOLDERS])
    detector, training = load_detector(path, args)
    trained_on = training["settings"].get("category")
    if trained_on not in (None, category):
        raise ValueError(f"{path} is the detector of {trained_on!r}, not of {category!r}")
    samples = gaussad.list_samples(args.data, category, "test")
    images = score_all(out, detector, samples, args)
    for message in contradictions(images):
        warnings.warn(f"{category}: {message}")
    metrics = measure(images, detector, args.false_alarms) | {
        "best_step": max((x["step"] for x in training["checks"] if x["kept"]), default=None),
        "backbone": detector.extractor.backbone,
        "image_size": detector.image_size,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "detector": path.as_posix(),
        "detector_sha256": train.digest(path),
    }
    words = in_words(images, metrics) + " Training is not finished." * (not training["finished"])
    write(out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    write(out / "report.html", report(category, words, metrics, training["checks"], images))
    figures = table([(title, metrics[key]) for key, title in FIGURES.items()])
    print(f"{category}, {path}", figures, sep="\n")
    print(f"{words} Report: {out / 'report.html'}")
    return metrics


def contradictions(images: list[Scored]) -> Iterator[str]:
    """What is odd about the test images and their masks, each with a count."""
    defective, stems = [x for x in images if x.anomalous], {x.sample.path.stem for x in images}
    for kind, n in (("good", len(images) - len(defective)), ("defective", len(defective))):
        if n == 0:
            yield f"no {kind} test images, so no AUROC; good ones belong in test/{NORMAL}"
    if n := sum(not x.mask.any() for x in defective):
        place = "it is ground_truth/<defect>/<stem>_mask.png"
        yield f"pixel figures leave out {n} images whose mask is missing or empty: {place}"
    if n := sum(x.mask.float().mean().item() > 0.5 for x in defective):
        yield f"{n} masks mark more than half of their image; are they inverted? 0 is normal"
    if n := sum(x.sample.mask is not None for x in images if not x.anomalous):
        yield f"{n} masks of good images are ignored; are these images in the right folder?"
    if n := sum(f"{stem}_mask" in stems for stem in stems):
        yield f"{n} masks lie among the images and are scored; move them to ground_truth"


def measure(images: list[Scored], detector: GaussianAD, false_alarms: float) -> dict:
    """The figures of metrics.json; None where undefined."""
    anomaly, pooled, maxima = torch.tensor([x.scores for x in images], dtype=torch.float64).T
    labels = torch.tensor([x.anomalous for x in images])
    known = [x for x in images if x.mask.any() or not x.anomalous]
    maps = torch.stack([x.map for x in known]) if known else torch.zeros(0)
    masks = torch.stack([x.mask for x in known]) if known else torch.zeros(0)
    defined = lambda metric, x, truth: metric(x, truth) if 0 < truth.sum() < truth.numel() else None
    area, missed = {}, {}
    for defect in sorted({x.sample.defect for x in images if x.anomalous}):
        chosen = torch.tensor([x.sample.defect in (NORMAL, defect) for x in images])
        area[defect] = defined(auroc, anomaly[chosen], labels[chosen])
        verdicts = [x.verdict for x in images if x.sample.defect == defect]
        missed[defect] = verdicts.count("normal") / len(verdicts)
    at = {rate: judge(anomaly, labels, detector.threshold(rate)) for rate in (0.01, 0.05, 0.1)}
    return {
        "image_auroc": defined(auroc, pooled, labels),
        "image_auroc_from_map": defined(auroc, maxima, labels),
        "image_auroc_both": defined(auroc, anomaly, labels),
        "image_auroc_per_defect": area,
        "miss_rate_per_defect": missed,
        "pixel_auroc": defined(auroc, maps, masks),
        "aupro": defined(aupro, maps, masks),
        "expected_false_alarms": false_alarms,
        **judge(anomaly, labels, detector.threshold(false_alarms)),
        "at_false_alarms": {str(rate): found for rate, found in at.items()},
        "n_normal": int((~labels).sum()),
        "n_anomalous": int(labels.sum()),
        "n_without_mask": len(images) - len(known),
    }


def judge(scores: Tensor, labels: Tensor, threshold: float) -> dict:
    """What a threshold gives; F1 = 2 hits / (2 hits + misses + false alarms)."""
    above = scores > threshold
    hits, alarms = above[labels], above[~labels]
    rate = lambda part: part.double().mean().item() if len(part) else None
    f1 = 2 * int(hits.sum()) / (int(above.sum()) + len(hits)) if len(hits) else None
    rates = {"false_alarm_rate": rate(alarms), "miss_rate": rate(~hits)}
    return {"threshold": threshold, **rates, "f1": f1}


def in_words(images: list[Scored], metrics: dict) -> str:
    """How good the detector is, for somebody who does not know AUROC."""
    defects = Counter(x.sample.defect for x in images if x.anomalous)
    wrong = [x for x in images if x.anomalous != (x.verdict == "anomalous")]
    misses = Counter(x.sample.defect for x in wrong if x.anomalous)
    n, missed, alarms = defects.total(), misses.total(), len(wrong) - misses.total()
    words = f"{n - missed} of {n} defective images found, {alarms} of {len(images) - n}"
    rate = f"{100 * metrics['expected_false_alarms']:g} %"
    words += f" good ones rejected, at {rate} expected false alarms"
    if misses:
        kinds = ", ".join(f"{k} of {defects[kind]} {kind}" for kind, k in misses.most_common())
        at_10 = round(n * metrics["at_false_alarms"]["0.1"]["miss_rate"])
        words += f"; missed: {kinds}; with 10 % expected, {at_10} would be missed"
    return f"{words}."


def write_results(root: Path, metrics: dict[str, dict]) -> None:
    """Write results.json, .csv and .html: categories, their mean and its standard error."""
    found = {name: {key: values[key] for key in RESULTS} for name, values in metrics.items()}
    mean, error = {}, {}
    for key in RESULTS:
        known = [row[key] for row in found.values() if row[key] is not None]
        mean[key] = fmean(known) if known else None
        error[key] = stdev(known) / len(known) ** 0.5 if len(known) > 1 else None
    of_all = {"mean": mean, "standard_error": error}
    write(root / "results.json", json.dumps({"categories": found, **of_all}, indent=2) + "\n")
    rows = [("category", *RESULTS)]
    rows += [(name, *row.values()) for name, row in [*found.items(), *of_all.items()]]
    write_csv(root / "results.csv", rows)
    links = "".join(f"<li><a href='{quote(x)}/report.html'>{escape(x)}</a>" for x in found)
    titles = ("category", *(FIGURES.get(key, key.replace("_", " ")) for key in RESULTS))
    body = f"{html_table([titles, *rows[1:]])}<h2>Reports</h2><ul>{links}</ul>"
    write(root / "results.html", page("Results", body))
    print(table(rows), f"results.json, .csv and .html are in {root}", sep="\n")


def shown(x: object) -> str:
    """A cell of a table; "-" for None."""
    return f"{x:.3f}" if isinstance(x, float) else "-" if x is None else str(x)


def percent(x: float | None) -> str:
    """A rate, such as 0.5, as a percentage."""
    return "-" if x is None else f"{100 * x:.1f} %"


def table(rows: list[tuple]) -> str:
    """Rows in columns of text."""
    rows = [[shown(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) + 2 for column in zip(*rows)]
    cells = lambda row: (x.rjust(width) for x, width in zip(row[1:], widths[1:]))
    return "\n".join(row[0].ljust(widths[0]) + "".join(cells(row)) for row in rows)


def write(path: Path, content: str) -> None:
    """Write a file, and make the folder that it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with gaussad.atomic_path(path) as part:  # file names are written as the file system has them
        part.write_text(content, encoding="utf-8", errors="surrogateescape", newline="")


def write_csv(path: Path, rows: Iterable[Sequence]) -> None:
    content = io.StringIO(newline="")
    csv.writer(content).writerows(rows)
    write(path, content.getvalue())


# ---- Pictures and the report -------------------------------------------------------------------


def picture(x: Scored) -> Image.Image:
    """The image, and beside it the same under its map, with the true and the predicted outline."""
    yellow, limit, red = x.limits
    heat = ((x.map.double() - yellow) / (red - yellow)).clamp(0, 1).numpy()[..., None]
    plain = x.image.permute(1, 2, 0).numpy()
    colour = np.concatenate([0 * heat + 255, 255 * (1 - heat), 0 * heat], -1)
    painted = plain + (colour - plain) * 0.7 * heat**0.5
    for region, colour in ((x.map > limit, PREDICTED), (x.mask, TRUE)):
        painted[outline(region).numpy()] = colour
    gap = np.full_like(plain[:, :6], 255)
    return Image.fromarray(np.concatenate([plain, gap, painted.round().astype(np.uint8)], 1))


def outline(region: Tensor) -> Tensor:
    """The pixels of a region (H, W) that are at most two from its edge."""
    outside = 1 - region[None].float()
    near = torch.nn.functional.max_pool2d(outside, 5, stride=1, padding=2)[0]
    return region & (near > 0)


STYLE = """:root { color-scheme: light dark } svg { width: 100%; max-height: 320px }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: auto; padding: 1em }
.lead { font-size: 1.25em } .figures, .charts, .pictures { display: grid; gap: 1em 2em }
.figures { grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)) }
.pictures { grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)) }
.charts { grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)) }
.figures b { font-size: 2em; display: block } figure { margin: 0 } img { width: 100% }
figure, table, svg, h2 { break-inside: avoid } h2, h3 { break-after: avoid }
figcaption, p { overflow-wrap: anywhere } td, th { padding: 0 1em 0 0; text-align: right }
td:first-child, th:first-child { text-align: left } .scroll { overflow-x: auto }
text { font-size: 12px; fill: currentColor } .good { fill: #0072b2; background: #0072b2 }
.bad { fill: #d55e00; background: #d55e00 } i { padding: 0 .5em; margin: 0 .2em 0 .6em }
path, polyline { fill: none; stroke: currentColor; stroke-width: 2 }
svg svg * { vector-effect: non-scaling-stroke } .kept { stroke-width: 9; stroke-linecap: round }"""


def page(title: str, body: str) -> str:
    """A page of HTML that needs no other file and no script."""
    head = "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width="
    head += f"device-width'><title>{escape(title)}</title><style>{STYLE}</style>"
    return f"{head}<h1>{escape(title)}</h1>{body}\n"


def report(category: str, words: str, metrics: dict, checks: list, images: list[Scored]) -> str:
    """All that was found of a category, as one page."""
    figures = [f"<div><b>{percent(metrics[key])}</b>{FIGURES[key]}</div>" for key in FIGURES]
    rows = [("defect", "images", "found", "missed", "AUROC of the anomaly score")]
    for defect, value in metrics["image_auroc_per_defect"].items():
        verdicts = [x.verdict for x in images if x.sample.defect == defect]
        found, missed = verdicts.count("anomalous"), verdicts.count("normal")
        rows.append((defect, len(verdicts), found, missed, percent(value)))
    thresholds = [("expected false alarms", "threshold", "false alarms", "missed", "F1")]
    for expected, judged in metrics["at_false_alarms"].items():
        threshold, *rates = judged.values()
        thresholds.append((percent(float(expected)), threshold, *map(percent, rates)))
    ranked = sorted(images, key=lambda x: -x.anomaly_score)
    good, defective = ([x for x in ranked if x.anomalous == kind] for kind in (False, True))
    called = lambda verdict, images: [x for x in images if x.verdict == verdict]
    kinds = {
        "misses, worst first": called("normal", defective[::-1]),
        "false alarms, worst first": called("anomalous", good),
        "defective images that were found, clearest first": called("anomalous", defective),
        "good images, most anomalous first": called("normal", good),
    }
    charts = histogram({"good": good, "defective": defective}, metrics["threshold"])
    charts += roc(good, defective) + training_curve(checks)
    keys = ("backbone", "best_step", "image_size", "date", "detector", "detector_sha256")
    details = [(key, metrics[key]) for key in keys]
    return page(
        category,
        f"<p class=lead>{escape(words)}</p><div class=figures>{''.join(figures)}</div>"
        f"<h2>Kinds of defect</h2>{html_table(rows)}<div class=charts>{charts}</div>"
        f"{pictures(kinds)}<h2>Other thresholds</h2>{html_table(thresholds)}"
        f"<h2>Details</h2>{html_table(details)}<p>best_step is that of fine-tuning; 0 is frozen.",
    )


def html_table(rows: list[tuple]) -> str:
    """Rows in a table, the first of them as a header if there are more than two columns."""
    tags = ["th" if len(rows[0]) > 2 else "td", *["td"] * (len(rows) - 1)]
    cells = lambda tag, row: "".join(f"<{tag}>{escape(shown(cell))}" for cell in row)
    html = "".join(f"<tr>{cells(tag, row)}" for tag, row in zip(tags, rows))
    return f"<div class=scroll><table>{html}</table></div>"


def pictures(kinds: dict[str, list[Scored]]) -> str:
    """Some pictures of each kind that has images."""
    html = (
        "<h2>Pictures</h2><p>Each image is shown beside a copy under its anomaly map: yellow is "
        "what half of the normal images reach at their most anomalous place, red what 1 % of them "
        "reach. Outlines: the true defect (cyan), detected by the map alone (white). The verdict "
        "uses the anomaly score."
    )
    for kind, images in kinds.items():
        if images:
            title = f"{min(len(images), SHOWN)} of {len(images)} {kind}"
            html += (
                f"<h3>{title}</h3><div class=pictures>{''.join(map(figure, images[:SHOWN]))}</div>"
            )
    return html


def figure(x: Scored) -> str:
    """A picture with its caption."""
    path, buffer = x.sample.path, io.BytesIO()
    picture(x).save(buffer, "JPEG", quality=90)
    data = b64encode(buffer.getvalue()).decode()
    name = escape(f"{path.parent.name}/{path.name}")
    image = f'<img src="data:image/jpeg;base64,{data}" alt="{name} and its anomaly map">'
    caption = f"{name}: {x.verdict}, score {x.anomaly_score:.1f}, threshold {x.threshold:.1f}"
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def histogram(images: dict[str, list[Scored]], threshold: float) -> str:
    """How many images of each kind, good first, have which anomaly score."""
    values = [[x.anomaly_score for x in found] for found in images.values()]
    edges = np.histogram_bin_edges([threshold, *sum(values, [])], 40)
    width, top, marks, legend = edges[1] - edges[0], 1, "", ""
    for colour, kind, found in zip(("good", "bad"), images, values):
        legend += f"<i class={colour}></i>{kind}"
        for left, n in zip(edges, np.histogram(found, edges)[0]):
            size = f'x="{left}" y="{-n}" width="{width}" height="{n}"'
            marks, top = f'{marks}<rect class={colour} {size} opacity=".7"/>', max(top, n)
    marks += f'<path d="M{threshold} 0V{-top}"/>'
    title = f"Scores{legend}, line: threshold"
    return chart(title, marks, (edges[0], edges[-1]), (0, top), "anomaly score", "images")


def roc(good: list[Scored], defective: list[Scored]) -> str:
    """The ROC curve of the anomaly score."""
    if not good or not defective:
        return ""
    scores = [np.sort([x.anomaly_score for x in found]) for found in (good, defective)]
    thresholds = np.unique([np.inf, *scores[0], *scores[1]])
    x, y = (100 - 100 * np.searchsorted(found, thresholds) / len(found) for found in scores)
    axes = (0, 100), (0, 100), "good rejected, %", "defective found, %"
    return chart("ROC curve", polyline(zip(x, y)), *axes)


def training_curve(checks: list[dict]) -> str:
    """The validator's AUROC over the steps of training, with a dot where a check was kept."""
    if len(checks) < 2:
        return ""
    steps = [check["step"] for check in checks]
    aurocs = [100 * check["auroc"] for check in checks]
    marks = polyline(zip(steps, aurocs))
    for step, y, check in zip(steps, aurocs, checks):
        marks += f'<path class=kept d="M{step} {-y}h0"/>' if check["kept"] else ""
    ranges, labels = ((0, steps[-1]), (min(aurocs) - 0.1, max(aurocs) + 0.1)), ("step", "AUROC, %")
    return chart("Training, by augmented images (dots: kept)", marks, *ranges, *labels)


def polyline(points: Iterable[tuple[float, float]]) -> str:
    return f'<polyline points="{" ".join(f"{x},{-y}" for x, y in points)}"/>'


def chart(title: str, marks: str, x: tuple, y: tuple, x_label: str, y_label: str) -> str:
    """A chart in SVG, with marks in the units of the data, but y upside down."""
    ticks, label = "", "<text text-anchor=middle transform="
    for part, anchor in ((0, "start"), (0.5, "middle"), (1, "end")):
        at_x, at_y = (f"{low + part * (high - low):.3g}" for low, high in (x, y))
        ticks += f"<text x={50 + 360 * part} y=226 text-anchor={anchor}>{at_x}</text>"
        ticks += f"<text x=44 y={212 - 196 * part} text-anchor=end>{at_y}</text>"
    box = f"{x[0]} {-y[1]} {x[1] - x[0]} {y[1] - y[0]}"
    return (
        f"<div><h3>{title}</h3><svg viewBox='0 0 420 246' role=img aria-label='{y_label} against "
        f"{x_label}'><path d='M50 10V210H410'/>{ticks}{label}'translate(230 243)'>{x_label}</text>"
        f"{label}'translate(10 110) rotate(-90)'>{y_label}</text><svg x=50 y=10 width=360 "
        f"height=200 preserveAspectRatio=none overflow=visible viewBox='{box}'>{marks}</svg></svg>"
        "</div>"
    )


if __name__ == "__main__":
    train.run_program(main)
