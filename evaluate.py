#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Score the test images of categories, or any images, with the detectors that train.py saved.

    python evaluate.py --data mvtec/ --category screw --pictures
    python evaluate.py --data mvtec/ --category all
    python evaluate.py --model runs/screw/detector.pt --images photos/

Reads runs/<category>/detector.pt; writes metrics.json, scores.csv and report.html beside it, and
with --pictures a folder of pictures. Of several categories it also writes runs/results.json and
results.csv. Of your own --images, scores and pictures go to runs/<category>/scored.
"""

from __future__ import annotations

import argparse
import base64
import csv
import io
import json
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gaussad import (NORMAL, GaussianAD, Sample, atomic_path, aupro, auroc, error_line,
                     list_categories, list_images, list_samples, load_image, load_images, load_mask,
                     load_plain, pick_device)  # fmt: skip

RESULTS = {  # the figures that are tabulated, and what they are called
    "image_auroc": "Image AUROC, the paper's score",
    "image_auroc_from_map": "Image AUROC, the map's maximum",
    "image_auroc_both": "Image AUROC, the anomaly score",
    "pixel_auroc": "Pixel AUROC",
    "aupro": "AU-PRO, to 30 % false positives",
    "false_alarm_rate": "False alarms, of the normal images",
    "miss_rate": "Misses, of the anomalous images",
    "f1": "F1 of the verdicts",
}
RATES = (0.01, 0.05, 0.1)  # of false alarms, whose thresholds the report compares
SHOWN = 6  # pictures of a kind in the report
GREEN, BLUE = (0, 200, 60), (40, 90, 255)  # outlines: the true defect, the predicted one


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    warnings.formatwarning = lambda message, *_: f"evaluate.py: {message}\n"
    args.device = pick_device(args.device)
    sys.stdout.reconfigure(errors="backslashreplace")  # for names a terminal has no letters for
    if args.images:
        return score_own(args)
    names = list_categories(args.data) if args.category == ["all"] else args.category
    alone = len(names) == 1 and args.category != ["all"]
    root, metrics = args.out or Path("runs"), {}
    for name in names:
        try:
            metrics[name] = evaluate(args, name, root if alone and args.out else root / name)
        except Exception as error:
            tell(f"{name}: {error_line(error)}")
    if metrics and not alone:
        write_results(root, metrics)
    return 0 if len(metrics) == len(names) else 2


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    head, _, rest = __doc__.partition("\n")
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=head, epilog=rest,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument  # without a usage, an error is one line
    add("--data", type=Path, help="folder of the categories, in the MVTec AD layout")
    add("--category", nargs="+", metavar="NAME", help="folders in --data; all: every one")
    add("--images", type=Path, nargs="+", metavar="PATH", help="your own images, files or folders")
    add("--model", type=Path, metavar="FILE", help="the detector, or a folder of <category>/"
        "detector.pt (default: detector.pt in --out or in runs/<category>)")
    add("--out", type=Path, help="folder of the results (default: that of the detector); of "
        "several categories, of theirs (default: runs)")
    add("--pictures", action="store_true", help="draw the anomaly map of each image")
    add("--false-alarms", type=float, default=0.05, metavar="SHARE",
        help="of normal images that the threshold lets be called anomalous, about (0.05)")
    add("--batch-size", type=int, default=16, metavar="N", help="images in a batch (16)")
    add("--workers", type=int, default=2, metavar="N", help="threads that decode images (2)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(auto: a GPU if any)")
    args = parser.parse_args(argv)
    if not 0 < args.false_alarms < 1 or min(args.batch_size, args.workers) < 1:
        parser.error("--false-alarms is between 0 and 1, --batch-size and --workers 1 or more")
    if args.images and (not args.model or args.data or args.category):
        parser.error("--images goes with --model, and without --data and --category")
    if not args.images and (args.data is None or args.category is None):
        parser.error("--data and --category are needed, or --model and --images")
    return args


def tell(error: str) -> None:
    print(f"evaluate.py: error: {error}", file=sys.stderr)


@dataclass
class Scored:
    """What a detector says of N images, on the CPU, and the thresholds it is judged by."""

    detector: GaussianAD
    samples: list[Sample]
    labels: Tensor  # (N,) bool, which are anomalous
    threshold: float  # of the anomaly score
    map_threshold: float
    scores: Tensor  # (N,) the paper's
    maxima: Tensor  # (N,) of the maps
    both: Tensor  # (N,) the anomaly score
    maps: Tensor  # (N, H, W), or (0, H, W) where they were not kept

    @property
    def verdicts(self) -> list[str]:
        return ["anomalous" if above else "normal" for above in self.both > self.threshold]


@torch.inference_mode()
def score(path: Path, samples: list[Sample], args: argparse.Namespace, out: Path) -> Scored:
    """Score images by the detector at `path`; write scores.csv and pictures to `out`."""
    detector = GaussianAD.load(path, args.device)
    thresholds = detector.threshold(args.false_alarms), detector.map_threshold(args.false_alarms)
    readable, found = [], []
    for batch, images in batches_of(samples, detector.image_size[0], args):
        scores, maps = detector.scores_and_maps(images.to(args.device))
        both, maxima = detector.anomaly_score(scores, maps), maps.amax((1, 2))
        # many images of one's own have no room for their maps, 4 H W bytes each
        kept = maps if args.data or args.pictures else maps[:0]
        found.append([x.cpu() for x in (scores, maxima, both, kept)])
        readable += batch
    if not readable:
        sys.exit(2)  # each one was told
    labels = torch.tensor([sample.defect != NORMAL for sample in readable])
    scored = Scored(detector, readable, labels, *thresholds, *map(torch.cat, zip(*found)))
    out.mkdir(parents=True, exist_ok=True)
    write_scores(out / "scores.csv", scored)
    if args.pictures:
        write_pictures(out / "pictures", scored)
    return scored


def batches_of(samples: list[Sample], size: int, args: argparse.Namespace) -> Iterator[tuple]:
    """Samples and their images, (B, 3, size, size). Those of one's own that cannot be read are told
    and left out; of labelled data each has to be read."""
    n = args.batch_size
    batches = [samples[start : start + n] for start in range(0, len(samples), n)]
    while batches:
        batch = batches.pop(0)
        try:
            yield batch, load_images([sample.path for sample in batch], size, args.workers)
        except ValueError as error:
            if args.data:
                raise
            if len(batch) == 1:
                tell(error_line(error))
            else:
                batches = [[sample] for sample in batch] + batches  # one by one


def score_own(args: argparse.Namespace) -> int:
    """Score images of no data set; print score, verdict and path of each. The exit code."""
    samples = [Sample(path, "", None) for path in list_images(args.images)]
    out = args.out or args.model.parent / "scored"
    scored = score(args.model, samples, args, out)
    for value, verdict, sample in zip(scored.both, scored.verdicts, scored.samples):
        print(f"{value:8.2f} {verdict:<9} {sample.path}")
    print(f"The threshold is {scored.threshold:.2f}. scores.csv is in {out}")
    return 0 if len(scored.samples) == len(samples) else 2


def evaluate(args: argparse.Namespace, category: str, out: Path) -> dict:
    """Score and measure a category; write and print what is found, and return the metrics."""
    path = find_detector(args.model, category, out)
    out = out if args.out else path.parent
    training = load_plain(path).get("training", {})
    trained_on = training.get("settings", {}).get("category")
    if trained_on not in (None, category):
        raise ValueError(f"{path} is the detector of {trained_on!r}, not of {category!r}")
    scored = score(path, list_samples(args.data, category, "test"), args, out)
    checks = training.get("checks", [])
    steps = [check["step"] for check in checks if check["kept"]]
    metrics = {**measure(scored), "best_step": steps[-1] if steps else None}
    notes = remarks(scored, metrics, unfinished=not training.get("finished", True))
    write(out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    write_report(out / "report.html", category, scored, metrics, notes, checks)
    print(text_table([[category, "in %"], *figures(metrics)]), *notes, sep="\n")
    print(f"metrics.json, scores.csv and report.html are in {out}")
    return metrics


def find_detector(model: Path | None, category: str, out: Path) -> Path:
    """Where the detector of a category is; raises ValueError where there is none."""
    places = [out / "detector.pt", Path("runs") / category / "detector.pt"]
    if model:
        places = [model, model / category / "detector.pt", model / "detector.pt"]
    for path in filter(Path.is_file, places):
        return path
    raise ValueError(f"no detector at {places[0]}: run train.py first, or name it by --model")


def measure(scored: Scored) -> dict:
    """All of metrics.json but the best step."""
    labels, both, samples = scored.labels, scored.both, scored.samples
    masks = torch.stack([read_mask(sample, scored.maps.shape[-1]) for sample in samples])
    known = ~labels | masks.any((1, 2))
    metrics = {"image_auroc": if_any(auroc, scored.scores, labels),
               "image_auroc_from_map": if_any(auroc, scored.maxima, labels),
               "image_auroc_both": if_any(auroc, both, labels), "image_auroc_per_defect": {},
               "pixel_auroc": if_any(auroc, scored.maps[known], masks[known]),
               "aupro": if_any(aupro, scored.maps[known], masks[known]),
               "n_normal": int((~labels).sum()), "n_anomalous": int(labels.sum()),
               "n_without_mask": int((~known).sum()), **judge(scored, scored.threshold),
               "at_false_alarms": {str(rate): judge(scored, scored.detector.threshold(rate))
                                   for rate in RATES}}  # fmt: skip
    for defect in sorted({sample.defect for sample in samples} - {NORMAL}):
        of = torch.tensor([sample.defect in (NORMAL, defect) for sample in samples])
        metrics["image_auroc_per_defect"][defect] = if_any(auroc, both[of], labels[of])
    return metrics


def read_mask(sample: Sample, size: int) -> Tensor:
    """Where an image is known to be anomalous, (size, size) bool."""
    if sample.mask is None:
        return torch.zeros(size, size, dtype=torch.bool)
    return load_mask(sample.mask, size, sample.path)


def if_any(metric: Callable, values: Tensor, truth: Tensor) -> float | None:
    """The metric, where something is anomalous and something is not."""
    return metric(values, truth) if truth.any() and not truth.all() else None


def judge(scored: Scored, threshold: float) -> dict:
    """The share of normal images above a threshold, of anomalous ones that are not, and
    F1 = 2 hits / (2 hits + misses + false alarms)."""
    above = scored.both > threshold
    share = lambda part: part.double().mean().item() if len(part) else None
    hits, alarms = above[scored.labels], above[~scored.labels]
    f1 = 2 * int(hits.sum()) / (int(above.sum()) + len(hits)) if len(hits) else None
    return {"threshold": threshold, "false_alarm_rate": share(alarms), "miss_rate": share(~hits),
            "f1": f1}  # fmt: skip


def remarks(scored: Scored, metrics: dict, unfinished: bool) -> list[str]:
    """What a reader of the figures has to know."""
    missing = sum(sample.defect != NORMAL and not sample.mask for sample in scored.samples)
    left_out = metrics["n_without_mask"]
    notes = {"{n_normal} normal and {n_anomalous} anomalous images.".format(**metrics): True,
             "No AUROC: it needs normal (test/good) and anomalous images, both.":
                 metrics["image_auroc_both"] is None,
             f"Of anomalous images, {missing} have no mask, ground_truth/<defect>/<stem>_mask.png, "
             "and are left out of the pixel figures.": missing,
             f"Of anomalous images, {left_out - missing} have an empty mask: left out as well.":
                 left_out - missing,
             "The training is not finished: this is its best step so far.": unfinished}  # fmt: skip
    return [note for note, holds in notes.items() if holds]


def figures(metrics: dict) -> list[list]:
    """The rows of the table that is printed and in the report."""
    rows = [[name, metrics[key]] for key, name in RESULTS.items()]
    return rows + [[f"Image AUROC, {k} alone", v]
                   for k, v in metrics["image_auroc_per_defect"].items()]  # fmt: skip


def text_table(rows: list[list]) -> str:
    """Rows of text and of shares, which are written in %."""
    rows = [list(map(text, row)) for row in rows]
    widths = [max(map(len, column)) + 2 for column in zip(*rows)]
    return "\n".join(row[0].ljust(widths[0]) + "".join(map(str.rjust, row[1:], widths[1:]))
                     for row in rows)  # fmt: skip


def html_table(rows: list[list]) -> str:
    cells = ["".join(f"<td>{escape(text(cell), quote=False)}</td>" for cell in row) for row in rows]
    return f"<table><tr>{'<tr>'.join(cells)}</table>"


def text(cell: str | float | None) -> str:
    return "-" if cell is None else cell if isinstance(cell, str) else f"{100 * cell:.1f}"


def write(path: Path, text: str) -> None:
    with atomic_path(path) as part:  # names of files are written as the file system has them
        part.write_text(text, encoding="utf-8", errors="surrogateescape", newline="")


def write_csv(path: Path, rows: Iterable) -> None:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    write(path, text.getvalue())


def write_scores(path: Path, scored: Scored) -> None:
    """One line per image: its path, defect and label where they are known, verdict and scores."""
    columns = {"path": [sample.path.as_posix() for sample in scored.samples]}
    if scored.samples[0].defect:
        columns |= {"defect": [sample.defect for sample in scored.samples],
                    "label": scored.labels.int().tolist()}  # fmt: skip
    columns |= {"verdict": scored.verdicts, "anomaly_score": scored.both.tolist(),
                "score": scored.scores.tolist(), "map_maximum": scored.maxima.tolist()}
    write_csv(path, [columns, *zip(*columns.values())])


def write_results(root: Path, metrics: dict[str, dict]) -> None:
    """results.json and results.csv, a row each category, then the mean over them and its standard
    error; the same printed in %."""
    found = {name: {key: values[key] for key in RESULTS} for name, values in metrics.items()}
    mean, error = {}, {}
    for key in RESULTS:
        known = [row[key] for row in found.values() if row[key] is not None]
        mean[key] = fmean(known) if known else None
        error[key] = stdev(known) / len(known) ** 0.5 if len(known) > 1 else None
    over_all = {"mean": mean, "standard_error": error}
    write(root / "results.json", json.dumps({"categories": found, **over_all}, indent=2) + "\n")
    rows = [[name, *row.values()] for name, row in [*found.items(), *over_all.items()]]
    write_csv(root / "results.csv", [["category", *RESULTS], *rows])
    print(text_table([["in %", *RESULTS], *rows]))
    print(f"results.json and results.csv are in {root}")


def write_pictures(folder: Path, scored: Scored) -> None:
    """A picture of each image, <defect>_<stem>.png, numbered where two would be the same."""
    folder.mkdir(exist_ok=True)
    taken = set()
    for i, sample in enumerate(scored.samples):
        name = f"{sample.defect}_{sample.path.stem}"[:50].lstrip("_")
        name = f"{name}_{i}" if name.lower() in taken else name
        taken.add(name.lower())
        with atomic_path(folder / f"{name}.png") as part:
            picture(scored, i).save(part, "PNG")


def picture(scored: Scored, i: int) -> Image.Image:
    """Image i, and beside it the same under its map, with the true and the predicted outline.
    Yellow begins at the median maximum of held-out images; red is twice as far as the threshold."""
    anomaly_map, sample = scored.maps[i], scored.samples[i]
    usual = scored.detector.held_out[:, 1].median().item()
    heat = (anomaly_map.double() - usual) / (scored.map_threshold - usual) / 2
    heat = heat.clamp(0, 1).numpy()[..., None]
    plain = load_image(sample.path, len(anomaly_map)).permute(1, 2, 0).numpy()
    colour = np.concatenate([0 * heat + 255, 255 * (1 - heat), 0 * heat], -1)  # yellow to red
    painted = plain + (colour - plain) * 0.7 * heat**0.5
    painted[outline(anomaly_map > scored.map_threshold)] = BLUE
    painted[outline(read_mask(sample, len(anomaly_map)))] = GREEN
    return Image.fromarray(np.concatenate([plain, painted.round().astype(np.uint8)], 1))


def outline(region: Tensor) -> np.ndarray:
    inner = -torch.nn.functional.max_pool2d(-region[None].float(), 3, stride=1, padding=1)[0]
    return (region & (inner == 0)).numpy()


STYLE = """body { font: 16px/1.5 system-ui; max-width: 1100px; margin: auto; padding: 1em }
table { border-collapse: collapse } td { border-bottom: 1px solid #ddd; padding: 3px 12px 3px 0 }
td + td { text-align: right } td, figcaption { overflow-wrap: break-word }
figure { display: inline-block; width: 540px; max-width: 100%; margin: 0 6px 1em 0 }
img, svg { width: 100%; max-width: 560px } path { stroke-width: 2 }"""


def write_report(path: Path, title: str, scored: Scored, metrics: dict, notes: list[str],
                 checks: list[dict]) -> None:  # fmt: skip
    """All that was found of a category in one file of HTML that needs no other."""
    parts = [
        (title, escape(" ".join(notes)), html_table([["", "in %"], *figures(metrics)])),
        ("Thresholds", "Each is chosen by the share of false alarms that is expected from held-out "
         "normal images. What it gives here, in %:", html_table(
            [["expected", "threshold", "false alarms", "misses", "F1"],
             *([float(rate), f"{found['threshold']:.2f}", *list(found.values())[1:]]
               for rate, found in metrics["at_false_alarms"].items())])),
        ("Anomaly scores", "Each mark is an image. Those to the right of the line, the threshold "
         f"{scored.threshold:.2f}, are called anomalous.", strips(scored)),
        ("Training", f"Step {metrics['best_step']} is kept. The separation s is how far augmented "
         "images score above held-out normal ones; its gain is over the best before.",
         html_table([["step", "loss", "s", "gain", "standard error"], *map(check_row, checks)])),
        ("Pictures", "Beside each image the same under its anomaly map: yellow is unusual, red is "
         "beyond the threshold of maps. Outlined in blue is the predicted defect, in green the "
         "true one.", ""),
        *((kind, "", "".join(figure(scored, i) for i in chosen))
          for kind, chosen in shown(scored).items() if chosen)]  # fmt: skip
    body = "".join(f"<h2>{escape(head)}</h2><p>{about}</p>{rest}" for head, about, rest in parts)
    write(path, "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="
          f"'width=device-width'><title>{escape(title)}</title><style>{STYLE}</style>{body}")


def check_row(check: dict) -> list[str]:
    values = [check[key] for key in ("loss", "separation", "gain", "standard_error")]
    return [str(check["step"]), *("-" if v is None else f"{v:.2f}" for v in values)]


def shown(scored: Scored) -> dict[str, list[int]]:
    """The images of the report, by title."""
    order, labels = scored.both.argsort(descending=True).tolist(), scored.labels
    above = scored.both > scored.threshold
    near = (scored.both - scored.threshold).abs().argsort().tolist()
    kinds = {"Worst misses": [i for i in order[::-1] if labels[i] and not above[i]],
             "Worst false alarms": [i for i in order if not labels[i] and above[i]],
             "Most anomalous": order,
             "Normal, nearest to the threshold": [i for i in near if not labels[i]]}  # fmt: skip
    return {title: chosen[:SHOWN] for title, chosen in kinds.items()}


def figure(scored: Scored, i: int) -> str:
    """A picture with its caption, in HTML."""
    path, buffer = scored.samples[i].path, io.BytesIO()
    picture(scored, i).save(buffer, "JPEG", quality=90)
    data = base64.b64encode(buffer.getvalue()).decode()
    text = f"{path.parent.name}/{path.name}: {scored.both[i]:.1f}, called {scored.verdicts[i]}"
    return (f'<figure><img src="data:image/jpeg;base64,{data}" alt=""><figcaption>{escape(text)}'
            "</figcaption></figure>")  # fmt: skip


def strips(scored: Scored) -> str:
    """A row for each kind of image, a mark in it for each image, a line at the threshold: SVG."""
    values, kinds = scored.both.tolist(), [sample.defect for sample in scored.samples]
    low, high = min(*values, scored.threshold), max(*values, scored.threshold)
    x = lambda value: f"{2 + 396 * (value - low) / (high - low or 1):.1f}"
    shapes, y = "", 0
    for kind in sorted(set(kinds), key=lambda kind: (kind != NORMAL, kind)):
        marks = "".join(f"M{x(v)} {y + 20}v15" for v, k in zip(values, kinds) if k == kind)
        shapes += (f"<text x=2 y={y + 15} font-size=13>{escape(kind[:50])}</text><path d='{marks}' "
                   f"stroke={'#17688a' if kind == NORMAL else '#c43c00'} />")  # fmt: skip
        y += 40
    return (f"<svg viewBox='0 0 400 {y + 20}'>{shapes}<path stroke=black d='M{x(scored.threshold)} "
            f"0V{y}M0 {y}H400' /><text y={y + 17} font-size=13>{low:.1f}</text><text x=200 "
            f"y={y + 17} font-size=13 text-anchor=middle>anomaly score</text><text x=400 "
            f"y={y + 17} font-size=13 text-anchor=end>{high:.1f}</text></svg>")  # fmt: skip


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        tell(error_line(error))
        sys.exit(2)
