"""Tracked runs that are killed, sweeps and searches that share a folder: what takes processes to show."""
import json, os, re, socket, subprocess, sys, time
from pathlib import Path

import pytest
from conftest import SEGNB, segnb, settings

# ---- tracking

TRACKED = """
import os, signal, sys
import numpy as np
from segnb.recipe import load_recipe
from segnb.track import Tracker
folder, name, first, last, resumed, end = sys.argv[1:]
tracker = Tracker(load_recipe("demo", {"track": ["csv", name]}), folder, "base", "unet", 0, resumed=resumed == "yes")
assert list(tracker.backends) == [name], tracker.backends
for step in range(int(first), int(last), 10):
    tracker.log(step, {"loss": 1 / step, "lr/decoder": 1e-3})
    tracker.bars(step, "score", {"building": step / 100})
    tracker.picture(step, "validation", np.full((6, 8, 3), step, np.uint8))
if end == "kill": os.kill(os.getpid(), signal.SIGKILL)
tracker.close()
"""
UNASKED = ("WANDB_MODE", "WANDB_API_KEY", "MLFLOW_TRACKING_URI")


def tracked(folder, name, first, last, resumed, end="close"):
    "A fit that reports the steps first, first + 10, … in a process of its own"
    clean = {k: v for k, v in os.environ.items() if k not in UNASKED}
    with socket.create_server(("127.0.0.1", 0)) as outside:   # whoever goes outside knocks here
        proxy = f"http://127.0.0.1:{outside.getsockname()[1]}"
        done = subprocess.run([sys.executable, "-c", TRACKED, folder, name, str(first), str(last), resumed, end], capture_output=True, text=True,
                              env={**clean, **dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), proxy), "NO_PROXY": ""},
                              timeout=300, stdin=subprocess.DEVNULL)
        outside.settimeout(0.2)
        with pytest.raises(TimeoutError): outside.accept()
    assert done.returncode == (-9 if end == "kill" else 0), done.stderr[-3000:]
    assert "left out" not in done.stdout, done.stdout


def tensorboard_rows(folder):
    "name -> steps"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder / "track/tensorboard/unet_fold0"), {"images": 0}).Reload()   # all of them
    return {name: [e.step for e in events.Scalars(name)] for name in events.Tags()["scalars"]} | \
           {name: [e.step for e in events.Images(name)] for name in events.Tags()["images"]}


def wandb_rows(folder):
    "name -> steps, of all offline parts of one run"
    from segnb.track import wandb_history
    rows = {}
    for path in sorted((folder / "track/wandb").glob("offline-run-*/*.wandb")):
        for step, names in wandb_history(path):
            for name in names: rows.setdefault(name, []).append(step)
    return {name.removesuffix("._type"): sorted(steps) for name, steps in rows.items() if "._type" in name or "." not in name}


def mlflow_rows(folder):
    "name -> steps, of the only run there is"
    from mlflow.tracking import MlflowClient
    client = MlflowClient(f"sqlite:///{folder.parent}/.mlflow/mlflow.db")
    run, = client.search_runs([client.get_experiment_by_name("demo").experiment_id])
    assert run.data.params["models.0.arch"] == "Unet" and run.info.status == "FINISHED"
    pictures = [a.path for a in client.list_artifacts(run.info.run_id, "images") if a.path.endswith(".png")]
    steps = lambda name: sorted(int(p.split("step+" if "step+" in p else "step%")[1].split("+")[0].split("%")[0]) for p in pictures if Path(p).name.startswith(name))
    return {name: [m.step for m in client.get_metric_history(run.info.run_id, name)] for name in run.data.metrics} | \
           {"validation": steps("validation"), "score by class": steps("score_by_class")}


