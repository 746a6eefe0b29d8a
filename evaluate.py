#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Score the test images of categories, or any images, with the detectors that train.py saved.

    python evaluate.py --data mvtec/ --category screw --pictures    # to runs/screw/results/
    python evaluate.py --category screw --images photos/new         # to runs/screw/scored/
With --category all every category in --data is evaluated, and runs/results.csv written."""

import csv
import json
import shutil
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from html import escape
from io import BytesIO
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import gaussad
from gaussad import GaussianAD, Sample

FIGURES = {
    "image_auroc_anomaly": "image AUROC, anomaly score (decides)",
    "image_auroc_pooled": "image AUROC, pooled score (trained)",
    "image_auroc_map": "image AUROC, maximum of the map",
    "pixel_auroc": "pixel AUROC",
    "aupro": "AU-PRO up to 30 % FPR",
}
RESULTS = (*FIGURES, "false_alarm_rate", "miss_rate")  # the columns of results.csv
COLUMNS = ("path", "defect", "verdict", "anomaly_score", "pooled_score", "map_maximum")


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(formatter_class=ArgumentDefaultsHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, help="folder of categories in the MVTec AD layout")
    source.add_argument("--images", type=Path, nargs="+", help="your own images, files or folders")
    add = parser.add_argument
    add("--category", nargs="+", required=True, help="names of runs; all: every one in --data")
    add("--runs", type=Path, default="runs", help="folder of the runs")
    add("--pictures", action="store_true", help="draw the anomaly map of each image")
    add("--false-alarms", type=float, default=0.05, help="expected fraction of good images")
    add("--batch-size", type=int, default=16, help="images in a batch")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: a GPU if any")
    args, where, metrics = parser.parse_args(argv), "", {}
    every = args.data and args.category == ["all"]
    try:
        for name in gaussad.list_categories(args.data) if every else args.category:
            where = f"{name}: "
            metrics[name] = evaluate(args, name, gaussad.pick_device(args.device))
        if args.data and len(metrics) > 1:
            write_results(args.runs / "results.csv", metrics)
    except (OSError, ValueError, torch.linalg.LinAlgError) as error:
        parser.exit(2, f"evaluate.py: error: {where}{error}\n")


def evaluate(args: Namespace, category: str, device: torch.device) -> dict:
    """Score images with the detector of a run; write, print and return what is found."""
    run = args.runs / category
    if not (run / "detector.pt").exists():
        raise ValueError(f"there is no {run / 'detector.pt'}: run train.py first")
    record, detector = run / "training.json", GaussianAD.load(run / "detector.pt", device)
    if record.exists() and not json.loads(record.read_text(encoding="utf-8"))["finished"]:
        print(f"{category}: training is not finished, the detector is that of the last check kept")
    threshold = detector.threshold(args.false_alarms)
    maxima = detector.held_out_scores[~detector.outliers(), 1].cpu()
    limits = np.quantile(maxima, (0.5, 1 - args.false_alarms, 0.99), method="weibull")
    if args.data:
        out, samples = run / "results", gaussad.list_samples(args.data, category, "test")
        (args.runs / "results.csv").unlink(missing_ok=True)  # it would not agree any more
    else:
        out = run / "scored"
        samples = [Sample(path, "", None) for path in gaussad.list_images(args.images)]
    remove_results(out)
    (out / "pictures" if args.pictures else out).mkdir(parents=True, exist_ok=True)
    read, scores, maps, masks = [], [], [], []
    for sample, image, mask, anomaly_map, values in predict(detector, samples, args):
        if args.pictures:
            name = f"pictures/{len(read):04d}_{sample.defect}_{sample.path.stem[:100]}.png"
            picture(image, mask, anomaly_map, limits).save(out / name, compress_level=1)
        if sample.defect == "good" or mask.any():  # pixel figures leave the others out
            maps.append(anomaly_map)
            masks.append(mask)
        read.append(sample)
        scores.append(values)
    if not read:
        raise ValueError("none of the images can be read")
    defective = torch.tensor([sample.defect not in ("good", "") for sample in read])
    scores = torch.stack(scores)
    scored = Scored(read, scores, defective, scores[:, 0] > threshold)
    metrics = dict.fromkeys((*RESULTS, "per_defect")) | {"threshold": threshold}
    if args.data:
        metrics |= measure(scored, maps, masks)
        if len(masks) < len(read):
            print(f"{len(read) - len(masks)} defective images have no mask: not in pixel figures")
        trained_on = {hash(x.read_bytes()) for x in (args.data / category).glob("train/good/*.*")}
        if n := sum(hash(sample.path.read_bytes()) in trained_on for sample in read):
            print(f"{n} test images are in train/good, too: their scores mean little")
        print(*(f"{title:36} {percent(metrics[key])}" for key, title in FIGURES.items()), sep="\n")
    with (out / "scores.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerow(COLUMNS)
        for sample, anomalous, values in zip(read, scored.anomalous, scores.tolist(), strict=True):
            verdict = "anomalous" if anomalous else "normal"
            csv.writer(file).writerow((sample.path, sample.defect, verdict, *values))
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2), encoding="utf-8")
    page = report(category, metrics, scored, pictures(scored, detector, limits, args))
    (out / "report.html").write_text(page, encoding="utf-8", errors="surrogateescape")
    print(f"{category}: {in_words(scored)} {out / 'report.html'}")
    if len(read) < len(samples):
        raise ValueError(f"{len(samples) - len(read)} of {len(samples)} images cannot be read")
    return metrics


def remove_results(folder: Path) -> None:
    """Remove what an earlier evaluation wrote, and the folder if nothing else is in it."""
    for name in ("scores.csv", "metrics.json", "report.html"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "pictures", ignore_errors=True)
    if folder.exists() and not any(folder.iterdir()):
        folder.rmdir()


class Scored(NamedTuple):
    """Images and their scores, in one order."""

    samples: list[Sample]
    scores: Tensor  # (N, 3) float64: anomaly score, pooled score, map maximum
    defective: Tensor  # (N,) bool: as the folder says; False for your own images
    anomalous: Tensor  # (N,) bool: as the threshold says


def predict(detector: GaussianAD, samples: list[Sample], args: Namespace) -> Iterator[tuple]:
    """Each (sample, image, mask, map, scores); an own image that cannot be read is only named."""

    def load(sample: Sample) -> tuple[Sample, Tensor, Tensor] | None:
        try:
            image = gaussad.load_image(sample.path, detector.image_size)
            return sample, image, gaussad.load_mask(sample.mask, detector.image_size)
        except (OSError, ValueError) as error:
            if args.data:
                raise
            sys.stderr.write(f"evaluate.py: {error}\n")  # at once, as threads write side by side

    for start in range(0, len(samples), args.batch_size):
        with ThreadPoolExecutor() as pool:
            batch = list(filter(None, pool.map(load, samples[start : start + args.batch_size])))
        if batch:
            scores, maps = detector.predict(torch.stack([image for _, image, _ in batch]))
            for x, anomaly_map, values in zip(batch, maps.cpu(), scores.cpu(), strict=True):
                yield *x, anomaly_map, values
        if sys.stderr.isatty():  # a line that the next one overwrites
            print(f"{start} of {len(samples)} images\x1b[K", end="\r", file=sys.stderr, flush=True)


def measure(scored: Scored, maps: list[Tensor], masks: list[Tensor]) -> dict:
    """What metrics.json says of a test set: areas and rates in [0, 1], None where undefined."""
    scores, defective, anomalous = scored.scores, scored.defective, scored.anomalous

    def area(metric: Callable, x: Tensor, truth: Tensor) -> float | None:
        return metric(x, truth) if truth.any() and not truth.all() else None

    per_defect = {}
    for defect in sorted({sample.defect for sample in scored.samples} - {"good"}):
        chosen = torch.tensor([sample.defect == defect for sample in scored.samples])
        among, n = chosen | ~defective, int(chosen.sum())
        auroc = area(gaussad.auroc, scores[among, 0], chosen[among])
        per_defect[defect] = {"images": n, "found": int(anomalous[chosen].sum()), "auroc": auroc}
    figures = [area(gaussad.auroc, x, defective) for x in scores.T]
    pixels = [torch.stack(x) for x in (maps, masks)] if maps else [defective, defective]
    figures += [area(gaussad.auroc, *pixels), area(gaussad.aupro, *pixels)]
    for wrong in (anomalous[~defective], ~anomalous[defective]):
        figures.append(wrong.double().mean().item() if len(wrong) else None)
    return dict(zip(RESULTS, figures, strict=True)) | {"per_defect": per_defect}


def in_words(scored: Scored) -> str:
    """How good the detector is, for somebody who does not know AUROC."""
    defective, anomalous = scored.defective, scored.anomalous
    if not scored.samples[0].defect:
        return f"{anomalous.sum()} of {len(anomalous)} images are called anomalous."
    found = f"{anomalous[defective].sum()} of {defective.sum()} defective images found, "
    return found + f"{anomalous[~defective].sum()} of {(~defective).sum()} good ones rejected."


def write_results(path: Path, metrics: dict[str, dict]) -> None:
    """Write and print results.csv: the categories, their mean and its standard error."""
    rows = {name: [x[key] for key in RESULTS] for name, x in metrics.items()}
    columns = [[x for x in column if x is not None] for column in zip(*rows.values(), strict=True)]
    rows["mean"] = [fmean(x) if x else None for x in columns]
    rows["standard_error"] = [stdev(x) / len(x) ** 0.5 if len(x) > 1 else None for x in columns]
    print(f"{'':16}" + "".join(f"{key.removeprefix('image_auroc_'):>18}" for key in RESULTS))
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerow(("category", *RESULTS))
        for name, row in rows.items():
            csv.writer(file).writerow((name, *row))
            print(f"{name:16}" + "".join(f"{percent(x):>18}" for x in row))


def percent(x: float | None) -> str:
    return "-" if x is None else f"{x:.1%}"


def picture(image: Tensor, mask: Tensor, anomaly_map: Tensor, limits: np.ndarray) -> Image.Image:
    """The image, and beside it the same under its map, with two outlines: see `report`."""
    low, middle, high = limits
    heat = ((anomaly_map.double() - low) / (high - low)).clamp(0, 1).numpy()[..., None]
    plain = image.permute(1, 2, 0).numpy()
    colour = np.concatenate([0 * heat + 255, 255 * (1 - heat), 0 * heat], -1)
    painted = plain + (colour - plain) * 0.7 * heat**0.5
    for region, outline in ((anomaly_map > middle, (255, 255, 255)), (mask, (0, 235, 235))):
        outside = torch.nn.functional.max_pool2d(1 - region[None].float(), 5, stride=1, padding=2)
        painted[(region & (outside[0] > 0)).numpy()] = outline  # two pixels wide
    return Image.fromarray(np.concatenate([plain, painted.round().astype(np.uint8)], 1))


def pictures(scored: Scored, detector: GaussianAD, limits: np.ndarray, args: Namespace) -> str:
    """Some pictures of each kind, as HTML; their images are scored again, as no map is kept."""
    order = scored.scores[:, 0].argsort(descending=True, stable=True).tolist()
    defective, anomalous, html = scored.defective, scored.anomalous, ""
    kinds = {"called anomalous": anomalous, "called normal": ~anomalous}
    if args.data:
        kinds = {"misses": defective & ~anomalous, "false alarms": ~defective & anomalous}
        kinds |= {"defects found": defective & anomalous, "good": ~defective & ~anomalous}
    for kind, chosen in kinds.items():
        ranked = [scored.samples[i] for i in order if chosen[i]]
        shown = ranked[:-7:-1] if kind == "misses" else ranked[:6]  # the worst first
        html += f"<h3>{kind}: {len(shown)} of {len(ranked)}</h3><div class=grid>"
        for sample, image, mask, anomaly_map, values in predict(detector, shown, args):
            file, name = BytesIO(), f"{sample.path.parent.name}/{sample.path.name}"
            picture(image, mask, anomaly_map, limits).save(file, "JPEG", quality=90)
            source = f"data:image/jpeg;base64,{b64encode(file.getvalue()).decode()}"
            html += f"<figure><img src='{source}' alt=''>{escape(name)}: {values[0]:.1f}</figure>"
        html += "</div>"
    return html


def histogram(scored: Scored, threshold: float) -> str:
    """How many images, good and defective, have which anomaly score, as SVG."""
    scores, defective = scored.scores[:, 0].numpy(), scored.defective.numpy()
    edges = np.histogram_bin_edges([threshold, *scores], 40)
    top, marks = np.histogram(scores, edges)[0].max(), ""
    for kind, group in (("good", scores[~defective]), ("bad", scores[defective])):
        for k, n in enumerate(200 * np.histogram(group, edges)[0] / top):
            marks += f"<rect class={kind} x={10 * k} y={200 - n:.1f} width=9 height={n:.1f} />"
    x = 400 * (threshold - edges[0]) / (edges[-1] - edges[0])
    marks += f"<path d='M{x:.1f} 0V200M0 200H400' stroke=black /><text x=-20 y=10>{top}</text>"
    marks += "".join(f"<text x={10 * k} y=214>{edges[k]:.3g}</text>" for k in (0, 20, 40))
    return f"<svg viewBox='-20 0 450 220'>{marks}</svg>"


STYLE = """body { font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: auto }
.grid { display: grid; gap: 1em; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)) }
figure { margin: 0 } table { margin: 1em 0 } td, th { padding-right: 2em; text-align: left }
img, svg { width: 100% } svg { max-width: 640px; font-size: 12px } b { font-size: 2em }
.good { color: #0072b2; fill: #0072b2 } .bad { color: #d55e00; fill: #d55e00; opacity: .8 }"""


def report(category: str, metrics: dict, scored: Scored, shown: str) -> str:
    """All that was found, as one page of HTML that needs no other file and no script."""
    judged = ""  # what needs labels
    if metrics["per_defect"] is not None:
        cards = [f"<div><b>{percent(metrics[x])}</b><br>{FIGURES[x]}</div>" for x in FIGURES]
        judged = f"<div class=grid>{''.join(cards)}</div><table><tr><th>defect<th>found<th>AUROC"
        for name, x in metrics["per_defect"].items():
            cells = escape(name), f"{x['found']} of {x['images']}", percent(x["auroc"])
            judged += "<tr><td>" + "<td>".join(cells)
        judged += "</table><p><span class=good>Good</span>, <span class=bad>defective</span> images"
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(category)}</title>"
        f"<meta name=viewport content='width=device-width'><style>{STYLE}</style>"
        f"<h1>{escape(category)}</h1><p>{in_words(scored)}{judged}<p>Number of images by anomaly "
        f"score; line: threshold, {metrics['threshold']:.2f}"
        f"{histogram(scored, metrics['threshold'])}<p>Each image beside a copy under its anomaly "
        "map. Yellow: half of the normal images have a place this anomalous; red: one in a hundred "
        "has. Outlines: true defect (cyan); where the map exceeds its own limit (white), which "
        f"decides nothing.{shown}"
    )


if __name__ == "__main__":
    main()
