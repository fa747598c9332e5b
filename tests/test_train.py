"""What a notebook cannot prove of a fit: several processes, kills at any instant, memory that runs out, processes whose parent dies."""
import json, os, random, re, shutil, signal, subprocess, sys, time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from conftest import SEGNB
from safetensors.torch import load_file

from segnb import train
from segnb.cli import differing, standing
from segnb.files import SegnbError
from segnb.launch import Place
from segnb.pipeline import STAGES, Run, Task, open_run, reason, run_pipeline, task_parts
from segnb.sample import draw_sample

SMALL = {"models": [{"name": "small", "arch": "Unet", "encoder": "mobilenet_v2", "options": {"encoder_depth": 3, "decoder_channels": [16, 8, 8]}}],
         "folds.n": 2, "augment.size": 64, "encoder_weights": None, "train.precision": "fp32", "train.memory_format": "contiguous", "train.workers": 0,
         "train.epochs": 2, "train.batch_size": 4, "train.epoch_scale": 2, "train.ema": None, "loss": {"name": "bce"}}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    "A function that opens a run of its own on the same small data, ready to train"
    home = tmp_path_factory.mktemp("train")
    data = draw_sample("demo", home / "data", train=8, test=1, size=64)
    def start(name, **settings):
        run = open_run("demo", home / name, {"data.root": data, **SMALL, **{k.replace("__", "."): v for k, v in settings.items()}})
        run.need("train")
        return run
    return start


def weights(run): return load_file(run.path("models/small/fold0/best.safetensors"))

def curve(run): return pd.read_csv(run.path("models/small/fold0/metrics.csv"))

def bare(run):
    "The files of a fit as bytes; the curve without what a clock says"
    return run.path("models/small/fold0/best.safetensors").read_bytes(), curve(run).drop(columns=["seconds", "images_per_s", "waited"]).to_csv()

def script(call, *arguments, **options):
    "Python that runs `call` in a process of its own"
    return subprocess.Popen([sys.executable, "-c", call, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)

FIT = "import sys; from segnb.pipeline import Run; from segnb.train import fit_fold; fit_fold(Run(sys.argv[1]), 'small', 0)"


SGD = {"name": "sgd", "lr": .05}   # Adam's first steps follow the sign of a gradient, and so of its last bit where it is nearly 0

@pytest.fixture(scope="module")
def alone(start):
    run = start("alone", optim=SGD)
    train.fit_fold(run, "small", 0)
    return run


def agree(run, alone):
    """Several processes and one: the same samples, BatchNorm over all of them, a loss that is a mean over pixels, sums in another order.
    Losses agree to 1e-4 of their value, weights to 1e-3, and the validation score, which counts pixels, to 2e-3"""
    one, many = curve(alone), curve(run)
    assert (one.step == many.step).all()
    np.testing.assert_allclose(many.loss, one.loss, rtol=1e-4)
    np.testing.assert_allclose(many.score, one.score, atol=2e-3)
    theirs = weights(alone)
    for name, value in weights(run).items(): np.testing.assert_allclose(value, theirs[name], rtol=1e-3, atol=1e-3, err_msg=name)


def test_two_processes_at_half_the_batch_reach_the_score_of_one(start, alone, capsys):
    run = start("two", optim=SGD, train__devices=2)
    fit = train.fit_fold(run, "small", 0)
    assert (fit["processes"], fit["images_per_step"], fit["valid_images"]) == (2, 4, 4)
    agree(run, alone)
    assert capsys.readouterr().err.count("small fold 0") > 0          # the first process's bar is passed on
    assert "finished already" in (train.fit_fold(run, "small", 0), capsys.readouterr().out)[1]


@pytest.mark.full
def test_two_processes_have_the_row_of_one_in_the_leaderboard(start):
    "Both folds, then the ensemble: score and spread to the tolerance of `agree`, and nothing but the number of processes differs"
    runs = [start(name, optim=SGD, train__devices=n, postprocess={"threshold": .5, "min_area": 0}) for name, n in (("one_row", 1), ("two_rows", 2))]
    for run in runs: run_pipeline(run.path("recipe.yaml"), run.folder, from_stage="train", to_stage="ensemble")
    one, two = (standing(run.folder) for run in runs)
    assert not one["fits"] and one["score"] == pytest.approx(two["score"], abs=2e-3) and one["spread"] == pytest.approx(two["spread"], abs=2e-3)
    assert differing([one["recipe"], two["recipe"]]) == [{"train.devices": 1}, {"train.devices": 2}]


def test_torchrun_trains_a_fit_that_the_pipeline_finds_up_to_date(start, alone):
    run = start("torchrun", optim=SGD, train__devices="auto")
    call = f"from segnb.train import fit_in_group; fit_in_group({str(run.folder)!r}, 'small', 0)"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--rdzv-backend", "c10d",
               "--rdzv-endpoint", "localhost:0", "--no-python", sys.executable, "-c", call]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    # devices: auto is one process where there is no GPU, and two were started: that is what the place says
    assert done.returncode == 0, done.stderr[-2000:]
    agree(run, alone)
    task = Task(STAGES["train"], "small", 0)
    assert reason(Run(run.folder), task, task_parts(Run(run.folder), task)) == ""


