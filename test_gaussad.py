# SPDX-License-Identifier: MIT
"""Every test: the maths against independent references, the command lines by running them.

    python -m pytest

runs offline on the CPU on drawn data and random weights. With GAUSSAD_DATA (an MVTec AD root with
screw in it) and GAUSSAD_WEIGHTS (a state dict of mobilenet_v2) it also runs on the real thing."""

import base64
import csv
import json
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import sys
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

os.environ["OMP_NUM_THREADS"] = "1"  # networks here are too small to gain by more threads

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.utils.data import DataLoader, TensorDataset
from torchvision import models
from torchvision.transforms.functional import normalize

import evaluate
import gaussad
import train
from gaussad import FeatureExtractor, Gaussian, GaussianAD, Moments

HERE = Path(__file__).parent
BACKBONE = "mobilenet_v3_small"
TINY = f"--backbone {BACKBONE} --levels 4 9 --weights random --image-size 64".split()

gaussad.FIRST_CHECK = 2  # checks at steps 0, 2, 4, … in place of 0, 32, 64, …: they are faster


@pytest.fixture(autouse=True)
def seeds():
    """Every test draws the same numbers, whatever ran before it."""
    torch.manual_seed(0)


def random_samples(*shape, condition):
    """Samples (..., N, C) whose features have standard deviations from 1 to condition^(-1/2)."""
    rng = np.random.default_rng(0)
    mix, _ = np.linalg.qr(rng.normal(size=(shape[-1], shape[-1])))
    return rng.normal(size=shape) * np.geomspace(1, condition**-0.5, shape[-1]) @ mix


def random_images(n, size=32):
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8)


def relative(a, b):
    return np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b))


# ---- Gaussian ------------------------------------------------------------------------------------


def naive_ledoit_wolf(x):
    """Ledoit and Wolf 2004, section 3.2, term by term with an outer product for each sample."""
    n, c = x.shape
    y = x - x.mean(0)
    s = y.T @ y / n
    norm2 = lambda a: (a * a).sum() / c
    m = np.trace(s) / c
    d2 = norm2(s - m * np.eye(c))
    b2 = min(d2, sum(norm2(np.outer(row, row) - s) for row in y) / n**2)
    return b2 / d2 * m * np.eye(c) + (1 - b2 / d2) * s, b2 / d2


def naive_distance(x, covariance):
    """The Mahalanobis distance of samples (..., N, C) to their mean."""
    y = x - x.mean(-2, keepdims=True)
    return np.sqrt(np.einsum("...ni,...ij,...nj->...n", y, np.linalg.inv(covariance), y))


@pytest.mark.parametrize("n, c, condition", [(12, 40, 1), (40, 40, 1e8), (999, 15, 1e8), (6, 2, 1)])
@pytest.mark.parametrize("reference", ["naive", "sklearn"])
def test_ledoit_wolf_equals_the_paper_and_scikit_learn(n, c, condition, reference):
    oracle = naive_ledoit_wolf
    if reference == "sklearn":
        oracle = pytest.importorskip("sklearn.covariance").ledoit_wolf
    x = random_samples(n, c, condition=condition)
    covariance, shrinkage = gaussad.ledoit_wolf(torch.tensor(x))
    expected, expected_shrinkage = oracle(x)
    assert relative(covariance, expected) < 1e-10
    assert abs(shrinkage.item() - expected_shrinkage) < 1e-10


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_moments_of_several_gaussians_do_not_depend_on_the_batches(offset):
    x = random_samples(2, 97, 10, condition=1e4)
    x[:, 0] += 3  # an outlier that comes first or last
    covariance, shrinkage = map(np.array, zip(*map(naive_ledoit_wolf, x)))
    samples = torch.tensor(x + offset)
    parts = samples.split([1, 1, 48, 47], dim=1)
    for order in (parts, parts[::-1]):
        moments = Moments()
        for part in order:
            moments.add(part)
        assert relative(moments.mean, x.mean(1) + offset) < 1e-12
        eigenvalues = np.array([np.linalg.eigvalsh(np.cov(part.T)) for part in x])
        p = eigenvalues / eigenvalues.sum(1, keepdims=True)
        assert relative(moments.effective_rank(), np.exp(-(p * np.log(p)).sum(1))) < 1e-6
        assert relative(moments.ledoit_wolf()[0], covariance) < 1e-9
        assert relative(moments.ledoit_wolf()[1], shrinkage) < 1e-9
        distance = Gaussian.fit(moments).distance(samples.movedim(1, 0))
        assert relative(distance.T, naive_distance(x, covariance)) < 1e-9


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("covariance", ["full", "diagonal", "identity"])
def test_distance_is_mahalanobis_and_its_gradient_zero_at_the_mean(covariance, scale):
    x = scale * random_samples(50, 8, condition=1e4)
    x[:, 2] = 7 * scale  # a feature that does not vary
    sigma, _ = naive_ledoit_wolf(x)
    ablated = {"full": sigma, "diagonal": np.diag(np.diag(sigma)), "identity": np.eye(8)}
    gaussian = Gaussian.fit(Moments().add(torch.tensor(x)), covariance=covariance)
    expected = naive_distance(x, ablated[covariance])
    assert relative(gaussian.distance(torch.tensor(x)), expected) < 1e-9
    at_mean = gaussian.mean.clone()[None].requires_grad_()
    gaussian.distance(at_mean).sum().backward()
    assert not gaussian.distance(at_mean).any() and not at_mean.grad.any()


# ---- AUROC and AU-PRO ----------------------------------------------------------------------------


def test_auroc_counts_pairs_with_ties_as_half():
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 6, 60) / 3, rng.random(60) < 0.4
    pairs = scores[labels][:, None] - scores[~labels][None]
    expected = ((pairs > 0) + (pairs == 0) / 2).mean()
    assert gaussad.auroc(torch.tensor(scores), torch.tensor(labels)) == pytest.approx(expected)


def test_auroc_equals_scikit_learn_on_a_million_tied_scores():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 500, 10**6) / 7, rng.random(10**6) < 0.1
    expected = metrics.roc_auc_score(labels, scores)
    assert abs(gaussad.auroc(torch.tensor(scores), torch.tensor(labels)) - expected) < 1e-12


