"""Images larger than memory, and tiles without end: what a notebook cannot prove about itself."""
import json, os, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from conftest import TINY
from segnb import ensemble
from segnb.decide import plain_decision
from segnb.data import read_samples
from segnb.ensemble import predict_test
from segnb.fast import go
from segnb.files import read_json, write_bytes, write_json
from segnb.pipeline import open_run, split_folds
from segnb.predict import Predictor
from segnb.recipe import Predict
from segnb.sample import draw_sample

BANDS = """
import resource, sys
import numpy as np
from segnb.windows import forget_rows, window_bands
image, mask = (np.lib.format.open_memmap(path, mode) for path, mode in zip(sys.argv[1:3], ("r", "r+")))
cheap = lambda windows: windows.transpose(0, 3, 1, 2) * np.float32(1 / 255)
for y0, y1, probs in window_bands(cheap, image, window=int(sys.argv[3]), batch_size=4):
    mask[y0:y1] = probs[0] > 0.5
    forget_rows(mask, y1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def write_rows(path, shape, row):
    "A .npy file of uint8, row by row"
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for y in range(shape[0]): file.write(row(y).tobytes())


def peak_of_mask(folder, height, width, window):
    "Peak resident MB of a process that turns an image file into a mask file; the mask is checked"
    ramp = np.arange(width, dtype=np.uint32)
    row = lambda y: ((ramp + 3 * y) % 256).astype(np.uint8)
    image, mask = folder / "image.npy", folder / "mask.npy"
    write_rows(image, (height, width), row)
    write_rows(mask, (height, width), lambda y: np.full(width, 7, np.uint8))
    done = subprocess.run([sys.executable, "-c", BANDS, image, mask, str(window)], capture_output=True, text=True, check=True)
    found = np.load(mask, mmap_mode="r")
    for y in {*range(0, height, 97), height - 1}: assert np.array_equal(found[y], row(y) > 127)
    return float(done.stdout)


def test_memory_does_not_grow_with_height(tmp_path):
    low, high = (peak_of_mask(tmp_path, height, 1024, 128) for height in (512, 24576))
    assert high < low + 15, (low, high)      # MB; the image has 24 MB, and its probabilities 96


class Bright(nn.Module):
    "Bright pixels are foreground, after a convolution and a norm that say little"
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.register_buffer("mean", torch.zeros(1, 3, 1, 1))
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 1, 1))

    def forward(self, x): return 0.1 * self.body(x.float() / 255) + 20 * (x[:, :1].float() - 127.5).sign()


def test_the_way_of_prediction_is_settled_once(tmp_path, monkeypatch):
    data = draw_sample("demo", tmp_path / "data", train=4, test=5, size=64)
    run = open_run("demo", tmp_path / "run", {**{k: v for k, v in TINY.items() if k != "models"}, "data.root": str(data), "folds.n": 0, "predict.batch_size": 2,
                                              "encoder_weights": None, "models": [{"name": "net", "arch": "Unet", "encoder": "mobilenet_v2"}]})
    read_samples(run.recipe).to_parquet(run.path("samples.parquet"), index=False)
    split_folds(run)
    write_json(run.path("models", "net", "fold0", "fit.json"), {"precision": "fp32", "memory_format": "contiguous"})
    write_bytes(run.path("models", "net", "fold0", "best.safetensors"), b"1")
    monkeypatch.setattr(ensemble, "load_fold", lambda *_: Bright())
    decision, note = plain_decision(run.recipe), run.path("test_masks", "way.json")
    whole = dict(predict_test(run, decision))
    assert len(whole) == 5 and not note.exists()                    # too few to judge
    monkeypatch.setattr(ensemble, "FEW", 5)
    judged = predict_test(run, decision)
    kept = read_json(note)
    assert [row["way"] for row in kept["tried"]] == ["as fitted", "folded", "folded bf16"] and judged.records.made_from["from"]["way"] == kept["way"]
    monkeypatch.setattr(ensemble, "judge_ways", None)               # from here on it is written down, in whichever way the timing went
    for way in ("as fitted", "folded", "folded bf16"):
        write_json(note, {**kept, "way": way})
        again = predict_test(run, decision)
        assert again.records.made_from["from"]["way"] == way and all((again[name] == whole[name]).all() for name in whole)
    plain = open_run("demo", tmp_path / "run", {**run.recipe.model_dump(mode="json"), "predict.fast": False})
    assert predict_test(plain, decision).records.made_from["from"]["way"] == "as fitted"


@pytest.mark.full
def test_compiled_networks_say_the_same():
    images = [np.random.default_rng(k).integers(0, 255, (64, 64, 3), dtype=np.uint8) for k in range(6)]
    make = lambda way: go(way, Predictor([Bright(0), Bright(1)], Predict(batch_size=4, tta=["hflip", "rot90"]), task="binary", weights=[3, 1]))
    wanted = make("as fitted")(images)
    for way in ("compiled", "compiled bf16"):
        predictor = make(way)
        found = predictor(images[:4]) + predictor(images[4:])      # the last batch is smaller
        assert max(np.abs(a - b).max() for a, b in zip(wanted, found)) < 1e-3


@pytest.mark.full
def test_image_of_30000_by_30000_in_2_gb(tmp_path):
    peak = peak_of_mask(tmp_path, 30_000, 30_000, 512)
    print(f"peak resident memory: {peak:.0f} MB")
    assert peak < 2000


@pytest.mark.full
def test_many_tiles_take_the_same_memory_and_time(tmp_path):
    "SEGNB_TILES=60640 for the competition's own number; SEGNB_FIGURES: a folder that keeps figure and numbers"
    tiles, folder = int(os.environ.get("SEGNB_TILES", 1500)), Path(os.environ.get("SEGNB_FIGURES", tmp_path))
    done = subprocess.run([sys.executable, Path(__file__).with_name("stream.py"), folder, "--tiles", str(tiles)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads((folder / "stream.json").read_text("utf8"))
    assert found["valid"] and found["tiles"] == tiles
    quarters, (plain, ours) = found["quarters"], found["speed"]
    assert quarters[3]["MB"] < 1.05 * quarters[1]["MB"], quarters
    assert max(q["ms"] for q in quarters) < 1.5 * min(q["ms"] for q in quarters), quarters
    assert ours["differing"] < 1e-3, ours                      # bf16 as it was fitted, beside fp32
    if "amx_bf16" in Path("/proc/cpuinfo").read_text(): assert ours["times"] > (4 if tiles > 50_000 else 3), found   # many are worth compiling
