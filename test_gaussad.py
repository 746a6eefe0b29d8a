# SPDX-License-Identifier: MIT
"""Every test: the maths against independent references, the command lines by running them.

They run offline on the CPU on drawn data and random weights; with GAUSSAD_DATA (an MVTec AD root
with screw in it) and GAUSSAD_WEIGHTS (a state dict of mobilenet_v2) on the real thing, too."""

import base64
import csv
import io
import json
import os
import re
import runpy
import shutil
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

os.environ["OMP_NUM_THREADS"] = "1"  # networks here are too small to gain by more threads

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import models
from torchvision.transforms.functional import normalize

import evaluate
import gaussad
import train
from gaussad import AugmentationValidator, FeatureExtractor, Gaussian, GaussianAD, fine_tune


@pytest.fixture(autouse=True)
def seeds():  # every test draws the same numbers, whatever ran before it
    torch.manual_seed(0)


def random_images(n, size=32, low=0, high=256):
    return torch.randint(low, high, (n, 3, size, size), dtype=torch.uint8)


def refuses(message, function, *given, error=ValueError, **more):
    with pytest.raises(error, match=message):
        function(*given, **more)


def relative(a, b):
    return np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b))


def own_extractor(levels=(1, 2, 3), map_levels=(2, 3), third=None, **given):
    """A small network of three modules, with batch norm that does something."""
    conv, down = nn.Conv2d(3, 8, 3, 4, padding=1), nn.Conv2d(8, 12, 3, 2, padding=1)
    stages = [nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU())]
    stages += [nn.Sequential(down, nn.BatchNorm2d(12), nn.ReLU()), third or nn.Conv2d(12, 12, 1)]
    for values in nn.ModuleList(stages[:2]).state_dict().values():
        if values.ndim == 1:
            values.uniform_(0.5, 2)
    return FeatureExtractor(stages, levels=levels, map_levels=map_levels, **given)


