"""The ensemble on a run folder: who predicts whom, what is kept, and what is read how often. Made-up networks, drawn images."""
import numpy as np
import pytest
import torch
from torch import nn
from segnb import ensemble
from segnb.data import read_samples
from segnb.ensemble import fits_of, out_of_fold, predict_test
from segnb.decide import Decision, plain_decision
from segnb.files import write_bytes, write_json
from segnb.pipeline import open_run, split_folds
from segnb.sample import draw_sample

LEVEL = {("unet", 0): -1.0, ("unet", 1): 0.5, ("fpn", 0): 1.5, ("fpn", 1): 3.0}   # the logit of each fit


class Constant(nn.Module):
    "Says the same of every pixel"
    def __init__(self, level): super().__init__(); self.level = level
    def forward(self, x): return torch.full((len(x), 1, *x.shape[2:]), self.level)


@pytest.fixture
def make_run(tmp_path, monkeypatch):
    data, loaded = draw_sample("demo", tmp_path / "data", train=6, test=5, size=64), []

    def load(run, model, fold):
        loaded.append((model, fold))
        return Constant(LEVEL[model, fold])

    def make(**overrides):
        run = open_run("demo", tmp_path / "run", {"data.root": str(data), "predict.batch_size": 2, "predict.tta": [], **overrides})
        read_samples(run.recipe).to_parquet(run.path("samples.parquet"), index=False)
        split_folds(run)
        for model, folds in fits_of(run).items():
            for k in folds: finish(run, model, k)
        return run

    monkeypatch.setattr(ensemble, "load_fold", load)
    make.loaded = loaded
    return make


def finish(run, model, fold, weights=b"1"):
    "Leave what a finished fit leaves"
    write_json(run.path("models", model, f"fold{fold}", "fit.json"), {"precision": "fp32", "memory_format": "contiguous"})
    write_bytes(run.path("models", model, f"fold{fold}", "best.safetensors"), weights)


def sigmoid(x): return 1 / (1 + np.exp(-x))


def test_each_image_is_predicted_by_the_fold_that_did_not_see_it(make_run):
    oof = out_of_fold(make_run())
    assert len(oof) == 6 and set(oof.folds) == {0, 1}
    for model in ("unet", "fpn"):
        for name, fold in zip(oof.image_ids, oof.folds):
            assert np.abs(oof.stores[model].probs(name) - sigmoid(LEVEL[model, fold])).max() <= 0.5 / 256


def test_only_folds_in_use(make_run):
    run = make_run(**{"folds.use": [1]})
    oof = out_of_fold(run)
    assert set(oof.folds) == {1} and set(make_run.loaded) == {("unet", 1), ("fpn", 1)}
    assert set(oof.image_ids) == set(run.folds().query("fold == 1").image_id)


def test_what_is_stored_is_kept_until_its_checkpoint_changes(make_run):
    run = make_run()
    out_of_fold(run)
    make_run.loaded.clear()
    out_of_fold(run)
    assert make_run.loaded == []
    finish(run, "fpn", 1, b"trained again")
    out_of_fold(run)
    assert make_run.loaded == [("fpn", 0), ("fpn", 1)]


def decision(**changes): return Decision(**{"weights": {"unet": 0.25, "fpn": 0.75}, "thresholds": [0.5], "min_area": 0, "because": {}, **changes})


def test_models_and_folds_are_weighted(make_run):
    run = make_run()
    mean = 0.25 * (sigmoid(-1.0) + sigmoid(0.5)) / 2 + 0.75 * (sigmoid(1.5) + sigmoid(3.0)) / 2
    for threshold, value in ((mean - 1e-4, 1), (mean + 1e-4, 0)):
        masks = predict_test(run, decision(thresholds=[threshold]))
        assert len(masks) == 5 and all((mask == value).all() for mask in masks.values())
    make_run.loaded.clear()
    predict_test(run, decision(weights={"unet": 1.0, "fpn": 0.0}))
    assert {model for model, _ in make_run.loaded} == {"unet"}     # a model of no weight is not even loaded


def test_interrupted_test_prediction_goes_on(make_run, monkeypatch):
    run = make_run()
    whole = dict(predict_test(run, decision(thresholds=[0.7])))
    read, decided = [], ensemble.decided_mask

    def counting(pack, i):
        read.append(i)
        return original(pack, i)

    original = type(run.pack()).image
    monkeypatch.setattr(type(run.pack()), "image", counting)

    def stopping(probs, *rest):
        if len(stopping.done) == 3: raise KeyboardInterrupt
        stopping.done.append(1)
        return decided(probs, *rest)

    stopping.done = []
    monkeypatch.setattr(ensemble, "decided_mask", stopping)
    with pytest.raises(KeyboardInterrupt): predict_test(run, decision(thresholds=[0.71]))
    monkeypatch.setattr(ensemble, "decided_mask", decided)
    read.clear()
    again = predict_test(run, decision(thresholds=[0.71]))
    assert len(read) == len(set(read)) == 2                        # the two that were missing, once each, whatever the number of networks
    assert set(again) == set(whole) and all((again[name] == whole[name]).all() for name in whole)


def test_without_folds(make_run):
    run = make_run(**{"folds.n": 0})
    assert out_of_fold(run) is None
    masks = predict_test(run, plain_decision(run.recipe))
    assert len(masks) == 5 and set(make_run.loaded) == {("unet", 0), ("fpn", 0)}
