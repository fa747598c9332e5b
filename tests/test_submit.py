"""Every corruption of a submission is refused, with the reason; a file that is right stays right.

Two guards stand before an upload. `validate_submission` sees the file alone: `TABLES`, `ZIPS`, `PICKLES` and the broken files are what it must name. What is wrong in a file
that is valid in itself (`MEANT`: the masks of two images swapped, runs counted from another base) only `make_submission` can see, which compares with what was meant."""
import gzip, io, pickle, re, zipfile

import cv2
import joblib
import numpy as np
import pandas as pd
import pytest
from conftest import REAL
from PIL import Image

from segnb.data import read_samples
import segnb.submit
from segnb.files import SegnbError
from segnb.formats import submission_suffix
from segnb.recipe import load_recipe
from segnb.submit import make_submission, read_submission, score_submission, validate_submission, write_submission

SIZES = {"b 1.png": (24, 40), "a,2.png": (24, 40), "c_3.png": (24, 40), "d_4.png": (24, 40)}
SAMPLES = pd.DataFrame([("test", name, *size) for name, size in SIZES.items()], columns=["split", "image_id", "height", "width"])
LABELS = ["Radius", "Ulna", "Hamate"]


def recipe_of(name, root):
    own = {"handbone": {"classes": LABELS}}.get(name, {})
    return load_recipe(name, {"data.root": str(root), "submit.size": None, **own})


def masks_of(recipe):
    rng = np.random.default_rng(0)
    shape = (24, 40, 3) if recipe.task == "multilabel" else (24, 40)
    n = recipe.n_classes if recipe.task == "multiclass" else 2
    masks = {name: np.kron(rng.integers(0, n, (4, 5, *shape[2:])), np.ones((6, 8, *[1] * len(shape[2:])))).astype(np.uint8) for name in SIZES}
    return masks | {"c_3.png": np.zeros(shape, np.uint8)}


@pytest.fixture
def good(tmp_path, request):
    "(recipe, path of a good submission)"
    recipe = recipe_of(request.param, tmp_path)
    suffix = {"csv": ".csv", "zip": ".zip", "pickle": ".pkl"}[recipe.submit.format.split("_")[-1]]
    return recipe, write_submission(recipe, masks_of(recipe), tmp_path / f"good{suffix}", samples=SAMPLES)


# ---- CSV: each corruption changes the lines of a good file. Line 0 is the header, then b 1, a,2, c_3 (empty), d_4.

def swap(lines, i, j):
    lines[i], lines[j] = lines[j], lines[i]
    return lines


def cell(lines, n, text):
    lines[n] = lines[n][:lines[n].rindex(",") + 1] + text
    return lines


def edit(lines, n, change):
    at = lines[n].rindex(",") + 1
    return cell(lines, n, change(lines[n][at:].split()))