def same(a, b):
    """Whether two detectors hold the same, to the bit."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def naive_ledoit_wolf(x):
    """Ledoit and Wolf 2004, section 3.2, term by term with an outer product for each sample."""
    n, c = x.shape
    y = x - x.mean(0)
    s = y.T @ y / n
    target = np.trace(s) / c * np.eye(c)
    d2 = ((s - target) ** 2).sum()
    b2 = min(d2, sum(((np.outer(row, row) - s) ** 2).sum() for row in y) / n**2)
    return b2 / d2 * target + (1 - b2 / d2) * s, b2 / d2


def naive_distance(x, covariance):
    """The Mahalanobis distance of samples (..., N, C) to their mean."""
    y = x - x.mean(-2, keepdims=True)
    return np.sqrt(np.einsum("...ni,...ij,...nj->...n", y, np.linalg.inv(covariance), y))


@pytest.mark.parametrize("n, c, condition", [(12, 40, 1), (40, 40, 1e8), (999, 15, 1e8), (6, 2, 1)])
def test_ledoit_wolf_equals_the_paper_and_scikit_learn(n, c, condition):
    rng = np.random.default_rng(0)
    mix, _ = np.linalg.qr(rng.normal(size=(c, c)))
    x = rng.normal(size=(n, c)) * np.geomspace(1, condition**-0.5, c) @ mix
    found = [gaussad.ledoit_wolf(torch.tensor(x + offset)) for offset in (0, 1e4)]
    expected = naive_ledoit_wolf(x)
    for _ in range(2):
        for (covariance, shrinkage), tolerance in zip(found, (1e-10, 1e-9), strict=True):
            assert relative(covariance, expected[0]) < tolerance
            assert abs(shrinkage.item() - expected[1]) < tolerance
        expected = pytest.importorskip("sklearn.covariance").ledoit_wolf(x)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("covariance", ["full", "diagonal", "identity"])
def test_distance_is_mahalanobis_and_its_gradient_zero_at_the_mean(covariance, scale):
    rng = np.random.default_rng(0)
    x = scale * rng.normal(size=(2, 4, 50, 8)) @ rng.normal(size=(8, 8))
    x[..., 2] = 7 * scale  # a feature that does not vary
    sigmas = [naive_ledoit_wolf(y)[0] + 0.1 * scale**2 * np.eye(8) for y in x.reshape(8, 50, 8)]
    if covariance != "full":
        sigmas = [np.diag(np.diag(s)) if covariance == "diagonal" else np.eye(8) for s in sigmas]
    gaussian = Gaussian.fit(torch.tensor(x), 0.1 * scale**2, covariance)
    found = gaussian.distance(torch.tensor(x).movedim(2, 0)).movedim(0, 2)
    assert relative(found, naive_distance(x, np.reshape(sigmas, (2, 4, 8, 8)))) < 1e-9
    at_mean = gaussian.mean.clone()[None].requires_grad_()
    gaussian.distance(at_mean).sum().backward()
    assert not gaussian.distance(at_mean).any() and not at_mean.grad.any()
    for samples in (torch.ones(9, 4), torch.full((9, 4), torch.nan)):
        refuses("do not vary, or are", Gaussian.fit, samples, error=torch.linalg.LinAlgError)


def test_auroc_counts_pairs_with_ties_as_half_and_metrics_refuse_nan_and_one_class():
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 9, 60) / 7, rng.random(60) < 0.3
    pairs = scores[labels][:, None] - scores[~labels]
    expected = ((pairs > 0) + (pairs == 0) / 2).mean()
    assert abs(gaussad.auroc(torch.tensor(scores), torch.tensor(labels)) - expected) < 1e-12
    scores, labels = rng.integers(0, 500, 10**6), rng.random(10**6) < 0.3
    expected = pytest.importorskip("sklearn.metrics").roc_auc_score(labels, scores)
    assert abs(gaussad.auroc(torch.tensor(scores), torch.tensor(labels).int()) - expected) < 1e-12
    nan, x = torch.tensor([[[0, torch.nan]]]), torch.rand(1, 1, 2)
    for scores, labels in ((nan, [[[0, 1]]]), (x, [[[1, 1]]]), (x, [[[0, 0]]]), (x, [[0, 1]])):
        for metric in (gaussad.auroc, gaussad.aupro):
            refuses("^AU.* both classes, and no NaN$", metric, scores, torch.tensor(labels))


def naive_aupro(maps, masks, limit):
    """Every score a threshold, one after the other; trapezoids, the last one cut at the limit."""
    label = pytest.importorskip("scipy.ndimage").label
    numbered = [label(mask, np.ones((3, 3)))[0] for mask in masks]
    regions = [(i, x == k) for i, x in enumerate(numbered) for k in range(1, x.max() + 1)]
    area, x0, y0 = 0.0, 0.0, 0.0
    for threshold in np.unique(maps)[::-1]:
        detected = maps >= threshold
        x = detected[masks == 0].mean()
        y = np.mean([detected[i][region].mean() for i, region in regions])
        if x >= limit:
            y = y0 + (y - y0) * (limit - x0) / (x - x0)
            return (area + (limit - x0) * (y0 + y) / 2) / limit
        area, x0, y0 = area + (x - x0) * (y0 + y) / 2, x, y


@pytest.mark.parametrize("distinct", [1, 5, 10**6])  # of normal scores
@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
def test_aupro_equals_brute_force(distinct, limit):
    rng = np.random.default_rng(0)
    masks = np.zeros((5, 11, 13), bool)
    masks[0, :5, :5] = masks[0, 5:8, 5:9] = True  # they touch by a corner
    masks[1, 4, 4:8:2] = masks[1, 0, 12] = masks[2] = True  # dots; all of a mask
    masks[3] = rng.random((11, 13)) < 0.3
    masks[4, ::2] = masks[4, 1::4, -1] = masks[4, 3::4, 0] = True  # one long serpentine
    maps = (rng.integers(0, distinct, masks.shape) / distinct + 0.3 * masks).clip(max=0.7)
    expected = naive_aupro(maps, masks, limit)
    maps, masks = torch.tensor(maps), torch.tensor(masks)
    assert gaussad.aupro(maps, masks, limit) == pytest.approx(expected, abs=1e-9)
    monotone = maps.exp().where(maps < 0.7, torch.inf)
    assert gaussad.aupro(monotone, masks.int(), limit) == pytest.approx(expected, abs=1e-9)


@torch.no_grad()
@pytest.mark.parametrize(
    "backbone, default, names",
    [
        ("efficientnet_b0", [5, 6, 7, 8, 9], {3: "features.2", 9: "features.8"}),
        ("mobilenet_v2", [11, 14, 17, 18, 19], {4: "features.3", 11: "features.10"}),
        ("resnet18", [4, 5], {1: "maxpool", 2: "layer1", 3: "layer2", 5: "layer4"}),
    ],
)
def test_levels_are_torchvisions_feature_maps(backbone, default, names, tmp_path):
    network, outputs, path = models.get_model(backbone).eval(), [], tmp_path / "weights.pth"
    for values in network.state_dict().values():
        if values.ndim == 1:  # batch norm that does something, as after training
            values.uniform_(0.5, 2)
    for name in names.values():
        network.get_submodule(name).register_forward_hook(lambda *x: outputs.append(x[-1].clone()))
    images = random_images(2)
    network(normalize(images / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    torch.save(network.state_dict(), path)
    found = FeatureExtractor(backbone, path, [*names], [*names][:1])(images)
    for x, y in zip(found, outputs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4 * y.abs().max())
    extractor = FeatureExtractor(backbone, path).train()
    assert not extractor.training and all(p.requires_grad for p in extractor.parameters())
    assert extractor.levels == default and extractor.map_levels == default[: len(default) // 2]
    assert not [m for m in extractor.modules() if isinstance(m, nn.BatchNorm2d)]
    assert FeatureExtractor(backbone, "random")(images)[-1].std(0).mean() > 0.01


@torch.no_grad()
def test_ones_own_network_is_taken_as_it_is_though_it_works_in_place():
    statistics, images = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.3]}, random_images(9)
    extractor = own_extractor([2, 3], [3], nn.Hardswish(inplace=True), **statistics)
    first = nn.Sequential(*extractor.stages[:2])(normalize(images / 255, **statistics))
    expected = [first, nn.functional.hardswish(first)]
    folded = gaussad.fold_batch_norm(deepcopy(extractor))
    assert type(folded.stages[0][1]) is nn.Identity
    for found in (extractor(images), folded(images)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * first.abs().max())
    for levels in ([0, 2], [2, 4], [3, 2], [2, 2], [3]):  # the last one lacks the map's
        refuses(r"must be among \[.*\], ascending, once each", own_extractor, levels, [2])
    for wrong in (images / 255, images[:, :1], images[0]):
        refuses(r"must be uint8 \(B, 3, H, W\)", extractor, wrong)


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path, monkeypatch):
    path, state = tmp_path / "weights.pth", models.get_model("mobilenet_v2").state_dict()
    body, found = {name: x for name, x in state.items() if "classifier" not in name}, []
    given, images = ("mobilenet_v2", path), random_images(1)
    for fitting in (state, body):
        torch.save(fitting, path)
        found.append(FeatureExtractor(*given)(images)[-1])
    assert torch.equal(*found)
    data, (name, first) = path.read_bytes(), next(iter(body.items()))
    wrong = [{name: first}, {**body, name: first[:3]}, {**body, "own.x": first}, [state]]
    for content in [*wrong, b"", b"text", data[:-99]]:
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        refuses("weights.pth is damaged, or .* of mobilenet_v2$", FeatureExtractor, *given)
    refuses("no backbone 'vgg16': names begin with efficientnet_b,", FeatureExtractor, "vgg16")
    monkeypatch.setattr(models, "get_model", lambda *_, **__: os.stat("offline"))  # an OSError
    refuses("download efficientnet_b4 .*offline.*give --weights", FeatureExtractor, error=OSError)


@torch.no_grad()
@pytest.mark.parametrize("device", ["cpu", "cuda"][: 1 + torch.cuda.is_available()])
def test_score_sums_the_levels_and_map_joins_them_at_each_location(device):
    images, detector, score = random_images(24, 64), GaussianAD(own_extractor()), 0
    features = detector.extractor(images)
    for x in features:
        pooled = x.double().numpy().mean((2, 3))
        score += naive_distance(pooled, naive_ledoit_wolf(pooled)[0])
    x = torch.cat(features[1:], 1).double().permute(2, 3, 0, 1).numpy()
    ridge = gaussad.MAP_RIDGE * x.var(2).mean() * np.eye(x.shape[-1])
    distance = naive_distance(x, [[naive_ledoit_wolf(at)[0] + ridge for at in row] for row in x])
    distance = torch.tensor(distance).permute(2, 0, 1).unsqueeze(1)
    expected = nn.functional.interpolate(distance, (64, 64), mode="bilinear")[:, 0]
    detector.to(gaussad.pick_device(device)).fit(images, 7).calibrate(images[:9], 4)
    scores, maps = detector.predict(images)
    assert scores.dtype == torch.float64 and maps.dtype == torch.float32
    assert relative(scores[:, 1].cpu(), score) < 1e-4  # features are float32
    assert relative(maps.cpu(), expected) < 1e-3
    assert torch.equal(scores[:, 2], maps.amax((1, 2)).double())
    assert relative(detector(images).cpu(), score) < 1e-4
    loss = gaussad.mahalanobis_loss(detector.features(images)[0], detector.gaussians).item()
    assert loss == pytest.approx(score.mean(), 1e-4)
    refuses("not of the size fitted to, 64 px square", detector, images[..., :32, :32])


def test_anomaly_score_is_standardised_over_held_out_images_but_for_outliers():
    images, held_out = random_images(52, low=100, high=150).split([40, 12])
    held_out[3] = 0  # a black frame
    held_out[7, :, :4, :4] = 230  # far off in one place, so in the map alone
    detector = GaussianAD(own_extractor()).fit(images).calibrate(held_out, 5)
    ratio = detector.held_out_scores / detector.held_out_scores.median(0).values
    assert torch.equal(detector.outliers(), (ratio > 2.5).any(1))
    assert detector.outliers().nonzero().flatten().tolist() == [3, 7]
    scores, _ = detector.predict(held_out)
    assert relative(scores[:, 1:], detector.held_out_scores) < 1e-6
    usable = scores[~detector.outliers()].numpy()
    z = (scores.numpy() - usable.mean(0)) / usable.std(0, ddof=1)
    assert relative(scores[:, 0], z[:, 1] + z[:, 2]) < 1e-9
    usable = np.sort(usable[:, 0])
    assert detector.threshold(0.25) == pytest.approx(0.75 * usable[7] + 0.25 * usable[8])  # 8.25th
    assert detector.threshold(0.05) == usable[-1]
    assert detector.fit(images[:30]).threshold(0.05) == usable[-1]  # which keeps the calibration
    refuses("^2 held-out images are no outliers: th", detector.calibrate, held_out[[0, 1, 3]])
    refuses("do not differ, or are not finite", detector.calibrate, held_out[[0, 0, 0]])
    detector.map_gaussian.mean[0] = torch.nan
    refuses("do not differ, or are not finite", detector.calibrate, held_out)


def test_detector_is_loaded_to_the_bit_and_no_code_in_its_file_is_run(tmp_path, monkeypatch):
    path, images = tmp_path / "detector.pt", random_images(40)
    detector = GaussianAD(FeatureExtractor("mobilenet_v2", "random", [2, 4], [4]), "diagonal")
    detector.fit(images[:30]).calibrate(images[30:]).save(path)
    before, loaded = torch.get_rng_state(), GaussianAD.load(path)
    assert torch.equal(torch.get_rng_state(), before) and same(detector, loaded)
    assert loaded.covariance == "diagonal" and loaded.image_size == 32
    assert all(p.requires_grad for p in loaded.parameters())  # it can be trained on
    whole, content = path.read_bytes(), torch.load(path, weights_only=True)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(torch, "save", lambda _, x: Path(x).write_bytes(b"half") / 0)  # a full disk
        detector.save(path)
    assert path.read_bytes() == whole
    malicious = type("X", (), {"__reduce__": lambda self: (os.mkdir, (f"{tmp_path}/run",))})()
    for more in ({"network": {}}, {"settings": 3}, {"x": malicious}):
        torch.save({**content, **more}, path)
        refuses("detector.pt is damaged, or is not a detector .*: tr", GaussianAD.load, path)
    assert not (tmp_path / "run").exists()
    own = GaussianAD(own_extractor()).fit(images[:30]).calibrate(images[30:])
    own.save(path)
    other = own_extractor(mean=[0, 0, 0])  # which stays as it is
    assert same(GaussianAD.load(path, extractor=other), own) and not other.mean.any()
    for extractor in (own_extractor([1, 3], [3]), own_extractor([1, 2, 3], [2]), None):
        refuses("detector.pt is damaged, or is not", GaussianAD.load, path, extractor=extractor)


def test_augmentations_change_what_they_say():
    noise = 255 * (random_images(60, 200) > 127).byte()  # which nothing else equals
    mean, other = noise.double().mean((2, 3), keepdim=True).round().byte(), noise.roll(1, 0)
    for augment, filling in ((gaussad.cutout, mean), (gaussad.cutmix, other)):
        found = augment(noise)
        changed = (found != noise).any(1)
        rows, columns = changed.any(2), changed.any(1)
        inside = rows[:, None, :, None] & columns[:, None, None]
        assert torch.equal(found, torch.where(inside, filling, noise))
        cut = rows[:, [0, -1]].any(1) | columns[:, [0, -1]].any(1)  # by the border
        height, width = rows.sum(1)[~cut], columns.sum(1)[~cut]
        area = height * width / 200**2
        assert ((height - width).abs() <= 1).all() and 0.05 < area.max() < 0.107
        assert 0.001 < area.min() < 0.005
    shades = []
    for image, found, colour in zip(noise, gaussad.scar(noise), mean, strict=True):
        points = (image != found).any(0).nonzero()
        shades.append((found[0, *points.T] > 100).all().item())
        assert (found[:, *points.T] == (colour if shades[-1] else colour // 2)[:, 0]).all()
        if points.min() > 0 and points.max() < 199:  # not cut by the border
            length = torch.cdist(points.double(), points.double()).max() / 200
            assert 0.09 < length < 0.36 and 0.007 < len(points) / 200**2 / length < 0.027
    assert 0.2 < np.mean(shades) < 0.8
    found, other = gaussad.mixup(noise).double(), other.double()
    weight = ((found - noise) / (other - noise)).nan_to_num(0).flatten(1).amax(1)
    blend = noise + weight.view(-1, 1, 1, 1) * (other - noise)
    assert (found - blend).abs().max() < 2 and weight.min() < 0.2 and weight.max() > 0.8


def spread(images):  # a score in whole numbers, with ties
    return (images.long().square().sum((1, 2, 3)) // 200_000).double()


def test_validators_values_have_the_auroc_as_mean_and_its_error_is_that_of_a_jackknife():
    images, before, gains = random_images(60, 16), torch.get_rng_state(), 0
    scores = (lambda x: spread(x) + spread(x[:, :1]), spread)
    local = {"cutout": gaussad.cutout, "scar": gaussad.scar}
    validator, again, other = (AugmentationValidator(images, local, 61, x) for x in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    found = [validator(score, batch_size=7) for score in scores]
    for values, score, sign in zip(found, scores, (1, -1), strict=True):
        for row, (name, versions) in zip(values, validator.versions.items(), strict=True):
            assert torch.equal(versions, again.versions[name])
            assert not torch.equal(versions, other.versions[name])
            owner = (images != versions[:, None]).flatten(2).sum(2).argmin(1).numpy()
            assert (np.bincount(owner) == 2 * 3).all()  # each shares most pixels with its image
            pairs = score(versions).numpy() - score(images).numpy()[:, None]
            C = (pairs > 0) + (pairs == 0) / 2
            assert (C == 0.5).any() and row.mean().item() == pytest.approx(C.mean(), abs=1e-9)
            without = [C[np.arange(60) != i][:, owner != i].mean() for i in (None, *range(60))]
            gains = gains + sign * np.array(without) / 2
    gain = (found[0] - found[1]).mean(0)
    assert gain.mean().item() == pytest.approx(gains[0], abs=1e-9)
    assert gain.std().item() / 60**0.5 == pytest.approx(np.sqrt(59 * np.var(gains[1:])), rel=0.1)
    [dimmed] = AugmentationValidator(images, {"dim": lambda x: x // 4}, 60).versions.values()
    blends = [images + x * (images // 4 - images.double()) for x in (1, 0.5, 0.25)]
    assert (dimmed - torch.cat(blends)).abs().max() <= 0.5


def test_steps_are_adams_on_the_mean_score_by_the_pretrained_gaussians(monkeypatch):
    monkeypatch.setattr(gaussad, "FIRST_CHECK", 2)
    images, seen, detector = random_images(30), [], GaussianAD(own_extractor())
    reference, before = deepcopy(detector).fit(images[:20]), torch.get_rng_state()
    given = {"lr": 2e-3, "batch_size": 8, "on_step": lambda *x: seen.append(x), "seed": 3}
    checks = list(fine_tune(detector, images[:20], images[20:], 4, **given))
    assert torch.equal(torch.get_rng_state(), before)
    order, losses = torch.Generator().manual_seed(3), []
    epochs = [torch.randperm(20, generator=order).split(8) for _ in range(2)]
    weights = list(reference.extractor.parameters())
    moments = [(torch.zeros_like(w), torch.zeros_like(w)) for w in weights]
    for t, indices in enumerate([*epochs[0], *epochs[1]][:4], start=1):
        loss = reference(images[indices]).mean()  # the Gaussians are those of the start
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, weights)
        for w, g, (m, v) in zip(weights, gradients, moments, strict=True):
            m += 0.1 * (g - m)
            v += 0.001 * (g**2 - v)
            w.data -= 2e-3 * m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    assert [step for step, _ in seen] == [1, 2, 3, 4] and checks[0].loss is None
    assert [loss for _, loss in seen] == pytest.approx(losses, rel=1e-4)
    assert [check.step for check in checks] == [0, 2, 4]
    assert checks[2].loss == pytest.approx(np.mean(losses[2:]), rel=1e-4)
    values = AugmentationValidator(images[20:], seed=3)(reference.fit(images[:20]))
    found = list(checks[2].aurocs.values())  # of Gaussians fitted to the features after step 4
    assert found == pytest.approx(values.mean(1).tolist(), abs=3 / 640)


# Values of the validator. The first gain is its standard error, 1/8, to the bit: it is not kept.
EVEN = torch.tensor([0, 0, 0, 0.5])
VALUES = [torch.zeros(4), EVEN, torch.full((4,), 0.25), 0.25 + EVEN, torch.full((4,), -1.0)]


def test_detector_is_that_of_the_last_check_kept_fitted_to_all_but_outliers(monkeypatch):
    images, judged, found = random_images(24, low=100, high=150), [], []
    normal, held_out, detector = images[:20], images[20:], GaussianAD(own_extractor())
    held_out[1] = 0  # a black frame
    usable, values = held_out[[0, 2, 3]], iter(VALUES)

    def validate(_, score, batch_size):
        judged.append(deepcopy(score))
        return next(values).expand(3, 4)

    monkeypatch.setattr(AugmentationValidator, "__call__", validate)
    for check in fine_tune(detector, normal, held_out, 999, 1e-3, patience=2):
        found.append((check.step, check.kept, check.gain, check.standard_error))
        expected = GaussianAD(deepcopy(judged[-1].extractor)).fit(normal)
        assert relative(judged[-1](usable).detach(), expected(usable).detach()) < 1e-6
        if check.kept:
            expected.calibrate(held_out).fit(torch.cat([normal, usable]))
            assert relative(detector.held_out_scores, expected.held_out_scores) < 1e-6
            assert detector.outliers().tolist() == [False, True, False, False]
            for x, y in zip(detector.predict(images), expected.predict(images), strict=True):
                assert relative(x, y) < 1e-6
            last = deepcopy(detector)
        assert same(detector, last)
    assert found[:3] == [(0, True, None, None), (32, False, 1 / 8, 1 / 8), (64, True, 1 / 4, 0)]
    assert found[3:] == [(128, False, 1 / 8, 1 / 8), (256, False, -1.25, 0)]


PICTURE = Image.fromarray((np.indices((40, 60)).sum(0) * 255 // 98).astype(np.uint8))
# RGB of 16 bits, which Pillow reads but cannot write.
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABEAIAAADA54+dAAAADElEQVR42mNg/g+CAAkiAwdf4EfLAAAAAElFTkSuQmCC"


def draw(path, value=255):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (64, 64), value).save(path)
    return path


def test_images_and_masks_of_the_contract_are_read_and_others_are_refused_by_name(tmp_path):
    turned, exif = PICTURE.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6
    turned.save(draw(tmp_path / "deeper/turned.png"), exif=exif)
    for name in ("L.bmp", "L.TIFF", "RGB.jpg", "RGB.webp", "P.png", "RGBA.png", "LA.png"):
        image = PICTURE.convert(name.split(".")[0])
        if image.mode[-1] == "A":
            image.putalpha(0)  # the colours count
        image.save(tmp_path / name, quality=100)
    paths = gaussad.list_images([tmp_path, tmp_path / "L.bmp"])
    assert paths == [*gaussad.list_images(str(tmp_path)), tmp_path / "L.bmp"] and len(paths) == 9
    expected = torch.tensor(np.array(PICTURE.resize((32, 32), Image.Resampling.BILINEAR))).int()
    for path, found in zip(paths, gaussad.load_images(paths, 32), strict=True):
        assert found.dtype == torch.uint8 and (found - expected).abs().max() <= 3, path.name
    contents = [b"text", (tmp_path / "P.png").read_bytes()[:-60], base64.b64decode(PNG)]
    for dtype in (np.uint16, np.int32, np.float32):
        Image.fromarray(np.asarray(PICTURE).astype(dtype)).save(buffer := io.BytesIO(), "TIFF")
        contents.append(buffer.getvalue())
    for content in contents:
        (tmp_path / "a.png").write_bytes(content)
        for load in (gaussad.load_image, gaussad.load_mask):
            refuses("a.png is damaged, or is not an image of at most", load, tmp_path / "a.png", 32)
    for i, mode in enumerate(("1", "L", "RGB", "RGBA")):
        mask, x, y = Image.new("L", (1024, 1024)).convert(mode), 1023 - 300 * i, 311 * i
        mask.putpixel((x, y), (0, 0, 1, 255)[: len(mode)] if i > 1 else 1)
        mask.save(tmp_path / "mask.png")
        found = gaussad.load_mask(tmp_path / "mask.png", 380)
        assert found[y * 380 // 1024, x * 380 // 1024] and found.sum() <= 4
    mask.putpixel((3, 3), (255, 255, 255, 254))
    mask.save(tmp_path / "mask.png")
    refuses("mask.png has transparent pixels", gaussad.load_mask, tmp_path / "mask.png", 9)


def test_samples_are_found_by_the_layout_and_a_fifth_is_held_out(tmp_path):
    part = tmp_path / "part"
    for name in ("good/b.png", "good/a.JPG", "cut/a.1.png", "cut/b.bmp"):
        draw(part / "test" / name)
    for name in ("cut/a.1_mask.png", "cut/b.png", "good/x_mask.png"):
        draw(part / "ground_truth" / name)
    (part / "test/cut/notes.txt").touch()
    found = gaussad.list_samples(tmp_path, "part", "test")
    assert [x.path.name for x in found] == ["a.1.png", "b.bmp", "a.JPG", "b.png"]
    assert [x.defect for x in found] == ["cut", "cut", "good", "good"]
    assert [x.mask for x in found] == [part / "ground_truth/cut/a.1_mask.png", None, None, None]
    for n, held in ((6, 3), (7, 3), (40, 16), (320, 64), (321, 65)):
        fit, held_out = gaussad.hold_out(range(n), seed=0)
        assert len(held_out) == held and sorted(fit + held_out) == list(range(n))
        assert gaussad.hold_out(range(n), 0) == (fit, held_out) != gaussad.hold_out(range(n), 1)
    refuses("there are 5 normal images: at least 6", gaussad.hold_out, range(5))


def call(script, *given):
    """Run a script in this process; its exit code, output and errors."""
    code, out, err = 0, io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", [script.__name__, *map(str, given)])
        try:
            script.main()
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()


def assert_one_line(result, message):
    code, _, error = result
    assert code == 2 and error.count("\n") == 1 and re.search(message, error), error


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read(path):
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return json.loads(text, parse_constant=pytest.fail)
    return list(csv.DictReader(text.splitlines()))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small data set, in which a white frame is held out, and a run on it."""
    t = SimpleNamespace(data=tmp_path_factory.mktemp("data"), runs=tmp_path_factory.mktemp("runs"))
    train.draw_demo(t.data / "part", size=64)
    samples = gaussad.list_samples(t.data, "part", "train")
    draw(gaussad.hold_out([sample.path for sample in samples])[1][3])
    t.tiny = ["--backbone", "mobilenet_v2", "--weights", "random", "--image-size", 64]
    t.tiny += ["--device", "cpu", "--steps", 0]
    t.given = ["--data", t.data, "--category", "part", *t.tiny]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gaussad, "OUTLIER", 1.3)  # random weights tell little
        t.result = call(train, *t.given, "--steps", 2, "--runs", t.runs)
    return t


