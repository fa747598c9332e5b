"""The road by papermill: what is reused and why, what a kill leaves behind, and that the number of workers changes nothing."""
import ast, json, os, random, re, shutil, signal, subprocess, sys, time
from hashlib import sha256
from pathlib import Path

import nbformat, papermill, psutil, pytest
from conftest import ROOT, SEGNB, TINY, segnb, settings

from segnb.files import SegnbError
from segnb.kernels import check_parameters, run_notebook
from segnb.pipeline import FUNCTIONS, STAGES, imported_rooms, run_half, stage_cells, stage_notebook

NOTEBOOKS = [s for s in STAGES.values() if s.notebook]


def said(done):
    "What each task said of itself: label -> reason"
    return dict(re.findall(r"^(\w+(?: \S+ fold \d+)?): (.+)$", done.stdout, re.M))


def content(folder, *patterns):
    "Hashes of the files that match"
    return {p.relative_to(folder).as_posix(): sha256(p.read_bytes()).hexdigest() for pattern in patterns for p in folder.glob(pattern)}


@pytest.fixture(scope="module")
def checked(tiny, tmp_path_factory):
    "A function that starts a run whose data is checked and split already, and looked at by no stage"
    folder = tmp_path_factory.mktemp("runs") / "checked"
    segnb("run", *tiny, "--out", folder, "--to", "check")
    return lambda out: shutil.copytree(folder, out)


@pytest.mark.quick
@pytest.mark.parametrize("stage", NOTEBOOKS, ids=lambda s: s.name)
def test_parameters_of_stage_notebooks(stage):
    notebook = stage_notebook(stage.notebook)
    wanted = {"recipe", "out", "overrides"} | ({"model", "fold"} if "{model}" in stage.writes else set())
    assert set(papermill.inspect_notebook(str(notebook))) == wanted
    with pytest.raises(SegnbError, match="Did you mean 'recipe'"): check_parameters(notebook, {"recepi": "demo"})


@pytest.mark.quick
@pytest.mark.parametrize("stage", NOTEBOOKS, ids=lambda s: s.name)
def test_a_stage_names_all_sections_it_reads(stage):
    "A section that a stage reads without saying so would change nothing when it changes"
    source = run_half(stage_cells(stage.notebook))
    room = stage.notebook.split("_", 1)[1]
    used = set(re.findall(r"\brecipe\.(\w+)", source + (ROOT / "segnb" / f"{room}.py").read_text("utf8")))
    of_all = {"name", "n_classes", "track", "model_copy", "model_dump", "yaml"}
    implied = {"models": "model" if stage.name == "train" else None}
    assert used - of_all - set(implied) <= set(stage.sections.split())


def test_every_file_of_the_road_is_there(finished):
    folder, done = finished
    for name in ("recipe.yaml", "environment.json", "manifest.json", "samples.parquet", "folds.csv", "doctor.json", "ensemble.json", "scores.json",
                 "submission.csv", "submission.json", "models/small/fold1/best.safetensors", "notebooks/30_train_small_fold0.ipynb"):
        assert (folder / name).is_file(), name
    assert set(said(done).values()) - {"first run"} <= {str(folder)} | {v for v in said(done).values() if v.startswith(str(folder))}
    stages = json.loads((folder / "manifest.json").read_text("utf8"))["stages"]
    assert set(stages) == {"check", "folds", "eda", "augment", "train small fold 0", "train small fold 1", "ensemble", "submit"}
    for record in stages.values():
        for name, digest in record["outputs"].items(): assert sha256((folder / name).read_bytes()).hexdigest() == digest
    scores = json.loads((folder / "scores.json").read_text("utf8"))
    assert scores["ensemble"]["honest_folds"].keys() == {"0", "1"} and scores["ensemble"]["honest"] is not None
    assert [row["step"] for row in scores["gains"]] == ["plain", "thresholds", "min_area", "all"] and "oof/gains.png" in stages["ensemble"]["outputs"]