def naive_regions(mask):
    """The 8-connected regions of a mask (H, W), each a list of its pixels, by flood fill."""
    left, regions = set(zip(*np.nonzero(mask))), []
    while left:
        region, edge = [], [left.pop()]
        while edge:
            row, column = edge.pop()
            region.append((row, column))
            near = {(row + i, column + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left -= near
            edge.extend(near)
        regions.append(region)
    return regions


def naive_aupro(maps, masks, limit):
    """Every score a threshold, one after the other; trapezoids, the last one cut at the limit."""
    regions = [[(i, *pixel) for pixel in region]
               for i, mask in enumerate(masks) for region in naive_regions(mask)]  # fmt: skip
    area, x0, y0 = 0.0, 0.0, 0.0
    for threshold in np.unique(maps)[::-1]:
        told = maps >= threshold
        x = told[masks == 0].mean()
        y = np.mean([np.mean([told[pixel] for pixel in region]) for region in regions])
        if x >= limit:
            y = y0 + (y - y0) * (limit - x0) / (x - x0)
            return (area + (limit - x0) * (y0 + y) / 2) / limit
        area, x0, y0 = area + (x - x0) * (y0 + y) / 2, x, y


@pytest.mark.parametrize("distinct", [5, 10**6])  # ties everywhere, and at the top alone
@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
def test_aupro_equals_brute_force(distinct, limit):
    rng = np.random.default_rng(0)
    masks = np.zeros((4, 10, 13), bool)
    masks[0, :5, :5] = masks[0, 5:8, 5:9] = True  # they touch by a corner
    masks[1, 4, 4:8:2] = masks[1, 0, 12] = masks[2] = True  # dots; all of a mask
    masks[3] = rng.random((10, 13)) < 0.3
    maps = (rng.integers(0, distinct, masks.shape) / distinct + 0.3 * masks).clip(max=0.7)
    found = gaussad.aupro(torch.tensor(maps), torch.tensor(masks), limit)
    assert found == pytest.approx(naive_aupro(maps, masks, limit), abs=1e-9)
    monotone = torch.tensor(maps).exp().where(torch.tensor(maps < 0.7), torch.inf)
    assert gaussad.aupro(monotone, torch.tensor(masks), limit) == found


def test_regions_are_those_of_a_flood_fill():
    masks = np.random.default_rng(0).random((6, 20, 30)) < 0.4
    masks[5] = False
    masks[5, ::2] = masks[5, 1::4, -1] = masks[5, 3::4, 0] = True  # one long serpentine
    labels = gaussad.label_regions(torch.tensor(masks)).numpy()
    regions = [(i, region) for i, mask in enumerate(masks) for region in naive_regions(mask)]
    assert ((labels > 0) == masks).all() and sum(i == 5 for i, _ in regions) == 1
    numbers = [{labels[(i, *pixel)] for pixel in region} for i, region in regions]
    assert sum(map(len, numbers)) == len(set.union(*numbers)) == len(regions)


# ---- Features ------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("backbone, levels, default, modules, prefix, key", [
    ("efficientnet_b0", [3, 9], [5, 6, 7, 8, 9], ["features.2", "features.8"], "", None),
    ("mobilenet_v2", [4, 11], [11, 14, 17, 18, 19], ["features.3", "features.10"], "module.",
     "state_dict"),
    ("resnet18", [1, 2, 3, 4, 5], [4, 5], ["relu", "layer1", "layer2", "layer3", "layer4"],
     "module.backbone.", "model"),
])  # fmt: skip
def test_levels_are_torchvisions_feature_maps(backbone, levels, default, modules, prefix, key,
                                              tmp_path):  # fmt: skip
    network, outputs, path = models.get_model(backbone).eval(), [], tmp_path / "weights.pth"
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # that does something, as after training
            for values in (module.running_mean, module.running_var, module.weight, module.bias):
                values.uniform_(0.5, 2)
    for name in modules:
        network.get_submodule(name).register_forward_hook(
            lambda module, args, output: outputs.append(output.clone()))
    images = random_images(2)
    network(normalize(images / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    state = {prefix + k: v for k, v in network.state_dict().items() if "classifier" not in k}
    torch.save({key: state, "epoch": 3} if key else state, path)
    for x, y in zip(FeatureExtractor(backbone, levels, path)(images), outputs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4 * y.abs().max())
    extractor = FeatureExtractor(backbone, weights=path)
    assert extractor.levels == default
    assert not [m for m in extractor.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert all(p.requires_grad for p in extractor.parameters())


def own_stages():
    """A small network of three stages, of stride 4, 8 and 16, with batch norm."""
    conv = lambda c, d, stride: torch.nn.Sequential(
        torch.nn.Conv2d(c, d, 3, stride, 1), torch.nn.BatchNorm2d(d), torch.nn.ReLU())
    return [conv(3, 8, 4), conv(8, 12, 2), conv(12, 16, 2)]


@torch.no_grad()
def test_ones_own_network_is_taken_as_it_is(tmp_path):
    stages, images = own_stages(), torch.rand(9, 3, 64, 64)
    given = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.3]}
    extractor = FeatureExtractor(stages, [2, 3], **given)
    expected = torch.nn.Sequential(*stages).eval()(normalize(images, **given))
    torch.testing.assert_close(extractor(images)[1], expected)
    assert FeatureExtractor(stages, **given).levels == [3]
    detector = GaussianAD(extractor).fit([images]).calibrate([images])
    detector.save(tmp_path / "own.pt")
    again = FeatureExtractor(own_stages(), [2, 3], **given)
    loaded = GaussianAD.load(tmp_path / "own.pt", extractor=again)
    assert torch.equal(loaded(images), detector(images))
    for other in (None, FeatureExtractor(own_stages(), [3], **given)):
        with pytest.raises(ValueError, match="own.pt is not .* the extractor given"):
            GaussianAD.load(tmp_path / "own.pt", extractor=other)


def test_weights_that_are_broken_are_told(tmp_path, monkeypatch):
    state = models.get_model(BACKBONE).state_dict()
    state["features.0.0.weight"][0] = torch.nan
    torch.save(state, tmp_path / "nan.pth")
    with pytest.raises(ValueError, match="nan.pth are not all finite"):
        FeatureExtractor(BACKBONE, weights=tmp_path / "nan.pth")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)  # as if it were not installed
    with pytest.raises(ValueError, match="a.safetensors, pip install safetensors"):
        FeatureExtractor(BACKBONE, weights="a.safetensors")
    monkeypatch.delattr(models, "get_model")  # as a download that breaks
    with pytest.raises(ConnectionError, match="get_model.*delete .*checkpoints"):
        FeatureExtractor(BACKBONE)


def test_safetensors_are_read(tmp_path):
    path, tensors = tmp_path / "a.safetensors", {"x": torch.rand(3)}
    pytest.importorskip("safetensors.torch").save_file(tensors, path)
    assert torch.equal(gaussad.load_plain(path)["x"], tensors["x"])


def test_batch_norm_with_an_activation_in_it_is_not_folded():
    layer = type("BatchNormAct2d", (torch.nn.BatchNorm2d,), {})  # as timm has it
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), layer(4)).eval()
    gaussad.fold_batch_norm(network)
    assert type(network[1]) is layer


# ---- Detector ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted():
    torch.manual_seed(0)
    images = torch.rand(24, 3, 64, 64)
    return GaussianAD(FeatureExtractor(BACKBONE, [2, 4, 9], "random")).fit(images.split(5)), images


@torch.no_grad()
def test_score_sums_the_levels_and_map_joins_them_at_each_location(fitted):
    images, score, joined = fitted[1], 0, []
    assert fitted[0].map_levels == [9]  # of stride 16
    detector = GaussianAD(fitted[0].extractor, [4, 9]).fit(images.split(7))
    for level, features in zip([2, 4, 9], detector.extractor(images), strict=True):
        pooled = features.double().numpy().mean((2, 3))
        score += naive_distance(pooled, naive_ledoit_wolf(pooled)[0])
        if level in detector.map_levels:  # of 8 and 2 locations a side
            joined.append(torch.nn.functional.interpolate(features, (8, 8), mode="bilinear"))
    x = torch.cat(joined, 1).double().permute(2, 3, 0, 1).numpy()
    covariance = np.array([[naive_ledoit_wolf(at)[0] for at in row] for row in x])
    floor = gaussad.MAP_FLOOR * np.diagonal(covariance, axis1=2, axis2=3).mean()
    distance = naive_distance(x, covariance + floor * np.eye(x.shape[-1]))
    distance = torch.tensor(distance).permute(2, 0, 1)[:, None]
    heat = torch.nn.functional.interpolate(distance, (64, 64), mode="bilinear")[:, 0]
    scores, maps = detector.scores_and_maps(images)
    assert relative(scores, score) < 1e-4  # features are float32
    assert relative(maps, heat) < 1e-3
    assert detector.loss(images).item() == pytest.approx(score.mean(), rel=1e-4)
    assert torch.equal(scores, detector(images)) and torch.equal(maps, detector.anomaly_map(images))


