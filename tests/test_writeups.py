"""What the five write-ups trained with, as written: on drawn data with small images for every change, on the real pictures in their own size by `make test-full`."""
import math

import pytest
import torch
from conftest import REAL

from segnb.files import read_json
from segnb.pipeline import open_run
from segnb.predict import Predictor
from segnb.recipe import load_recipe
from segnb.sample import draw_sample
from segnb.train import fit_fold, fold_rows, load_fold

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
