"""A bundle from run to proof: compiled, executed without segnb and without a network, and refused when anything in it has changed."""
import hashlib, json, shutil, zipfile
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from conftest import REAL, TINY, segnb, settings
from segnb import bundle, ensemble
from segnb.bundle import bundle_run, pack_zip, refuse_too_large, refuse_too_slow, start_weights, write_start
from segnb.crf import refined
from segnb.data import read_samples
from segnb.engine import save_weights
from segnb.ensemble import fits_of, no_scores, predict_test, predictor_of, read_decision
from segnb.fast import WAYS
from segnb.files import RecipeError, SegnbError, write_json
from segnb.formats import submission_suffix
from segnb.pipeline import Run, open_run, split_folds
from segnb.sample import draw_sample
from segnb.submit import make_submission
from segnb.train import new_model
from segnb.verify import Place, borrowed_environment, execute, namespace, prepare, verify_bundle


def lively(net, seed):
    "`net` with norms as after a training, so that it matters how they are computed"
    draw = torch.Generator().manual_seed(seed)
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.uniform_(-.2, .2, generator=draw)
            m.running_var.uniform_(.5, 2, generator=draw)
    return net


def submit(run, path, way):
    "Predict the test images of `run` this way, and write the submission; its report"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ensemble, "find_way", lambda *_: way)
        masks = predict_test(run, read_decision(run))
    return make_submission(run.recipe, masks, path, samples=run.samples())[0]


def untrained(folder, recipe="demo", way="as fitted"):
    "A run on a drawn sample whose networks were never trained: all that predicting needs, in a second"
    small = {"models": [{"name": "small", "arch": "Unet", "encoder": "mobilenet_v2", "precision": "bf16", "memory_format": "channels_last", "compile": False}],
             "data.root": str(draw_sample(recipe, folder / "data", train=6, test=4, size=64)), "augment.size": 64, "folds.n": 2, "encoder_weights": None}
    if recipe == "demo": small |= {"postprocess.crf": {"preset": "deeplab", "steps": 2}}
    if recipe == "handbone": small |= {"predict.size": None, "submit.size": None}   # 29 labels of 2048 x 2048 take minutes
    run = open_run(recipe, folder / "run", small)
    read_samples(run.recipe).to_parquet(run.path("samples.parquet"), index=False)
    split_folds(run)
    for model, fold in [(model, k) for model, folds in fits_of(run).items() for k in folds]:
        place = run.path("models", model, f"fold{fold}")
        place.mkdir(parents=True)
        save_weights(lively(new_model(run.recipe.model_copy(update={"seed": fold}), run.recipe.models[0], run.pack()), fold), place / "best.safetensors")
        write_json(place / "fit.json", {"model": run.recipe.models[0].model_dump(), "precision": "bf16", "memory_format": "channels_last", "in_channels": run.pack().n_channels, "n_classes": run.recipe.n_classes, "score": 0.5,
                                        "threads": torch.get_num_threads(), "device": "cpu", "seconds": 1.0, "processes": 1, "resumed": False})
    shares = {(model, k): 1.0 for model, folds in fits_of(run).items() for k in folds}
    image = run.pack().image(len(run.samples()) - 1)
    probs = refined(predictor_of(run, shares, 64 * 64)([image])[0], image, run.recipe)
    thresholds = [] if run.recipe.task == "multiclass" else [float(np.median(plane)) for plane in probs]   # so that the last mask is neither empty nor full
    write_json(run.path("ensemble.json"), {"weights": {"small": 1.0}, "thresholds": thresholds, "min_area": 4, "fill_holes": 3, "because": {}})
    write_json(run.path("scores.json"), no_scores(run.recipe))
    write_json(run.path("submission.json"), submit(run, run.path("submission" + submission_suffix(run.recipe)), way))
    return run


def run_and_bundle(tmp_path_factory, recipe, *options):
    "A run of all stages on a drawn sample, and its bundle"
    folder = tmp_path_factory.mktemp(f"bundle_{recipe}")
    segnb("sample", recipe, folder / "data", "--train", 6, "--test", 4, "--size", 64)
    small = TINY | {"data.root": folder / "data", "folds.n": 2}
    segnb("run", recipe, "--out", folder / "run", *settings(**small), timeout=1200)
    segnb("bundle", folder / "run", "--out", folder / "bundle", *options)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A bundle, its run and its data"
    folder = tmp_path_factory.mktemp("bundle")
    bundle_run(untrained(folder).folder, folder / "bundle", title="Buildings")
    return folder


