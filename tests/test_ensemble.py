"""The ensemble on a run folder: who predicts whom, what is kept, and what is read how often. Made-up networks, drawn images."""
import numpy as np
import pytest
import torch
from torch import nn
from conftest import segnb
from segnb import ensemble
from segnb.data import read_samples
from segnb.combine import choose_weights, vote_shares
from segnb.crf import refined
from segnb.decide import Decision, plain_decision
from segnb.ensemble import ensemble_of, fits_of, out_of_fold, other_folds, predict_test, read_decision, save_decision, with_submissions
from segnb.files import DataError, RecipeError, SegnbError, write_bytes, write_json
from segnb.pipeline import STAGES, Task, changes, open_run, split_folds, task_parts
from segnb.predict import resize_probs
from segnb.sample import draw_sample
from segnb.submit import read_submission, write_submission

LEVEL = {("unet", 0): -1.0, ("unet", 1): 0.5, ("fpn", 0): 1.5, ("fpn", 1): 3.0, ("psp", 0): -2.0, ("psp", 1): -3.0}   # the logit of each fit


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

    def make(folder="run", **overrides):
        run = open_run("demo", tmp_path / folder, {"data.root": str(data), "predict.batch_size": 2, "predict.tta": [], **overrides})
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


def says(model): return np.mean([sigmoid(LEVEL[model, k]) for k in (0, 1)])


def same(masks, value): return len(masks) == 5 and all((mask == value).all() for mask in masks.values())


def test_sixteen_bits_are_stored_and_recorded(make_run):
    run = make_run(**{"ensemble.bits": 16})
    store = out_of_fold(run).stores["fpn"]
    assert store.bits == 16 and store.records.made_from["error"] == store.error == 0.5 / 65536
    levels = {round(float(store.probs(name)[0, 0, 0]), 4) for name in run.folds().image_id}
    assert levels == {round(sigmoid(1.5), 4), round(sigmoid(3.0), 4)} and store.hists(run.folds().image_id).sum() == 6 * 64 * 64
    make_run.loaded.clear()
    assert out_of_fold(make_run(**{"ensemble.bits": 8})).stores["fpn"].bits == 8 and len(make_run.loaded) == 4   # other bits: predicted again


def vote(**thresholds): return {name: {"votes": 1.0, "thresholds": [t]} for name, t in thresholds.items()}


def test_networks_vote_with_their_own_masks(make_run):
    run = make_run()
    low, high = says("unet") - 0.01, says("fpn") + 0.01                    # unet finds everything, fpn nothing
    assert same(predict_test(run, decision(weights=vote(unet=low, fpn=high))), 1)       # a tie: as the first says
    assert same(predict_test(run, decision(weights=vote(fpn=high, unet=low))), 0)
    heavy = {**vote(fpn=high), "unet": {"votes": 2.0, "thresholds": [low]}}
    assert same(predict_test(run, decision(weights=heavy)), 1)
    save_decision(run, decision(weights=heavy))                             # and the loose images of the command line
    image = np.zeros((9, 8, 3), np.uint8)
    assert (ensemble_of(run, read_decision(run), pixels=1)([image])[0] >= 0.5).all()


class Shade(nn.Module):
    "Sees buildings where it is bright, the more the higher its level"
    def __init__(self, level): super().__init__(); self.level = level
    def forward(self, x): return (x[:, :1].float() - 128) / 20 + self.level


def test_a_crf_follows_the_vote_at_the_size_of_the_picture(make_run, monkeypatch):
    monkeypatch.setattr(ensemble, "load_fold", lambda run, model, fold: Shade(LEVEL[model, fold]))
    run, cast = make_run(**{"ensemble.method": "vote", "postprocess.crf": {"steps": 2, "appearance_std": 5}, "submit.size": 20}), vote(unet=.5, fpn=.6)
    masks, samples, moved = predict_test(run, decision(weights=cast)), run.samples(), 0
    for i in samples.index[samples.split == "test"]:
        image = run.pack().image(i)
        ballots = [sum(sigmoid((image[..., 0] - 128.0) / 20 + LEVEL[name, k]) for k in (0, 1)) / 2 >= w["thresholds"][0] for name, w in cast.items()]
        shares = vote_shares(np.stack(ballots)[:, None].astype(np.uint8), [1, 1], None)
        wanted, without = (resize_probs(torch.from_numpy(p)[None], (20, 20))[0, 0].numpy() >= .5 for p in (refined(shares, image, run.recipe), shares))
        assert np.mean(masks[samples.image_id[i]] != wanted) < .005
        moved += np.mean(wanted != without)
    assert moved > .05
    with pytest.raises(RecipeError, match="asks the picture"): predict_test(make_run(**{"ensemble": {"method": "vote", "submissions": {"a": "a.csv"}}, "postprocess.crf": "deeplab", "submit.size": 20}), decision(weights=cast))