ANY_TABLE = {
    "no header": (lambda x: x[1:], "row 1 is"),
    "index column": (lambda x: ["," + x[0], *(f"{n},{line}" for n, line in enumerate(x[1:]))], "the header is ',"),
    "wrong header": (lambda x: [x[0].upper(), *x[1:]], "column '"),
    "columns swapped": (lambda x: [",".join(reversed(x[0].split(","))), *x[1:]], "is not one of the test images"),
    "semicolons": (lambda x: [line.replace(",", ";") for line in x], "row 1 is"),
    "missing rows": (lambda x: x[:1], "'d_4.png' is missing"),
    "row twice": (lambda x: [*x, x[-1]], "already"),
    "stranger": (lambda x: [*x, x[-1].replace("d_4", "e_5")], "'e_5.png' is not one of the test images"),
    "other suffix": (lambda x: [line.replace("d_4.png", "d_4.jpg") for line in x], "'d_4.png' is missing"),
    "order": (lambda x: swap(x, 1, -1), "out of order"),
    "sorted": (lambda x: [x[0], *sorted(x[1:])], "out of order"),
    "cell too many": (lambda x: [*x[:-1], x[-1] + ",1"], "cells"),
    "cut in a row": (lambda x: [*x[:-1], x[-1][:3]], "cells"),
    "column more": (lambda x: [x[0] + ",note", *(line + ",x" for line in x[1:])], "the header is"),
    "value column lost": (lambda x: [line[:line.rindex(",")] for line in x], "is not there once"),
    "byte order mark": (lambda x: ["\ufeff" + x[0], *x[1:]], "byte order mark"),
    "file twice": (lambda x: x + x, "already"),
    "rows joined": (lambda x: [x[0], x[1] + x[2], *x[3:]], "cells"),
    "image is NaN": (lambda x: [x[0], "nan" + x[1][x[1].index(","):], *x[2:]], "'nan' is not one of the test images"),
    "folder in the name": (lambda x: [x[0], "test/" + x[1], *x[2:]], "is not one of the test images"),
}
RLE = {
    "odd": (lambda x: edit(x, 1, lambda t: " ".join(t[:-1])), "has no length"),
    "text": (lambda x: edit(x, 1, lambda t: " ".join(["x", *t[1:]])), "row 2, 'b 1.png"),
    "fraction": (lambda x: edit(x, 1, lambda t: " ".join([t[0] + ".0", *t[1:]])), "not a whole number"),
    "negative": (lambda x: edit(x, 1, lambda t: " ".join([t[0], "-" + t[1], *t[2:]])), "not a whole number"),
    "zero length": (lambda x: edit(x, 1, lambda t: " ".join([t[0], "0", *t[2:]])), "length 0 is not positive"),
    "base 0": (lambda x: cell(x, 1, "0 5"), "start 0 is below 1"),
    "past the end": (lambda x: cell(x, 1, "950 20"), "past the end: the mask has 960 pixels"),
    "larger image": (lambda x: cell(x, 1, "961 1"), "past the end"),
    "overlap": (lambda x: cell(x, 1, "1 10 5 10"), "token 3: start 5 overlaps"),
    "descending": (lambda x: cell(x, 1, "50 2 10 2"), "token 3: start 10 goes back"),
    "a class map": (lambda x: cell(x, 1, " ".join("0" * 960)), "start 0 is below 1"),
    "list": (lambda x: cell(x, 1, "[1 5]"), "token 1 is '[1'"),
    "half empty": (lambda x: cell(x, 1, "-1 -1"), "token 1 is '-1'"),
    "exponent": (lambda x: cell(x, 1, "1e2 5"), "token 1 is '1e2'"),
    "touching itself": (lambda x: cell(x, 1, "5 3 5 3"), "overlaps"),
    "COCO counts": (lambda x: cell(x, 1, "6Xa1"), "token 1 is '6Xa1'"),
}
TABLES = {
    "satellite": ANY_TABLE | RLE | {
        "empty as nothing": (lambda x: cell(x, 3, ""), "an empty mask is written '', the organiser wants '-1'"),
        "empty as NaN": (lambda x: cell(x, 3, "NaN"), "an empty mask is written 'NaN'"),
        "empty as -1.0": (lambda x: cell(x, 3, "-1.0"), "an empty mask is written '-1.0'"),
    },
    "trash": ANY_TABLE | {
        "short": (lambda x: edit(x, 1, lambda t: " ".join(t[:-1])), "959 numbers, 24 x 40 pixels need 960"),
        "long": (lambda x: edit(x, 1, lambda t: " ".join([*t, "0"])), "961 numbers"),
        "other size": (lambda x: edit(x, 1, lambda t: " ".join(t[:480])), "480 numbers"),
        "class too high": (lambda x: edit(x, 1, lambda t: " ".join([*t[:7], "12", *t[8:]])), "number 8 is 12, the classes are 0..11"),
        "ignored": (lambda x: edit(x, 1, lambda t: " ".join(["255", *t[1:]])), "number 1 is 255"),
        "float": (lambda x: edit(x, 1, lambda t: " ".join(f"{n}.0" for n in t)), "token 1 is"),
        "negative": (lambda x: edit(x, 1, lambda t: " ".join(["-1", *t[1:]])), "token 1 is '-1'"),
        "commas": (lambda x: edit(x, 1, lambda t: '"' + ",".join(t) + '"'), "token 1 is"),
        "nothing": (lambda x: cell(x, 1, ""), "0 numbers"),
        "run lengths": (lambda x: cell(x, 1, "1 3 10 5"), "4 numbers"),
        "NaN": (lambda x: edit(x, 1, lambda t: " ".join(["nan", *t[1:]])), "token 1 is 'nan'"),
        "empty token": (lambda x: cell(x, 3, "-1"), "token 1 is '-1'"),
        "class names": (lambda x: edit(x, 1, lambda t: " ".join(["Paper", *t[1:]])), "token 1 is 'Paper'"),
    },
    "handbone": {name: c for name, c in ANY_TABLE.items() if name != "sorted"} | RLE | {
        "one label less": (lambda x: [*x[:2], *x[3:]], "the row of 'b 1.png Ulna' is missing"),
        "image less": (lambda x: [x[0], *x[4:]], "'b 1.png' is missing"),
        "label order": (lambda x: swap(x, 1, 2), "row 2: 'b 1.png Ulna' stands where 'b 1.png Radius' belongs"),
        "unknown label": (lambda x: [x[0], x[1].replace("Radius", "radius"), *x[2:]], "Did you mean 'Radius'?"),
        "label number": (lambda x: [x[0], x[1].replace("Radius", "0"), *x[2:]], "label '0' is not one of"),
        "empty as -1": (lambda x: cell(x, 7, "-1"), "an empty mask is written '-1', the organiser wants ''"),
    },
}