@torch.no_grad()
def test_one_score_is_both_standardised_over_the_images_held_out(fitted):
    detector, images = GaussianAD(fitted[0].extractor).fit([fitted[1]]), torch.rand(5, 3, 64, 64)
    held_out = torch.rand(12, 3, 64, 64)
    assert detector.calibrate(held_out.split(5)) is detector
    found = detector.anomaly_score(*detector.scores_and_maps(images)).numpy()
    maxima, expected = lambda x: detector.anomaly_map(x).amax((1, 2)), 0
    for of in (detector, maxima):
        usual = of(held_out).numpy()
        expected += (of(images).numpy() - usual.mean()) / usual.std(ddof=1)
    assert relative(found, expected) < 1e-4
    own = detector.anomaly_score(*detector.scores_and_maps(held_out))
    assert detector.threshold(0.05) == pytest.approx(gaussad.tail_quantile(own, 0.95), rel=1e-3)
    expected = gaussad.tail_quantile(maxima(held_out), 0.9)
    assert detector.map_threshold(0.1) == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_zero_steps_fit_and_calibrate_which_equals_its_parts(fitted, monkeypatch):
    monkeypatch.delattr(gaussad, "AugmentationValidator")  # as there is nothing to judge
    images, held_out = fitted[1].split([18, 6])
    found, expected = (GaussianAD(fitted[0].extractor) for _ in range(2))
    [check] = gaussad.fine_tune(found, images.split(5), held_out, steps=0)
    assert check.kept and check.validation is None
    assert relative(found.held_out, expected.fit([images]).calibrate([held_out]).held_out) < 1e-4
    expected.fit([images, held_out])
    with pytest.raises(ValueError, match="calibrate it first"):  # again
        expected.threshold()
    pairs = zip(found.scores_and_maps(images), expected.scores_and_maps(images))
    assert all(relative(*pair) < 1e-4 for pair in pairs)


def test_tail_quantile_keeps_the_false_alarm_rate_of_few_and_of_many():
    rng = np.random.default_rng(0)
    draw = lambda *shape: 40 + 5 * rng.gamma(20, size=shape) / 20**0.5
    future = draw(10**4)
    for n, tolerance in ((6, 0.02), (64, 0.01), (2000, 0.003)):
        found = [gaussad.tail_quantile(torch.tensor(scores), 0.95) for scores in draw(400, n)]
        alarms = (future[:, None] > np.array(found)).mean()
        assert alarms == pytest.approx(0.05, abs=tolerance)
    few = [gaussad.tail_quantile(x, 0.95) for x in torch.empty(9000, 16).exponential_()]
    assert np.exp(-np.array(few)).mean() == pytest.approx(0.05, abs=0.002)  # exact for its model
    far = torch.tensor([gaussad.tail_quantile(x, 0.99) for x in torch.randn(900, 200)])
    assert torch.special.ndtr(-far).mean().item() == pytest.approx(0.01, abs=0.002)
    assert gaussad.tail_quantile(torch.tensor(future), 0.5) == pytest.approx(np.median(future))


def test_saved_detector_is_the_same_to_the_bit(fitted, tmp_path):
    detector, images = fitted
    detector = GaussianAD(detector.extractor, np.array([4, 9])).fit([images]).calibrate([images])
    path, before = tmp_path / "detector.pt", torch.random.get_rng_state()
    detector.save(path, note="mine")
    loaded = GaussianAD.load(path)
    assert torch.equal(torch.random.get_rng_state(), before)
    with torch.no_grad():
        pairs = zip(loaded.scores_and_maps(images), detector.scores_and_maps(images))
        assert all(torch.equal(*pair) for pair in pairs)
    assert loaded.threshold() == detector.threshold()
    assert all(p.requires_grad for p in loaded.parameters())  # it can be trained on
    assert gaussad.load_plain(path)["note"] == "mine"


