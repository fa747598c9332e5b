"What the pack's notebook cannot prove about itself: other processes, kills, full disks, memory"
import multiprocessing, os, signal, subprocess, sys, textwrap, time
import albumentations as A
import numpy as np
import pytest
import torch
from segnb.data import read_samples
from segnb.pack import Pack, StepBatches, StoredPack, TrainDataset, ArrayWriter, Arrays, make_loader, open_pack, pack_key
from segnb.recipe import load_recipe
from segnb.sample import draw_sample

PRELUDE = """
import sys, time, warnings
from pathlib import Path
import segnb.pack as pack
from segnb.data import read_samples
from segnb.recipe import load_recipe
raw, cache = map(Path, sys.argv[1:3])
recipe = load_recipe("demo", {"data.root": raw})
samples = read_samples(recipe)
def slowly(recipe, row, read=pack.read_pair):
    time.sleep(.2)
    return read(recipe, row)
"""

def start(body, *args):
    "Python in another process"
    return subprocess.Popen([sys.executable, "-c", PRELUDE + textwrap.dedent(body), *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

@pytest.fixture(scope="module")
def raw(tmp_path_factory): return draw_sample("demo", tmp_path_factory.mktemp("raw"), train=8, test=2)

@pytest.fixture(scope="module")
def opened(raw):
    recipe = load_recipe("demo", {"data.root": raw})
    return recipe, read_samples(recipe)

def test_killed_build_leaves_nothing_that_looks_whole(raw, opened, tmp_path):
    build = start("pack.read_pair = slowly; pack.open_pack(recipe, samples, cache, workers=1)", raw, tmp_path)
    while not list(tmp_path.glob(".*.part/images.bin")):
        assert build.poll() is None, build.communicate()[1]
        time.sleep(.02)
    build.send_signal(signal.SIGKILL)
    build.wait()
    left = list(tmp_path.glob(".*.part"))
    assert left and not [p for p in tmp_path.iterdir() if p.is_dir() and p not in left]
    pack = open_pack(*opened, tmp_path)
    assert isinstance(pack, StoredPack)
    np.testing.assert_array_equal(pack.image(7), Pack(*opened).image(7))

def test_two_processes_build_at_once(raw, opened, tmp_path):
    body = """
    pack.read_pair = slowly
    found = pack.open_pack(recipe, samples, cache)
    print(found.folder.name, int(sum(found.image(i).sum() for i in found.train)))
    """
    both = [start(body, raw, tmp_path) for _ in range(2)]
    answers = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], answers
    assert answers[0][0] == answers[1][0]
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == [pack_key(*opened, tmp_path)]

def test_disk_that_fills_up_while_building(raw, tmp_path):
    body = """
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))   # writing past it fails as on a full disk
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = pack.open_pack(recipe, samples, cache)
    assert type(found) is pack.Pack and len(said) == 1 and "data.cache" in str(said[0].message), said
    assert not [p for p in cache.iterdir() if p.is_dir()]
    found.image(0), found.mask(0)
    """
    process = start(body, raw, tmp_path)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 0, errors

def test_spawned_workers_give_the_same_batches(opened, tmp_path):
    pack = open_pack(*opened, tmp_path)
    dataset = TrainDataset(pack, pack.train, A.Compose([A.RandomCrop(32, 32), A.HorizontalFlip(), A.Rotate(30)]), seed=3)
    batches = StepBatches(len(dataset), 3, 0, 4)
    loader = make_loader(dataset, batches, 2)
    loader.multiprocessing_context = multiprocessing.get_context("spawn")
    for ours, theirs in zip(make_loader(dataset, batches, 0), loader, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)

@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="counts mapped pages as Linux does")
def test_a_window_reads_only_its_rows(tmp_path):
    with ArrayWriter(tmp_path / "images.bin") as writer:
        writer.add(np.zeros((8192, 4096, 3), np.uint8))
        index = writer.finish()
    mapped = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("RssFile")).split()[1]) / 1024
    image, before = Arrays(tmp_path / "images.bin", index)[0], mapped()
    np.array(image[100:164, 50:114])
    assert mapped() - before < 8      # MB; the window's rows are 0.8 MB of 96
    image.max()
    assert mapped() - before > 80     # and the measure does see what is read
