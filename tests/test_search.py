"""Tracked runs that are killed, sweeps and searches that share a folder: what takes processes to show."""
import json, os, signal, socket, subprocess, sys, time
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