@pytest.mark.parametrize("good, name", [(task, name) for task, found in TABLES.items() for name in found], indirect=["good"])
def test_table_corruptions(good, name):
    recipe, path = good
    change, said = TABLES[recipe.name][name]
    assert validate_submission(recipe, path, samples=SAMPLES) == []
    lines = path.read_text("utf8").splitlines()
    path.write_text("\n".join(change(list(lines))) + "\n", "utf8")
    assert path.read_text("utf8").splitlines() != lines
    problems = validate_submission(recipe, path, samples=SAMPLES)
    assert any(said in problem for problem in problems), problems


@pytest.mark.parametrize("good", list(TABLES), indirect=True)
@pytest.mark.parametrize("data, said", [(b"", "row 1 is ''"), (b"PK\3\4\xff\xff\n\xff", "not UTF-8"), (b"\x00" * 100, "row 1 is"),
                                        ("숲,mask_rle\n".encode("cp949"), "not UTF-8"),
                                        ("img_id,mask_rle\n".encode("utf-16"), "not UTF-8"), (gzip.compress(b"img_id,mask_rle\n"), "not UTF-8")])
def test_not_a_table(good, data, said):
    recipe, path = good
    path.write_bytes(data)
    problems = validate_submission(recipe, path, samples=SAMPLES)
    assert any(said in problem for problem in problems), problems
    with pytest.raises(SegnbError, match="good.csv"): read_submission(recipe, path, samples=SAMPLES)


@pytest.mark.parametrize("good", list(TABLES), indirect=True)
def test_harmless_differences(good):
    "Line ends of Windows, quotes and a blank last line change nothing; a byte order mark is a problem, and still readable"
    recipe, path = good
    lines = path.read_text("utf8").splitlines()
    quoted = [f'"{line}"' if n == 0 else line for n, line in enumerate(lines)]
    quoted[0] = ",".join(f'"{name}"' for name in lines[0].split(","))
    path.write_bytes("\r\n".join([*quoted, "", ""]).encode())
    assert validate_submission(recipe, path, samples=SAMPLES) == []
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    again, masks = read_submission(recipe, path, samples=SAMPLES), masks_of(recipe)
    assert all((again[name] == masks[name]).all() for name in SIZES)


# ---- zip of pictures

def png(array, mode=None):
    out = io.BytesIO()
    Image.fromarray(array).convert(mode).save(out, "PNG")
    return out.getvalue()