@pytest.fixture
def copy(made, tmp_path):
    "A bundle to spoil"
    return shutil.copytree(made / "bundle", tmp_path / "bundle")


def cells_of(path): return [c.source for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
def code_of(path): return "\n".join(cells_of(path))


def test_predict_makes_the_same_bytes_elsewhere(made):
    report = verify_bundle(made / "bundle", borrow=True, keep=made / "kept")
    assert report.ok, report.text()
    assert (made / "kept" / "submission.csv").read_bytes() == (made / "run" / "submission.csv").read_bytes()
    assert any("byte for byte" in line for line in report.checked) and any("segnb cannot be imported" in line for line in report.checked)


def test_both_notebooks_make_the_same_bytes_and_weights(finished, tmp_path):
    "As the demo trains: with an average of the weights"
    segnb("bundle", finished[0], "--out", tmp_path / "bundle")
    said = segnb("verify", tmp_path / "bundle", "--borrow", "--train").stdout
    assert "byte for byte" in said and "bit for bit" in said, said


def test_notebooks_hold_what_the_run_used_and_nothing_else(made):
    for name in ("predict", "train"):
        code = code_of(made / "bundle" / f"{name}.ipynb")
        compile(code, name, "exec")
        assert "import segnb" not in code and "from segnb" not in code
        for other in ("PolygonJson", "ClassTable", "FCN8s", "lovasz", "papermill", "wandb", "def polygons_to_mask"): assert other not in code, (name, other)
    assert "focal" not in code_of(made / "bundle" / "predict.ipynb") and "def focal_dice_loss" in code_of(made / "bundle" / "train.ipynb")
    lines = json.loads((made / "bundle" / "MANIFEST.json").read_text())["code_lines"]
    assert max(lines.values()) < 1600, lines   # of the demo; the satellite stays below 1,500


def test_a_faster_way_goes_along(tmp_path, monkeypatch):
    "The notebook predicts as the run did, and says so"
    monkeypatch.setattr(bundle, "make_notebooks", lambda *given, make=bundle.make_notebooks: make(*given[:-1], ["predict"]))   # the other one is no part of this
    run, output = untrained(tmp_path, way="folded bf16"), tmp_path / "submission.csv"
    manifest = bundle_run(run.folder, tmp_path / "bundle")
    parameters, *code = cells_of(tmp_path / "bundle" / "predict.ipynb")
    space = {}
    exec(parameters, space)
    space |= {"data_root": tmp_path / "data", "bundle": tmp_path / "bundle", "output": output}
    for cell in code: exec(cell, space)
    assert output.read_bytes() == run.path("submission.csv").read_bytes()
    submit(run, tmp_path / "as_fitted.csv", "as fitted")
    assert output.read_bytes() != (tmp_path / "as_fitted.csv").read_bytes()
    assert manifest["way"] == "folded bf16" and "inside the convolution before it, in bf16" in (tmp_path / "bundle" / "README.md").read_text()


@pytest.mark.full
@pytest.mark.parametrize("way", [way for way in WAYS if way != "folded bf16"])
def test_every_way_makes_the_same_bytes_elsewhere(tmp_path, monkeypatch, way):
    "Compiled networks are compiled again there: no code of the run is found"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "run_cache"))
    bundle_run(untrained(tmp_path, way=way).folder, tmp_path / "bundle")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "other_cache"))
    report = verify_bundle(tmp_path / "bundle", borrow=True)
    assert report.ok, report.text()
    text = (tmp_path / "bundle" / "README.md").read_text()
    assert ("needs a C++ compiler" in text) == ("compiled" in way)


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


TAMPER = {"weight": (lambda b: flip(next((b / "weights").iterdir())), "has changed since the bundle was made"),
          "threshold": (lambda b: (b / "ensemble.json").write_text((b / "ensemble.json").read_text().replace('"thresholds": [\n  0', '"thresholds": [\n  1')), "ensemble.json has changed"),
          "notebook": (lambda b: flip(b / "predict.ipynb"), "predict.ipynb has changed"),
          "missing": (lambda b: (b / "recipe.yaml").unlink(), "recipe.yaml is missing"),
          "extra": (lambda b: (b / "extra.py").write_text("1"), "extra.py is in the bundle, and MANIFEST.json does not know it")}


