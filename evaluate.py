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
import html
import io
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from gaussad import (NORMAL, GaussianAD, Sample, atomic_path, aupro, auroc, error_line,
                     list_categories, list_images, list_samples, load_image, load_images, load_mask, load_plain,
                     pick_device)  # fmt: skip

RESULTS = ["image_auroc", "image_auroc_from_map", "image_auroc_both", "pixel_auroc", "aupro",
           "false_alarm_rate", "miss_rate", "f1"]  # fmt: skip
RATES = (0.01, 0.05, 0.1)  # of false alarms, whose thresholds the report compares
SHOWN = 6  # pictures of a kind in the report


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    device = pick_device(args.device)
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files a terminal has no letters for
    if args.images:
        return score_own(args, device)
    names = list_categories(args.data) if args.category == ["all"] else args.category
    alone = len(names) == 1 and args.category != ["all"]
    root, metrics = args.out or Path("runs"), {}
    for name in names:
        try:
            out = root if alone and args.out else root / name
            metrics[name] = evaluate(args, name, out, device)
        except Exception as error:
            print(f"evaluate.py: error: {name}: {error_line(error)}", file=sys.stderr)
    if metrics and not alone:
        write_results(root, metrics)
    return 0 if len(metrics) == len(names) else 2


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    head, _, rest = __doc__.partition("\n")
    parser = Parser(description=head, epilog=rest,
                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("--data", type=Path, help="folder of the categories, in the MVTec AD layout")
    add("--category", nargs="+", metavar="NAME", help="folders in --data; all: every one")
    add("--images", type=Path, nargs="+", metavar="PATH",
        help="your own images, files or folders, in place of --data and --category")
    add("--model", type=Path, metavar="FILE", help="the detector, or a folder of <category>/"
        "detector.pt (default: detector.pt in --out or in runs/<category>)")
    add("--out", type=Path, help="folder of the results (default: runs/<category>); of several "
                                 "categories, of theirs (default: runs)")
    add("--pictures", action="store_true", help="draw the anomaly map of each image")
    add("--false-alarms", type=float, default=0.05, metavar="SHARE",
        help="of normal images that the threshold lets be called anomalous, about (0.05)")
    add("--batch-size", type=int, default=16, metavar="N", help="images in a batch (16)")
    add("--workers", type=int, default=2, metavar="N", help="threads that decode images (2)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(auto: a GPU if any)")
    args = parser.parse_args(argv)
    if not 0 < args.false_alarms < 1:
        parser.error("--false-alarms is a share between 0 and 1, such as 0.05")
    if args.images and (not args.model or args.data or args.category):
        parser.error("--images goes with --model, and without --data and --category")
    if not args.images and (args.data is None or args.category is None):
        parser.error("--data and --category are needed, or --model and --images")
    return args


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong; --help has the rest."""

    def error(self, message: str) -> None:
        raise ValueError(message)


# ------------------------------------------------------------------------------------------------
# Scoring
# ------------------------------------------------------------------------------------------------


@dataclass
class Scored:
    """What a detector says of N images, on the CPU, and the thresholds it is judged by."""

    detector: GaussianAD
    paths: list[Path]
    scores: Tensor  # (N,) the paper's
    maxima: Tensor  # (N,) of the maps
    both: Tensor  # (N,) the one score
    maps: Tensor | None  # (N, H, W), unless they were not kept
    threshold: float  # of the one score
    map_threshold: float

    @property
    def anomalous(self) -> Tensor:
        """(N,) bool, the verdicts."""
        return self.both > self.threshold


@torch.inference_mode()
def score(detector: GaussianAD, paths: list[Path], args: argparse.Namespace, device: torch.device,
          keep_maps: bool = True) -> Scored:  # fmt: skip
    """Score image files; their maps take 4 H W bytes each, which many images have no room for."""
    found = []
    for start in range(0, len(paths), args.batch_size):
        images = load_images(paths[start : start + args.batch_size], detector.image_size[0],
                             args.workers)  # fmt: skip
        scores, maps = detector.scores_and_maps(images.to(device))
        both = detector.anomaly_score(scores, maps)
        maxima = maps.amax((1, 2))
        found.append([x.cpu() for x in (scores, maxima, both, *[maps] * keep_maps)])
    scores, maxima, both, *maps = map(torch.cat, zip(*found))
    return Scored(detector, paths, scores, maxima, both, maps[0] if keep_maps else None,
                  detector.threshold(args.false_alarms), detector.map_threshold(args.false_alarms))


def find_detector(args: argparse.Namespace, category: str, out: Path) -> Path:
    """Where the detector of a category is; raises ValueError where there is none."""
    places = [out / "detector.pt", Path("runs") / category / "detector.pt"]
    if args.model:
        places = [args.model, args.model / category / "detector.pt", args.model / "detector.pt"]
    for path in places:
        if path.is_file():
            return path
    raise ValueError(f"no detector at {places[0]}: run train.py first, or name it by --model")


def load(path: Path, device: torch.device) -> GaussianAD:
    detector = GaussianAD.load(path, device)
    if not len(detector.held_out) or len(set(detector.image_size)) > 1:
        raise ValueError(f"{path} was not calibrated, or fitted to images that are not square")
    return detector


def evaluate(args: argparse.Namespace, category: str, out: Path, device: torch.device) -> dict:
    """Score and measure a category; write and print what is found, and return the metrics."""
    path = find_detector(args, category, out)
    training = load_plain(path).get("training", {})
    trained_on = training.get("settings", {}).get("category")
    if trained_on not in (None, category):
        raise ValueError(f"{path} is the detector of {trained_on!r}, not of {category!r}")
    detector = load(path, device)
    samples = list_samples(args.data, category, "test")
    out.mkdir(parents=True, exist_ok=True)
    masks = [read_mask(sample, detector.image_size[0]) for sample in samples]
    scored = score(detector, [sample.path for sample in samples], args, device)
    labels = torch.tensor([sample.defect != NORMAL for sample in samples])
    kept = [check["step"] for check in training.get("checks", []) if check["kept"]]
    metrics = {**measure(samples, labels, scored), **measure_maps(scored.maps, masks),
               **verdicts(labels, scored.both, scored.threshold),
               "at_false_alarms": {str(rate): verdicts(labels, scored.both, detector.threshold(rate))
                                   for rate in RATES},
               "best_step": kept[-1] if kept else None}  # fmt: skip
    write_json(out / "metrics.json", metrics)
    names = [sample.defect for sample in samples]
    write_scores(out / "scores.csv", scored, {"defect": names, "label": labels.int().tolist()})
    print(table(category, samples, metrics))
    if training and not training["finished"]:
        print(f"The training of {path} is not finished: this is its best step so far.")
    write_report(out / "report.html", category, metrics, training.get("checks", []), labels, scored,
                 masks)
    print(f"metrics.json, scores.csv and report.html are in {out}")
    if args.pictures:
        write_pictures(out / "pictures", scored, names, masks)
    return metrics


def score_own(args: argparse.Namespace, device: torch.device) -> int:
    """Score images of no data set: the score, the verdict and the path of each."""
    detector, paths = load(args.model, device), list_images(args.images)
    out = args.out or args.model.parent / "scored"
    out.mkdir(parents=True, exist_ok=True)
    scored = score(detector, paths, args, device, keep_maps=args.pictures)
    write_scores(out / "scores.csv", scored, {})
    for value, anomalous, path in zip(scored.both.tolist(), scored.anomalous.tolist(), paths):
        print(f"{value:8.2f} {'anomalous' if anomalous else 'normal':<9} {path}")
    print(f"The threshold is {scored.threshold:.2f}. scores.csv is in {out}")
    if args.pictures:
        write_pictures(out / "pictures", scored, [""] * len(paths), [None] * len(paths))
    return 0


# ------------------------------------------------------------------------------------------------
# Metrics: in [0, 1], None where there is nothing to compute them from
# ------------------------------------------------------------------------------------------------


def read_mask(sample: Sample, size: int) -> Tensor | None:
    """Where an image is anomalous, (size, size) bool: nowhere if normal, None if not known."""
    if sample.defect == NORMAL:
        return torch.zeros(size, size, dtype=torch.bool)
    return load_mask(sample.mask, size) if sample.mask else None


def measure(samples: list[Sample], labels: Tensor, scored: Scored) -> dict:
    """AUROC over all images of the three scores, and of each defect against all normal ones by the
    one score."""
    def of(scores: Tensor, chosen: Tensor = labels | True) -> float | None:
        both = labels[chosen].any() and not labels[chosen].all()
        return auroc(scores[chosen], labels[chosen]) if both else None

    defects = sorted({sample.defect for sample in samples} - {NORMAL})
    chosen = {defect: torch.tensor([sample.defect in (NORMAL, defect) for sample in samples])
              for defect in defects}  # fmt: skip
    return {"image_auroc": of(scored.scores), "image_auroc_from_map": of(scored.maxima),
            "image_auroc_both": of(scored.both),
            "image_auroc_per_defect": {d: of(scored.both, chosen[d]) for d in defects},
            "n_normal": int((~labels).sum()), "n_anomalous": int(labels.sum())}  # fmt: skip


def verdicts(labels: Tensor, scores: Tensor, threshold: float) -> dict:
    """The share of normal images called anomalous, of anomalous ones called normal, and
    F1 = 2 hits / (2 hits + misses + false alarms)."""
    above, n = scores > threshold, int(labels.sum())
    misses, alarms = int((labels & ~above).sum()), int((~labels & above).sum())
    return {"threshold": threshold,
            "false_alarm_rate": alarms / (len(labels) - n) if n < len(labels) else None,
            "miss_rate": misses / n if n else None,
            "f1": 2 * (n - misses) / (2 * n - misses + alarms) if n else None}  # fmt: skip


def measure_maps(maps: Tensor, masks: list[Tensor | None]) -> dict:
    """Pixel AUROC and AU-PRO over the images whose mask is known."""
    known = [i for i, mask in enumerate(masks) if mask is not None]
    truth = torch.stack([masks[i] for i in known]) if known else torch.zeros(0)
    both = truth.any() and not truth.all()
    return {"pixel_auroc": auroc(maps[known], truth) if both else None,
            "aupro": aupro(maps[known], truth) if both else None,
            "n_without_mask": len(masks) - len(known)}  # fmt: skip


# ------------------------------------------------------------------------------------------------
# Tables
# ------------------------------------------------------------------------------------------------


def write_json(path: Path, content: dict) -> None:
    with atomic_path(path) as part:
        part.write_text(json.dumps(content, indent=2) + "\n")


def write_csv(path: Path, header: list[str], rows: Iterable) -> None:
    names = {"encoding": "utf-8", "errors": "surrogateescape"}  # as the file system has them
    with atomic_path(path) as part, part.open("w", newline="", **names) as file:
        csv.writer(file).writerows([header, *rows])


def write_scores(path: Path, scored: Scored, columns: dict[str, list]) -> None:
    """One line per image: its path, the columns given, its verdict and scores."""
    verdict = ["anomalous" if anomalous else "normal" for anomalous in scored.anomalous]
    columns = {"path": [image.as_posix() for image in scored.paths], **columns, "verdict": verdict,
               "anomaly_score": scored.both.tolist(), "score": scored.scores.tolist(),
               "map_maximum": scored.maxima.tolist()}  # fmt: skip
    write_csv(path, list(columns), zip(*columns.values()))


def write_results(root: Path, metrics: dict[str, dict]) -> None:
    """results.json and results.csv, a row each category, then the mean over them and its standard
    error; the same printed in %."""
    rows = {name: [found[key] for key in RESULTS] for name, found in metrics.items()}
    mean, error = [], []
    for values in zip(*rows.values()):
        known = np.array([value for value in values if value is not None])
        mean.append(float(known.mean()) if len(known) else None)
        error.append(float(known.std(ddof=1) / len(known) ** 0.5) if len(known) > 1 else None)
    named = {name: dict(zip(RESULTS, values)) for name, values in rows.items()}
    write_json(root / "results.json", {"categories": named, "mean": dict(zip(RESULTS, mean)),
                                       "standard_error": dict(zip(RESULTS, error))})  # fmt: skip
    rows |= {"mean": mean, "standard_error": error}
    write_csv(root / "results.csv", ["category", *RESULTS], ([k, *v] for k, v in rows.items()))
    for name, cells in {"in %": RESULTS, **rows}.items():
        texts = [cell if isinstance(cell, str) else percent(cell) for cell in cells]
        print(f"{name:<16}" + "".join(f"{text:>21}" for text in texts))
    print(f"results.json and results.csv are in {root}")


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def table(category: str, samples: list[Sample], metrics: dict) -> str:
    """The metrics as text."""
    n, anomalous, masked = len(samples), metrics["n_anomalous"], metrics["n_without_mask"]
    rows = [(f"{defect}, AUROC", sum(sample.defect == defect for sample in samples), value)
            for defect, value in metrics["image_auroc_per_defect"].items()]  # fmt: skip
    rows += [("all anomalous, AUROC", anomalous, metrics["image_auroc_both"]),
             ("  by the paper's score", anomalous, metrics["image_auroc"]),
             ("  by the map's maximum", anomalous, metrics["image_auroc_from_map"]),
             ("pixels, AUROC", n - masked, metrics["pixel_auroc"]),
             ("pixels, AU-PRO to 30 %", n - masked, metrics["aupro"]),
             ("false alarms", metrics["n_normal"], metrics["false_alarm_rate"]),
             ("misses", anomalous, metrics["miss_rate"]),
             ("F1 of the verdicts", n, metrics["f1"])]  # fmt: skip
    lines = [f"{category:<24} images        in %"]
    lines += [f"{name:<24} {images:>6} {percent(value):>11}" for name, images, value in rows]
    if metrics["image_auroc"] is None:
        lines.append("No AUROC: it needs normal (test/good) and anomalous images, both.")
    if masked:
        lines.append(f"{masked} anomalous images have no mask in ground_truth/ and are left out of "
                     "the pixel figures.")  # fmt: skip
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------------------------

CAPTION = 24  # height of the caption in pixels
GREEN, BLUE = (0, 200, 60), (40, 90, 255)  # outlines: the true defect, the predicted one


def write_pictures(folder: Path, scored: Scored, names: list[str], masks: list) -> None:
    """A picture of each image, <defect>_<stem>.png, numbered where two would be the same."""
    folder.mkdir(exist_ok=True)
    taken = set()
    for i, path in enumerate(scored.paths):
        name = f"{names[i]}_{path.stem}"[:50].lstrip("_")
        name = f"{name}_{i}" if name.lower() in taken else name
        taken.add(name.lower())
        with atomic_path(folder / f"{name}.png") as part:
            picture(scored, i, masks[i], name).save(part, "PNG")
    print(f"Pictures are in {folder}")


def picture(scored: Scored, i: int, mask: Tensor | None, name: str) -> Image.Image:
    """Image i, and beside it the same under its map, with the true and the predicted outline.

    Yellow begins where half of the held-out normal images have their maximum; red is at twice the
    way from there to the threshold of the map.
    """
    anomaly_map = scored.maps[i]
    usual = scored.detector.held_out[:, 1].median().item()
    heat = ((anomaly_map - usual) / (scored.map_threshold - usual) / 2).clamp(0, 1)
    heat = heat.double().numpy()[..., None]
    plain = load_image(scored.paths[i], len(anomaly_map)).permute(1, 2, 0).numpy()
    colour = np.concatenate([0 * heat + 255, 255 * (1 - heat), 0 * heat], -1)  # yellow to red
    painted = plain + (colour - plain) * 0.7 * heat**0.5
    painted[outline(anomaly_map > scored.map_threshold)] = BLUE
    if mask is not None:
        painted[outline(mask)] = GREEN
    both = np.concatenate([plain, painted.round().astype(np.uint8)], 1)
    drawn = Image.new("RGB", (both.shape[1], both.shape[0] + CAPTION))
    drawn.paste(Image.fromarray(both), (0, CAPTION))
    verdict = "ANOMALOUS" if scored.anomalous[i] else "NORMAL"
    text = f"{verdict} {scored.both[i]:.1f} (threshold {scored.threshold:.1f})  {name}"
    font = ImageFont.load_default(min(14, len(plain) // 10))
    ImageDraw.Draw(drawn).text((6, 4), text.encode("ascii", "replace"), fill="white", font=font)
    return drawn


def outline(region: Tensor) -> np.ndarray:
    inner = -torch.nn.functional.max_pool2d(-region[None].float(), 3, stride=1, padding=1)[0]
    return (region & (inner == 0)).numpy()


# ------------------------------------------------------------------------------------------------
# Report
# ------------------------------------------------------------------------------------------------

STYLE = """body { font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: auto; padding: 1em }
h1, h2 { line-height: 1.2; margin: 1.2em 0 .4em } table { border-collapse: collapse }
div { overflow-x: auto } td, th { padding: 3px 14px 3px 0; text-align: right; white-space: nowrap }
tr { border-bottom: 1px solid #ddd } tr > :first-child { text-align: left } svg { max-width: 480px }
figure { display: inline-block; margin: 0 1% 1em 0; width: 48%; min-width: 300px; max-width: 100% }
img { width: 100% } .normal { fill: #279; color: #279 } .anomalous { fill: #c40; color: #c40 }
.curve { fill: none; stroke-width: 2 } .axis { fill: none; stroke: #999 } .bar { opacity: .6 }
text { font-size: 13px }"""


def write_report(path: Path, category: str, metrics: dict, checks: list[dict], labels: Tensor,
                 scored: Scored, masks: list[Tensor | None]) -> None:  # fmt: skip
    """All that was found of a category in one file of HTML that needs no other."""
    figures = [[key, percent(metrics[key])] for key in RESULTS]
    figures += [[f"image_auroc_both of {defect}", percent(value)]
                for defect, value in metrics["image_auroc_per_defect"].items()]  # fmt: skip
    rates = [[f"{100 * float(rate):.0f} %", f"{found['threshold']:.2f}",
              *(percent(found[key]) for key in RESULTS[-3:])]
             for rate, found in metrics["at_false_alarms"].items()]  # fmt: skip
    training = [[check["step"], *("-" if check[key] is None else f"{check[key]:.2f}"
                                  for key in ("loss", "separation", "gain", "standard_error")),
                 "kept" * check["kept"]] for check in checks]  # fmt: skip
    parts = [
        f"<h1>{html.escape(category)}</h1>", html_table(["", "%"], figures),
        "<h2>Anomaly score</h2><p>Share of the <b class=normal>normal</b> and of the "
        "<b class=anomalous>anomalous</b> images; the line is the threshold.</p>",
        histogram(scored, labels),
        "<h2>What other thresholds would have given</h2><p>By the share of false alarms that was "
        "expected from held-out normal images; in %.</p>",
        html_table(["expected", "threshold", "false alarms", "misses", "F1"], rates),
        "<h2>ROC curve</h2><p>Of the anomaly score (solid), the paper's score (dashed) and the "
        "map's maximum (dotted). The dot is the threshold.</p>", roc_curves(scored, labels),
        f"<h2>Training</h2><p>Best step: {metrics['best_step']}.</p>",
        html_table(["step", "loss", "s", "gain", "standard error", ""], training),
        "<h2>Pictures</h2><p>Red is beyond the threshold of the map; outlined in blue what is "
        "predicted, in green the true defect.</p>",
    ]  # fmt: skip
    for title, chosen in shown(scored, labels).items():
        if chosen:
            parts.append(f"<h2>{title}</h2>")
        for i in chosen:
            name = f"{scored.paths[i].parent.name}/{scored.paths[i].name}"
            parts.append(inline(picture(scored, i, masks[i], name)))
    page = (f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport "
            f'content="width=device-width"><title>{html.escape(category)}</title>'
            f"<style>{STYLE}</style>" + "\n".join(parts))  # fmt: skip
    with atomic_path(path) as part:
        part.write_text(page, encoding="utf-8", errors="backslashreplace")


def shown(scored: Scored, labels: Tensor) -> dict[str, list[int]]:
    """The images of the report, by title."""
    order, above = scored.both.argsort(descending=True).tolist(), scored.anomalous
    near = (scored.both - scored.threshold).abs().argsort().tolist()
    kinds = {"Worst misses": [i for i in order[::-1] if labels[i] and not above[i]],
             "Worst false alarms": [i for i in order if not labels[i] and above[i]],
             "Most anomalous": order,
             "Normal, and nearest to the threshold": [i for i in near if not labels[i]]}  # fmt: skip
    return {title: chosen[:SHOWN] for title, chosen in kinds.items()}


def html_table(header: list[str], rows: list[list]) -> str:
    def row(tag: str, cells: list) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells)

    body = row("th", header) + "".join(row("td", cells) for cells in rows)
    return f"<div><table>{body}</table></div>"


def svg(*shapes: str) -> str:
    """A drawing in a frame of 400 x 250, y downwards."""
    frame = "<rect class=axis x=0 y=0 width=400 height=250 />"
    return f'<svg viewBox="-2 -2 404 274">{frame}{"".join(shapes)}</svg>'


def histogram(scored: Scored, labels: Tensor, bins: int = 40) -> str:
    """Bars of the share of normal and anomalous images in each bin, and a line at the threshold."""
    low, high = scored.both.min().item(), max(scored.both.max().item(), scored.threshold)
    x = lambda value: 400 * (value - low) / (high - low or 1)
    shapes = []
    for label, name in enumerate(("normal", "anomalous")):
        counts = torch.histc(scored.both[labels == label], bins, low, high)
        heights = (240 * counts / counts.max().clamp(min=1)).tolist()
        shapes += [f"<rect class='bar {name}' x={10 * i} y={250 - height:.1f} width=10 "
                   f"height={height:.1f} />" for i, height in enumerate(heights)]  # fmt: skip
    at = x(scored.threshold)
    ticks = [f"<text x={x(value):.0f} y=268 text-anchor={anchor}>{value:.1f}</text>"
             for value, anchor in ((low, "start"), (scored.threshold, "middle"), (high, "end"))]
    return svg(*shapes, f"<path d='M{at:.1f} 0V250' stroke=black />", *ticks)


def roc_curves(scored: Scored, labels: Tensor) -> str:
    if labels.all() or not labels.any():
        return "<p>It needs normal and anomalous images, both.</p>"
    shapes = []
    for values, dash in ((scored.both, "none"), (scored.scores, "8 4"), (scored.maxima, "2 3")):
        above = values[:, None] >= torch.cat([values, values.new_tensor([torch.inf])]).sort()[0]
        rates = [above[labels == label].double().mean(0) for label in (0, 1)]
        points = " ".join(f"{400 * a:.1f},{250 - 250 * b:.1f}" for a, b in zip(*rates))
        shapes.append(f'<polyline class=curve points="{points}" stroke=#36c stroke-dasharray="{dash}" />')
    x, y = (scored.anomalous[labels == label].double().mean().item() for label in (0, 1))
    return svg(*shapes, f"<circle cx={400 * x:.1f} cy={250 - 250 * y:.1f} r=5 />",
               "<text x=400 y=268 text-anchor=end>false-positive rate</text>")  # fmt: skip


def inline(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<figure><img src="data:image/jpeg;base64,{data}" alt=""></figure>'


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        print(f"evaluate.py: error: {error_line(error)}", file=sys.stderr)
        sys.exit(2)
