"""A bundle from run to proof: compiled, executed without segnb and without a network, and refused when anything in it has changed."""
import json, shutil

import nbformat
import pytest
from conftest import TINY, segnb, settings
from segnb.verify import verify_bundle


def finished(tmp_path_factory, recipe, *options):
    "A finished run on a drawn sample, and its bundle"
    folder = tmp_path_factory.mktemp(f"bundle_{recipe}")
    segnb("sample", recipe, folder / "data", "--train", 6, "--test", 4, "--size", 64)
    small = TINY | {"data.root": folder / "data", "folds.n": 2}
    segnb("run", recipe, "--out", folder / "run", *settings(**small), timeout=1200)
    segnb("bundle", folder / "run", "--out", folder / "bundle", *options)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory): return finished(tmp_path_factory, "demo", "--title", "Buildings", "--zip")


@pytest.fixture
def copy(made, tmp_path):
    "A bundle to spoil"
    return shutil.copytree(made / "bundle", tmp_path / "bundle")


def code_of(path): return "\n".join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == "code")


def test_predict_makes_the_same_bytes_elsewhere(made):
    report = verify_bundle(made / "bundle", borrow=True, keep=made / "kept")
    assert report.ok, report.text()
    assert (made / "kept" / "submission.csv").read_bytes() == (made / "run" / "submission.csv").read_bytes()
    assert any("byte for byte" in line for line in report.checked) and any("segnb cannot be imported" in line for line in report.checked)


def test_notebooks_hold_what_the_run_used_and_nothing_else(made):
    for name in ("predict", "train"):
        code = code_of(made / "bundle" / f"{name}.ipynb")
        compile(code, name, "exec")
        assert "import segnb" not in code and "from segnb" not in code
        for other in ("PolygonJson", "ClassTable", "FCN8s", "lovasz", "papermill", "wandb", "def polygons_to_mask"): assert other not in code, (name, other)
    assert "focal" not in code_of(made / "bundle" / "predict.ipynb") and "def focal_dice_loss" in code_of(made / "bundle" / "train.ipynb")
    lines = json.loads((made / "bundle" / "MANIFEST.json").read_text())["code_lines"]
    assert max(lines.values()) < 1500, lines
    assert (made / "bundle.zip").stat().st_size > 1000


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
    done = segnb("verify", copy, "--borrow", code=1)
    assert says in done.stdout and "NOT verified" in done.stdout


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
    import hashlib
    manifest["files"]["requirements.txt"] = hashlib.sha256(requirements.read_bytes()).hexdigest()
    (copy / "MANIFEST.json").write_text(json.dumps(manifest))
    report = verify_bundle(copy, borrow=True)
    assert not report.ok and "numpy is" in report.text() and "requirements.txt has 1.0" in report.text()


def test_limits_are_kept(made, tmp_path):
    assert "MB allowed" in segnb("bundle", made / "run", "--out", tmp_path / "small", "--max-mb", 0.001, code=1).stderr
    assert "is not empty" in segnb("bundle", made / "run", "--out", made / "run", code=2).stderr


@pytest.mark.real
@pytest.mark.parametrize("recipe", ["demo", "satellite", "trash", "indoor", "handbone", "wildfire"])
def test_both_notebooks_of_every_recipe(tmp_path_factory, recipe):
    folder = finished(tmp_path_factory, recipe)
    report = verify_bundle(folder / "bundle", borrow=True, train=True)
    assert report.ok, report.text()


@pytest.mark.real
def test_one_notebook_instead_of_two(made, tmp_path):
    segnb("bundle", made / "run", "--out", tmp_path / "one", "--single")
    report = verify_bundle(tmp_path / "one", borrow=True, train=True)
    assert report.ok and not (tmp_path / "one" / "train.ipynb").exists(), report.text()