@pytest.mark.parametrize("name,rows", [("tensorboard", tensorboard_rows), ("wandb", wandb_rows), ("mlflow", mlflow_rows)])
def test_a_killed_fit_goes_on_in_the_same_tracked_run(name, rows, tmp_path):
    pytest.importorskip(name)
    tracked(tmp_path / "base", name, 10, 40, "no", "kill")
    tracked(tmp_path / "base", name, 20, 60, "yes")          # from the checkpoint of step 10
    found = rows(tmp_path / "base")
    if name == "wandb":   # it writes in the background: numbers are sent again from the ledger, a picture of the last second is not
        for picture in ("score by class", "validation"):
            assert found[picture] in ([10, 20, 30, 40, 50], [20, 30, 40, 50])
            found[picture] = [10, 20, 30, 40, 50]
    assert found == dict.fromkeys(("loss", "lr/decoder", "score/building", "score by class", "validation"), [10, 20, 30, 40, 50])
    if name == "wandb": assert len({p.stem for p in (tmp_path / "base/track/wandb").glob("offline-run-*/*.wandb")}) == 1   # one id


# ---- many runs, many processes

FAKE = """
import math, os, time
from segnb.files import SegnbError
def scores(recipe, folder, *, stage, show):
    "Stands for a training: slow, and says which process did what"
    with open(os.environ["FAKE_LOG"], "a") as log: log.write(f"{folder.name} {os.getpid()}\\n")
    for fold in range(2):
        time.sleep(float(os.environ.get("FAKE_SECONDS", "0.4")))
        yield fold, 0.8 - 0.1 * abs(math.log10(recipe.optim.lr / 2e-3)) + 0.01 * fold, 1 - fold
"""
TUNE = """
import sys, fake
from segnb.tune import tune
out, data, trials, jobs = sys.argv[1:]
tune("demo", out, int(trials), jobs=int(jobs), scores=fake.scores,
     overrides={"data.root": data, "tune": {"prune_after": None, "space": {"optim.lr": {"low": 1e-4, "high": 1e-2, "log": True}}}})
"""
SWEEP = """
import sys, fake
from segnb.sweep import sweep
out, data, jobs = sys.argv[1:]
result = sweep("demo", {"optim.lr": [1e-3, 2e-3, 4e-3]}, [0, 1], out, jobs=int(jobs), scores=fake.scores, overrides={"data.root": data})
assert not result.errors and list(result.table.n) == [4, 4, 4], result.table
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    "Starts a script whose trainings are pretended; its log tells who did what"
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])))
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    def start(script, *arguments):
        return subprocess.Popen([sys.executable, "-c", script, *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    start.rows = lambda: [line.split() for line in (tmp_path / "log").read_text().splitlines()] if (tmp_path / "log").exists() else []
    return start


def finish(process):
    assert process.wait(300) == 0, process.stderr.read()[-3000:]


def wait_for(condition, seconds=200):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited in vain"
        time.sleep(.05)


@pytest.mark.full
def test_two_processes_search_together_and_one_is_killed(fake, tmp_path):
    "The survivor takes over the trial that the dead one held; no trial is lost, none is done twice"
    import pandas as pd
    arguments = TUNE, tmp_path / "study", tmp_path, 8, 1
    one, two = fake(*arguments), fake(*arguments)
    wait_for(lambda: len({pid for _, pid in fake.rows()}) == 2 and fake.rows()[-1][1] == str(one.pid))
    held = [name for name, pid in fake.rows() if pid == str(one.pid)][-1]
    one.kill()
    finish(two)
    table = pd.read_csv(tmp_path / "study/trials.csv")
    assert list(table.trial) == list(range(8)) and set(table.state) == {"complete"}
    names = [name for name, _ in fake.rows()]
    assert {n for n in names if names.count(n) > 1} <= {held} and len(set(names)) == 8


@pytest.mark.full
def test_jobs_share_the_trials_and_end_with_their_parent(fake, tmp_path, monkeypatch):
    import pandas as pd, psutil
    finish(fake(TUNE, tmp_path / "study", tmp_path, 6, 2))
    table = pd.read_csv(tmp_path / "study/trials.csv")
    assert set(table.state) == {"complete"} and len(table) == 6
    assert sorted(name for name, _ in fake.rows()) == [f"trial_{n:04d}" for n in range(6)] and len({pid for _, pid in fake.rows()}) == 2
    monkeypatch.setenv("FAKE_SECONDS", "30")
    parent = fake(TUNE, tmp_path / "study", tmp_path, 12, 2)
    wait_for(lambda: len(fake.rows()) == 8)
    workers = psutil.Process(parent.pid).children(recursive=True)
    parent.kill()
    assert psutil.wait_procs(workers, timeout=15)[1] == []


@pytest.mark.full
def test_a_sweep_is_shared_too(fake, tmp_path):
    finish(fake(SWEEP, tmp_path / "sweep", tmp_path, 2))
    rows = fake.rows()
    assert len(rows) == len({name for name, _ in rows}) == 6 and len({pid for _, pid in rows}) == 2
    assert (tmp_path / "sweep/sweep.png").is_file()


# ---- the commands

@pytest.mark.quick
def test_usage_errors_of_sweep_and_tune(tmp_path):
    out = ["--out", tmp_path / "x"]
    assert "--grid key=[value, …]" in segnb("sweep", "demo", "--grid", "loss.name=bce", *out, code=2).stderr
    assert "nothing to search" in segnb("tune", "demo", "--trials", 3, *out, code=2).stderr
    assert not (tmp_path / "x").exists()


ONE_FOLD = settings(**{"folds.use": "[0]", "train.epoch_scale": 2})


def test_a_sweep_trains_shares_continues_and_shows_what_failed(tiny, tmp_path):
    "Two true cells, one of which cannot be trained; what one has found out about the data the other takes over"
    out = tmp_path / "sweep"
    command = ["sweep", *tiny, *ONE_FOLD, "--out", out]
    done = segnb(*command, "--grid", "optim.lr=[1e-3, 1e30]", code=1)
    assert "optim.lr=1e+30_seed=0  folds: as in optim.lr=0.001_seed=0" in done.stdout
    assert "1 failed:\noptim.lr=1e+30_seed=0: " in done.stdout and "Traceback" not in done.stderr
    fit = json.loads((out / "optim.lr=0.001_seed=0/models/small/fold0/fit.json").read_text())
    assert f"{fit['score']:.4f}" in done.stdout
    again = segnb(*command, "--grid", "optim.lr=[1e-3]", "--grid", "postprocess.min_area=[0]", "--set", "track=[csv]")   # a new cell: its fit is there already
    assert "train small fold 0: as in optim.lr=0.001_seed=0" in again.stdout and "first run" in again.stdout.split("ensemble:")[1]
    assert json.loads((out / "optim.lr=0.001_postprocess.min_area=0_seed=0/scores.json").read_text())["ensemble"]["folds"].keys() == {"0"}
    board = segnb("leaderboard", out).stdout
    assert "min_area=0" in board and "~" in board


def test_a_search_trains_and_leaves_a_recipe_that_runs(tiny, tmp_path):
    out = tmp_path / "search"
    done = segnb("tune", *tiny, *ONE_FOLD, "--trials", 1, "--out", out, "--set", "tune.space.loss.name=[bce]")
    assert "1 complete" in done.stdout and {"best.yaml", "history.png", "importance.csv", "parallel.csv", "trials.csv"} <= {p.name for p in out.iterdir()}
    assert "loss: {name: bce}" in (out / "best.yaml").read_text()
    assert "train small fold 0" not in segnb("tune", *tiny, *ONE_FOLD, "--trials", 1, "--out", out, "--set", "tune.space.loss.name=[bce]").stdout
    segnb("run", out / "best.yaml", "--out", tmp_path / "best", "--to", "check")


@pytest.mark.quick
def test_the_examples_in_the_bundled_recipes_hold(tmp_path):
    "What is commented out in a recipe is right when it is not"
    from segnb.recipe import bundled_recipes, load_recipe, recipe_text
    seen = set()
    for name in bundled_recipes():
        lines = [re.sub(r"^# (?=track:|tune:|  )", "", line) for line in recipe_text(name).splitlines()]
        (tmp_path / f"{name}.yaml").write_text("\n".join(lines), "utf8")
        recipe = load_recipe(tmp_path / f"{name}.yaml")
        seen |= {*recipe.track} | {*recipe.tune.space}
        for key, values in re.findall(r"--grid ([\w.]+)=\[(\S+)\]", "\n".join(lines)):
            for value in values.split(","): load_recipe(name, {key: value})
    assert {"tensorboard", "wandb", "optim.lr", "loss.name"} <= seen