def test_what_is_up_to_date_is_reused_and_the_reason_is_said(finished, tiny, tmp_path):
    folder = tmp_path / "again"
    shutil.copytree(finished[0], folder)
    for path in folder.rglob("*"): os.utime(path)   # touched, not changed
    again = said(segnb("run", *tiny, "--out", folder))
    assert {v for k, v in again.items() if k != "done"} == {"up to date"}
    figure, store = folder / "oof/thresholds.png", folder / "oof/small/data.bin"
    there, stored = figure.exists(), store.stat().st_mtime_ns
    changed = said(segnb("run", *tiny, "--out", folder, "--set", "postprocess.threshold=0.4"))
    assert there and not figure.exists() and store.stat().st_mtime_ns == stored               # of the earlier decision figures go, probabilities stay
    assert changed["train small fold 1"] == "up to date"
    assert changed["ensemble"] == "postprocess.threshold changed (auto → 0.4)"
    (folder / "submission.csv").unlink()
    (folder / "eda").rename(folder / "eda-moved")
    gone = said(segnb("run", *tiny, "--out", folder, "--set", "postprocess.threshold=0.4"))
    assert gone["submit"] == "submission.csv is gone" and gone["eda"].endswith("is gone") and gone["ensemble"] == "up to date"
    assert "start from" in segnb("run", *tiny, "--out", tmp_path / "new", "--from", "train", code=2).stderr
    fresh = said(segnb("run", *tiny, "--out", folder, "--from", "submit", "--fresh"))
    assert fresh["submit"] == "asked for afresh" and set(fresh) == {"submit", "done"}
    stores = [folder / "oof/small/data.bin", folder / "test_masks/data.bin"]
    times = lambda: [path.stat().st_mtime_ns for path in stores]
    before = times()
    segnb("run", *tiny, "--out", folder, "--from", "ensemble", "--to", "ensemble", "--fresh", "--set", "postprocess.threshold=0.4")
    assert all(new > old for new, old in zip(times(), before))                                # predicted anew


def test_commands_on_a_finished_run(finished, demo_data, tiny, tmp_path):
    folder, submission, data = finished[0], finished[0] / "submission.csv", settings(**{"data.root": demo_data})
    assert "is valid" in segnb("validate", "demo", submission, *data).stdout
    lines = submission.read_text("utf8").splitlines()
    (tmp_path / "short.csv").write_text("\n".join(lines[:-1]) + "\n", "utf8")
    assert lines[-1].split(",")[0] in segnb("validate", "demo", tmp_path / "short.csv", *data, code=1).stdout
    assert json.loads(segnb("score", "demo", submission, submission, *data).stdout)["score"] == 1.0
    assert f"/{folder.name}" in segnb("leaderboard", folder).stdout   # a long path loses its beginning
    assert "no run folder" in segnb("leaderboard", tmp_path, code=2).stderr
    assert "is finished already" in segnb("fit", folder).stdout
    assert "no run folder" in segnb("fit", tmp_path, code=2).stderr
    images = sorted((demo_data / "test_img").glob("*.png"))[:2]
    segnb("predict", folder, *images, "--out", tmp_path / "masks")
    assert {p.name for p in (tmp_path / "masks").iterdir()} == {f"{i.stem}{end}.png" for i in images for end in ("", "_overlay")}
    assert "truncated" in segnb("predict", folder, truncated(images[0], tmp_path), "--out", tmp_path / "masks", code=3).stderr


def truncated(image, folder):
    "A copy of `image` without its end"
    path = folder / "cut.png"
    path.write_bytes(image.read_bytes()[:-200])
    return path


def test_workers_change_nothing(finished, checked, tiny, tmp_path):
    segnb("run", *tiny, "--out", checked(tmp_path / "two"), "--from", "train", "--set", "train.workers=2")
    assert (tmp_path / "two/submission.csv").read_bytes() == (finished[0] / "submission.csv").read_bytes()
    assert content(tmp_path / "two", "models/**/*.safetensors") == content(finished[0], "models/**/*.safetensors")


def wait_for(condition, seconds=240):
    "Poll until `condition()` holds"
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited in vain"
        time.sleep(.05)


def start(*arguments):
    "The command in the background, as from a terminal"
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([SEGNB, *map(str, arguments)], preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler), **quiet)


def family(process):
    return psutil.Process(process.pid).children(recursive=True)