def test_train_writes_what_the_library_makes_bit_for_bit(trained, monkeypatch):
    monkeypatch.setattr(gaussad, "OUTLIER", 1.3)
    run, samples = trained.runs / "part", gaussad.list_samples(trained.data, "part", "train")
    fit, held_out = gaussad.hold_out([sample.path for sample in samples])
    images = gaussad.load_images(fit, 64), gaussad.load_images(held_out, 64)
    torch.manual_seed(0)
    detector = GaussianAD(FeatureExtractor("mobilenet_v2", "random"))
    checks = list(fine_tune(detector, *images, steps=2))
    assert same(GaussianAD.load(run / "detector.pt"), detector)
    assert sorted(os.listdir(run)) == ["detector.pt", "training.json"]
    record, (code, output, error) = read(run / "training.json"), trained.result
    assert record["checks"] == [check._asdict() for check in checks] and record["finished"]
    assert record["device"] == "cpu" and record["arguments"]["image_size"] == 64
    assert (code, error) == (0, "")  # progress is for terminals
    assert output.startswith("part: 32 images to fit, 16 held out, on cpu\n")
    assert re.findall("(.*) scores far above", output) == [str(held_out[3])]
    assert f"--data {trained.data} --category part --runs {run.parent}\n" in output


def test_finished_run_is_left_alone_and_a_new_one_keeps_no_old_result(trained, tmp_path):
    runs = shutil.copytree(trained.runs, tmp_path / "runs")
    run, given = runs / "part", [train, *trained.given, "--runs", runs]
    record, detector = run / "training.json", run / "detector.pt"
    for name in ("scores.csv", "metrics.json", "report.html", "pictures/1.png", "../scored/my.txt"):
        draw((run / "results" / name).with_suffix(".png")).rename(run / "results" / name)
    (runs / "results.csv").touch()
    before = contents(runs)
    assert_one_line(call(*given), "error: part: .*/part is finished: --force trains it anew")
    assert f"{run} is finished and skipped; --force" in call(*given, "--category", "all")[1]
    for option, value in (("lr", -1), ("weights", "x.pth"), ("backbone", "x"), ("category", "x")):
        assert_one_line(call(*given, "--force", f"--{option}", value), "py: error: (part|x): ")
    assert_one_line(call(*given, "--device", "cuda"), "^train.py: error: torch sees no CUDA device")
    assert contents(runs) == before
    record.write_text(record.read_text().replace('"finished": true', '"finished": false'))
    assert call(*given)[0] == 0 and read(record)["finished"]
    assert contents(runs).keys() == {record, detector, run / "scored/my.txt"}
    detector.unlink()
    assert call(*given)[0] == 0 and detector.exists() and not (run / "results").exists()
    record.unlink()
    assert_one_line(call(*given), "is finished: --force")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gaussad, "mahalanobis_loss", lambda *_: signal.raise_signal(signal.SIGINT))
        assert call(*given, "--force", "--steps", "1")[0] == 130
    assert detector.exists() and not train.is_finished(run)
    given = ["--data", trained.data, "--category", "part", "--runs", runs]
    assert "part: training is not finished" in call(evaluate, *given)[1]
    detector.write_bytes(b"")
    assert_one_line(call(evaluate, *given), "part: .*/detector.pt is damaged, .*: train it anew")