def test_kills_leave_no_trace(start):
    "SIGKILL at random instants, checkpoints after every step; EMA, accumulation, mixing, a plateau and a worker"
    options = dict(train__ema=.9, train__accumulate=2, train__epochs=3, train__epoch_scale=16, train__workers=1, train__checkpoint_minutes=1e-9,
                   mixing=[{"name": "mixup", "p": .5}], optim__schedule={"name": "plateau", "patience": 0, "threshold": 9})
    whole, cut = start("whole", **options), start("cut", **options)
    train.fit_fold(whole, "small", 0)
    random.seed(0)
    checkpoint, kills = cut.path("models/small/fold0/last.ckpt"), 0
    while not cut.path("models/small/fold0/fit.json").exists():
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        process = script(FIT, cut.folder)
        try:
            while process.poll() is None and (not checkpoint.exists() or checkpoint.stat().st_mtime_ns == before): time.sleep(.01)
            if kills < 3:
                time.sleep(random.random() * .2)
                process.kill()
                kills += 1
        finally: process.stdout.read(); process.wait()
    assert kills == 3 and bare(cut) == bare(whole)
    assert [p.name for p in cut.path("models/small/fold0").glob(".*")] == []


def test_ctrl_c_ends_the_command_with_its_own_code(start):
    "130 and one paragraph, where Lightning would exit with 1 and say nothing"
    run = start("interrupted", train__epochs=500)
    process = subprocess.Popen([SEGNB, "fit", run.folder], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    try:
        while not run.path("models/small/fold0/last.ckpt").exists(): assert process.poll() is None; time.sleep(.05)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
    finally: process.kill()
    assert process.returncode == 130 and "Interrupted." in said and "Traceback" not in said


class Greedy(torch.nn.Module):
    "A loss that runs out of memory over more than `limit` images"
    maps = None
    def __init__(self, limit): super().__init__(); self.limit, self.seen = limit, set()
    def forward(self, logits, target, maps=None):
        if len(logits) > self.limit: raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        self.seen.add(len(logits))
        return torch.nn.functional.binary_cross_entropy_with_logits(logits, target)


@pytest.mark.parametrize("where", ["fit", "probe"])
def test_memory_runs_out(start, monkeypatch, capsys, where):
    "The batch is halved, the step sees as many images, and the run remembers"
    run = start(f"greedy_{where}", **({"train__precision": "auto"} if where == "probe" else {}))
    loss = Greedy(limit=1)
    monkeypatch.setattr(train, "build_loss", lambda *args, **options: loss)
    fit = train.fit_fold(run, "small", 0)
    said = capsys.readouterr().out
    assert said.count("memory ran out") == 2 and "a step still sees 4 images" in said
    assert (fit["batch_size"], fit["split"], fit["accumulate"], fit["images_per_step"], fit["steps"]) == (4, 4, 4, 4, 4) and loss.seen == {1}
    assert Run(run.folder).recipe.models[0].split == 4
    loss.limit = 0
    with pytest.raises(SegnbError, match="one image at a time"): train.fit_fold(run, "small", 1)


class StopsAt(torch.nn.Module):
    "The recipe's loss, which raises at call `n`"
    def __init__(self, inner, n): super().__init__(); self.inner, self.n, self.maps = inner, n, inner.maps
    def forward(self, *args):
        self.n -= 1
        if self.n == 0: raise KeyError("stopped")
        return self.inner(*args)


DOORS = {"models": [{"name": "small", "arch": "UnetPlusPlus", "encoder": "resnet18", "options": {"encoder_depth": 3, "decoder_channels": [16, 8, 8],
                                                                                                 "deep_supervision": True}}],
         "loss": {"name": "sum", "terms": [{"name": "dice"}, {"name": "boundary", "weight": .5}]}, "mixing": [{"name": "cutmix", "p": .5}, {"name": "mixup", "p": 1}],
         "sampling": {"weights": {"name": "rare"}, "foreground": [1, 0]}, "train.ema": .9, "train.accumulate": 2, "train.batch_size": 2, "train.checkpoint_minutes": 1e-9,
         "optim": {"name": "radam", "freeze_encoder": 1, "clip": .5, "encoder_lr_scale": .1, "schedule": {"name": "poly", "warmup_epochs": 1, "per": "epoch"}}}
WITHOUT = {"models": [{**DOORS["models"][0], "options": {**DOORS["models"][0]["options"], "deep_supervision": False}}], "loss": {"name": "dice"}, "mixing": [],
           "sampling": {"weights": None, "foreground": None}, "optim": {"freeze_encoder": 0}}


def test_every_room_is_wired_and_survives_a_stop(start, monkeypatch):
    "Deep supervision, distance maps, mixing and a sampling that changes from epoch to epoch, together: each matters, and a fit cut in the middle of them ends alike"
    make = lambda name, **changed: start(name, **{k.replace(".", "__"): v for k, v in {**DOORS, **changed}.items()})
    whole, cut, real, made = make("doors"), make("doors_cut"), train.build_loss, []
    def fit(run, n):
        monkeypatch.setattr(train, "build_loss", lambda *args, **options: made.append(StopsAt(real(*args, **options), n)) or made[-1])
        train.fit_fold(run, "small", 0)
    fit(whole, 10**6)
    calls = 10**6 - made[-1].n   # several a batch: MixUp and each output have their own
    for n in (calls // 3, calls // 2):
        with pytest.raises(KeyError): fit(cut, n)
    monkeypatch.setattr(train, "build_loss", real)
    train.fit_fold(cut, "small", 0)
    assert bare(cut) == bare(whole)
    for key, value in WITHOUT.items():
        other = make(f"doors_{key}", **{key: {**DOORS[key], **value} if isinstance(value, dict) and key != "loss" else value})
        train.fit_fold(other, "small", 0)
        assert curve(other).loss.tolist() != curve(whole).loss.tolist(), key


def test_deep_supervision_leaves_the_network_as_it_is(start, alone, monkeypatch):
    "Heads that only training has: other weights of the same names, a network that predicts, and a fit that is cut and continues to the same bytes"
    deep, cut = (start(name, optim=SGD, train__deep_supervision=1.0, train__checkpoint_minutes=1e-9) for name in ("deep", "deep_cut"))
    train.fit_fold(deep, "small", 0)
    assert weights(deep).keys() == weights(alone).keys() and not torch.equal(weights(deep)["net.segmentation_head.0.weight"], weights(alone)["net.segmentation_head.0.weight"])
    assert train.load_fold(deep, "small", 0)(torch.zeros(1, 3, 64, 64)).shape == (1, 1, 64, 64)
    with monkeypatch.context() as patch:
        patch.setattr(train, "build_loss", lambda *args, build=train.build_loss, **options: StopsAt(build(*args, **options), 8))   # three outputs a batch: within the third
        with pytest.raises(KeyError): train.fit_fold(cut, "small", 0)
    train.fit_fold(cut, "small", 0)
    assert bare(cut) == bare(deep)


def test_processes_whose_memory_runs_out_halve_the_batches_once(alone, monkeypatch):
    run = Run(shutil.copytree(alone.folder, alone.folder.with_name("race")))

    def first(fit, started):
        Run(run.folder).decide("small", split=2)   # the other process did
        raise MemoryError

    there = {"find_place": lambda *_: (Place(rank=1, world=2), False), "joined": nullcontext, "slowest": lambda place, *seconds: seconds, "fit_here": first}
    for name, value in there.items(): monkeypatch.setattr(train, name, value)
    with pytest.raises(SegnbError, match="start the same processes again"): train.fit_in_group(run.folder, "small", 0)
    assert Run(run.folder).recipe.models[0].split == 2


@pytest.mark.full
def test_a_group_that_runs_out_of_memory_is_started_anew(start, capsys):
    run = start("group", train__devices=2)
    hook = run.folder / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text("""
import os, sys, threading, time
def patch():
    while "segnb.train" not in sys.modules or not hasattr(sys.modules["segnb.train"], "fit_process"): time.sleep(.001)
    import torch, segnb.train as train
    real = train.build_loss
    class Greedy(torch.nn.Module):
        maps = None
        def __init__(self, inner): super().__init__(); self.inner = inner
        def forward(self, logits, target, maps=None):
            if len(logits) > 1 and os.environ.get("RANK") == "1": raise torch.OutOfMemoryError("CUDA out of memory")
            return self.inner(logits, target)
    train.build_loss = lambda *a, **k: Greedy(real(*a, **k))
if os.environ.get("LOCAL_WORLD_SIZE"): threading.Thread(target=patch, daemon=True).start()
""")
    old = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(hook), old]))
    try: fit = train.fit_fold(run, "small", 0)
    finally: os.environ.pop("PYTHONPATH") if old is None else os.environ.update(PYTHONPATH=old)
    assert (fit["split"], fit["processes"], fit["images_per_step"]) == (2, 2, 4)
    assert "memory ran out" in capsys.readouterr().out


def test_processes_end_with_their_parent():
    "Killed, so that it could not tell them"
    process = script("from segnb.launch import launch; launch('subprocess:check_call', {'args': ['sleep', '60']}, 2)")
    deadline = time.time() + 60
    while len(group := psutil.Process(process.pid).children(recursive=True)) < 4: assert time.time() < deadline; time.sleep(.1)
    process.kill()
    sleepers = [p for p in group if p.name() == "sleep"]
    alive = psutil.wait_procs([p for p in group if p not in sleepers], timeout=20)[1]
    for p in sleepers: p.kill()
    process.stdout.close(); process.wait()
    assert len(group) - len(sleepers) == 2 and not alive


def test_epoch_scale_is_said_to_be_left_aside(start, capsys):
    run = start("budget", train__minutes=1)
    run.decide("small", precision="fp32", memory_format="contiguous", compile=False, steps=2)
    train.fit_fold(run, "small", 0)
    assert re.search(r"epoch_scale 2 is left aside: .* 1 batches", capsys.readouterr().out)
    assert curve(run).step.tolist() == [1, 2]
