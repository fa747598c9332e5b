"""Draw many tiles, send them through one small network to a validated submission, show memory and time on the way, and how fast a plain loop is.

python tests/stream.py FOLDER --tiles 60640    →  FOLDER/stream.png, stream.csv, stream.json

The drawn tiles take about 90 KB each (5.5 GB for 60,640) and are deleted at the end.
"""
import argparse, copy, json, shutil, subprocess, sys, tempfile, time
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import psutil
import torch
from tqdm import tqdm

from conftest import SEGNB, TINY, settings
from segnb.ensemble import _write_masks, ensemble_of, most_pixels, read_decision
from segnb.fast import differing_share
from segnb.figures import new_figure, save_figure, use_style
from segnb.files import read_json, write_json
from segnb.masks import rle_decode
from segnb.pipeline import Run
from segnb.predict import keep_memory
from segnb.sample import draw_sample
from segnb.speed import plain_predict, take_turns
from segnb.store import MaskStore, MaskWriter
from segnb.submit import make_submission
from segnb.train import best_device, load_fold

TILE, TILE_BYTES = 224, 130_000   # pixels a side; room on the disk for a drawn one and its mask


def draw_tiles(folder, tiles, drawn=60):
    "A satellite sample of `tiles` test images: `drawn` of them, and these shifted, so that no two are the same"
    folder.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(folder).free) < 2 * tiles * TILE_BYTES: sys.exit(f"{folder} has {free / 2**30:.1f} GB free, and {tiles} tiles want {2 * tiles * TILE_BYTES / 2**30:.1f}.")
    root = draw_sample("satellite", folder / "raw", train=80, test=min(drawn, tiles), size=TILE)
    images = [cv2.imread(str(path)) for path in sorted((root / "test_img").iterdir())]
    for k in tqdm(range(len(images), tiles), desc="drawing", unit="tile"):
        shifted = np.roll(images[k % len(images)], (3 * k // len(images), 5 * k // len(images)), (0, 1))
        cv2.imwrite(str(root / f"test_img/TEST_{k:05d}.png"), shifted, [cv2.IMWRITE_PNG_COMPRESSION, 1])
    names = [f"TEST_{k:05d}" for k in range(tiles)]
    pd.DataFrame({"img_id": names, "img_path": [f"./test_img/{n}.png" for n in names]}).to_csv(root / "test.csv", index=False)
    pd.DataFrame({"img_id": names, "mask_rle": -1}).to_csv(root / "sample_submission.csv", index=False)
    return root


def watch(command, index):
    "Run `command`; each half second: seconds, MB and processor seconds of it and its children, tiles done"
    process, start, rows, done, at = subprocess.Popen(command), time.monotonic(), [], 0, 0
    while process.poll() is None:
        time.sleep(.5)
        if index.exists():
            with open(index, "rb") as file:
                file.seek(at)
                new = file.read()
            at, done = at + len(new), done + new.count(b'{"name"')
        rows.append((time.monotonic() - start, *taken(process.pid), done))
    if process.returncode: sys.exit(f"{' '.join(map(str, command))} ended with {process.returncode}")
    return pd.DataFrame(rows, columns=["seconds", "MB", "work", "tiles"])


def taken(pid):
    "MB and processor seconds of a process and all that it started"
    memory = work = 0
    try: family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess: return np.nan, np.nan
    for process in family:
        try: memory, work = memory + process.memory_info().rss, work + sum(process.cpu_times()[:2])
        except psutil.NoSuchProcess: pass
    return memory / 2**20, work


def quarters(table, tiles):
    "Largest memory, and the processor's time a tile, of each quarter of the prediction"
    predicting, found = table[(table.tiles > 0) & (table.tiles < tiles)], []
    for low in (0, .25, .5, .75):
        part = predicting[predicting.tiles.between(low * tiles, (low + .25) * tiles)]
        spent = {what: (part[what].iloc[-1] - part[what].iloc[0]) / (part.tiles.iloc[-1] - part.tiles.iloc[0]) for what in ("work", "seconds")}
        found.append({"MB": round(part.MB.max(), 1), "ms": round(1000 * spent["work"], 2), "wall_ms": round(1000 * spent["seconds"], 2)})
    return found


def compare(run, tiles, batch=16):
    "The run's network over the same tiles, from files to a CSV, in turns: by a plain loop, and by the stages' own functions, which validate it too"
    samples, decision, note = run.samples(), read_decision(run), run.path("test_masks", "way.json")
    rows, way = samples.index[samples.split == "test"].tolist()[:tiles], read_json(note)["way"] if note.exists() else "as fitted"
    net, recipe = copy.deepcopy(load_fold(run, "small", 0).net).float().to(memory_format=torch.contiguous_format).eval(), run.recipe
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"sample_submission": "none.csv"})})   # that of all tiles
    predictor, pack = ensemble_of(run, decision, most_pixels(run, rows), recipe.submit.size, way=way), run.pack()
    with tempfile.TemporaryDirectory() as folder:
        def plain(part):
            texts = plain_predict(net, [recipe.data.root / samples.image[i] for i in part], decision.thresholds[0], batch, best_device())
            pd.DataFrame({"img_id": samples.image_id[part], "mask_rle": [text or -1 for text in texts]}).to_csv(Path(folder) / "plain.csv", index=False)
            return [rle_decode(text, pack.shape(i)) for i, text in zip(part, texts)]
        def ours(part):
            keep_memory()
            writer = MaskWriter(Path(folder) / f"masks {part[0]}", {"at": time.time()})
            _write_masks(run, predictor, writer, part, decision, {})
            writer.close()
            masks = MaskStore(writer.folder)
            make_submission(recipe, masks, Path(folder) / "ours.csv", samples=samples.loc[part])
            return list(masks.values())
        table, masks = take_turns({"plain fp32 loop": plain, f"segnb, {way}": ours}, [rows[k:k + 64 * batch] for k in range(0, len(rows), 64 * batch)])
    return table.assign(differing=[0.0, differing_share(*masks.values())])


