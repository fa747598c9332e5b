"""What the tests share: the command as its own process, a sample that trains in seconds, and where the real pictures are."""
import os, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
REAL = ROOT.parent / "shared" / "data"
SEGNB = Path(sys.executable).parent / "segnb"

# A network and a sample so small that one fit takes seconds
TINY = {"models": "[{name: small, arch: Unet, encoder: mobilenet_v2}]", "train.epochs": 1, "train.batch_size": 4, "train.workers": 0,
        "train.epoch_scale": 1, "augment.size": 64, "encoder_weights": "null", "train.precision": "fp32", "train.memory_format": "contiguous"}


def pytest_configure(config):
    config.addinivalue_line("markers", "quick: for every commit, all of them in seconds")
    config.addinivalue_line("markers", "full: takes minutes (make test-full)")
    config.addinivalue_line("markers", "real: needs the real pictures in ../shared (make test-full)")


def pytest_collection_modifyitems(items):
    if REAL.is_dir(): return
    for item in items:
        if "real" in item.keywords: item.add_marker(pytest.mark.skip(reason=f"the real pictures are not here: {REAL}"))


def settings(**values):
    "`--set` options for dotted keys"
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


def segnb(*arguments, code=0, timeout=600, cwd=None, **environment):
    "Run the command; fail with what it said unless it ends with `code`"
    done = subprocess.run([SEGNB, *map(str, arguments)], capture_output=True, text=True, timeout=timeout, cwd=cwd, env={**os.environ, **environment})
    assert done.returncode == code, f"exit code {done.returncode}, expected {code}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory):
    "A small drawn data set in the demo's layout"
    folder = tmp_path_factory.mktemp("data") / "demo"
    segnb("sample", "demo", folder, "--train", 8, "--test", 4, "--size", 64)
    return folder


@pytest.fixture(scope="session")
def tiny(demo_data):
    "Arguments of a run that takes seconds for each fit"
    return ["demo", *settings(**{"data.root": demo_data, "folds.n": 2, **TINY})]


@pytest.fixture(scope="session")
def finished(tiny, tmp_path_factory):
    "A run of all stages, never interrupted: (folder, what it said)"
    folder = tmp_path_factory.mktemp("runs") / "finished"
    return folder, segnb("run", *tiny, "--out", folder)