def test_what_cannot_join_is_said_before_anything_is_predicted(make_run, tmp_path):
    other = finished(make_run, "other", **{"folds.use": [1]})
    run = make_run(**{"ensemble.runs": [str(other.folder)]})
    make_run.loaded.clear()
    with pytest.raises(DataError, match="no out-of-fold probability"): out_of_fold(run)
    assert make_run.loaded == []


    finished(make_run, "other")
    run = make_run(**{"ensemble": {"method": "weighted", "runs": [str(other.folder)], "weights": {"unet": 1, "fpn": 1, "other/pspp": 1}}})
    make_run.loaded.clear()
    with pytest.raises(RecipeError, match="says nothing of other/psp"): out_of_fold(run)
    run = make_run(**{"ensemble.runs": [str(other.folder)]})
    finish(other, "psp", 1, b"trained again")
    with pytest.raises(SegnbError, match="other/psp was trained again .* finish it first"): out_of_fold(run)
    assert make_run.loaded == []


def test_the_cap_is_that_of_this_run(make_run):
    other = finished(make_run, "other", **{"ensemble.max_ram": 100})
    run = make_run(**{"ensemble.runs": [str(other.folder)], "ensemble.max_ram": 0.25})
    for weights in ({"other/psp": 1.0, "unet": 0.0, "fpn": 0.0}, {"unet": 1.0, "fpn": 0.0}):
        with pytest.raises(RecipeError, match="ensemble.max_ram is 0.25"): ensemble_of(run, decision(weights=weights), pixels=2**26)
    windows = make_run("windows", **{"ensemble.max_ram": 0.25, "predict.window": 64})
    ensemble_of(windows, decision(), pixels=2**26)                            # 0.25 GB: of windows no second copy is made
    with pytest.raises(RecipeError, match="largest image need 0.50 GB"): ensemble_of(windows, decision(), pixels=2**27)


def test_classes_from_their_own_model(make_run):
    run = make_run()
    for name, other in (("unet", "fpn"), ("fpn", "unet")):
        for step, value in ((-1e-4, 1), (1e-4, 0)):
            assert same(predict_test(run, decision(weights={name: [1.0], other: [0.0]}, thresholds=[says(name) + step])), value)


def finished(make_run, folder, **overrides):
    "A second run with a model of its own"
    run = make_run(folder, **{"models": [{"name": "psp"}], **overrides})
    out_of_fold(run)
    save_decision(run, decision(weights={"psp": 1.0}))
    return run


def test_a_finished_run_joins(make_run):
    other = finished(make_run, "other", **{"folds.stratify": None, "seed": 3})
    run = make_run(**{"ensemble.runs": [str(other.folder)], "ensemble.method": "mean"})
    oof = out_of_fold(run)
    assert list(oof.stores) == ["unet", "fpn", "other/psp"] and set(choose_weights(oof)[0].weights.values()) == {1 / 3}
    theirs = dict(zip(other.folds().image_id, other.folds().fold))
    for name in oof.image_ids: assert np.abs(oof.stores["other/psp"].probs(name) - sigmoid(LEVEL["psp", theirs[name]])).max() <= 0.5 / 256
    moved = sum(theirs[i] != k for i, k in zip(run.folds().image_id, run.folds().fold))
    assert (f"{moved} of 6 images in other folds" in other_folds(run)[0]) if moved else other_folds(run) == []
    weights, mean = {"unet": 0.25, "fpn": 0.25, "other/psp": 0.5}, 0.25 * says("unet") + 0.25 * says("fpn") + 0.5 * says("psp")
    for step, value in ((-1e-4, 1), (1e-4, 0)): assert same(predict_test(run, decision(weights=weights, thresholds=[mean + step])), value)
    assert same(predict_test(run, decision(weights={"other/psp": 1.0, "fpn": 0.0, "unet": 0.0}, thresholds=[says("psp") - 1e-4])), 1)