def figure(table, tiles, speed):
    "Memory over time, time a tile over tiles, and images/s beside the plain loop"
    use_style()
    fig, axes = new_figure(1, 3, size=(4.2, 3), title=f"{tiles:,} tiles of {TILE} x {TILE} to a validated submission")
    predicting = table[(table.tiles > 0) & (table.tiles < tiles)]
    axes[0, 0].plot(table.seconds / 60, table.MB)
    axes[0, 0].axvspan(predicting.seconds.min() / 60, predicting.seconds.max() / 60, alpha=.15, label="predicting")
    axes[0, 0].set(xlabel="minutes", ylabel="resident memory in MB", ylim=(0, None))
    axes[0, 0].legend(loc="lower right")
    step = predicting.groupby(predicting.tiles * 20 // tiles).first()
    axes[0, 1].plot(step.tiles[1:], 1000 * np.diff(step.work) / np.diff(step.tiles), marker="o")
    axes[0, 1].set(xlabel="tiles", ylabel="processor ms a tile", ylim=(0, 1200 * np.max(np.diff(step.work) / np.diff(step.tiles))))
    bars = axes[0, 2].barh(speed.loop, speed["images/s"], color=["#9aa1ab", "#d55e00"])
    axes[0, 2].bar_label(bars, [f"{n:.0f} ({times:.1f} x)" for n, times in zip(speed["images/s"], speed.times)], padding=3)
    axes[0, 2].set(xlabel="images/s, files to CSV, in turns", xlim=(0, 1.4 * speed["images/s"].max()))
    return fig


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tiles", type=int, default=60640)
    parser.add_argument("--encoder", default="resnet18", help="of the small network, a Unet")
    parser.add_argument("--turns", type=int, default=2048, help="tiles that the plain loop and segnb take turns at")
    options = parser.parse_args()
    folder, tiles = options.folder, options.tiles
    root = draw_tiles(folder, tiles)
    try: found = measure(folder, root, tiles, options)
    finally:
        for part in (root, folder / "run/test_masks"): shutil.rmtree(part, ignore_errors=True)
    write_json(folder / "stream.json", found)
    print(json.dumps(found))


def measure(folder, root, tiles, options):
    "The stages over all tiles, watched, and the comparison"
    how = settings(**{**TINY, "models": f"[{{name: small, arch: Unet, encoder: {options.encoder}}}]", "data.root": root, "folds.n": 0, "augment.size": TILE, "train.epochs": 12,
                      "train.precision": "bf16", "train.memory_format": "channels_last", "postprocess.threshold": 0.5, "predict.tta": [], "predict.batch_size": 16})
    run = [SEGNB, "run", "satellite", "--out", folder / "run", *how]
    seconds = {}
    for stage in ("check", "train"):
        start = time.monotonic()
        subprocess.run([*run, "--from", stage, "--to", stage], check=True)
        seconds[stage] = round(time.monotonic() - start, 1)
    table = watch([*run, "--from", "ensemble", "--to", "submit"], folder / "run/test_masks/index.jsonl")
    predicting = table[(table.tiles > 0) & (table.tiles < tiles)].seconds
    seconds |= {"before the first tile": round(predicting.iloc[0], 1), "predicting": round(predicting.iloc[-1] - predicting.iloc[0], 1),
                "submit": round(table.seconds.iloc[-1] - predicting.iloc[-1], 1)}
    valid = subprocess.run([SEGNB, "validate", "satellite", folder / "run/submission.csv", "--set", f"data.root={root}"]).returncode == 0
    speed = compare(Run(folder / "run"), min(tiles, options.turns))
    save_figure(figure(table, tiles, speed), folder / "stream.png", table)
    return {"tiles": tiles, "encoder": options.encoder, "valid": valid, "quarters": quarters(table, tiles), "seconds": seconds, "speed": speed.to_dict("records")}


if __name__ == "__main__": main()