MASK = np.zeros((24, 40), np.uint8)
FIRST, LAST = "test_0000.png", "test_0003.png"
ZIPS = {
    "missing": (lambda x: x[:-1], "'test_0003.png' ('d_4.png') is missing"),
    "extra": (lambda x: [*x, ("test_0004.png", png(MASK))], "'test_0004.png' is not one of"),
    "twice": (lambda x: [*x, x[0]], "in the zip twice"),
    "folder": (lambda x: [("masks/" + n, b) for n, b in x], "is in a folder: the zip must be flat"),
    "mac folder": (lambda x: [*x, ("__MACOSX/._test_0000.png", b"")], "is in a folder"),
    "way out": (lambda x: [*x, ("../../evil.png", b"")], "is in a folder"),
    "absolute": (lambda x: [*x, ("/tmp/evil.png", b"")], "is in a folder"),
    "windows": (lambda x: [*x, ("C:\\evil.png", b"")], "is in a folder"),
    "from one": (lambda x: [(f"test_{n + 1:04d}.png", b) for n, (_, b) in enumerate(x)], "'test_0000.png' ('b 1.png') is missing"),
    "own names": (lambda x: [(name, b) for name, (_, b) in zip(SIZES, x)], "is not one of"),
    "colours": (lambda x: [(FIRST, png(MASK, "RGB")), *x[1:]], "a picture of mode RGB"),
    "palette": (lambda x: [(FIRST, png(MASK, "P")), *x[1:]], "a picture of mode P"),
    "16 bit": (lambda x: [(FIRST, png(MASK.astype(np.uint16))), *x[1:]], "a picture of mode I;16"),
    "transposed": (lambda x: [(FIRST, png(MASK.T.copy())), *x[1:]], "40 x 24 (height x width), it must be 24 x 40, it looks transposed"),
    "half size": (lambda x: [(FIRST, png(MASK[::2, ::2].copy())), *x[1:]], "12 x 20 (height x width)"),
    "class 255": (lambda x: [(FIRST, png(MASK + np.uint8(255))), *x[1:]], "class 255 at row 0, column 0, the classes are 0..9"),
    "cut": (lambda x: [*x[:-1], (LAST, x[-1][1][:-20])], "not a readable PNG"),
    "jpeg": (lambda x: [(FIRST, b"\xff\xd8\xff\xe0 no png"), *x[1:]], "not a readable PNG"),
    "other suffix": (lambda x: [(n.replace(".png", ".PNG"), b) for n, b in x], "is not one of"),
    "three digits": (lambda x: [(n.replace("_0", "_"), b) for n, b in x], "is not one of"),
    "transparent": (lambda x: [(FIRST, png(MASK, "LA")), *x[1:]], "a picture of mode LA"),
    "one bit": (lambda x: [(FIRST, png(MASK, "1")), *x[1:]], "a picture of mode 1"),
    "class too high": (lambda x: [(FIRST, png(MASK + np.uint8(10))), *x[1:]], "class 10 at row 0, column 0"),
    "empty member": (lambda x: [(FIRST, b""), *x[1:]], "not a readable PNG"),
    "nothing": (lambda x: [], "'test_0000.png' ('b 1.png') is missing"),
}


@pytest.mark.parametrize("good", ["indoor"], indirect=True)
@pytest.mark.parametrize("name", ZIPS)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_zip_corruptions(good, name):
    recipe, path = good
    change, said = ZIPS[name]
    assert validate_submission(recipe, path, samples=SAMPLES) == []
    with zipfile.ZipFile(path) as file: members = [(n, file.read(n)) for n in file.namelist()]
    with zipfile.ZipFile(path, "w") as file:
        for member, data in change(members): file.writestr(member, data)
    problems = validate_submission(recipe, path, samples=SAMPLES)
    assert any(said in problem for problem in problems), problems