def test_evaluate_writes_figures_and_a_report_of_scores_and_maps(trained, tmp_path):
    root, runs = tmp_path / "data", shutil.copytree(trained.runs, tmp_path / "runs")
    part, out = shutil.copytree(trained.data, root) / "part", runs / "part/results"
    (part / "ground_truth/no_hole/003_mask.png").unlink()
    draw(part / "ground_truth/stain/001_mask.png", 0)
    shutil.copy(part / "train/good/000.png", part / "test/good/005.png")
    draw(out / "pictures/of_before.png")
    given = ["--data", root, "--category", "part", "--runs", runs, "--pictures"]
    code, output, error = call(evaluate, *given, "--false-alarms", 0.2, "--batch-size", 7)
    assert (code, error, len(os.listdir(out / "pictures"))) == (0, "", 48)
    detector = GaussianAD.load(runs / "part/detector.pt")
    samples = gaussad.list_samples(root, "part", "test")
    scores, maps = detector.predict(gaussad.load_images([sample.path for sample in samples], 64))
    masks = torch.stack([gaussad.load_mask(sample.mask, 64) for sample in samples])
    kinds, threshold = np.array([sample.defect for sample in samples]), detector.threshold(0.2)
    rows = read(out / "scores.csv")
    found = torch.tensor([[float(x) for x in list(row.values())[3:]] for row in rows])
    assert relative(found, scores) < 1e-6
    bad, above = torch.tensor(kinds != "good"), scores[:, 0] > threshold
    verdicts = np.where(above, "anomalous", "normal")
    expected = [(str(x.path), x.defect, y) for x, y in zip(samples, verdicts, strict=True)]
    assert [(row["path"], row["defect"], row["verdict"]) for row in rows] == expected
    metrics, known = read(out / "metrics.json"), ~bad | masks.flatten(1).any(1)
    stain = torch.tensor(kinds == "stain")
    area = gaussad.auroc(scores[stain | ~bad, 0], stain[stain | ~bad])
    expected = {"images": 12, "found": above[stain].sum().item(), "auroc": area}
    assert metrics.pop("per_defect")["stain"] == pytest.approx(expected)
    values = [gaussad.auroc(x, bad) for x in scores.T]
    values += [metric(maps[known], masks[known]) for metric in (gaussad.auroc, gaussad.aupro)]
    expected = dict(zip(evaluate.FIGURES, values, strict=True))
    page = (out / "report.html").read_text(encoding="utf-8")
    assert all(f"<b>{metrics[key]:.1%}</b>" in page for key in expected)
    expected |= {"false_alarm_rate": above[~bad].double().mean().item(), "threshold": threshold}
    expected["miss_rate"] = (~above[bad]).double().mean().item()
    assert metrics == pytest.approx(expected, abs=1e-4)
    words = f"{above[bad].sum()} of 36 defective images found, {above[~bad].sum()} of 12 good ones"
    assert words in output and words in page and "1 test images are in train/good, too" in output
    assert known.sum() == 46 and "2 defective images have no mask" in output
    assert not re.search(r"http|<script|<link|src='(?!data:)", page)
    order, shown = scores[:, 0].argsort(descending=True), []
    for chosen in (bad & ~above, ~bad & above, bad & above, ~bad & ~above):
        ranked = [f"{kinds[i]}/{samples[i].path.name}" for i in order if chosen[i]]
        shown += ranked[:6] if shown else ranked[:-7:-1]  # misses, worst first
    assert re.findall(r"alt=''>(.*?): ", page) == shown


