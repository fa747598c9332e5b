"""Pseudo-labels end to end: the command runs the rounds, validation never meets one, and a switch that is off changes nothing."""
import json

import pandas as pd
import pytest
from conftest import segnb, settings

from segnb.files import SegnbError, sha256_file
from segnb.pipeline import Run, open_run, read_manifest
from segnb.pseudo import PseudoLabels
from segnb.sample import draw_sample
from segnb.train import Fit, fit_fold, learn_labels

ONE_FOLD = settings(**{"folds.use": "[0]", "train.epochs": 2})


def test_a_fit_its_labels_and_a_fit_with_them(tmp_path):
    "Images that validate are in neither fit; asked again nothing is done again; without rounds the labels and what is said of them are gone"
    root = draw_sample("demo", tmp_path / "demo", train=6, test=3, size=64)
    small = {"data.root": root, "name": "proof", "folds.n": 2, "models": [{"name": "tiny", "arch": "Unet", "encoder": "mobilenet_v2"}], "encoder_weights": None,
             "train": {"epochs": 1, "batch_size": 4, "workers": 0, "precision": "fp32", "memory_format": "contiguous"},
             "augment": {"preset": "none", "size": 64}, "pseudo": {"rounds": 1, "confidence": 0.51, "ratio": 0.5}}
    run, folder = open_run("demo", tmp_path / "run", small), tmp_path / "run/models/tiny/fold0"
    run.need("train")
    first, fit = fit_fold(run, "tiny", 0), Fit(run, "tiny", 0)
    learn_labels(fit)
    dataset = fit.dataset(fit.plan(fit.entry))
    seen = {dataset.pick(epoch, place)[0] for epoch in range(4) for place in range(len(dataset))}
    assert first["pseudo_images"] == len(fit.labels) > 0 and not {*fit.valid_rows} & seen
    assert dataset.augment.transforms[0].frame.ignore_index == 255            # no crop is aimed at what nobody knows
    assert seen == {*fit.train_rows} | {len(run.samples()) + k for k in range(len(fit.labels))}

    before = sha256_file(folder / "best.safetensors")
    assert fit_fold(run, "tiny", 0) == first                                  # all of it is there
    for name in ("fit.json", "last.ckpt"): (folder / name).unlink()           # as if killed in the last round …
    (folder / ".pseudo1-x.part").mkdir()                                      # … while it made labels
    fit_fold(run, "tiny", 0)
    assert sha256_file(folder / "best.safetensors") == before and not (folder / ".pseudo1-x.part").exists()
    known = open_run("demo", tmp_path / "run", {**small, "pseudo": {"rounds": 1, "folders": [str(root / "train_img")]}})
    with pytest.raises(SegnbError, match="is the training image train_img/"):  # the fold that validates on it would learn it
        fit_fold(known, "tiny", 0)
    off = open_run("demo", tmp_path / "run", {**small, "pseudo": {"rounds": 0}})
    fit_fold(off, "tiny", 0)
    assert [p.name for p in folder.iterdir() if p.is_dir()] == [] and "pseudo" not in read_manifest(off.folder)


@pytest.mark.full   # two fits and all stages: for `make test-full`
def test_a_run_with_rounds(tiny, tmp_path):
    out = tmp_path / "run"
    segnb("run", *tiny, *ONE_FOLD, *settings(**{"pseudo.rounds": 1, "pseudo.confidence": 0.51, "pseudo.ratio": 0.5}), "--out", out)
    segnb("validate", out / "recipe.yaml", out / "submission.csv")

    run, folder = Run(out), out / "models/small/fold0"
    origin, labels = json.loads((out / "manifest.json").read_text())["pseudo"]["small fold 0"]["round 1"], PseudoLabels(folder / "pseudo1")
    teacher, pupil = (json.loads((folder / part / "fit.json").read_text()) for part in ("round0", "."))
    assert (teacher["pseudo_images"], pupil["pseudo_images"]) == (0, len(labels)) and len(labels) > 0
    assert pupil["train_images"] == 2 * teacher["train_images"] and pupil["valid_images"] == teacher["valid_images"]
    assert origin["images_taken"] == len(labels) and origin["sha256"] == labels.origin["sha256"]
    assert origin["teacher"] == "models/small/fold0/round0/best.safetensors"

    samples = run.samples()
    test_ids = set(samples[samples.split == "test"].image_id)
    assert {row["image_id"] for row in labels.rows} <= test_ids
    folds = pd.read_csv(out / "folds.csv", dtype={"image_id": str})
    assert not test_ids & set(folds.image_id)                                  # what validates is of the table of folds

    again = segnb("run", *tiny, *ONE_FOLD, *settings(**{"pseudo.rounds": 1, "pseudo.confidence": 0.51, "pseudo.ratio": 0.5}), "--out", out).stdout
    assert "train small fold 0: up to date" in again and "submit: up to date" in again
    other = segnb("run", *tiny, *ONE_FOLD, *settings(**{"pseudo.rounds": 1, "pseudo.confidence": 0.6, "pseudo.ratio": 0.5}), "--out", out, "--to", "train").stdout
    assert "train small fold 0: pseudo.confidence changed (0.51 → 0.6)" in other


@pytest.mark.full
def test_off_changes_nothing(tiny, tmp_path):
    segnb("run", *tiny, *ONE_FOLD, "--out", tmp_path / "run", "--to", "train")
    weights = (tmp_path / "run/models/small/fold0/best.safetensors").read_bytes()
    said = segnb("run", *tiny, *ONE_FOLD, *settings(**{"pseudo.confidence": 0.6, "pseudo.ratio": 0.7}), "--out", tmp_path / "run", "--to", "train").stdout
    assert "train small fold 0: up to date" in said and "pseudo" not in json.loads((tmp_path / "run/manifest.json").read_text())
    segnb("run", *tiny, *ONE_FOLD, *settings(**{"pseudo.rounds": 1}), "--out", tmp_path / "run", "--to", "train")
    segnb("run", *tiny, *ONE_FOLD, "--out", tmp_path / "run", "--to", "train")
    assert (tmp_path / "run/models/small/fold0/best.safetensors").read_bytes() == weights    # there and back
    assert [p.name for p in (tmp_path / "run/models/small/fold0").iterdir() if p.is_dir()] == []