@pytest.mark.parametrize("good", ["indoor"], indirect=True)
def test_broken_zips(good):
    recipe, path = good
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2])
    assert "not a readable zip file" in validate_submission(recipe, path, samples=SAMPLES)[0]
    damaged = bytearray(whole)
    damaged[60] ^= 255
    path.write_bytes(bytes(damaged))
    assert "cannot be read from the zip" in validate_submission(recipe, path, samples=SAMPLES)[0]


@pytest.mark.parametrize("good", ["indoor"], indirect=True)
@pytest.mark.parametrize("how", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_zips_that_not_every_reader_opens(good, how):
    recipe, path = good
    with zipfile.ZipFile(path) as file: members = [(n, file.read(n)) for n in file.namelist()]
    with zipfile.ZipFile(path, "w", how) as file:
        for member, data in members: file.writestr(member, data)
    problems = validate_submission(recipe, path, samples=SAMPLES)
    assert len(problems) == 4 and all("compressed in a way" in problem for problem in problems), problems
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for member, data in members: file.writestr(member, data)
    assert validate_submission(recipe, path, samples=SAMPLES) == []


@pytest.mark.parametrize("good", ["indoor"], indirect=True)
def test_zip_bomb(good):
    recipe, path = good
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file: file.writestr(FIRST, b"\0" * (80 * 2**20))
    assert path.stat().st_size < 2**20
    assert any("it claims to be 83886080 bytes" in p for p in validate_submission(recipe, path, samples=SAMPLES))


# ---- pickle

class Evil:
    def __init__(self, path): self.path = path

    def __reduce__(self): return open, (str(self.path), "w")


def first(masks, value): return masks | {"b 1.png": value}


PICKLES = {
    "missing": (lambda x: {k: v for k, v in x.items() if k != "d_4.png"}, "'d_4.png' is missing"),
    "extra": (lambda x: x | {"e_5.png": x["d_4.png"]}, "'e_5.png' is not one of the test images"),
    "own names": (lambda x: {k.replace(".png", ""): v for k, v in x.items()}, "is not one of the test images"),
    "number keys": (lambda x: dict(enumerate(x.values())), "key 0 is not text"),
    "a list": (lambda x: list(x.values()), "not a dict of arrays"),
    "int64": (lambda x: first(x, x["b 1.png"].astype(np.int64)), "an array of int64, it must be an array of uint8"),
    "bool": (lambda x: first(x, x["b 1.png"].astype(bool)), "an array of bool"),
    "float": (lambda x: first(x, x["b 1.png"].astype(np.float32)), "an array of float32"),
    "lists": (lambda x: first(x, x["b 1.png"].tolist()), "EMPTY_LIST"),
    "objects": (lambda x: first(x, x["b 1.png"].astype(object)), "which may run code"),
    "text": (lambda x: first(x, "1 3 10 5"), "a str, it must be an array of uint8"),
    "255": (lambda x: first(x, np.full((24, 40), 255, np.uint8)), "class 255 at row 0, column 0"),
    "channel": (lambda x: first(x, x["b 1.png"][None]), "1 x 24 x 40 (height x width), it must be 24 x 40"),
    "transposed": (lambda x: first(x, x["b 1.png"].T), "it looks transposed"),
    "half size": (lambda x: first(x, x["b 1.png"][::2, ::2]), "12 x 20 (height x width)"),
    "flat": (lambda x: first(x, x["b 1.png"].ravel()), "960 (height x width)"),
    "empty": (lambda x: first(x, x["b 1.png"][:0]), "0 x 40 (height x width)"),
    "class too high": (lambda x: first(x, x["b 1.png"] * 2), "class 2 at"),
    "NaN": (lambda x: first(x, np.full((24, 40), np.nan)), "an array of float64"),
    "none": (lambda x: first(x, None), "a NoneType, it must be an array"),
    "a dict in it": (lambda x: {"masks": x}, "'masks' is not one of the test images"),
    "bytes as keys": (lambda x: {k.encode(): v for k, v in x.items()}, "BINBYTES"),
    "folder in the name": (lambda x: {"test_img/" + k: v for k, v in x.items()}, "'test_img/b 1.png' is not one of"),
    "minus one": (lambda x: first(x, -x["b 1.png"].astype(np.int8)), "an array of int8"),
    "nothing": (lambda x: {}, "'b 1.png' is missing"),
}


@pytest.mark.parametrize("good", ["wildfire"], indirect=True)
@pytest.mark.parametrize("name", PICKLES)
def test_pickle_corruptions(good, name):
    recipe, path = good
    change, said = PICKLES[name]
    assert validate_submission(recipe, path, samples=SAMPLES) == []
    joblib.dump(change(joblib.load(path)), path, protocol=4)
    problems = validate_submission(recipe, path, samples=SAMPLES)
    assert any(said in problem for problem in problems), problems


@pytest.mark.parametrize("good", ["wildfire"], indirect=True)
@pytest.mark.parametrize("hide", ["value", "key", "whole", "array"])
def test_pickle_runs_nothing(good, hide):
    recipe, path = good
    trace, masks = path.parent / "ran", masks_of(recipe)
    evil = {"value": lambda: masks | {"a,2.png": Evil(trace)}, "key": lambda: {Evil(trace): 1}, "whole": lambda: Evil(trace),
            "array": lambda: masks | {"a,2.png": np.array([Evil(trace)], object)}}[hide]()
    joblib.dump(evil, path, protocol=4)
    problems = validate_submission(recipe, path, samples=SAMPLES)
    assert len(problems) == 1 and "may run code" in problems[0], problems
    with pytest.raises(SegnbError, match="may run code"): read_submission(recipe, path, samples=SAMPLES)
    assert not trace.exists()


@pytest.mark.parametrize("good", ["wildfire"], indirect=True)
def test_compressed_and_cut_pickles(good):
    recipe, path = good
    whole = path.read_bytes()
    for data in (whole[:-40], whole[:len(whole) // 2], whole[:100], b""):
        path.write_bytes(data)
        assert "not a dict of arrays" in validate_submission(recipe, path, samples=SAMPLES)[0]
    for how in (3, "gzip", "bz2"):
        joblib.dump(masks_of(recipe), path, compress=how)
        assert "uncompressed" in validate_submission(recipe, path, samples=SAMPLES)[0]
    path.write_bytes(pickle.dumps(masks_of(recipe)))
    assert "wants to import numpy" in validate_submission(recipe, path, samples=SAMPLES)[0]
    path.write_bytes(b"\x80\x04}}K\x01s.")                      # {{}: 1}, which no Python writes
    assert "is not text" in validate_submission(recipe, path, samples=SAMPLES)[0]
    with pytest.raises(SegnbError, match="is not text"): read_submission(recipe, path, samples=SAMPLES)


@pytest.mark.parametrize("good", ["satellite", "trash", "indoor", "handbone", "wildfire"], indirect=True)
def test_wrong_suffix(good):
    recipe, path = good
    other = path.rename(path.with_suffix(".txt"))
    assert validate_submission(recipe, other, samples=SAMPLES) == [f"the file is called 'good.txt', the organiser wants a {path.suffix} file"]


# ---- valid in itself, and not what was meant

SQUARE = SAMPLES.assign(height=24, width=24)
A, B = "b 1.png", "a,2.png"
RENAMED = np.arange(256, dtype=np.uint8)
RENAMED[[1, 2]] = 2, 1


def each(change): return lambda masks: {name: change(mask) for name, mask in masks.items()}


def moved(text):
    "Run lengths counted from another base: every start one lower"
    return re.sub(r"(\d+) (\d+)", lambda run: f"{int(run[1]) - 1} {run[2]}", text)


def last_digit(text):
    "A file that was cut short inside its last number"
    return text.rstrip()[:-1] + "\n"


MEANT = {   # what happens to the masks on their way into the file
    "two images swapped": lambda masks: masks | {A: masks[B], B: masks[A]},
    "one image late": lambda masks: dict(zip(masks, [masks[A], *masks.values()])),
    "transposed": each(lambda m: np.swapaxes(m, 0, 1)),
    "mirrored": each(lambda m: m[:, ::-1]),
    "upside down": each(lambda m: m[::-1]),
    "a pixel to the right": each(lambda m: np.roll(m, 1, 1)),
    "one pixel": lambda masks: masks | {A: np.where(np.arange(24 * 24).reshape(24, 24, *[1] * (masks[A].ndim - 2)) == 100, 1 - np.minimum(masks[A], 1), masks[A])},
    "all empty": each(np.zeros_like),
    "half size": each(lambda m: m[::2, ::2]),
    "grown": each(lambda m: cv2.dilate(m, np.ones((3, 3)))),
    "from another run": each(lambda m: np.roll(m, 5, 0)),
}
CLASSES = {"classes renamed": each(lambda m: RENAMED[m]), "background counted": each(lambda m: np.maximum(m, 1) - 1)}
LABELS_MEANT = {"labels renamed": each(lambda m: m[..., ::-1]), "a label lost": each(lambda m: m * [1, 0, 1])}
TEXTS = {"base off by one": moved, "cut in the last number": last_digit}   # what happens to the file
BY_RECIPE = {"satellite": MEANT | TEXTS, "handbone": MEANT | LABELS_MEANT | TEXTS, "trash": MEANT | CLASSES, "indoor": MEANT | CLASSES, "wildfire": MEANT}


@pytest.mark.parametrize("task, name", [(task, name) for task, found in BY_RECIPE.items() for name in found])
def test_what_only_the_comparison_sees(task, name, tmp_path, monkeypatch):
    recipe, change, write = recipe_of(task, tmp_path), BY_RECIPE[task][name], write_submission
    masks = {key: np.ascontiguousarray(mask[:, 8:32]) for key, mask in masks_of(recipe).items()}
    for mask in masks.values(): mask[0, :1] = mask[-1, -1:] = 0      # no run starts at the first pixel or ends at the last
    if task in ("satellite", "handbone"): masks["d_4.png"][-1, 10:22] = 1

    def spoiled(recipe, masks, path, samples):
        if name not in TEXTS: return write(recipe, change(dict(masks)), path, samples=samples)
        text = write(recipe, masks, path, samples=samples).read_text("utf8")
        path.write_text("".join(change(line) if "," in line and n else line for n, line in enumerate(text.splitlines(True))) if name != "cut in the last number" else change(text), "utf8")

    suffix = submission_suffix(recipe)
    spoiled(recipe, masks, tmp_path / f"alone{suffix}", SQUARE)
    assert validate_submission(recipe, tmp_path / f"alone{suffix}", samples=SQUARE) == []      # the first guard sees nothing
    monkeypatch.setattr(segnb.submit, "write_submission", spoiled)
    with pytest.raises(SegnbError, match="differ from those written"): make_submission(recipe, masks, tmp_path / f"never{suffix}", samples=SQUARE)
    assert not (tmp_path / f"never{suffix}").exists()


def test_fifteen_ways_each():
    kinds = {**TABLES, "indoor": ZIPS, "wildfire": PICKLES}
    assert len(kinds) == 5 and all(len(table) >= 15 and all(len(said) > 3 for _, said in table.values()) for table in kinds.values())


# ---- the doors

def test_sample_submission(tmp_path):
    "The organiser's own word on ids and order"
    recipe = recipe_of("satellite", tmp_path)
    path = write_submission(recipe, masks_of(recipe), tmp_path / "good.csv", samples=SAMPLES)
    sample = pd.DataFrame({"img_id": list(SIZES), "mask_rle": -1})
    for rows, problems in ((sample, 0), (sample[::-1], 1), (sample[:3], 1), (sample.rename(columns={"img_id": "id"}), 1)):
        rows.to_csv(tmp_path / "sample_submission.csv", index=False)
        assert len(validate_submission(recipe, path, samples=SAMPLES)) == problems


def test_repeated_problems_are_counted(tmp_path):
    samples = pd.DataFrame({"split": "test", "image_id": [f"TEST_{n:05d}" for n in range(2000)], "height": 4, "width": 4})
    recipe = recipe_of("satellite", tmp_path)
    path = write_submission(recipe, {name: MASK[:4, :4] for name in samples["image_id"]}, tmp_path / "a.csv", samples=samples)
    path.write_text(path.read_text().replace(",-1", ",0 3"))
    problems = validate_submission(recipe, path, samples=samples)
    assert len(problems) == 6 and problems[-1] == "… and 1995 more like the last"


@pytest.mark.parametrize("good", ["satellite", "trash", "indoor", "handbone", "wildfire"], indirect=True)
def test_one_pixel_matters(good):
    "The comparison finds a single wrong pixel in a valid file, and then there is no file"
    recipe, path = good
    masks = masks_of(recipe)

    class Flickering(dict):
        reads = 0

        def __getitem__(self, name):
            mask = super().__getitem__(name).copy()
            Flickering.reads += 1
            if Flickering.reads == len(self) + 2: mask.flat[5] ^= 1
            return mask

    with pytest.raises(SegnbError, match="differ from those written, 'a,2.png' first"):
        make_submission(recipe, Flickering(masks), path.with_stem("never"), samples=SAMPLES)
    assert not path.with_stem("never").exists() and len(list(path.parent.glob(".*"))) == 0
    report, written = make_submission(recipe, masks, path.with_stem("proven"), samples=SAMPLES)
    assert report["pixels_differing"] == 0 and path.with_stem("proven").read_bytes() == path.read_bytes()


def test_unwritable(tmp_path):
    recipe = recipe_of("satellite", tmp_path)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SegnbError, match="cannot be written"):
        write_submission(recipe, masks_of(recipe), tmp_path / "file" / "a.csv", samples=SAMPLES)


def test_score_is_the_organisers(tmp_path):
    "Against the satellite organiser's formula, written out"
    recipe = load_recipe("satellite", {"data.root": str(tmp_path), "submit.size": [24, 40]})
    masks = masks_of(recipe)
    other = {name: np.roll(mask, 3, 1) for name, mask in masks.items()}
    for name, file in ((masks, "truth.csv"), (other, "mine.csv")): write_submission(recipe, name, tmp_path / file, samples=SAMPLES)
    found = [(2 * (p & t).sum() + 1e-7) / (p.sum() + t.sum() + 1e-7) for p, t in zip(other.values(), masks.values()) if p.any() or t.any()]
    assert score_submission(recipe, tmp_path / "mine.csv", tmp_path / "truth.csv")["score"] == pytest.approx(np.mean(found), abs=1e-12)


@pytest.mark.real
@pytest.mark.parametrize("name", list(TABLES) + ["indoor", "wildfire"])
def test_real_layouts(name, tmp_path):
    "Names, order and sizes as the organiser's own test files have them"
    recipe = load_recipe(REAL / name / "recipe.yaml")
    rng, test = np.random.default_rng(0), read_samples(recipe).query("split == 'test'")
    depth = 2 if recipe.task == "binary" else recipe.n_classes

    def blobs(size):
        field = cv2.resize(rng.random((6, 6, depth)).astype(np.float32), size[::-1], interpolation=cv2.INTER_CUBIC)
        return (field > 0.7).astype(np.uint8) if recipe.task == "multilabel" else field.argmax(2).astype(np.uint8)

    masks = {row.image_id: blobs((row.height, row.width)) for row in test.itertuples()}
    path = tmp_path / f"submission{submission_suffix(recipe)}"
    report, written = make_submission(recipe, masks, path)
    assert report["images"] == len(test) and report["pixels_differing"] == 0
    assert validate_submission(recipe, path) == []
    assert score_submission(recipe, path, path)["score"] == pytest.approx(1, abs=1e-6)
    last = test["image_id"].iloc[-1]
    assert list(read_submission(recipe, path)) == list(test["image_id"])
    with pytest.raises(SegnbError, match="have no mask"): make_submission(recipe, {k: v for k, v in masks.items() if k != last}, path)