def test_several_categories_shared_by_torchrun_are_tabulated(trained, tmp_path, monkeypatch):
    for name in "abc":
        shutil.copytree(trained.data / "part", tmp_path / "data" / name)
    shutil.rmtree(tmp_path / "data/a/test/good")
    shutil.rmtree(tmp_path / "data/a/ground_truth")
    runs = tmp_path / "runs"
    given = ["--data", tmp_path / "data", "--category", "all", "--runs", runs]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, categories in (("0", "ac"), ("1", "abc")):
        monkeypatch.setenv("RANK", rank)
        assert call(train, *given, *trained.tiny)[0] == 0
        assert sorted(os.listdir(runs)) == list(categories)
    assert_one_line(call(train, *given, "--data", runs), "error: there is no <category>/train in")
    code, output, _ = call(evaluate, *given)
    metrics = {x: read(runs / x / "results/metrics.json") for x in "abc"}
    assert metrics["a"]["image_auroc_anomaly"] is metrics["a"]["aupro"] is None
    rows = {row["category"]: row for row in read(runs / "results.csv")}
    assert code == 0 and [*rows] == ["a", "b", "c", "mean", "standard_error"]
    known = [metrics[x]["aupro"] for x in "bc"]  # that of a is undefined
    assert float(rows["mean"]["aupro"]) == pytest.approx(np.mean(known))
    assert float(rows["standard_error"]["aupro"]) == pytest.approx(np.std(known, ddof=1) / 2**0.5)
    assert rows["a"]["false_alarm_rate"] == "" and f"{np.mean(known):.1%}" in output
    (runs / "b/detector.pt").unlink()  # the first error ends the program
    assert_one_line(call(evaluate, *given), "error: b: there is no .*: run train.py first")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [str(gaussad.pick_device(x)) for x in ("auto", "cpu")] == ["cuda:3", "cpu"]