def test_a_killed_or_interrupted_fit_continues_to_the_same_submission(checked, tiny, tmp_path):
    "SIGKILL in the middle of a fit, then Ctrl-C in the middle of the rest, then to the end; against a run that nobody touched"
    longer = [*tiny, *settings(**{"train.epochs": 6, "train.epoch_scale": 4, "folds.use": "[0]"})]
    segnb("run", *longer, "--out", checked(tmp_path / "whole"), "--from", "train")
    folder = checked(tmp_path / "cut")
    for name, code in (("SIGKILL", -9), ("SIGINT", 130)):
        checkpoint = folder / "models/small/fold0/last.ckpt"
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        process = start("run", *longer, "--out", folder, "--from", "train")
        wait_for(lambda: checkpoint.exists() and checkpoint.stat().st_mtime_ns > before)
        kernels = family(process)
        if name == "SIGKILL":
            for kernel in kernels: kernel.kill()   # so that it does not finish the fit in the second it needs to notice
        process.send_signal(getattr(signal, name))
        assert process.wait(60) == code
        assert psutil.wait_procs(kernels, timeout=15)[1] == [], "a kernel outlived the command"
        assert "Traceback" not in process.stderr.read()
    done = segnb("run", *longer, "--out", folder, "--from", "train")
    assert said(done)["train small fold 0"] == "continues, it was not finished"
    assert content(folder, "submission.csv", "scores.json", "models/*/*/best.safetensors") == \
           content(tmp_path / "whole", "submission.csv", "scores.json", "models/*/*/best.safetensors")


@pytest.mark.full
@pytest.mark.parametrize("name", ["satellite", "trash", "indoor", "handbone", "wildfire"])
def test_the_road_of_each_competition(name, tmp_path):
    "Drawn in its raw layout, checked, run, and a valid submission at the end"
    segnb("sample", name, tmp_path / "data", "--train", 8, "--test", 4)
    own = ["--set", f"data.root={tmp_path / 'data'}"]
    segnb("check", name, *own)
    small = {"models": TINY["models"], "encoder_weights": "null", "folds.n": 2, "train.epochs": 1, "train.epoch_scale": 1, "train.batch_size": 4}
    segnb("run", name, *own, *settings(**small), "--out", tmp_path / "run", timeout=1200)
    submission = next((tmp_path / "run").glob("submission.[!j]*"))
    segnb("validate", name, submission, *own)
    assert json.loads((tmp_path / "run/scores.json").read_text())["images"] == 8


@pytest.mark.full
def test_ten_kills_at_random_instants_ten_identical_submissions(checked, tiny, tmp_path):
    "Two folds, killed once at an instant drawn over the whole of the road, ten times over"
    longer = [*tiny, *settings(**{"train.epochs": 4, "train.epoch_scale": 4, "train.ema": .9, "train.accumulate": 2, "train.workers": 1, "train.checkpoint_minutes": .02})]
    began, whole = time.time(), checked(tmp_path / "whole")
    segnb("run", *longer, "--out", whole, "--from", "train")
    seconds, whole = time.time() - began, content(whole, "submission.csv", "scores.json", "models/*/*/best.safetensors")
    draw, kills = random.Random(0), 0
    for k in range(30):   # one that ended before its instant does not count
        folder = checked(tmp_path / f"cut{k}")
        process = start("run", *longer, "--out", folder, "--from", "train")
        try: process.wait(draw.uniform(.02, .9) * seconds)
        except subprocess.TimeoutExpired:
            for one in [*family(process), process]: one.kill()
        kills += process.wait(60) == -9
        process.stderr.close()
        segnb("run", *longer, "--out", folder, "--from", "train")
        assert content(folder, "submission.csv", "scores.json", "models/*/*/best.safetensors") == whole, f"kill {k}"
        shutil.rmtree(folder)
        if kills == 10: return
    raise AssertionError(f"{kills} kills in 30 runs")


def small_notebook(path, *sources):
    "A notebook whose first cell is tagged `parameters`"
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    cells[0].metadata.tags = ["parameters"]
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)
    return path


