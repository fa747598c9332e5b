"""Pseudo-labels end to end: the command runs the rounds, validation never meets one, and a switch that is off changes nothing."""
import json

import pandas as pd
import pytest
from conftest import segnb, settings

from segnb.pipeline import Run
from segnb.pseudo import PseudoLabels

ONE_FOLD = settings(**{"folds.use": "[0]", "train.epochs": 2})


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