def test_own_images_are_scored_but_for_one_that_cannot_be_read(trained, tmp_path):
    photos, out = tmp_path / "photos", trained.runs / "part/scored"
    paths = [draw(photos / f"a b/same{i}.png", 90) for i in range(8)]  # of equal scores
    paths += [Path(shutil.copy(trained.data / "part/test/no_hole/000.png", photos / "ö.png"))]
    given = [evaluate, "--category", "part", "--runs", trained.runs, "--batch-size", 4, "--images"]
    code, output, error = call(*given, photos)
    rows, page = read(out / "scores.csv"), (out / "report.html").read_text(encoding="utf-8")
    assert (code, error) == (0, "") and [row["path"] for row in rows] == list(map(str, paths))
    assert np.ptp([float(row["anomaly_score"]) for row in rows[:8]]) < 1e-4
    n = sum(row["verdict"] == "anomalous" for row in rows)
    for text in (output, page):
        assert f"{n} of 9 images are called anomalous." in text and "AUROC" not in text
    shown = re.findall("alt=''>.*?/(.*?.png): ", page)
    assert len(shown) == len(set(shown)) == min(n, 6) + min(9 - n, 6)
    assert [x for x, y in read(out / "metrics.json").items() if y is not None] == ["threshold"]
    (photos / "broken.png").write_text("text")
    code, output, error = call(*given, photos, photos / "none.png")
    for line in ("broken.png is damaged, .*", ".*none.png'", "evaluate.* 2 of 11 images cannot .*"):
        assert re.search(f"{line}\n", error)  # threads write the first two in any order
    assert (code, error.count("\n")) == (2, 3) and len(read(out / "scores.csv")) == 9


