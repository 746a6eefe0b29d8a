#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Score the test images of categories, or any images, with the detectors that train.py saved.

    python evaluate.py --data mvtec/ --category screw --pictures   # runs/screw/results/
    python evaluate.py --data mvtec/ --category all                # and runs/results.csv
    python evaluate.py --category mine --images photos/new         # runs/mine/scored/

Reads <runs>/<category>/detector.pt. Writes metrics.json, scores.csv, report.html and, if asked for,
pictures/ into one folder, which replaces that of an earlier evaluation as a whole."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import warnings
from argparse import SUPPRESS, ArgumentParser, Namespace
from base64 import b64encode
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from datetime import datetime
from html import escape
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import gaussad
from gaussad import NORMAL, FeatureExtractor, GaussianAD, Sample

FIGURES = {
    "image_auroc_both": "image AUROC, anomaly score (decides)",
    "image_auroc": "image AUROC, pooled score",
    "image_auroc_from_map": "image AUROC, maximum of the map",
    "pixel_auroc": "pixel AUROC",
    "aupro": "AU-PRO up to 30 % FPR",
}
RESULTS = (*FIGURES, "false_alarm_rate", "miss_rate", "f1")  # what is averaged over categories
SCORES = ("anomaly_score", "pooled_score", "map_maximum")
SHOWN = 6  # pictures of a kind in the report
TRUE, PREDICTED = (0, 235, 235), (255, 255, 255)  # outlines: cyan and white, visible on the heat


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line asks for. Returns the exit code."""
    args = parse(argv)
    args.device = gaussad.pick_device(args.device)
    names, metrics = gaussad.category_names(args.category, args.data), {}
    for name in names:
        try:
            metrics[name] = evaluate(args, name)
        except Exception as error:
            gaussad.print_error(error, name)
    if metrics and args.data and (len(names) > 1 or "all" in args.category):
        write_results(args.runs, metrics)
    complete = metrics.keys() == set(names) and not any(x["n_unreadable"] for x in metrics.values())
    return 0 if complete else 2


def parse(argv: Sequence[str] | None) -> Namespace:
    """The options; a wrong one ends the program with one line and exit code 2."""
    kind = {"formatter_class": gaussad.HelpFormatter, "allow_abbrev": False}
    parser = ArgumentParser(usage=SUPPRESS, description=__doc__, **kind)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, help="folder of categories in the MVTec AD layout")
    source.add_argument("--images", type=Path, nargs="+", help="your own images, files or folders")
    add = parser.add_argument
    add("--category", nargs="+", required=True, help="names of runs; all: all folders in --data")
    add("--runs", type=Path, default="runs", help="folder of the runs")
    add("--backbone", metavar="FILE", help="the .py file of your own network, as for train.py")
    add("--pictures", action="store_true", help="draw the anomaly map of each image")
    add("--false-alarms", type=float, default=0.05, help="expected fraction, between 0 and 1")
    add("--batch-size", type=int, default=16, help="images in a batch")
    add("--workers", type=int, default=gaussad.CORES, help="threads that decode images")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: a GPU if any")
    args = parser.parse_args(argv)
    if not 0 < args.false_alarms < 1:
        parser.error("--false-alarms must be between 0 and 1")
    if min(args.batch_size, args.workers) < 1:
        parser.error("--batch-size and --workers must be at least 1")
    if args.images and len(args.category) > 1:
        parser.error("--images needs one --category, the name of a run")
    return args


def evaluate(args: Namespace, category: str) -> dict:
    """Score images with the detector of a run; write, then print what is found, and return it."""
    run = args.runs / category
    folders = args.images or [args.data / category / name for name in gaussad.FOLDERS]
    gaussad.check_run(run, folders)
    detector, details, trained_on = load_run(args, run)
    if args.data:
        place, samples = run / "results", gaussad.list_samples(args.data, category, "test")
    else:
        samples = [Sample(path, "", None) for path in gaussad.list_images(args.images)]
        place = run / "scored"
    with gaussad.replacing(place) as out:
        found = score(detector, samples, args, out)
        for message in contradictions(found, trained_on):
            warnings.warn(f"{category}: {message}")
        metrics = measure(found, detector, args) | details
        metrics["n_unreadable"] = len(samples) - len(found.samples)
        words = in_words(found, metrics)
        write_scores(out / "scores.csv", found)
        (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        page = report(category, words, metrics, found)  # file names as the file system has them
        (out / "report.html").write_text(page, encoding="utf-8", errors="surrogateescape")
    if args.data:
        gaussad.say(f"{category}, {details['detector']}")
        gaussad.say(table([(title, metrics[key]) for key, title in FIGURES.items()]))
    else:
        rows = zip(found.scores[:, 0].tolist(), found.verdicts, found.samples)
        lines = [f"{value:8.2f} {verdict:<9} {x.path}" for value, verdict, x in rows]
        gaussad.say(*(lines[i] for i in found.ranked))
    gaussad.say(f"{words} Report: {place / 'report.html'}")
    return metrics


def load_run(args: Namespace, run: Path) -> tuple[GaussianAD, dict, set[str]]:
    """The detector of a run, what metrics.json says of it, and digests of its training images."""
    path = run / "detector.pt"
    if not path.is_file():
        there = ", ".join(sorted(x.parent.name for x in args.runs.glob("*/detector.pt")))
        hint = f"there are: {there}" if there else "run train.py first, or give --runs"
        raise ValueError(f"no detector {path}; {hint}")
    with path.open("rb") as file:  # it stays the same even if another takes its place meanwhile
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        content, extractor = gaussad.load_plain(file), None
    if args.backbone:
        extractor = FeatureExtractor(args.backbone, content.get("levels"), "random")
    detector = gaussad.read_detector(content, path, extractor).to(args.device)
    training = {"settings": {}, "checks": [], "state": None}
    if (run / "checkpoint.pt").is_file():
        try:
            training |= gaussad.load_plain(run / "checkpoint.pt")
        except ValueError as error:  # which the detector does not need
            warnings.warn(str(error))
    details = {
        "backbone": detector.extractor.backbone,
        "best_step": max((x["step"] for x in training["checks"] if x["kept"]), default=None),
        "image_size": detector.image_size,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "detector": path.as_posix(),
        "detector_sha256": sha256,
        "training_finished": training["state"] is None,
        "checks": training["checks"],
    }
    return detector, details, set(training["settings"].get("images", ()))


# ---- Scores ------------------------------------------------------------------------------------


class Scored(NamedTuple):
    """Images and their scores, in one order; all tensors are on the CPU."""

    samples: list[Sample]
    digests: list[str]  # of the files
    scores: Tensor  # (N, 3), as SCORES
    tensors: dict[int, tuple[Tensor, Tensor, Tensor]]  # image, map and mask, by number
    threshold: float  # of the anomaly score
    limits: list[float]  # of the map: where heat begins, yellow; the outline; where heat is red

    @property
    def labelled(self) -> bool:
        """Whether folders say what the images are; they do not of your own."""
        return bool(self.samples[0].defect)

    @property
    def labels(self) -> Tensor:
        """(N,) bool: anomalous, as the folder says."""
        return torch.tensor([sample.defect != NORMAL for sample in self.samples])

    @property
    def verdicts(self) -> list[str]:
        above = (self.scores[:, 0] > self.threshold).tolist()
        return ["anomalous" if x else "normal" for x in above]

    @property
    def ranked(self) -> list[int]:
        """The numbers of the images, most anomalous first."""
        return self.scores[:, 0].argsort(descending=True).tolist()


@torch.inference_mode()
def score(detector: GaussianAD, samples: list[Sample], args: Namespace, out: Path) -> Scored:
    """Score images; draw pictures of all if asked to. Of your own images, which may be many, only
    the tensors of the most anomalous are kept, and those that cannot be read are left out."""
    maxima = detector.held_out_scores[:, 1]
    limits = [gaussad.tail_quantile(maxima, 1 - rate) for rate in (0.5, args.false_alarms, 0.01)]
    threshold = detector.threshold(args.false_alarms)
    (out / "pictures" if args.pictures else out).mkdir(parents=True)
    read, digests, scores, drawn = [], [], [], []
    tensors = {}
    with ThreadPoolExecutor(args.workers) as pool:
        for batch in decoded(pool, samples, detector.image_size, args):
            pooled, maps = detector.scores_and_maps(torch.stack([x for _, _, x, _ in batch]))
            anomaly = detector.anomaly_score(pooled, maps)
            scores += torch.stack([anomaly, pooled, maps.amax((1, 2))], 1).tolist()
            for (sample, digest, image, mask), anomaly_map in zip(batch, maps.cpu()):
                tensors[len(read)] = image, anomaly_map, mask
                read.append(sample)
                digests.append(digest)
                if args.pictures:
                    number = f"{len(read):0{len(str(len(samples)))}d}"  # so that they sort
                    name = f"{number}_{sample.path.parent.name}_{sample.path.stem}"[:50]
                    path = out / f"pictures/{name}.png"
                    drawn.append(pool.submit(draw, path, image, anomaly_map, mask, limits))
            if args.images:
                for i in sorted(tensors, key=lambda i: scores[i][0])[:-SHOWN]:
                    del tensors[i]
            gaussad.progress(f"{len(read)} of {len(samples)} images scored")
    gaussad.progress("")
    for picture_drawn in drawn:
        picture_drawn.result()  # raises what drawing raised, such as a full disk
    if not read:
        raise ValueError("none of these images can be read")
    scores = torch.tensor(scores, dtype=torch.float64)
    return Scored(read, digests, scores, tensors, threshold, limits)


def decoded(
    pool: Executor, samples: list[Sample], size: list[int], args: Namespace
) -> Iterator[list[tuple]]:
    """Batches of (sample, digest of its file, image, mask), the next one being read while the
    present one is used. A bad image of your own is told and left out."""

    def read(sample: Sample) -> tuple | None:
        try:
            mask = torch.zeros(size, dtype=torch.bool)
            if sample.mask and sample.defect != NORMAL:
                mask = gaussad.load_mask(sample.mask, size, sample.path)
            image = gaussad.load_image(sample.path, size)
            return sample, gaussad.digest(sample.path), image, mask
        except (ValueError, OSError) as error:
            if args.data:
                raise
            gaussad.print_error(error)

    n = args.batch_size
    batches = [samples[i : i + n] for i in range(0, len(samples), n)]
    coming = pool.map(read, batches[0])
    for following in [*batches[1:], []]:
        present, coming = coming, pool.map(read, following)
        if batch := [x for x in present if x]:
            yield batch


def write_scores(path: Path, found: Scored) -> None:
    """Write scores.csv: a row for each image; without a label if it has no folder that says it."""
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "defect", "label", "verdict", *SCORES))
        for x, verdict, scores in zip(found.samples, found.verdicts, found.scores.tolist()):
            label = int(x.defect != NORMAL) if x.defect else None
            writer.writerow((x.path.absolute().as_posix(), x.defect, label, verdict, *scores))


# ---- Figures -----------------------------------------------------------------------------------


def contradictions(found: Scored, trained_on: set[str]) -> Iterator[str]:
    """What contradicts itself in the images, each with a count."""
    if n := sum(digest in trained_on for digest in found.digests):
        yield f"{n} of these images were trained on: their scores mean little"
    if not found.labelled:
        return
    marked = {i: mask.float().mean().item() for i, (_, _, mask) in found.tensors.items()}
    defective = found.labels.nonzero().flatten().tolist()
    for kind, n in (("good", len(marked) - len(defective)), ("defective", len(defective))):
        if n == 0:
            yield f"no {kind} test images, so no AUROC; good ones belong in test/{NORMAL}"
    if n := sum(marked[i] == 0 for i in defective):
        place = "it is ground_truth/<defect>/<stem>_mask.png"
        yield f"pixel figures leave out {n} images whose mask is missing or empty: {place}"
    masks, large = (sum(marked[i] > x for i in defective) for x in (0, 0.5))
    if large > masks / 2:
        yield f"{large} of {masks} masks mark more than half of their image; are they inverted?"
    if n := sum(x.mask is not None for x in found.samples if x.defect == NORMAL):
        yield f"{n} masks of good images are ignored; are these images in the right folder?"
    stems = {sample.path.stem for sample in found.samples}
    if n := sum(f"{stem}_mask" in stems for stem in stems):
        yield f"{n} masks lie among the images and are scored; move them to ground_truth"
    places = {(digest, x.defect) for digest, x in zip(found.digests, found.samples)}
    if n := len(places) - len(set(found.digests)):
        yield f"{n} images lie in a second folder of test/, too: which one is right?"


def measure(found: Scored, detector: GaussianAD, args: Namespace) -> dict:
    """The figures of metrics.json; None where undefined."""
    anomaly, pooled, maxima = found.scores.T
    n_called = int((anomaly > found.threshold).sum())
    metrics = {"expected_false_alarms": args.false_alarms, "n_called_anomalous": n_called}
    if not found.labelled:
        return {**metrics, "threshold": found.threshold, "n_images": len(found.samples)}
    labels = found.labels
    known = [i for i in found.tensors if not labels[i] or found.tensors[i][2].any()]
    maps = torch.stack([found.tensors[i][1] for i in known]).to(args.device) if known else labels
    masks = torch.stack([found.tensors[i][2] for i in known]).to(args.device) if known else labels

    def defined(metric, x: Tensor, truth: Tensor) -> float | None:
        return metric(x, truth) if 0 < truth.sum() < truth.numel() else None

    area, missed = {}, {}
    for defect in sorted({x.defect for x in found.samples} - {NORMAL}):
        own = torch.tensor([x.defect == defect for x in found.samples])
        area[defect] = defined(gaussad.auroc, anomaly[own | ~labels], labels[own | ~labels])
        missed[defect] = judge(anomaly[own], labels[own], found.threshold)["miss_rate"]
    at = {str(x): judge(anomaly, labels, detector.threshold(x)) for x in (0.01, 0.05, 0.1)}
    return metrics | {
        "image_auroc": defined(gaussad.auroc, pooled, labels),
        "image_auroc_from_map": defined(gaussad.auroc, maxima, labels),
        "image_auroc_both": defined(gaussad.auroc, anomaly, labels),
        "image_auroc_per_defect": area,
        "miss_rate_per_defect": missed,
        "pixel_auroc": defined(gaussad.auroc, maps, masks),
        "aupro": defined(gaussad.aupro, maps, masks),
        **judge(anomaly, labels, found.threshold),
        "at_false_alarms": at,
        "n_normal": int((~labels).sum()),
        "n_anomalous": int(labels.sum()),
        "n_without_mask": len(found.samples) - len(known),
    }


def judge(scores: Tensor, labels: Tensor, threshold: float) -> dict:
    """What a threshold gives; F1 = 2 hits / (2 hits + misses + false alarms)."""
    above = scores > threshold
    hits, alarms = above[labels], above[~labels]
    return {
        "threshold": threshold,
        "false_alarm_rate": alarms.double().mean().item() if len(alarms) else None,
        "miss_rate": (~hits).double().mean().item() if len(hits) else None,
        "f1": 2 * int(hits.sum()) / (int(above.sum()) + len(hits)) if len(hits) else None,
    }


def in_words(found: Scored, metrics: dict) -> str:
    """How good the detector is, for somebody who does not know AUROC."""
    unfinished = "" if metrics["training_finished"] else " Training is not finished."
    if not found.labelled:
        words = f"{metrics['n_called_anomalous']} of {metrics['n_images']} images are called "
        words += f"anomalous (score above {found.threshold:.2f})."
        if metrics["n_unreadable"]:
            words += f" {metrics['n_unreadable']} images could not be read."
        return words + unfinished
    defects = Counter(x.defect for x in found.samples if x.defect != NORMAL)
    passed = [x.defect for x, y in zip(found.samples, found.verdicts) if y == "normal"]
    misses = Counter(defect for defect in passed if defect != NORMAL)
    n, good = metrics["n_anomalous"], metrics["n_normal"]
    rate = f"{100 * metrics['expected_false_alarms']:g} %"
    words = f"{n - misses.total()} of {n} defective images found, {good - passed.count(NORMAL)} of "
    words += f"{good} good ones rejected, at {rate} expected false alarms"
    if misses:
        kinds = ", ".join(f"{k} of {defects[kind]} {kind}" for kind, k in misses.most_common())
        at_10 = round(n * metrics["at_false_alarms"]["0.1"]["miss_rate"])
        words += f"; missed: {kinds}; with 10 % expected, {at_10} would be missed"
    return f"{words}.{unfinished}"


def write_results(root: Path, metrics: dict[str, dict]) -> None:
    """Write and print results.csv: categories, their mean and its standard error."""
    rows = [(name, *(values[key] for key in RESULTS)) for name, values in metrics.items()]
    mean, error = ["mean"], ["standard_error"]
    for key in RESULTS:
        known = [values[key] for values in metrics.values() if values[key] is not None]
        mean.append(fmean(known) if known else None)
        error.append(stdev(known) / len(known) ** 0.5 if len(known) > 1 else None)
    rows = [("category", *RESULTS), *rows, mean, error]
    how = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
    with gaussad.replacing(root / "results.csv") as new, new.open("w", **how) as file:
        csv.writer(file).writerows(rows)
    gaussad.say(f"{table(rows)}\n{root / 'results.csv'}")


def shown(x: object) -> str:
    """A cell of a table; "-" for None."""
    return f"{x:.3f}" if isinstance(x, float) else "-" if x is None else str(x)


def table(rows: list[tuple]) -> str:
    """Rows in columns of text."""
    cells = [[shown(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) + 2 for column in zip(*cells)]
    return "\n".join(
        row[0].ljust(widths[0]) + "".join(x.rjust(n) for x, n in zip(row[1:], widths[1:]))
        for row in cells
    )


# ---- Pictures and the report -------------------------------------------------------------------


def picture(image: Tensor, heat: Tensor, mask: Tensor, limits: list[float]) -> Image.Image:
    """The image, and beside it the same under its map, with the true and the predicted outline."""
    yellow, limit, red = limits
    strength = ((heat.double() - yellow) / (red - yellow)).clamp(0, 1).numpy()[..., None]
    plain = image.permute(1, 2, 0).numpy()
    colour = np.concatenate([0 * strength + 255, 255 * (1 - strength), 0 * strength], -1)
    painted = plain + (colour - plain) * 0.7 * strength**0.5
    painted[outline(heat > limit).numpy()] = PREDICTED
    painted[outline(mask).numpy()] = TRUE
    gap = np.full_like(plain[:, :6], 255)
    return Image.fromarray(np.concatenate([plain, gap, painted.round().astype(np.uint8)], 1))


def draw(path: Path, *shown: object) -> None:
    """Save a picture, four times as fast as by default and a fifth larger."""
    picture(*shown).save(path, compress_level=1)


def outline(region: Tensor) -> Tensor:
    """The pixels of a region (H, W) that are at most two from its edge."""
    outside = 1 - region[None].float()
    near = torch.nn.functional.max_pool2d(outside, 5, stride=1, padding=2)[0]
    return region & (near > 0)


STYLE = """:root { color-scheme: light dark } svg { width: 100%; max-width: 640px }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: auto; padding: 1em }
.lead { font-size: 1.25em } .figures, .pictures { display: grid; gap: 1em 2em }
.figures { grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)) }
.pictures { grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)) }
.figures b { font-size: 2em; display: block } figure { margin: 0 } img { width: 100% }
figure, table, svg, h2 { break-inside: avoid } h2, h3 { break-after: avoid }
figcaption, p { overflow-wrap: anywhere } td, th { padding: 0 1em 0 0; text-align: right }
td:first-child, th:first-child { text-align: left } .scroll { overflow-x: auto }
text { font-size: 12px; fill: currentColor } .good { fill: #0072b2; background: #0072b2 }
.bad { fill: #d55e00; background: #d55e00 } i { padding: 0 .5em; margin: 0 .2em 0 .6em }
path { fill: none; stroke: currentColor; stroke-width: 2 }"""


def report(category: str, words: str, metrics: dict, found: Scored) -> str:
    """All that was found, as one page of HTML that needs no other file and no script."""
    labels, verdicts, figures, defects = found.labels.tolist(), found.verdicts, "", ""
    kinds = {"most anomalous": found.ranked}
    if found.labelled:
        for key, title in FIGURES.items():
            value = "-" if metrics[key] is None else f"{metrics[key]:.1%}"
            figures += f"<div><b>{value}</b>{title}</div>"
        rows = [("defect", "images", "found", "missed", "AUROC of the anomaly score")]
        for defect, value in metrics["image_auroc_per_defect"].items():
            n = sum(x.defect == defect for x in found.samples)
            missed = round(n * metrics["miss_rate_per_defect"][defect])
            rows.append((defect, n, n - missed, missed, value))
        defects = f"<h2>Kinds of defect</h2>{html_table(rows)}"

        def ranked(label: bool, verdict: str) -> list[int]:
            return [i for i in found.ranked if labels[i] == label and verdicts[i] == verdict]

        kinds = {
            "misses, worst first": ranked(True, "normal")[::-1],
            "false alarms, worst first": ranked(False, "anomalous"),
            "defective images that were found, clearest first": ranked(True, "anomalous"),
            "good images, most anomalous first": ranked(False, "normal"),
        }
    keys = ("threshold", "backbone", "best_step", "image_size", "date", "detector")
    details = html_table([(key, metrics[key]) for key in (*keys, "detector_sha256")])
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="
        f"'width=device-width'><title>{escape(category)}</title><style>{STYLE}</style>"
        f"<h1>{escape(category)}</h1><p class=lead>{escape(words)}</p>"
        f"<div class=figures>{figures}</div>{defects}{histogram(found)}"
        f"{pictures(found, kinds)}<h2>Details</h2>{details}"
        "<p>best_step is the step of fine-tuning that was kept last; 0 is the frozen network.\n"
    )


def html_table(rows: list[tuple]) -> str:
    """Rows in a table, the first of them as a header if there are more than two columns."""
    html = ""
    for i, row in enumerate(rows):
        tag = "th" if i == 0 and len(row) > 2 else "td"
        html += "<tr>" + "".join(f"<{tag}>{escape(shown(cell))}" for cell in row)
    return f"<div class=scroll><table>{html}</table></div>"


def pictures(found: Scored, kinds: dict[str, list[int]]) -> str:
    """Some pictures of each kind that has images, each with a caption."""
    html = (
        "<h2>Pictures</h2><p>Each image is shown beside a copy under its anomaly map. Yellow: half "
        "of the normal images have a place this anomalous; red: only 1 % have. Outlines: the true "
        "defect (cyan); where the map exceeds its own threshold, which decides nothing (white)."
    )
    for kind, images in kinds.items():
        if images:
            html += (
                f"<h3>{min(len(images), SHOWN)} of {len(images)} {kind}</h3><div class=pictures>"
            )
            html += "".join(figure(found, i) for i in images[:SHOWN]) + "</div>"
    return html


def figure(found: Scored, i: int) -> str:
    """A picture with its caption."""
    path, buffer = found.samples[i].path, io.BytesIO()
    picture(*found.tensors[i], found.limits).save(buffer, "JPEG", quality=90)
    data = b64encode(buffer.getvalue()).decode()
    name = escape(f"{path.parent.name}/{path.name}")
    image = f'<img src="data:image/jpeg;base64,{data}" alt="{name} and its anomaly map">'
    scores = f"score {found.scores[i, 0]:.1f}, threshold {found.threshold:.1f}"
    caption = f"{name}: {found.verdicts[i]}, {scores}"
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def histogram(found: Scored) -> str:
    """A chart of how many images, good and defective, have which anomaly score."""
    scores, labels = found.scores[:, 0].numpy(), found.labels.numpy()
    edges = np.histogram_bin_edges([found.threshold, *scores], 40)
    groups = {"good": scores[~labels], "defective": scores[labels]}
    if not found.labelled:
        groups = {"images": scores}
    counts = {name: np.histogram(group, edges)[0] for name, group in groups.items()}
    top = max(1, *(max(count) for count in counts.values()))
    marks, legend = "", ""
    for colour, (name, count) in zip(("good", "bad"), counts.items()):
        legend += f"<i class={colour}></i>{name}"
        for k, height in enumerate(200 * count / top):
            place = f"x={50 + 9 * k} y={210 - height:.1f} width=9 height={height:.1f}"
            marks += f"<rect class={colour} {place} opacity=.7 />"
    line = 50 + 360 * (found.threshold - edges[0]) / (edges[-1] - edges[0])
    marks += f"<path d='M{line:.1f} 10V210M50 10V210H410'/>"
    texts = [(44, 16, top), (44, 212, 0), (230, 243, "anomaly score")]
    texts += [(50 + 9 * k, 226, f"{edges[k]:.3g}") for k in (0, 20, 40)]
    for x, y, text in texts:
        anchor = "middle" if 50 <= x < 410 else "end"
        marks += f"<text x={x} y={y} text-anchor={anchor}>{text}</text>"
    return (
        f"<h2>Scores</h2><p>Number of images with a score:{legend}; line: threshold"
        f"<svg viewBox='0 0 420 246' role=img aria-label='histogram of scores'>{marks}</svg>"
    )


if __name__ == "__main__":
    gaussad.run_program(main)
