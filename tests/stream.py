"""Draw many tiles, send them through one small network to a validated submission, and show memory and time on the way.

python tests/stream.py FOLDER --tiles 60640    →  FOLDER/stream.png, stream.csv, stream.json
"""
import argparse, json, subprocess, sys, time
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import psutil
from tqdm import tqdm

from conftest import SEGNB, TINY, settings
from segnb.figures import new_figure, save_figure, use_style
from segnb.sample import draw_sample


def draw_tiles(folder, tiles, drawn=60):
    "A satellite sample of `tiles` test images: `drawn` of them, and these shifted, so that no two are the same"
    root = draw_sample("satellite", folder / "raw", train=8, test=min(drawn, tiles), size=224)
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


def figure(table, tiles):
    "Memory over time, and time a tile over tiles"
    use_style()
    fig, axes = new_figure(1, 2, size=(9, 3), title=f"{tiles:,} tiles of 224 x 224 to a validated submission")
    predicting = table[(table.tiles > 0) & (table.tiles < tiles)]
    axes[0, 0].plot(table.seconds / 60, table.MB)
    axes[0, 0].axvspan(predicting.seconds.min() / 60, predicting.seconds.max() / 60, alpha=.15, label="predicting")
    axes[0, 0].set(xlabel="minutes", ylabel="resident memory in MB", ylim=(0, None))
    axes[0, 0].legend(loc="lower right")
    step = predicting.groupby(predicting.tiles * 20 // tiles).first()
    axes[0, 1].plot(step.tiles[1:], 1000 * np.diff(step.work) / np.diff(step.tiles), marker="o")
    axes[0, 1].set(xlabel="tiles", ylabel="processor ms a tile", ylim=(0, None))
    return fig


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tiles", type=int, default=60640)
    parser.add_argument("--size", default="null", help="what the network sees instead of 224: a quick look at memory")
    options = parser.parse_args()
    folder, tiles = options.folder, options.tiles
    root = draw_tiles(folder, tiles)
    how = settings(**{**TINY, "data.root": root, "folds.n": 0, "augment.size": 224, "train.precision": "bf16", "train.memory_format": "channels_last",
                   "postprocess.threshold": 0.5, "predict.tta": [], "predict.batch_size": 16, "predict.size": options.size})
    run = [SEGNB, "run", "satellite", "--out", folder / "run", *how]
    seconds = {}
    for stage in ("check", "train"):
        start = time.monotonic()
        subprocess.run([*run, "--from", stage, "--to", stage], check=True)
        seconds[stage] = round(time.monotonic() - start, 1)
    table = watch([*run, "--from", "ensemble", "--to", "submit"], folder / "run/test_masks/index.jsonl")
    valid = subprocess.run([SEGNB, "validate", "satellite", folder / "run/submission.csv", "--set", f"data.root={root}"]).returncode == 0
    found = {"tiles": tiles, "valid": valid, "quarters": quarters(table, tiles), "seconds": seconds}
    save_figure(figure(table, tiles), folder / "stream.png", table)
    (folder / "stream.json").write_text(json.dumps(found, indent=1), "utf8")
    print(json.dumps(found))


if __name__ == "__main__": main()
