"""What the five write-ups trained with, as written: on drawn data with small images for every change, on the real pictures in their own size by `make test-full`.

And how they put their networks together: each is a recipe of its own, NAME_writeup."""
import math

import numpy as np
import pytest
import torch
from conftest import REAL, TINY, segnb

from segnb import pipeline
from segnb.crf import CRF_PRESETS, crf_options, dense_crf
from segnb.decide import plain_decision
from segnb.ensemble import fits_of
from segnb.files import read_json
from segnb.pipeline import open_run, run_pipeline
from segnb.postprocess import LABEL_RULES
from segnb.predict import Predictor, resize_probs
from segnb.recipe import load_recipe
from segnb.sample import draw_sample
from segnb.submit import read_submission
from segnb.train import fit_fold, fold_rows, load_fold
from segnb.transforms import resize_image

# What a write-up did besides the bundled recipe's own choices, which are those of its main models
WRITEUPS = {
    "satellite": {},
    "satellite_winners": {"models": [{"name": "effv2", "arch": "Unet", "encoder": "tu-tf_efficientnetv2_m"}], "sampling": {"min_share": .05},
                          "mixing": [{"name": "paste", "p": .15, "vflip": .5, "rotate": 180, "area": [.001, .2]}]},
    "trash": {},
    "trash_winners": {"models": [{"name": "hrnet", "arch": "HRNetOCR", "encoder": "tu-hrnet_w48"}, {"name": "upp", "arch": "UnetPlusPlus", "encoder": "efficientnet-b3"}],
                      "loss": {"name": "sum", "terms": [{"name": "ce", "weight": .75}, {"name": "dice", "weight": .25}, {"name": "ssim", "weight": .25}]},
                      "mixing": [{"name": "paste", "p": .15, "objects": 2, "scale": [.7, 1.4]}],
                      "optim.schedule": {"name": "restarts", "period": 10, "warmup": 1, "growth": 1.5, "decay": .8, "final": .01}},
    "trash_fcn": {"models": [{"name": "fcn", "arch": "FCN8s", "encoder": "vgg16", "options": {"hidden_channels": 1024}}], "optim.schedule": {"name": "plateau", "factor": .5, "patience": 3}},
    "indoor": {"loss": {"name": "abl_ce_lovasz"}},
    "indoor_rare": {"loss": {"name": "focal_log_dice", "weights": [10, 1]}, "augment": {"preset": "indoor_rare", "size": 384, "options": {"classes": [5, 6]}}},
    "handbone": {"mixing": [{"name": "mixup", "p": .5, "alpha": .4}]},
    "handbone_deep": {"models": [{"name": "deep", "arch": "UnetPlusPlus", "encoder": "resnet101", "options": {"deep_supervision": True}}],
                      "mixing": [{"name": "cutmix", "p": .5, "alpha": 1.0}]},
    "wildfire": {"models": [{"name": "team", "arch": "Unet", "encoder": "tu-regnetx_002", "options": {
        "decoder_channels": [128, 64, 48, 32], "stem": {"means": True, "nodata": 0, "adapter": [14, 14], "stride": 1}}}], "folds.n": 0},
    "wildfire_folds": {"loss": {"name": "lovasz_hinge", "per_image": True, "activation": "relu"}},
}
SHORT = {"encoder_weights": None, "train.epochs": 1, "train.workers": 0, "track": ["csv"]}


def fit_as_written(name, run):
    "Every model of `run` on its first fold: the loss is a number, the weights moved, and the network predicts an image"
    run.need("train")
    train, _ = fold_rows(run.samples(), run.folds(), 0)
    for model in run.recipe.models:
        fit_fold(run, model.name, 0)
        fit, image = read_json(run.path("models", model.name, "fold0", "fit.json")), run.pack().image(int(train[0]))
        assert fit["steps"] >= 1 and fit["model"]["arch"] == model.arch and fit["model"]["options"] == model.options
        rows = run.path("models", model.name, "fold0", "metrics.csv").read_text().splitlines()
        assert math.isfinite(float(rows[1].split(",")[rows[0].split(",").index("loss")]))
        probs = Predictor(load_fold(run, model.name, 0), run.recipe.predict, task=run.recipe.task, classes=run.recipe.classes)([image])[0]
        assert probs.shape == (run.recipe.n_classes, *image.shape[:2]) and 0 <= probs.min() and probs.max() <= 1 and probs.std() > 0