def test_a_kernel_of_this_interpreter_whatever_lies_around(tmp_path):
    "A stray kernelspec named python3 and an environment that is not activated"
    stray = tmp_path / "jupyter/kernels/python3"
    stray.mkdir(parents=True)
    (stray / "kernel.json").write_text(json.dumps({"argv": ["/bin/false"], "display_name": "python3", "language": "python"}))
    notebook = small_notebook(tmp_path / "who.ipynb", "x = 1", "import sys\nprint(sys.executable, x)")
    code = f"from segnb.kernels import run_notebook; run_notebook({str(notebook)!r}, {str(tmp_path / 'out.ipynb')!r}, {{'x': 2}})"
    clean = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "JUPYTER_PATH": str(tmp_path / "jupyter")}
    done = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, timeout=120)
    assert done.stdout == f"{sys.executable} 2\n", done.stderr


def test_a_dead_kernel_is_said_in_one_paragraph(tmp_path):
    notebook = small_notebook(tmp_path / "dies.ipynb", "x = 1", "import os, signal\nprint('so far', flush=True)\nos.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(SegnbError, match="died without a word"): run_notebook(notebook, tmp_path / "out/dies.ipynb")
    assert (tmp_path / "out/dies.ipynb").is_file()


def test_a_failed_stage_is_kept_and_named(finished, tiny, tmp_path):
    folder = tmp_path / "fails"
    shutil.copytree(finished[0], folder)
    broken = folder / "models/small/fold0/best.safetensors"
    broken.write_bytes(b"not weights")
    done = segnb("run", *tiny, "--out", folder, "--from", "ensemble", code=1)
    assert "notebooks/40_ensemble.ipynb" in done.stderr and "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()[-1]) < 3000
    outputs = [o for c in nbformat.read(folder / "notebooks/40_ensemble.ipynb", 4).cells for o in c.get("outputs", [])]
    assert any(o.output_type == "error" for o in outputs)
    assert (folder / "submission.csv").read_bytes() == (finished[0] / "submission.csv").read_bytes()


def test_one_run_folder_one_process(checked, tiny, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    with open(checked(tmp_path / "a") / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = content(tmp_path / "a", "recipe.yaml", "manifest.json")
        assert "Another process" in segnb("run", *tiny, "--out", tmp_path / "a", "--to", "check", "--fresh", "--set", "optim.lr=0.5", code=1).stderr
        assert content(tmp_path / "a", "recipe.yaml", "manifest.json") == before


def test_data_errors_end_with_3_and_what_was_done_stays(demo_data, tiny, tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(demo_data, data)
    mine = [*tiny, "--set", f"data.root={data}", "--out", out]
    segnb("run", *mine, "--to", "check")
    kept = (out / "samples.parquet").read_bytes()
    image = next((data / "train_img").glob("*.png"))
    image.write_bytes(image.read_bytes()[:200])
    done = segnb("run", *mine, "--to", "check", code=3)
    assert image.name in done.stderr and "Traceback" not in done.stderr
    assert (out / "samples.parquet").read_bytes() == kept
    assert segnb("check", "demo", *settings(**{"data.root": data}), code=1).stdout.count(image.name) >= 1
    assert "nowhere" in segnb("run", *tiny, "--out", tmp_path / "x", "--set", f"name=mine", "--set", "data.root=/nowhere", code=3).stderr


def test_the_wheel_of_a_source_archive_carries_the_stages(tmp_path):
    pytest.importorskip("setuptools")
    copy = tmp_path / "clone"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "demo", "*.egg-info", "__pycache__"))
    subprocess.run([sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", tmp_path], cwd=copy, check=True)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps", "--use-pep517", "-w", tmp_path,
                    next(tmp_path.glob("segnb-*.tar.gz"))], check=True)
    home = tmp_path / "installed"
    shutil.unpack_archive(next(tmp_path.glob("segnb-*.whl")), home, "zip")
    find = "from segnb.pipeline import *; print(*[stage_notebook(s.notebook) for s in STAGES.values() if s.notebook], sep='\\n')"
    done = subprocess.run([sys.executable, "-c", find], env={**os.environ, "PYTHONPATH": str(home)}, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.split() == [str(home / f"segnb/notebooks/{s.notebook}.ipynb") for s in NOTEBOOKS]
    assert {p.stem for p in (home / "segnb/recipes").glob("*.yaml")} == {p.stem for p in (ROOT / "segnb/recipes").glob("*.yaml")}