def test_altered_file_is_refused_and_no_code_in_it_is_run(fitted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class Malicious:
        def __reduce__(self):
            return os.mkdir, ("executed",)

    for alter in (lambda content: content.pop("image_size"),
                  lambda content: content["state"].popitem(),
                  lambda content: content["detector"].update(levels=[2, 4]),
                  lambda content: content.update(more=Malicious())):  # fmt: skip
        fitted[0].save("detector.pt")
        content = gaussad.load_plain("detector.pt")
        alter(content)
        torch.save(content, "detector.pt")
        with pytest.raises(ValueError, match="detector.pt is not a"):
            GaussianAD.load("detector.pt")
    assert os.listdir() == ["detector.pt"]


@torch.no_grad()
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
def test_scores_and_maps_of_a_gpu_are_those_of_the_cpu(fitted):
    images, device = fitted[1], gaussad.pick_device("cuda")
    expected = fitted[0].scores_and_maps(images)
    on_gpu = GaussianAD(deepcopy(fitted[0].extractor)).to(device).fit(images.split(5))
    for found, values in zip(on_gpu.scores_and_maps(images.to(device)), expected, strict=True):
        assert relative(found.cpu(), values) < 1e-3


# ---- Augmentation validator ----------------------------------------------------------------------


def test_cutout_and_cutmix_change_one_square_of_the_stated_area():
    noise = random_images(50, 64)
    for augment in (gaussad.cutout, gaussad.cutmix):
        changed = (augment(noise) != noise).any(1)
        assert changed.flatten(1).any(1).float().mean() > 0.9  # a few lie across the border
        for where in changed:
            rows, columns = where.any(1).sum(), where.any(0).sum()
            assert rows * columns <= 0.11 * 64 * 64
    pasted, partners = gaussad.cutmix(noise), noise.roll(1, 0)
    assert ((pasted == noise) | (pasted == partners)).all()
    mixed = gaussad.mixup(noise)
    assert (mixed >= noise.minimum(partners)).all() and (mixed <= noise.maximum(partners)).all()


def test_validator_draws_once_from_its_seed_and_leaves_the_generator_alone():
    images, before = random_images(6), torch.random.get_rng_state()
    one, same, other = (gaussad.AugmentationValidator(images, seed, 11, gaussad.AUGMENTATIONS)
                        for seed in (1, 1, 2))  # fmt: skip
    assert torch.equal(torch.random.get_rng_state(), before)
    for name, augmented in one.augmented.items():
        assert augmented.dtype == torch.uint8 and augmented.shape == (12, 3, 32, 32)
        assert not torch.equal(augmented[:6], augmented[6:])
        assert torch.equal(augmented, same.augmented[name])
        assert not torch.equal(augmented, other.augmented[name])


def spread(batch):
    """A score of images that is above zero and has nothing to do with a detector."""
    return batch.double().std((1, 2, 3))


def test_separation_is_that_of_its_formula():
    images = random_images(20)
    validator = gaussad.AugmentationValidator(images, versions=60)
    found = validator(spread, batch_size=7)
    log, expected = np.log(spread(images).numpy()), []
    for name, augmented in validator.augmented.items():
        versions = np.log(spread(augmented).numpy()).reshape(3, 20)
        expected.append((versions - log).mean() / log.std())
        scores = torch.cat([spread(images), spread(augmented)])
        auroc = gaussad.auroc(scores, torch.arange(80) >= 20)
        assert found.auroc[name] == pytest.approx(auroc, abs=1e-12)
    assert found.separation == pytest.approx(np.mean(expected), rel=1e-12)


def test_standard_error_of_a_gain_is_that_of_leaving_images_out():
    rng = np.random.default_rng(0)
    log = rng.normal(size=(2, 80)) + rng.normal(size=80)
    augmented = log + rng.normal(1.0, 0.3, size=(2, 80))
    s = lambda keep: np.diff([(a - x)[keep].mean() / x[keep].std() for x, a in zip(log, augmented)])
    images = torch.zeros(80, 3, 2, 2, dtype=torch.uint8)
    validator = gaussad.AugmentationValidator(images, 1, 1, {"none": lambda x: x})
    found = []
    for pair in zip(log, augmented):
        scores = iter(np.exp(pair))
        found.append(validator(lambda batch: torch.tensor(next(scores)), batch_size=80))
    gain, error = found[1].gain_over(found[0])
    left_out = [s(np.arange(80) != i).item() for i in range(80)]
    assert gain == pytest.approx(s(np.arange(80) >= 0).item())
    assert error == pytest.approx(np.sqrt(79 * np.var(left_out)), rel=0.1)


# ---- Fine-tuning ---------------------------------------------------------------------------------


@pytest.fixture
def task():
    """A detector, normal images in a loader that shuffles, and images held out."""
    torch.manual_seed(0)
    images = random_images(30)
    loader = DataLoader(TensorDataset(images[:20], torch.zeros(20)), 7, shuffle=True)
    return GaussianAD(FeatureExtractor(BACKBONE, [2, 4], "random")), loader, images[20:]


def test_one_step_is_adams_on_the_mean_score(task):
    detector, loader, held_out = task
    reference = deepcopy(detector)
    with gaussad.seeded(3):
        reference.fit(loader, maps=False)
    optimizer = torch.optim.Adam(reference.parameters(), lr=1e-3)
    with gaussad.seeded(3 + 1):
        images, _ = next(iter(loader))
    loss = reference(images).mean()
    loss.backward()
    optimizer.step()
    checks = list(gaussad.fine_tune(detector, loader, held_out, steps=1, lr=1e-3, seed=3))
    assert checks[1].loss == loss.item()
    assert all(map(torch.equal, reference.parameters(), detector.parameters()))


def test_kept_detector_is_fitted_to_all_and_calibrated_and_others_have_no_maps(task, monkeypatch):
    detector, loader, held_out = task
    gains = iter([(1.9, 1.0), (2.1, 1.0), (-5.0, 1.0), (1.0, 1.0)])
    monkeypatch.setattr(gaussad.Validation, "gain_over", lambda self, other: next(gains))
    checks, everything = [], [loader.dataset.tensors[0], held_out]
    for check in gaussad.fine_tune(detector, loader, held_out, steps=10**6, lr=0, patience=2):
        checks.append((check.step, check.kept))
        if check.kept:
            expected = GaussianAD(detector.extractor).fit(everything)(held_out)
            assert relative(detector(held_out).detach(), expected.detach()) < 1e-6
            assert len(detector.held_out) == 10 and detector.threshold() > 0
        else:
            with pytest.raises(ValueError, match="without maps"):
                detector.anomaly_map(held_out)
    assert checks == [(0, True), (2, False), (4, True), (8, False), (16, False)]


def test_growing_effective_rank_forbids_a_check(task, monkeypatch):
    monkeypatch.setattr(gaussad.Validation, "gain_over", lambda self, other: (3.0, 1.0))
    ranks, kept = iter([10.9, 11.1, 9.0]), []
    monkeypatch.setattr(Moments, "effective_rank", lambda self: torch.tensor(10.0))
    for check in gaussad.fine_tune(*task, steps=8, lr=0):
        kept.append((round(check.effective_rank, 1), check.kept))
        rank = torch.tensor(next(ranks, 0.0))
        monkeypatch.setattr(Moments, "effective_rank", lambda self: rank)
    assert kept == [(10.0, True), (10.9, True), (11.1, False), (9.0, True)]


def test_any_check_is_gone_on_from_to_the_same_bits(task):
    detector, loader, held_out = task
    given, start = {"steps": 5, "lr": 1e-3, "patience": 9, "seed": 5}, deepcopy(detector)
    checks = list(gaussad.fine_tune(detector, loader, held_out, **given))
    assert [check.step for check in checks] == [0, 2, 4, 5]
    for i, check in enumerate(checks[:3]):
        again = deepcopy(start)
        torch.rand(7)  # what the caller draws in between changes nothing
        rest = list(gaussad.fine_tune(again, loader, held_out, state=check.state, **given))
        found, whole = rest[-1], checks[-1]
        assert len(rest) == 3 - i
        assert (found.loss, found.gain, found.kept) == (whole.loss, whole.gain, whole.kept)
        with torch.no_grad():
            assert torch.equal(again(held_out), detector(held_out))
        with pytest.raises(ValueError, match="not as it was at first"):
            next(gaussad.fine_tune(again, loader, held_out, state=check.state, **given))


def test_readme_examples_train_take_ones_own_network_and_export(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (HERE / "README.md").read_text(encoding="utf-8")
    text = text.replace("steps=512", "steps=2")
    text = text.replace('"efficientnet_b4"', f'"{BACKBONE}", [1, 2], weights="random"')
    first, own, export = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[:3]
    images, network = random_images(24), torch.nn.Module()
    network.features = torch.nn.Sequential(*own_stages())
    names = {"dataset": TensorDataset(images, torch.zeros(24)), "held_out": images[:12].flip(-1),
             "network": network}  # fmt: skip
    exec(first, names)
    assert names["maps"].shape == (12, 32, 32) and names["anomalous"].dtype == torch.bool
    exec(own, names)
    assert GaussianAD.load("own.pt", extractor=names["extractor"])(images).shape == (24,)
    exec(export, names)
    exported = torch.export.load("detector.pt2").module()
    expected = GaussianAD.load("detector.pt").scores_and_maps(images[:3])
    for found, value in zip(exported(images[:3]), expected, strict=True):
        torch.testing.assert_close(found, value)


# ---- Errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("call, message", [
    (lambda d, x: Gaussian.fit(Moments().add(torch.rand(2, 3))), "three samples"),
    (lambda d, x: Gaussian.fit(Moments().add(5 + 3e-8 * torch.rand(5, 3))), "do not vary"),
    (lambda d, x: gaussad.ledoit_wolf(torch.tensor([[1.0], [torch.nan]])), "NaN"),
    (lambda d, x: gaussad.auroc(x, 0 * x), "both classes"),
    (lambda d, x: gaussad.auroc(x * torch.nan, x.round()), "NaN"),
    (lambda d, x: gaussad.aupro(x[:, 0], 0 * x[:, 0]), "anomalous and normal"),
    (lambda d, x: gaussad.aupro(x[:, 0], x[:, 0]), "0 and 1"),
    (lambda d, x: FeatureExtractor(own_stages()), "mean and std"),
    (lambda d, x: d(x.long()), "uint8, or floating-point"),
    (lambda d, x: d(255 * x), r"in \[0, 1\]"),
    (lambda d, x: d(x * torch.nan), r"in \[0, 1\]"),
    (lambda d, x: d(x[..., :32]), "was fitted to"),
    (lambda d, x: d.anomaly_score(*d.scores_and_maps(x)), "calibrate it first"),
    (lambda d, x: d.calibrate([x[:1].expand(3, -1, -1, -1)]), "two held-out images"),
    (lambda d, x: d.fit([x, x[..., :32]]), r"\[64, 64\] and \[64, 32\]"),
    (lambda d, x: list(gaussad.fine_tune(d, [x], x, steps=-1)), "0 or more"),
    (lambda d, x: list(gaussad.fine_tune(d, iter([x]), random_images(2, 64), 1)), "again"),
    (lambda d, x: gaussad.AugmentationValidator(random_images(6))(lambda b: 0 * spread(b)), "zero"),
    (lambda d, x: gaussad.tail_quantile(torch.ones(3), 1.0), "quantile"),
    (lambda d, x: gaussad.hold_out(range(5)), "too few"),
])  # fmt: skip
def test_what_cannot_be_done_is_told(call, message, fitted):
    with pytest.raises(ValueError, match=message):
        call(deepcopy(fitted[0]), fitted[1])