def test_demo_ends_in_a_detector_better_than_chance(tmp_path, monkeypatch):
    given = ["--demo", "--image-size", "64", "--steps", "1", "--runs", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [train.__file__, *given])
    monkeypatch.setattr(sys, "stderr", shown := io.StringIO())
    shown.isatty = lambda: True
    runpy.run_path(train.__file__, run_name="__main__")
    assert read(tmp_path / "demo/results/metrics.json")["image_auroc_anomaly"] > 0.7
    assert re.match(r"step 1, loss [\d.]+\x1b\[K\r.* of 48 images\x1b\[K\r", shown.getvalue())


def test_readme_example_trains_on_a_folder_and_scores_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = Path(train.__file__).with_name("README.md").read_text(encoding="utf-8")
    for a, b in (("512", "2"), ("380", "32"), ('"efficientnet_b4"', '"mobilenet_v2", "random"')):
        text = text.replace(a, b)
    train.draw_demo(tmp_path / "drawn", size=32)
    (tmp_path / "drawn/train").rename(tmp_path / "photos")
    (tmp_path / "drawn/test/stain/000.png").rename(tmp_path / "photos/new.png")
    for example in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(example, names := {})
    assert names["scores"].shape == (1, 3) and names["maps"].shape == (1, 32, 32)