@pytest.mark.parametrize("how", TAMPER)
def test_a_changed_bundle_is_refused_with_the_reason(copy, how):
    spoil, says = TAMPER[how]
    spoil(copy)
    report = verify_bundle(copy, borrow=True)
    assert not report.ok and says in report.text() and "NOT verified" in report.text()


def test_a_missing_image_is_named(made, copy, tmp_path):
    data = shutil.copytree(made / "data", tmp_path / "data")
    gone = next((data / "test_img").iterdir())
    gone.unlink()
    report = verify_bundle(copy, data=data, borrow=True)
    assert not report.ok and gone.name in report.text() and "is missing" in report.text()


def test_another_library_version_is_named(copy):
    requirements = copy / "requirements.txt"
    requirements.write_text("".join("numpy==1.0\n" if line.startswith("numpy==") else line for line in requirements.open()))
    manifest = json.loads((copy / "MANIFEST.json").read_text())
    manifest["files"]["requirements.txt"] = hashlib.sha256(requirements.read_bytes()).hexdigest()
    (copy / "MANIFEST.json").write_text(json.dumps(manifest))
    report = verify_bundle(copy, borrow=True)
    assert not report.ok and "numpy is" in report.text() and "requirements.txt has 1.0" in report.text()


def test_without_a_namespace_connections_are_refused(tmp_path):
    place = Place(borrowed_environment(tmp_path / "env"), tmp_path / "work")
    prepare(place)
    for call in ("create_connection(('192.0.2.1', 9), 1)", "getaddrinfo('example.org', 80)"):
        assert "no network while a bundle is verified" in place.run("-c", f"import socket; socket.{call}").stderr
    assert place.run("-c", "import socket; s = socket.create_server(('127.0.0.1', 0)); socket.create_connection(s.getsockname())").returncode == 0


def test_limits_are_kept(made):
    with pytest.raises(SegnbError, match="more than the 0.001 MB allowed. Largest: weights"): refuse_too_large(made / "bundle", 0.001)
    with pytest.raises(SegnbError, match="more than the 0 allowed"): refuse_too_slow(json.loads((made / "bundle" / "MANIFEST.json").read_text()), 0, Run(made / "run").recipe)
    with pytest.raises(RecipeError, match="is not empty"): bundle_run(made / "run", made / "run")


def test_the_zip_is_the_bundle_and_always_the_same(copy):
    first = pack_zip(copy).read_bytes()
    assert pack_zip(copy).read_bytes() == first
    with zipfile.ZipFile(copy.with_suffix(".zip")) as file: names = {name.removeprefix("bundle/") for name in file.namelist()}
    assert names == {*json.loads((copy / "MANIFEST.json").read_text())["files"], "MANIFEST.json"}


def test_the_command_says_what_is_wrong_and_ends_with_1(copy):
    flip(next((copy / "weights").iterdir()))
    assert "NOT verified: 1 problem." in segnb("verify", copy, "--borrow", code=1).stdout


@pytest.mark.full
@pytest.mark.parametrize("recipe", ["trash", "indoor", "handbone", "wildfire"])
def test_predict_of_every_format(tmp_path, recipe):
    bundle_run(untrained(tmp_path, recipe).folder, tmp_path / "bundle")
    report = verify_bundle(tmp_path / "bundle", borrow=True)
    assert report.ok, report.text()


@pytest.mark.full
@pytest.mark.parametrize("recipe", ["satellite", "trash", "indoor", "handbone", "wildfire"])
def test_both_notebooks_of_every_recipe(tmp_path_factory, recipe):
    folder = run_and_bundle(tmp_path_factory, recipe)
    report = verify_bundle(folder / "bundle", borrow=True, train=True)
    assert report.ok, report.text()
    assert any("bit for bit" in line for line in report.checked)
    assert recipe != "satellite" or json.loads((folder / "bundle" / "MANIFEST.json").read_text())["code_lines"]["train"] < 1500