# ---- Files: cameras, masks, folders --------------------------------------------------------------

GRAY = (np.indices((40, 60)).sum(0) * 255 // 98).astype(np.int64)  # 0 to 255
DEFECT = np.zeros((50, 70), bool)
DEFECT[10:20, 30:60] = True


def test_images_of_any_mode_and_suffix_become_the_same_rgb(tmp_path):
    image = Image.fromarray(GRAY.astype(np.uint8))
    for suffix in ("png", "jfif", "jp2", "TGA"):
        image.save(tmp_path / f"a.{suffix}", quality=100)
    for mode in ("RGB", "RGBA", "LA", "P"):
        image.convert(mode).save(tmp_path / f"{mode}.png")
    expected = gaussad.load_image(tmp_path / "a.png", 32)
    assert expected.shape == (3, 32, 32) and expected.dtype == torch.uint8
    assert len(paths := gaussad.list_images([tmp_path])) == 8
    for path, found in zip(paths, gaussad.load_images(paths, 32, workers=3)):
        assert (found.int() - expected.int()).abs().max() <= 1, path.name


# A pixel of 1023 in 16 bits per colour, which Pillow reads but cannot write.
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABEAIAAADA54+dAAAADElEQVR42mNg/g+CAAkiAwdf4EfLAAAAAElFTkSuQmCC"


def test_camera_data_in_16_bits_is_read_right_or_refused(tmp_path):
    expected = Image.fromarray(GRAY.astype(np.uint8)).resize((32, 32), Image.Resampling.BILINEAR)
    path = tmp_path / "camera.tif"
    for dtype in (np.uint16, np.int32):
        Image.fromarray((GRAY * 257).astype(dtype)).save(path)
        found = gaussad.load_image(path, 32).numpy()
        assert np.abs(found - np.asarray(expected, int)).max() <= 1
        for bits in (8, 10, 14):
            Image.fromarray((GRAY * (2**bits - 1) // 255).astype(dtype)).save(path)
            with pytest.raises(ValueError, match="camera.tif: .* or save as 8 bits"):
                gaussad.load_image(path, 32)
    path.write_bytes(base64.b64decode(PNG))
    with pytest.raises(ValueError, match="camera.tif: .* or save as 8 bits"):
        gaussad.load_image(path, 32)


def test_pixels_of_another_meaning_and_images_too_big_are_refused(tmp_path, monkeypatch):
    values, path = GRAY * 257, tmp_path / "odd.tif"
    for odd, tags in ((values.astype(np.int32) - 300, {}), (values.astype(np.int32) * 2, {}),
                      (values.astype(np.float32), {}), (values.astype(np.uint16), {262: 0})):
        Image.fromarray(odd).save(path, tiffinfo=tags)
        with pytest.raises(ValueError, match="odd.tif: pixels are not from 0, black"):
            gaussad.load_image(path, 32)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="odd.tif is too big"):
        gaussad.load_image(path, 32)


def drawn(colour, rest, mode="RGBA"):
    """The defect in one colour, the rest in another."""
    image = Image.new(mode, DEFECT.shape[::-1], rest)
    image.paste(colour, mask=Image.fromarray(DEFECT))
    if mode == "P":
        image.putpalette([0] * 768)  # all black
    return image.convert("I;16") if mode == "I" else image


def test_what_is_not_opaque_is_drawn_over_black(tmp_path):
    drawn((90, 120, 30), (0, 0, 0), "RGB").save(tmp_path / "opaque.png")
    expected = gaussad.load_image(tmp_path / "opaque.png", 32)
    for rest in ((0, 0, 0, 0), (255, 255, 255, 0)):
        drawn((90, 120, 30, 255), rest).save(tmp_path / "a.png")
        assert torch.equal(gaussad.load_image(tmp_path / "a.png", 32), expected)


@pytest.mark.parametrize("colour, rest, mode", [
    ((255, 255, 255, 255), (255, 255, 255, 0), "RGBA"), ((0, 0, 0, 255), (0, 0, 0, 0), "RGBA"),
    ((255, 255, 255, 255), (0, 0, 0, 255), "RGBA"), ((0, 0, 1), (0, 0, 0), "RGB"),
    ((1, 255), (0, 255), "LA"), (1, 0, "P"), (1, 0, "I"), (1, 0, "1"),
])  # fmt: skip
def test_mask_of_any_kind_is_where_the_defect_is(colour, rest, mode, tmp_path):
    drawn(colour, rest, mode).save(tmp_path / "mask.png")
    expected = Image.fromarray(DEFECT).resize((350, 350), Image.Resampling.NEAREST)
    found = gaussad.load_mask(tmp_path / "mask.png", 350)
    assert found.dtype == torch.bool and np.array_equal(found, np.asarray(expected))
    drawn(rest, rest, mode).save(tmp_path / "empty.png")
    assert not gaussad.load_mask(tmp_path / "empty.png", 64).any()


def test_no_pixel_of_a_defect_vanishes_when_its_mask_is_made_smaller(tmp_path):
    for row, column in ((0, 0), (511, 300), (1023, 1023)):
        mask = Image.new("L", (1024, 1024))
        mask.putpixel((column, row), 255)
        mask.save(tmp_path / "dot.png")
        assert gaussad.load_mask(tmp_path / "dot.png", 380)[row * 380 // 1024, column * 380 // 1024]


def test_image_turned_by_exif_and_its_mask_of_the_raw_size_go_together(tmp_path):
    upright, exif, turns = drawn(255, 0, "L"), Image.Exif(), Image.Transpose
    upright.save(tmp_path / "upright.png")
    expected = gaussad.load_mask(tmp_path / "upright.png", 350)
    for orientation, turn in ((5, turns.TRANSPOSE), (6, turns.ROTATE_90), (7, turns.TRANSVERSE),
                              (8, turns.ROTATE_270)):  # fmt: skip
        exif[0x0112] = orientation
        upright.transpose(turn).save(tmp_path / "image.png", exif=exif)
        upright.transpose(turn).save(tmp_path / "mask.png")
        image = gaussad.load_image(tmp_path / "image.png", 350)[0] > 127
        assert (image != expected).float().mean() < 0.01
        mask = gaussad.load_mask(tmp_path / "mask.png", 350, tmp_path / "image.png")
        assert torch.equal(mask, expected)


def draw(path, value=255):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (64, 64), value).save(path)


def test_samples_and_their_masks_are_found_by_the_conventions(tmp_path):
    names = {"a.png": "a_mask.png", "b.jpg": "b.png", "c.png": "c.bmp", "d.PNG": "d_mask.PNG",
             "deep/e.webp": "deep/e_mask.tif", "f.1.png": "f.1/000.png", "g.png": None}  # fmt: skip
    part = tmp_path / "part"
    for image, mask in names.items():
        draw(part / "test/cut" / image)
        if mask:
            draw(part / "ground_truth/cut" / mask)
    draw(part / "ground_truth/cut/f.1/001.png", 0)
    for split in ("test", "ground_truth"):
        (part / split / "cut/deep").rename(tmp_path / f"linked_{split}")
        (part / split / "cut/deep").symlink_to(tmp_path / f"linked_{split}")
    for other in ("train/Good/a.png", "train/bad/a.png", "test/GOOD/a.png", "test/ok/a.png",
                  "test/cut/.hidden.png", "test/cut/.checkpoints/a.png"):  # fmt: skip
        draw(part / other)
    (part / "test/cut/notes.txt").touch()
    assert [s.defect for s in gaussad.list_samples(tmp_path, "part", "train")] == ["good"]
    with pytest.warns(UserWarning) as told:
        found = gaussad.list_samples(tmp_path, "part", "test")
    told = str([*map(str, told)])
    assert re.search("passed over, being no images: 1.*ok counts as a defect", told)
    assert [sample.defect for sample in found] == ["good"] + 7 * ["cut"] + ["ok"]
    for sample, (image, mask) in zip(found[1:], names.items()):
        assert sample.path == part / "test/cut" / image and (sample.mask is None) == (mask is None)
        assert mask is None or gaussad.load_mask(sample.mask, 32).all()


def test_held_out_are_a_fifth_but_sixteen_or_half():
    for n, held in ((7, 3), (40, 16), (320, 64)):
        fit, held_out = gaussad.hold_out(range(n), seed=0)
        assert len(held_out) == held and sorted(fit + held_out) == list(range(n))
        assert gaussad.hold_out(range(n), 0) == (fit, held_out) != gaussad.hold_out(range(n), 1)


# ---- Command lines -------------------------------------------------------------------------------

# What tests start as processes of their own imports torch once for all of them.
multiprocessing.set_forkserver_preload(["torchvision.transforms.v2"])


def run(script, *given):
    """Run a script as `python` would, but in this process, as it takes seconds to import torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(HERE / script), *map(str, given)])
        runpy.run_path(str(HERE / script), run_name="__main__")


@pytest.fixture
def cli(capfd):
    """Run a script; its exit code, output and errors."""

    def call(*given):
        with pytest.raises(SystemExit) as stop:
            run(*given)
        return stop.value.code, *capfd.readouterr()

    return call


def assert_one_line(result, message):
    code, _, error = result
    assert code == 2 and error.count("\n") == 1 and re.search(message, error), error


def read_scores(folder):
    """The rows of scores.csv, and of each the anomaly score, the paper's and the map's maximum."""
    with (folder / "scores.csv").open(newline="", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    return rows, np.array([list(row.values())[-3:] for row in rows], float)


def read_json(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The options that name a small data set."""
    root = tmp_path_factory.mktemp("demo")
    train.draw_demo(root, size=64)
    (root / "demo/ground_truth/stain/003_mask.png").unlink()
    return ["--data", str(root), "--category", "demo"]


@pytest.fixture(scope="module")
def trained(demo, tmp_path_factory):
    """A folder where train.py has run, on data without test images."""
    root = tmp_path_factory.mktemp("trained")
    shutil.copytree(Path(demo[1], "demo/train"), root / "data/demo/train")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert train.main(["--data", "data", "--category", "demo", *TINY, "--steps", "3"]) == 0
    return root


@pytest.fixture(scope="module")
def evaluated(trained, demo, tmp_path_factory):
    """What evaluate.py writes, and what the library says of the same images."""
    out, runs = tmp_path_factory.mktemp("evaluated"), trained / "runs"
    given = ["--model", str(runs), "--out", str(out), "--pictures", "--false-alarms", "0.1"]
    assert evaluate.main([*demo, *given]) == 0
    rows, found = read_scores(out)
    detector = GaussianAD.load(runs / "demo/detector.pt")
    samples = gaussad.list_samples(demo[1], "demo", "test")
    with torch.no_grad():
        images = gaussad.load_images([sample.path for sample in samples], 64)
        scores, maps = detector.scores_and_maps(images)
    return SimpleNamespace(
        out=out, metrics=read_json(out / "metrics.json"), rows=rows, found=found, samples=samples,
        detector=detector, scores=scores, maps=maps,
        labels=np.array([sample.defect != "good" for sample in samples]),
        masks=torch.stack([evaluate.load(sample, 64, True)[3] for sample in samples]))  # fmt: skip


def test_train_writes_the_detector_that_the_library_makes_and_its_history(trained, demo):
    history = read_json(trained / "runs/demo/history.json")
    content = gaussad.load_plain(trained / "runs/demo/detector.pt")
    assert content["training"].pop("state") is None and content["training"]["finished"]
    assert content["training"].items() <= history.items()
    paths = [sample.path for sample in gaussad.list_samples(demo[1], "demo", "train")]
    fit, held_out = map(torch.stack, gaussad.hold_out(gaussad.load_images(paths, 64)))
    torch.manual_seed(0)
    detector = GaussianAD(FeatureExtractor(BACKBONE, [4, 9], "random"))
    checks = gaussad.fine_tune(detector, DataLoader(fit, 16, shuffle=True), held_out, steps=3)
    for check, written in zip(checks, history["checks"], strict=True):
        for key in ("step", "loss", "kept"):
            assert getattr(check, key) == written[key]
        assert check.validation.separation == written["separation"]
        if check.kept:
            step, best = check.step, deepcopy(detector.state_dict())
    assert history["best_step"] == step and best.keys() == content["state"].keys()
    assert all(torch.equal(best[key], content["state"][key]) for key in best)


def test_evaluate_writes_scores_verdicts_and_what_thresholds_give(evaluated):
    e = evaluated
    expected = [e.detector.anomaly_score(e.scores, e.maps), e.scores, e.maps.amax((1, 2))]
    assert relative(e.found, torch.stack(expected, 1)) < 1e-5
    assert [row["path"] for row in e.rows] == [sample.path.as_posix() for sample in e.samples]
    assert [row["label"] == "1" for row in e.rows] == e.labels.tolist()
    for rate, judged in [*e.metrics["at_false_alarms"].items(), (0.1, e.metrics)]:
        above = e.found[:, 0] > e.detector.threshold(float(rate))
        assert judged["false_alarm_rate"] == above[~e.labels].mean()
        assert judged["miss_rate"] == (~above)[e.labels].mean()
        hits = (above & e.labels).sum()
        assert judged["f1"] == pytest.approx(2 * hits / (above.sum() + e.labels.sum()))
    assert [row["verdict"] == "anomalous" for row in e.rows] == above.tolist()


def test_aurocs_of_evaluate_are_scikit_learns(evaluated):
    auroc, e = pytest.importorskip("sklearn.metrics").roc_auc_score, evaluated
    keys = ("image_auroc_both", "image_auroc", "image_auroc_from_map")
    for key, values in zip(keys, e.found.T):
        assert e.metrics[key] == pytest.approx(auroc(e.labels, values), abs=1e-12)
    for defect, value in e.metrics["image_auroc_per_defect"].items():
        chosen = np.array([sample.defect in ("good", defect) for sample in e.samples])
        expected = auroc(e.labels[chosen], e.found[chosen, 0])
        assert value == pytest.approx(expected, abs=1e-12)
    known = [i for i, sample in enumerate(e.samples) if sample.mask or sample.defect == "good"]
    maps, masks = e.maps[known], e.masks[known]
    expected = auroc(masks.flatten(), maps.flatten())
    assert len(known) == 39 and e.metrics["pixel_auroc"] == pytest.approx(expected, abs=1e-6)
    assert e.metrics["aupro"] == pytest.approx(gaussad.aupro(maps, masks), abs=1e-4)


def test_report_and_pictures_show_the_figures_and_the_regions_true_and_predicted(evaluated):
    e, folder = evaluated, evaluated.out / "pictures"
    page = (e.out / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"http|<script|<link|src=\"(?!data:)", page)  # needs no other file
    assert all(f"{e.metrics[key]:.3f}\n" in page for key in evaluate.RESULTS)
    wrong = [(row["verdict"], row["label"]) for row in e.rows]
    counts = wrong.count(("normal", "1")), wrong.count(("anomalous", "0")), 24, 16
    assert page.count("<img ") == sum(min(evaluate.SHOWN, count) for count in counts)
    assert len(os.listdir(folder)) == 40
    i = max(range(16, 40), key=lambda i: e.maps[i].max())  # the first 16 are normal
    name = f"{i + 1:03d}_{e.samples[i].defect}_{e.samples[i].path.name}"
    picture = np.asarray(Image.open(folder / name))
    plain, painted = picture[:, :64], picture[:, 64:]
    assert (plain == np.asarray(Image.open(e.samples[i].path).convert("RGB"))).all()
    predicted = e.maps[i] > e.detector.map_threshold(0.1)
    for colour, region in ((evaluate.GREEN, e.masks[i]), (evaluate.BLUE, predicted)):
        outline = (painted == colour).all(-1)
        assert outline.any() and not (outline & ~region.numpy()).any()


def run_until_killed(*given):
    """A run of train.py that is killed after its second check is written."""

    def killed(*arguments, whole=gaussad.fine_tune):
        for check in whole(*arguments):
            if check.step > 2:
                os.kill(os.getpid(), signal.SIGKILL)
            yield check

    gaussad.fine_tune = killed
    run("train.py", *given)


def test_run_that_is_killed_goes_on_to_the_same_bits(trained, demo, cli, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    given = ["--data", trained / "data", *demo[2:], *TINY, "--steps", 3, "--out", tmp_path]
    process = multiprocessing.get_context("forkserver").Process(target=run_until_killed, args=given)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    before = gaussad.load_plain(tmp_path / "detector.pt")["training"]["checks"]
    code, output, error = cli("evaluate.py", *demo, "--out", tmp_path)
    assert code == 0 and "is not finished" in output, error
    with (tmp_path / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert_one_line(cli("train.py", *given), "another train.py is at work in")
    (tmp_path / ".detector.pt.part").touch()  # of a kill at another moment
    code, output, _ = cli("train.py", *given)
    assert code == 0 and re.findall(r"(?m)^ +(\d+) ", output) == ["0", "2", "3"]
    a, b = (gaussad.load_plain(path / "detector.pt") for path in (trained / "runs/demo", tmp_path))
    assert all(torch.equal(a["state"][key], b["state"][key]) for key in a["state"])
    assert b["training"]["checks"][: len(before)] == before  # their seconds, too
    for check in a["training"]["checks"] + b["training"]["checks"]:
        del check["seconds"]
    assert a["training"] == b["training"]


def test_finished_run_is_left_alone_and_every_other_setting_is_another_run(demo, cli, tmp_path):
    torch.save(models.get_model(BACKBONE).state_dict(), tmp_path / "a.pth")
    shutil.copy(tmp_path / "a.pth", tmp_path / "b.pth")  # by another name it is the same run
    shutil.copytree(Path(demo[1], "demo/train"), tmp_path / "demo/train")
    given = ["--data", tmp_path, "--category", "demo", *TINY, "--steps", 0, "--out", tmp_path]
    for more, finished in ((["--device", "cpu"], False), (["--device", "auto"], True),
                           (demo[:2], True),  # the same images elsewhere
                           (["--force"], False), (["--weights", tmp_path / "a.pth"], False),
                           (["--weights", tmp_path / "b.pth"], True), (["--seed", 1], False),
                           (["--steps", 2, "--lr", 1e30], False)):  # fmt: skip
        code, output, error = cli("train.py", *given, *more)
        assert code == 0 and ("is finished" in output) == finished, error
    assert "smaller learning rate" in output  # the last has failed after its step 0
    history = read_json(tmp_path / "history.json")
    assert history["finished"] and history["best_step"] == 0
    cli("train.py", *given)
    draw(tmp_path / "demo/train/good/000.png", 9)  # another photo in place of one
    assert "is finished" not in cli("train.py", *given)[1]


def test_several_categories_shared_by_torchrun_are_tabulated_though_one_fails(demo, cli, tmp_path):
    (tmp_path / "data/empty/train/good").mkdir(parents=True)
    for name in ("disc", "plate"):
        shutil.copytree(Path(demo[1], "demo"), tmp_path / "data" / name)
    for lacking in ("test/good", "test/stain", "ground_truth"):
        shutil.rmtree(tmp_path / "data/disc" / lacking)
    draw(tmp_path / "data/disc/ground_truth/scratch/003_mask.png", 0)
    given = ["--data", str(tmp_path / "data"), "--category", "all", "--out", str(tmp_path)]
    launch = LaunchConfig(1, 1, 2, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
                          start_method="forkserver", max_restarts=0)  # fmt: skip
    with pytest.raises(ChildFailedError) as failed:  # once the other one is done
        elastic_launch(launch, run)("train.py", *given, *TINY, "--steps", "2")
    assert {rank: failure.exitcode for rank, failure in failed.value.failures.items()} == {1: 2}
    code, _, error = cli("evaluate.py", *given)
    assert code == 2 and "empty: no detector at" in error
    disc, plate = (read_json(tmp_path / name / "metrics.json") for name in ("disc", "plate"))
    assert disc["image_auroc_both"] is disc["pixel_auroc"] is disc["false_alarm_rate"] is None
    assert disc["n_without_mask"] == 16 and plate["n_without_mask"] == 1
    _, mean, error = read_json(tmp_path / "results.json").values()
    assert mean["aupro"] == plate["aupro"] and error["aupro"] is None
    values = [disc["miss_rate"], plate["miss_rate"]]
    assert mean["miss_rate"] == pytest.approx(np.mean(values))
    assert error["miss_rate"] == pytest.approx(np.std(values, ddof=1) / np.sqrt(2))
    rows = list(csv.reader((tmp_path / "results.csv").read_text().splitlines()))
    assert [row[0] for row in rows[1:]] == ["disc", "plate", "mean", "standard_error"]
    assert float(rows[2][1]) == plate[rows[0][1]]


def test_own_images_by_any_name_are_trained_on_and_scored_but_for_one(demo, cli, tmp_path):
    images, stain = tmp_path / "images", Path(demo[1], "demo/test/stain/000.png")
    shutil.copytree(Path(demo[1], "demo/train/good"), images)
    names = ["new\nline größe 寸法.png", "not_text_\udcff.png", "UPPER.PNG", f"{240 * 'n'}.png"]
    for i, name in enumerate(names):
        draw(images / name, i)
    draw(images / "copy.png", 0)
    (images / "dangling.png").symlink_to("nowhere")
    (images / "._003.png").write_text("not an image")
    names += ["copy.png", *(f"{i:03d}.png" for i in range(48)), stain.name]
    given = ["train.py", "--normal", images, "--out", tmp_path, *TINY, "--steps", 0]
    with pytest.warns(UserWarning, match="1 of 53 normal images are copies"):
        assert cli(*given)[0] == 0
    assert_one_line(cli("train.py", "--normal", demo[1], "--out", tmp_path), "of a data set give")
    (images / "br\noken_\udcff.png").touch()
    assert_one_line(cli(*given), "cannot read the image .*br oken_")
    given = ["evaluate.py", "--model", tmp_path / "detector.pt", "--images"]
    result = cli(*given, images, stain, "--pictures")
    assert_one_line(result, "cannot read the image .*br oken_")
    rows, found = read_scores(tmp_path / "scored")
    assert sorted(Path(row["path"]).name for row in rows) == sorted(names)
    assert len(os.listdir(tmp_path / "scored/pictures")) == len(names)
    assert re.search(rf"{found[-1, 0]:.2f} +{rows[-1]['verdict']} +{stain}\n", result[1])
    cli(*given, images / "br\noken_\udcff.png")
    assert len(read_scores(tmp_path / "scored")[0]) == len(names)  # and not lost


def test_demo_ends_in_a_detector_better_than_chance(tmp_path):
    given = ["--demo", "--image-size", "64", "--steps", "0"]
    assert train.main([*given, "--out", str(tmp_path)]) == 0
    assert read_json(tmp_path / "metrics.json")["image_auroc_both"] > 0.7


@pytest.fixture(scope="module")
def broken(demo, tmp_path_factory):
    """A folder of what can be wrong with data, weights and runs."""
    root = tmp_path_factory.mktemp("broken")
    (root / "empty/train/good").mkdir(parents=True)
    shutil.copytree(Path(demo[1], "demo/train"), root / "truncated/train")
    os.truncate(root / "truncated/train/good/003.png", 200)
    torch.save(models.get_model(BACKBONE).state_dict(), root / "weights.pth")
    (root / "file").write_text("of text")
    for name in ("file", "weights.pth"):
        (root / "runs" / name).mkdir(parents=True)
        shutil.copy(root / name, root / "runs" / name / "detector.pt")
    return root


@pytest.mark.parametrize("given, message", [
    ("train.py --data ROOT/nowhere", "no data set at .*nowhere"),
    ("train.py --category screw", "no category 'screw'.*there are: demo"),
    ("train.py --data ROOT --category empty", "no images at .*empty/train/good"),
    ("train.py --data ROOT --category truncated", "truncated/train/good/003.png"),
    ("train.py --levels 0 3", "the levels 1 to 13"),
    ("train.py --weights ROOT/weights.pth --backbone resnet18", "not hold .* resnet18"),
    ("train.py --out ROOT/file/run", "Not a directory: .*file/run"),
    ("train.py --out ROOT/runs/file", "detector.pt is not a file saved by torch.save"),
    ("train.py --out ROOT/runs/weights.pth", "not of train.py"),
    ("train.py --normal ROOT", "not allowed with argument"),
    ("evaluate.py --model RUN --data ROOT --category empty", "'demo', not of 'empty'"),
    ("evaluate.py --model RUN --data RUN/../../data", "demo/test"),  # what it was trained from
    ("evaluate.py --model RUN --false-alarms 5", "between 0 and 1"),
])  # fmt: skip
def test_bad_input_is_told_in_one_line(given, message, broken, demo, trained, cli, tmp_path):
    given = given.replace("ROOT", str(broken)).replace("RUN", str(trained / "runs/demo"))
    script, *more = given.split()
    options = [*TINY, "--steps", "2", "--out", tmp_path] if script == "train.py" else []
    assert_one_line(cli(script, *demo, *options, *more), message)


def test_error_with_a_line_break_in_a_file_name_is_one_line():
    told = gaussad.error_line(NotADirectoryError(20, "Not a directory", "a\nb"))
    assert told == "Not a directory: a b: check this path, or give another"


def test_full_disk_keeps_what_was_there(trained, demo, cli, tmp_path):
    resource = pytest.importorskip("resource")
    path, before = tmp_path / "detector.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    shutil.copy(trained / "runs/demo/detector.pt", path)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))  # bytes of a file, at most
        for script, more in (("train.py", [*TINY, "--steps", 0]), ("evaluate.py", [])):
            result = cli(script, *demo, "--out", tmp_path, *more)
            assert_one_line(result, f"File too large: {tmp_path}/(detector.pt|scores.csv): check")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == (trained / "runs/demo/detector.pt").read_bytes()
    assert not list(tmp_path.glob(".*.part"))


# ---- The real thing ------------------------------------------------------------------------------

real = pytest.mark.skipif(not {"GAUSSAD_DATA", "GAUSSAD_WEIGHTS"} <= os.environ.keys(),
                          reason="they name no data and weights")  # fmt: skip


@real
@torch.inference_mode()
def test_frozen_mobilenet_on_screw_agrees_with_an_independent_program():
    data, weights = os.environ["GAUSSAD_DATA"], os.environ["GAUSSAD_WEIGHTS"]
    normal = [sample.path for sample in gaussad.list_samples(data, "screw", "train")]
    fit, _ = gaussad.hold_out(normal, 0)
    test = gaussad.list_samples(data, "screw", "test")
    levels = [2, 4, 7, 11, 14, 17, 18, 19]  # what the independent program had
    detector = GaussianAD(FeatureExtractor("mobilenet_v2", levels, weights), [14])
    detector.fit(gaussad.load_images(fit, 320).split(16))
    images = gaussad.load_images([sample.path for sample in test], 320).split(16)
    scores, maps = map(torch.cat, zip(*[detector.scores_and_maps(batch) for batch in images]))
    found = gaussad.auroc(scores, torch.tensor([s.defect != "good" for s in test]))
    assert 100 * found == pytest.approx(77.5, abs=2)
    masks = torch.stack([evaluate.load(sample, 320, True)[3] for sample in test])
    assert 100 * gaussad.auroc(maps, masks) == pytest.approx(98.5, abs=0.5)
    assert 100 * gaussad.aupro(maps, masks) == pytest.approx(93.7, abs=1)


@real
@torch.inference_mode()
def test_efficientnet_lite0_on_transistor_through_ones_own_network(monkeypatch):
    shared = Path(os.environ["GAUSSAD_WEIGHTS"]).parent.parent
    monkeypatch.syspath_prepend(shared / "tools")
    lite = pytest.importorskip("efficientnet_lite")
    extractor = FeatureExtractor(list(lite.lite0().features), mean=lite.MEAN, std=lite.STD)
    assert extractor.levels == [5, 6, 7, 8, 9]
    normal, test = (gaussad.list_samples(os.environ["GAUSSAD_DATA"], "transistor", split)
                    for split in ("train", "test"))  # fmt: skip
    fit, held_out = gaussad.hold_out(gaussad.load_images([s.path for s in normal], 256))
    detector = GaussianAD(extractor)
    detector.fit_and_calibrate(torch.stack(fit).split(16), torch.stack(held_out))
    images = gaussad.load_images([sample.path for sample in test], 256).split(16)
    found = [detector.scores_and_maps(batch) for batch in images]
    labels = torch.tensor([sample.defect != "good" for sample in test])
    pooled = gaussad.auroc(torch.cat([scores for scores, _ in found]), labels)
    both = gaussad.auroc(torch.cat([detector.anomaly_score(*pair) for pair in found]), labels)
    assert 100 * pooled == pytest.approx(97.2, abs=1) and both > 0.99