DATA, WEIGHTS = os.environ.get("GAUSSAD_DATA"), os.environ.get("GAUSSAD_WEIGHTS")


@pytest.mark.skipif(not (DATA and WEIGHTS), reason="GAUSSAD_DATA or GAUSSAD_WEIGHTS is not set")
def test_frozen_mobilenet_on_screw_agrees_with_an_independent_program():
    levels = [2, 4, 7, 11, 14, 17, 18, 19]  # what the independent program had
    detector = GaussianAD(FeatureExtractor("mobilenet_v2", WEIGHTS, levels, [14]))
    normal, test = (gaussad.list_samples(DATA, "screw", split) for split in ("train", "test"))
    fit, held_out = gaussad.hold_out([sample.path for sample in normal])
    detector.fit(gaussad.load_images(fit, 320)).calibrate(gaussad.load_images(held_out, 320))
    images = gaussad.load_images([sample.path for sample in test], 320).split(16)
    scores, maps = map(torch.cat, zip(*map(detector.predict, images), strict=True))
    masks = torch.stack([gaussad.load_mask(sample.mask, 320) for sample in test])
    labels = torch.tensor([sample.defect != "good" for sample in test])
    assert 100 * gaussad.auroc(scores[:, 1], labels) == pytest.approx(77.5, abs=2)
    assert 100 * gaussad.auroc(maps, masks) == pytest.approx(98.5, abs=0.5)
    assert 100 * gaussad.aupro(maps, masks) == pytest.approx(93.7, abs=1)