@pytest.mark.full
@pytest.mark.real
@pytest.mark.parametrize("recipe, wheels", [("satellite", ["--wheels"]), ("trash", [])])
def test_real_pictures_where_segnb_was_never_installed(tmp_path, recipe, wheels):
    "In a new environment: from the bundle's own wheels, or from the package index"
    segnb("run", REAL / recipe / "recipe.yaml", "--out", tmp_path / "run", *settings(**{"folds.n": 0, "train.minutes": 0.5}), timeout=3600)
    segnb("bundle", tmp_path / "run", "--out", tmp_path / "bundle", *wheels, timeout=3600)
    report = verify_bundle(tmp_path / "bundle", data=REAL / recipe, train=True, keep=tmp_path / "kept")
    assert report.ok, report.text()
    assert (tmp_path / "kept" / "submission.csv").read_bytes() == (tmp_path / "run" / "submission.csv").read_bytes()


@pytest.mark.full
def test_two_models_with_found_weights_thresholds_and_views(tmp_path):
    "What an ensemble decided, its bundle holds: shares, thresholds, areas, views, the CRF"
    data = draw_sample("satellite", tmp_path / "data", train=8, test=4, size=64)
    two = TINY | {"models": "[{name: one, arch: Unet, encoder: mobilenet_v2}, {name: two, arch: FPN, encoder: mobilenet_v2}]", "data.root": data, "folds.n": 2,
                  "ensemble.method": "weighted", "predict.tta": "[hflip, rot90]", "postprocess.threshold": "auto", "postprocess.min_area": "auto", "postprocess.crf": "trash"}
    segnb("run", "satellite", "--out", tmp_path / "run", *settings(**two), timeout=1800)
    segnb("bundle", tmp_path / "run", "--out", tmp_path / "bundle")
    report = verify_bundle(tmp_path / "bundle", borrow=True, train=True)
    assert report.ok, report.text()


def test_starting_weights_travel(tmp_path):
    "The bundle holds the encoder that a fit began with, adapted to its channels"
    run = untrained(tmp_path)
    encoder = new_model(run.recipe, run.recipe.models[0], run.pack()).net.encoder
    save_weights(encoder, tmp_path / "published.safetensors")
    other = Run(run.folder)
    entry = other.recipe.models[0].model_copy(update={"encoder_weights": str(tmp_path / "published.safetensors")})
    other.recipe = other.recipe.model_copy(update={"models": [entry], "seed": 5})
    write_start(other, "small", tmp_path / "start.safetensors")
    assert (tmp_path / "start.safetensors").read_bytes() == (tmp_path / "published.safetensors").read_bytes()
    assert start_weights(other) == {"small": "published.safetensors"} and start_weights(run) == {}


@pytest.mark.full
def test_more_test_images_make_more_rows(made, tmp_path):
    data, bundle = shutil.copytree(made / "data", tmp_path / "data"), (made / "bundle").resolve()
    shutil.copy(next((data / "test_img").iterdir()), data / "test_img" / "NEW.png")
    for name, row in (("test.csv", "NEW,./test_img/NEW.png\n"), ("sample_submission.csv", "NEW,-1\n")):
        with open(data / name, "a") as file: file.write(row)
    for gone in ("train.csv", "train_img"): (shutil.rmtree if (data / gone).is_dir() else Path.unlink)(data / gone)   # predicting needs no training files
    place = Place(borrowed_environment(tmp_path / "env"), tmp_path / "work", namespace())
    prepare(place)
    failed, _ = execute(place, bundle / "predict.ipynb", {"data_root": data, "bundle": bundle, "output": tmp_path / "submission.csv"})
    assert not failed, failed
    ids = [line.split(",")[0] for line in (tmp_path / "submission.csv").read_text().splitlines()]
    assert len(ids) == 6 and ids[-1] == "NEW"


@pytest.mark.full
def test_one_notebook_instead_of_two(tmp_path_factory, tmp_path):
    folder = run_and_bundle(tmp_path_factory, "demo", "--title", "Buildings", "--zip", "--max-mb", 500)
    segnb("bundle", folder / "run", "--out", tmp_path / "one", "--single")
    report = verify_bundle(tmp_path / "one", borrow=True, train=True)
    assert report.ok and not (tmp_path / "one" / "train.ipynb").exists(), report.text()