@pytest.mark.parametrize("writeup", WRITEUPS)
def test_a_write_up_trains_on_drawn_data(writeup, tmp_path):
    name = writeup.split("_")[0]
    draw_sample(name, tmp_path / "data", train=8, test=1, size=128)
    small = {"augment.size": 64, "train.batch_size": 2, "train.precision": "fp32", "train.memory_format": "contiguous", "train.epoch_scale": .5}
    if name == "handbone": small["predict.size"] = 64
    settings = {"folds.n": 2, **WRITEUPS[writeup], **SHORT, **small, "data.root": tmp_path / "data"}
    fit_as_written(writeup, open_run(name, tmp_path / "run", settings))


@pytest.mark.real
@pytest.mark.full
@pytest.mark.parametrize("writeup", WRITEUPS)
def test_a_write_up_trains_on_the_real_pictures(writeup, tmp_path):
    "One short epoch in the write-up's own sizes; the classes are those of the pictures"
    name = writeup.split("_")[0]
    own = load_recipe(name)
    sections = {key: getattr(own, key).model_dump(mode="json") for key in ("loss", "optim", "train")}
    settings = {**sections, "models": [m.model_dump(mode="json", exclude_none=True) for m in own.models], **WRITEUPS[writeup], **SHORT, "train.epoch_scale": .05, "train.precision": "bf16", "train.memory_format": "channels_last"}
    fit_as_written(writeup, open_run(REAL / name / "recipe.yaml", tmp_path / "run", settings))


BONES = [0.9 if bone in ("Trapezoid", "Pisiform") else 0.5 for bone in load_recipe("handbone").classes]
FLIPS = {"hflip": [3], "vflip": [2], "rot180": [2, 3]}
TOGETHER = {"satellite": dict(views=[], weights=[0.7, 0.15, 0.15], thresholds=[0.3], crf={}, folds=5),
            "trash": dict(views=[], weights=[0.5, 0.5], thresholds=[], crf=CRF_PRESETS["trash"], folds=5),
            "indoor": dict(views=["hflip"], weights=[1], thresholds=[], crf={}, folds=5),
            "handbone": dict(views=[], weights=[1], thresholds=BONES, crf={}, folds=5),
            "wildfire": dict(views=["hflip", "vflip", "rot180"], weights=[1], thresholds=[0.5], crf={}, folds=0)}
OTHERS = {"satellite": [dict(weights=[0.15, 0.15, 0.7]), dict(thresholds=[0.5])], "trash": [dict(weights=[1, 0]), dict(crf={})], "indoor": [dict(views=[])],
          "handbone": [dict(thresholds=[0.4 if t == 0.9 else t for t in BONES])], "wildfire": [dict(views=["hflip", "vflip"]), dict(thresholds=[0.3])]}


@pytest.mark.quick
@pytest.mark.parametrize("name", TOGETHER)
def test_a_write_up_is_one_recipe(name):
    recipe, said = load_recipe(f"{name}_writeup"), TOGETHER[name]
    decision, post = plain_decision(recipe), recipe.postprocess
    assert (recipe.predict.tta, list(decision.weights.values()), decision.thresholds, recipe.folds.n) == tuple(said[k] for k in ("views", "weights", "thresholds", "folds"))
    assert (crf_options(post.crf) if post.crf else {}) == said["crf"]
    assert not any(getattr(post, rule) for rule in LABEL_RULES)                 # no rule, stated or to be found
    assert load_recipe(name, {k: v for k, v in recipe.model_dump(mode="json").items() if k in ("name", "predict", "ensemble", "postprocess", "folds")}) == recipe


