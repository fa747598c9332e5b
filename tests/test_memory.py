"""What the ensemble keeps in memory: many large images of many labels by eight models, under `ensemble.max_ram`."""
import json, os, re, subprocess, sys
from pathlib import Path
import numpy as np
import pytest
from segnb.combine import OutOfFold, evaluate, sample_pixels
from segnb.recipe import load_recipe
from segnb.store import ProbStore, ProbWriter

MODELS = [f"net{m}" for m in range(8)]


def draw_stores(folder, images, labels, size):
    "Blocks of probability with a noisy row here and there; the other models hold the first one's images by other names"
    rng, block = np.random.default_rng(0), np.ones((32, 32), np.uint8)
    writer = ProbWriter(folder / MODELS[0], {})
    for i in range(images):
        planes = np.stack([np.kron(rng.integers(0, 256, (size // 32, size // 32), np.uint8), block) for _ in range(labels)])
        planes[:, ::size // 8] = rng.integers(0, 256, planes[:, ::size // 8].shape, np.uint8)
        writer.put(f"hand {i}", planes, np.zeros((labels, 2, 256)))
    writer.close()
    for m, name in enumerate(MODELS[1:], 1):
        (folder / name).mkdir()
        os.link(folder / MODELS[0] / "data.bin", folder / name / "data.bin")
        lines = [json.loads(line) for line in (folder / MODELS[0] / "index.jsonl").read_text().splitlines()]
        for n, line in enumerate(line for line in lines if "name" in line): line["name"] = f"hand {(n + m) % images}"
        (folder / name / "index.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def truth(i, c, size):
    "One label of one image"
    y, x = np.ogrid[:size, :size]
    return ((y // 48 + x // 80 + i + c) % 3 == 0).astype(np.uint8)


def open_stores(folder, images, labels, size, task, max_ram):
    recipe = load_recipe("handbone" if task == "multilabel" else "indoor", {"classes": [f"bone {c}" for c in range(labels)], "models": [{"name": m} for m in MODELS], "ensemble.max_ram": max_ram})
    def mask(i):
        if task == "multiclass": return truth(i, 0, size)
        planes = np.empty((labels, size, size), np.uint8)
        for c in range(labels): planes[c] = truth(i, c, size)
        return planes.transpose(1, 2, 0)
    return OutOfFold(recipe, {m: ProbStore(folder / m) for m in MODELS}, [f"hand {i}" for i in range(images)], np.arange(images) % 2, mask, mask)


def memory(what):
    "Bytes of this process, resident now (VmRSS) or at its peak (VmHWM); a peak by `resource` would begin with that of the process that started it"
    return int(re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def measure(folder, images, labels, size, max_ram):
    "Judge mean and vote, and sample for a search; prints how much more memory than the interpreter's that took"
    folder, images, labels, size = Path(folder), int(images), int(labels), int(size)
    mean, before = {m: 1 / 8 for m in MODELS}, memory("VmRSS")
    found = evaluate(oof := open_stores(folder, images, labels, size, "multilabel", float(max_ram)), mean)
    one = oof.subset([0])
    cast = evaluate(one, {m: {"votes": 1, "thresholds": [0.4] * labels} for m in MODELS})
    exclusive = evaluate(open_stores(folder, 1, labels, size, "multiclass", float(max_ram)), mean)
    taken = sum(array.nbytes for pixels in sample_pixels(oof) for array in (*pixels.bins, pixels.true, pixels.weight))
    np.savez(folder / "found.npz", thresholds=found.thresholds, counts=found.counts, cast=cast.counts, exclusive=exclusive.counts)
    print(json.dumps({"bytes": memory("VmHWM") - before, "sample": taken}))


def exact(folder, i, c):
    "float64: (8, H, W) of one label of one image"
    return np.stack([(ProbStore(folder / m).bins(f"hand {i}", c) + 0.5) / 256 for m in MODELS])


def check_memory(folder, images, labels, size, cap, planes):
    draw_stores(folder, images, labels, size)
    done = subprocess.run([sys.executable, __file__, folder, *map(str, (images, labels, size, cap))], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    said, found = json.loads(done.stdout), np.load(folder / "found.npz")
    print(f"{images} images of {labels} x {size} x {size} by 8 models: {said['bytes'] / 2**20:.0f} MB above the interpreter")
    assert said["bytes"] < cap * 2**30 and said["sample"] <= 2**26
    for i, c in planes:
        probs, true = exact(folder, i, c), truth(i, c, size)
        for part, pred in ((found["counts"][i, c], probs.mean(0) >= found["thresholds"][c]), (found["cast"][0, c] if i == 0 else None, np.add.reduce(probs >= 0.4) >= 4 + (probs[0] < 0.4))):
            if part is not None: assert part.tolist() == [np.count_nonzero(pred & (true == 1)), np.count_nonzero(pred), np.count_nonzero(true)]
    best, most = np.zeros((size, size), np.uint8), np.full((size, size), -1.0)
    for c in range(labels):
        mean = exact(folder, 0, c).mean(0)
        best[mean > most], most = c, np.maximum(most, mean)
    assert found["exclusive"][0, :, 1].tolist() == np.bincount(best.ravel(), minlength=labels).tolist()


linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured as Linux tells it")


@linux
def test_memory_is_that_of_a_band(tmp_path):
    "An image as float32 is 116 MB, eight models of it 928 MB"
    check_memory(tmp_path, 2, 29, 1024, 0.25, [(0, 0), (1, 28)])


@linux
@pytest.mark.full
def test_memory_of_twenty_large_images(tmp_path):
    "An image as float32 is 464 MB, eight models of it 3.6 GB"
    check_memory(tmp_path, 20, 29, 2048, 1, [(0, 0), (7, 11), (19, 28)])


if __name__ == "__main__": measure(*sys.argv[1:])