def test_a_run_that_cannot_join_is_refused_with_the_reason(make_run, tmp_path):
    other = finished(make_run, "other", **{"folds.use": [1]})
    with pytest.raises(DataError, match="no out-of-fold probability of 3 of the 6 training images"): out_of_fold(make_run(**{"ensemble.runs": [str(other.folder)]}))
    other.path("ensemble.json").unlink()
    with pytest.raises(SegnbError, match="finish it first"): out_of_fold(make_run(**{"ensemble.runs": [str(other.folder)]}))
    roads = make_run("roads", classes=["road"])
    with pytest.raises(RecipeError, match="not of the same things"): out_of_fold(make_run(**{"ensemble.runs": [str(roads.folder)]}))
    with pytest.raises(RecipeError, match="is no run"): out_of_fold(make_run(**{"ensemble.runs": [str(tmp_path / "nothing")]}))
    raw = {name: "0" * 64 for name in make_run().samples().image}
    write_json(other.path("manifest.json"), {"requested": None, "decisions": {}, "inputs": raw, "stages": {}})
    with pytest.raises(DataError, match="11 pictures of other are others"): out_of_fold(make_run(**{"ensemble.runs": [str(other.folder)]}))


def test_finished_submissions_vote(make_run, tmp_path):
    run, rng = make_run(), np.random.default_rng(0)
    samples = run.samples()
    test = samples[samples.split == "test"]
    drawn = {name: {i: rng.integers(0, 2, size, np.uint8) for i, *size in zip(test.image_id, test.height, test.width)} for name in "abc"}
    for name, masks in drawn.items(): write_submission(run.recipe, masks, tmp_path / f"{name}.csv", samples=samples)
    files = {name: str(tmp_path / f"{name}.csv") for name in "abc"}
    run = make_run(**{"ensemble": {"method": "vote", "submissions": files, "weights": {"unet": 1, "fpn": 0, "a": 1, "b": 1, "c": 2}}})
    chosen = with_submissions(run.recipe, decision(weights=vote(unet=says("unet") - 0.01)))      # a one everywhere
    masks = predict_test(run, chosen, {name: read_submission(run.recipe, path, samples=samples) for name, path in files.items()})
    for i in masks:
        ones = 1 + drawn["a"][i] + drawn["b"][i] + 2 * drawn["c"][i].astype(int)                # of five votes
        assert (masks[i] == (ones >= 3)).all()
    short = {name: {k: v for k, v in drawn[name].items() if name != "b" or k != next(iter(drawn["b"]))} for name in "abc"}
    with pytest.raises(DataError, match="b has no mask of 1 of the 5 test images"): predict_test(run, chosen, short)


def test_files_vote_from_the_command_line(make_run, tmp_path):
    run, rng = make_run(), np.random.default_rng(0)
    samples, data = run.samples(), ["--set", f"data.root={run.recipe.data.root}"]
    test = samples[samples.split == "test"]
    masks = [{i: rng.integers(0, 2, size, np.uint8) for i, *size in zip(test.image_id, test.height, test.width)} for _ in range(3)]
    files = [write_submission(run.recipe, own, tmp_path / f"{k}.csv", samples=samples) for k, own in enumerate(masks)]
    said = segnb("vote", "demo", *files, "--out", tmp_path / "voted.csv", *data).stdout
    voted = read_submission(run.recipe, tmp_path / "voted.csv", samples=samples)
    assert all((voted[i] == (sum(own[i].astype(int) for own in masks) >= 2)).all() for i in masks[0]) and "the vote of 3 submissions" in said
    assert "3 files and 2 weights" in segnb("vote", "demo", *files, "--out", tmp_path / "x.csv", "--weights", "1,2", *data, code=2).stderr


def test_what_makes_the_ensemble_stale(make_run, tmp_path):
    def parts(**overrides):
        run = make_run(**{"ensemble": {"method": "vote", "submissions": {"a": str(tmp_path / "a.csv")}, "runs": [str(tmp_path / "other")], **overrides}})
        return {name: task_parts(run, Task(STAGES[name])) for name in ("eda", "ensemble", "submit")}
    before = parts()
    assert parts(max_ram=1.0) == before                                     # where it is kept is no matter of what comes out
    assert {*changes(before["ensemble"], parts(bits=16)["ensemble"])} == {"ensemble.bits"} and parts(bits=16)["eda"] == before["eda"]
    write_bytes(tmp_path / "a.csv", b"1")
    assert {*changes(before["ensemble"], parts()["ensemble"])} == {"ensemble.submissions.a content"}
    write_json(tmp_path / "other" / "manifest.json", {"stages": {"ensemble": {"outputs": {"oof/psp/data.bin": "1", "scores.json": "2"}}}})
    assert {k.split(".")[0] for k in changes(before["ensemble"], parts()["ensemble"])} == {"ensemble", "other results"}