def by_hand(recipe, nets, image, views, weights, thresholds, crf, folds):
    "The mask of an image (H, W, C), as a script of the team's own would make it; nets: those of each model"
    x, mean = torch.from_numpy(resize_image(image, recipe.predict.size or image.shape[:2]).transpose(2, 0, 1)[None].astype(np.float32)), 0
    for own, weight in zip(nets, weights):
        with torch.no_grad(): logits = [net(x.flip(f)).flip(f) for net in own for f in ([], *(FLIPS[view] for view in views))]
        mean = mean + weight * torch.stack([one.softmax(1) if recipe.task == "multiclass" else one.sigmoid() for one in logits]).mean(0)
    probs = resize_probs(mean, image.shape[:2])[0].numpy()
    if crf: probs = dense_crf(image, probs, **crf)
    if not thresholds: return probs.argmax(0)
    found = probs >= np.array(thresholds)[:, None, None]
    return found.transpose(1, 2, 0) if recipe.task == "multilabel" else found[0]


@pytest.mark.full
@pytest.mark.parametrize("name", TOGETHER)
def test_a_write_up_puts_its_networks_together(name, tmp_path, monkeypatch):
    "Raw files to a valid submission with the masks that the write-up's own numbers give, and none beside them"
    said, size, notebook = TOGETHER[name], 128 if name in ("satellite", "handbone") else 64, pipeline.perform_notebook
    def perform(run, task, show): return fit_fold(run, task.model, task.fold) if task.model else notebook(run, task, show)
    monkeypatch.setattr(pipeline, "perform_notebook", perform)                    # fits in this process: they take seconds, and a notebook as long to start
    data = draw_sample(name, tmp_path / "data", train=12, test=3, size=size)
    models = [{"name": m.name, "arch": arch, "encoder": "mobilenet_v2"} for m, arch in zip(load_recipe(f"{name}_writeup").models, ("Linknet", "FPN", "Unet"))]
    small = {**TINY, "models": models, "data.root": data, "optim.lr": 3e-3, "optim.schedule": {"name": "constant"}, "train.epochs": 4, "encoder_weights": None, "submit.size": 32 if name == "trash" else None}
    if name == "handbone": small |= {"predict.size": 64, "loss": {"name": "bce", "pos_weight": [300.0] * 29}}   # about half sure of all bones
    if name == "trash": small |= {"optim.lr": 1e-6, "train.epochs": 1}            # networks in doubt, so that the CRF has something to say
    if said["folds"] and name != "trash": small |= {"folds.n": 2}                 # trash: ten networks are what it says
    for first, last in (("check", "check"), ("train", "submit")): opened = run_pipeline(f"{name}_writeup", tmp_path / "run", from_stage=first, to_stage=last, overrides=small)
    path = next(opened.folder.glob("submission.[cpz]*"))
    segnb("validate", opened.path("recipe.yaml"), path)
    samples = opened.samples()
    test, masks = samples[samples.split == "test"], read_submission(opened.recipe, path, samples=samples)
    nets, step = [[load_fold(opened, model, k) for k in folds] for model, folds in fits_of(opened).items()], 2 if name == "trash" else 1   # 64 pixels to 32: the nearest ones
    assert sum(map(len, nets)) == {"satellite": 6, "trash": 10, "indoor": 2, "handbone": 2, "wildfire": 1}[name]
    def differing(**other):
        mask = lambda i: by_hand(opened.recipe, nets, opened.pack().image(i), **{**said, **other})[::step, ::step]
        return np.mean([np.mean(mask(i) != masks[test.image_id[i]]) for i in test.index])
    others = [differing(**other) for other in OTHERS[name]]
    assert differing() < 1e-3 and min(others) > 5e-3, (differing(), others)
