"""Every finding of the doctor is provoked on a handful of tiny files, and none of them on good ones."""
import json, os, zipfile

import cv2
import numpy as np
import pytest
import tifffile
from conftest import REAL
from PIL import Image

from segnb.data import FINDINGS, read_samples
from segnb.doctor import columns, examine
from segnb.files import DataError
from segnb.masks import rle_encode
from segnb.recipe import load_recipe

H, W = 12, 16
LABELS = ["Radius", "Ulna"]
SQUARE = [[2, 2], [9, 2], [9, 9], [2, 9]]


class Layout:
    "A folder of tiny files and the recipe that reads it"
    def __init__(self, root, name, **overrides):
        self.root, self.name, self.overrides, self.rng = root, name, overrides, np.random.default_rng(0)

    def scene(self, *shape, dtype=np.uint8):
        "A picture unlike all others"
        return self.rng.integers(1, 250, shape or (H, W, 3)).astype(dtype)

    def picture(self, name, array, **options):
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".tif": tifffile.imwrite(path, array, **options)
        else: (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(path, **options)

    def text(self, name, text):
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text if isinstance(text, str) else json.dumps(text), "utf8")

    def recipe(self, **overrides):
        return load_recipe(self.name, {"data.root": self.root, **self.overrides, **overrides})

    def codes(self, **overrides):
        return {found["code"] for found in examine(self.recipe(**overrides), workers=0).findings}


def rle_csv(root):
    layout, mask = Layout(root, "satellite"), np.zeros((H, W), np.uint8)
    mask[3:6, 4:9] = 1
    for split, n in (("train", 3), ("test", 2)):
        for k in range(n): layout.picture(f"{split}_img/{split}_{k}.png", layout.scene())
    layout.text("train.csv", "img_id,img_path,mask_rle\n" + "".join(f"A{k},./train_img/train_{k}.png,{rle_encode(mask)}\n" for k in range(3)))
    layout.text("test.csv", "img_id,img_path\nT0,./test_img/test_0.png\nT1,./test_img/test_1.png\n")
    layout.text("sample_submission.csv", "img_id,mask_rle\nT0,-1\nT1,-1\n")
    return layout


def coco(root):
    layout = Layout(root, "trash", classes=["Background", "Paper", "Metal"])
    image = lambda k, split: dict(id=k, file_name=f"{split}/{k}.jpg", height=H, width=W)
    for k in range(3): layout.picture(f"{'a' if k < 2 else 'b'}/{k}.jpg", layout.scene())
    layout.train = dict(images=[image(0, "a"), image(1, "a")], categories=[dict(id=0, name="Paper"), dict(id=1, name="Metal")],
                        annotations=[annotation(k, k, k, [sum(SQUARE, [])]) for k in range(2)])
    layout.text("train_all.json", layout.train)
    layout.text("test.json", dict(layout.train, images=[image(2, "b")], annotations=[]))
    return layout


def annotation(number, image, category, segmentation):
    return dict(id=number, image_id=image, category_id=category, segmentation=segmentation)


def index_png(root):
    layout = Layout(root, "indoor", classes=["background", "wall", "door"])
    for k in range(3):
        layout.picture(f"train/images/{k}.png", layout.scene())
        layout.picture(f"train/masks/{k}.png", np.arange(H * W, dtype=np.uint8).reshape(H, W) % 3)
    layout.picture("test/images/0.png", layout.scene())
    return layout


def polygon_json(root):
    layout = Layout(root, "handbone", classes=LABELS)
    for k in range(2):
        layout.picture(f"train/DCM/ID{k}/i{k}_R.png", layout.scene())
        layout.text(f"train/outputs_json/ID{k}/i{k}_R.json", dict(annotations=[dict(label=label, points=SQUARE) for label in LABELS]))
    layout.picture("test/DCM/ID9/i9_L.png", layout.scene())
    return layout


def tiff(root):
    layout = Layout(root, "wildfire")
    for k in (2, 10):
        layout.picture(f"train_img/train_img_{k}.tif", layout.scene(10, H, W, dtype=np.uint16))
        layout.picture(f"train_mask/train_mask_{k}.tif", np.eye(H, W, dtype=np.uint8)[None])
        layout.picture(f"test_img/test_img_{k}.tif", layout.scene(10, H, W, dtype=np.uint16))
    return layout


LAYOUTS = dict(rle_csv=rle_csv, coco=coco, index_png=index_png, polygon_json=polygon_json, tiff=tiff)
MASK = np.arange(H * W, dtype=np.uint8).reshape(H, W) % 3
PROVOKE = {}   # code -> (layout, what makes it wrong)


def provokes(code, layout):
    "Register a function that spoils good files; it may return overrides of the recipe"
    def register(spoil):
        PROVOKE[f"{code} {layout}"] = layout, spoil
        return spoil
    return register


def palette(picture, colors):
    picture.putpalette(np.array(colors, np.uint8).tobytes())
    return picture


def turned(layout, name, array):
    picture = Image.fromarray(array)
    picture.getexif()[274] = 6
    layout.picture(name, picture, exif=picture.getexif())


@provokes("missing-file", "rle_csv")
def _(layout): (layout.root / "train_img/train_1.png").unlink()

@provokes("missing-file", "coco")
def _(layout): (layout.root / "b/2.jpg").unlink()

@provokes("path-outside", "rle_csv")
def _(layout): layout.text("test.csv", "img_id,img_path\nT0,./test_img/test_0.png\nT1,../test_1.png\n")

@provokes("path-outside", "coco")
def _(layout):
    layout.train["images"][0]["file_name"] = "/etc/hostname"
    layout.text("train_all.json", layout.train)

@provokes("unlisted-file", "rle_csv")
def _(layout): layout.picture("test_img/extra.png", layout.scene())

@provokes("unlisted-file", "coco")
def _(layout): layout.picture("a/extra.jpg", layout.scene())

@provokes("unlisted-file", "tiff")
def _(layout): layout.text("test_meta.csv", "test_img\ntest_img_10.tif\n")

@provokes("unpaired-image", "index_png")
def _(layout): (layout.root / "train/masks/1.png").unlink()

@provokes("unpaired-image", "polygon_json")
def _(layout): (layout.root / "train/outputs_json/ID0/i0_R.json").unlink()

@provokes("unpaired-mask", "index_png")
def _(layout): (layout.root / "train/images/1.png").unlink()

@provokes("unpaired-mask", "tiff")
def _(layout): (layout.root / "train_img/train_img_2.tif").unlink()

@provokes("duplicate-id", "rle_csv")
def _(layout): layout.text("train.csv", (layout.root / "train.csv").read_text() + "A0,./train_img/train_1.png,\n")

@provokes("duplicate-id", "index_png")
def _(layout): layout.picture("test/images/0.jpg", layout.scene())

@provokes("duplicate-id", "coco")
def _(layout):
    layout.train["images"][1]["id"] = 0
    layout.text("train_all.json", layout.train)

@provokes("no-images", "index_png")
def _(layout): (layout.root / "test/images/0.png").unlink()

@provokes("exclude-unknown", "index_png")
def _(layout): return {"data.exclude": ["7"]}

@provokes("unreadable", "index_png")
def _(layout): (layout.root / "train/images/1.png").write_text("<html>not found</html>")

@provokes("unreadable", "tiff")
def _(layout): (layout.root / "train_mask/train_mask_2.tif").write_bytes(b"II*\0nonsense")

@provokes("truncated", "index_png")
def _(layout): shorten(layout.root / "test/images/0.png")

@provokes("truncated", "coco")
def _(layout): shorten(layout.root / "a/1.jpg")

@provokes("truncated", "tiff")
def _(layout): shorten(layout.root / "train_img/train_img_2.tif")

def shorten(path): path.write_bytes(path.read_bytes()[:path.stat().st_size * 2 // 3])

@provokes("bands", "tiff")
def _(layout): return {"data.bands": [0, 10]}

@provokes("mask-255", "index_png")
def _(layout): layout.picture("train/masks/1.png", (MASK > 0).astype(np.uint8) * 255)

@provokes("mask-255", "tiff")
def _(layout): layout.picture("train_mask/train_mask_2.tif", np.eye(H, W, dtype=np.uint8)[None] * 255)

@provokes("mask-colors", "index_png")
def _(layout): layout.picture("train/masks/1.png", layout.scene())

@provokes("color-unknown", "index_png")
def _(layout):
    layout.picture("train/masks/1.png", layout.scene())
    return {"data.palette": [[0, 0, 0], [1, 1, 1], [2, 2, 2]]}

@provokes("palette-ambiguous", "index_png")
def _(layout): layout.picture("train/masks/1.png", palette(Image.fromarray(MASK), [[200] * 3, [5] * 3, [90] * 3]))

@provokes("palette-varies", "index_png")
def _(layout):
    layout.picture("train/masks/0.png", palette(Image.fromarray(MASK), [[0, 0, 0], [250, 0, 0], [0, 250, 0]]))
    layout.picture("train/masks/1.png", palette(Image.fromarray(MASK), [[0, 0, 0], [0, 250, 0], [250, 0, 0]]))

@provokes("class-range", "index_png")
def _(layout): layout.picture("train/masks/1.png", MASK + 1)

@provokes("class-range", "tiff")
def _(layout): layout.picture("train_mask/train_mask_2.tif", np.full((1, H, W), 7, np.uint8))

@provokes("size-mismatch", "index_png")
def _(layout): layout.picture("train/masks/1.png", MASK[:, ::2])

@provokes("size-mismatch", "coco")
def _(layout): layout.picture("a/1.jpg", layout.scene(H * 2, W * 2, 3))

@provokes("rle-broken", "rle_csv")
def _(layout): layout.text("train.csv", (layout.root / "train.csv").read_text() + "A9,./train_img/train_1.png,5 3 6\n")

@provokes("sample-submission", "rle_csv")
def _(layout): layout.text("sample_submission.csv", "img_id,mask_rle\nT0,-1\nT7,-1\n")

@provokes("sample-missing", "rle_csv")
def _(layout): (layout.root / "sample_submission.csv").unlink()

@provokes("sample-order", "rle_csv")
def _(layout): layout.text("sample_submission.csv", "img_id,mask_rle\nT1,-1\nT0,-1\n")

@provokes("class-unknown", "coco")
def _(layout): return dict(classes=["Background", "Paper", "Metall"])

@provokes("class-unknown", "polygon_json")
def _(layout): return dict(classes=["Radius", "Elna"])

@provokes("polygon-broken", "coco")
def _(layout): annotate(layout, [[1, 2, 3]])

@provokes("polygon-broken", "polygon_json")
def _(layout): label(layout, "Ulna", [[1, 2], ["x", 3]])

@provokes("polygon-degenerate", "coco")
def _(layout): annotate(layout, [[1, 1, 5, 5, 3, 3]])

@provokes("polygon-degenerate", "polygon_json")
def _(layout): label(layout, "Ulna", [[1, 2], [3, 4]])

@provokes("polygon-outside", "coco")
def _(layout): annotate(layout, [[1, 1, 90, 1, 90, 9]])

@provokes("polygon-outside", "polygon_json")
def _(layout): label(layout, "Ulna", [[-9, 2], [3, 4], [5, 1]])

@provokes("label-twice", "polygon_json")
def _(layout): label(layout, "Ulna", SQUARE)

@provokes("label-missing", "polygon_json")
def _(layout): layout.text("train/outputs_json/ID0/i0_R.json", dict(annotations=[dict(label="Ulna", points=SQUARE)]))

def annotate(layout, segmentation):
    layout.train["annotations"].append(annotation(9, 0, 0, segmentation))
    layout.text("train_all.json", layout.train)

def label(layout, name, points):
    entries = [dict(label=known, points=SQUARE) for known in LABELS] + [dict(label=name, points=points)]
    layout.text("train/outputs_json/ID0/i0_R.json", dict(annotations=entries))

@provokes("category-twice", "coco")
def _(layout):
    layout.train["categories"].append(dict(id=2, name="Paper"))
    layout.text("train_all.json", layout.train)

@provokes("category-unused", "coco")
def _(layout):
    layout.train["categories"].append(dict(id=2, name="Glass"))
    layout.text("train_all.json", layout.train)

@provokes("category-ids", "coco")
def _(layout):
    layout.train["categories"][1]["id"] = layout.train["annotations"][1]["category_id"] = 5
    layout.text("train_all.json", layout.train)

@provokes("annotation-orphan", "coco")
def _(layout):
    layout.train["annotations"][1]["image_id"] = 77
    layout.text("train_all.json", layout.train)

@provokes("class-unused", "index_png")
def _(layout): return dict(classes=["background", "wall", "door", "lamp"])

@provokes("empty-mask", "rle_csv")
def _(layout): layout.text("train.csv", "img_id,img_path,mask_rle\nA0,./train_img/train_0.png,-1\nA1,./train_img/train_1.png,1 5\n")

@provokes("ignored-mask", "index_png")
def _(layout):
    layout.picture("train/masks/1.png", np.full((H, W), 9, np.uint8))
    return {"data.ignore_index": 9}

@provokes("mask-lossy", "index_png")
def _(layout):
    (layout.root / "train/masks/1.png").unlink()
    layout.picture("train/masks/1.jpg", np.zeros((H, W), np.uint8))

@provokes("blank-image", "index_png")
def _(layout): layout.picture("train/images/1.png", np.full((H, W, 3), 200, np.uint8))

@provokes("blank-image", "polygon_json")
def _(layout): layout.picture("train/DCM/ID1/i1_R.png", 200 + layout.scene() // 50)

@provokes("nodata", "tiff")
def _(layout): no_data(layout, slice(None))

@provokes("zero-values", "tiff")
def _(layout): no_data(layout, 3)

def no_data(layout, bands):
    image = layout.scene(10, H, W, dtype=np.uint16)
    image[bands, :5] = 0
    layout.picture("train_img/train_img_2.tif", image)

@provokes("not-finite", "tiff")
def _(layout):
    image = layout.scene(10, H, W, dtype=np.float32)
    image[0, 0, 0] = np.nan
    layout.picture("train_img/train_img_2.tif", image)

@provokes("bands-vary", "tiff")
def _(layout): layout.picture("train_img/train_img_2.tif", layout.scene(10, H, W))

@provokes("scale", "tiff")
def _(layout): return {"data.scale": 100}

@provokes("exif-turned", "index_png")
def _(layout): turned(layout, "train/images/1.png", layout.scene(W, H, 3))

@provokes("exif-ambiguous", "rle_csv")
def _(layout): turned(layout, "train_img/train_1.png", layout.scene())

@provokes("transparent", "index_png")
def _(layout): layout.picture("train/images/1.png", layout.scene(H, W, 4))

@provokes("wrong-suffix", "index_png")
def _(layout): (layout.root / "train/images/1.png").write_bytes(cv2.imencode(".jpg", layout.scene())[1].tobytes())

@provokes("leak", "index_png")
def _(layout): (layout.root / "test/images/0.png").write_bytes((layout.root / "train/images/1.png").read_bytes())

@provokes("repeated-image", "index_png")
def _(layout): (layout.root / "train/images/2.png").write_bytes((layout.root / "train/images/1.png").read_bytes())

@provokes("table-unreadable", "polygon_json")
def _(layout): layout.text("train/outputs_json/ID0/i0_R.json", '{"annotations": [')

@provokes("dialect-proven", "rle_csv")
def _(layout): layout.text("sample_submission.csv", "img_id,mask_rle\nT0,\nT1,\n")

@provokes("dialect-proven", "coco")
def _(layout):
    layout.text("sample_submission.csv", "image_id,PredictionString\nb/2.jpg,0 0 0 0\n")
    return {"submit.size": 3}

@provokes("dialect-proven", "polygon_json")
def _(layout): layout.text("sample_submission.csv", "image_name,class,rle\ni9_L.png,Ulna,\ni9_L.png,Radius,\n")

@provokes("dialect-likely", "rle_csv")
def _(layout):
    disk = rle_encode(cv2.circle(np.zeros((H, W), np.uint8), (7, 6), 4, 1, -1), order="F")
    layout.text("train.csv", "img_id,img_path,mask_rle\n" + "".join(f"A{k},./train_img/train_{k % 3}.png,{disk}\n" for k in range(20)))

@provokes("rle-unusual", "rle_csv")
def _(layout): layout.text("train.csv", (layout.root / "train.csv").read_text() + "A9,./train_img/train_1.png,1 3 4 2\n")

@provokes("sample-header", "coco")
def _(layout): layout.text("sample_submission.csv", "id,PredictionString\nb/2.jpg,0 0 0 0\n")

@provokes("sample-names", "index_png")
def _(layout): zipped(layout, "test_0001.png")

@provokes("dialect-proven", "index_png")
def _(layout): zipped(layout, "test_0000.png")

def zipped(layout, name):
    layout.picture("mask.png", MASK)
    with zipfile.ZipFile(layout.root / "sample_submission.zip", "w") as file: file.write(layout.root / "mask.png", name)

@provokes("table-unreadable", "index_png")
def _(layout): layout.text("sample_submission.zip", "no zip")


RAISED = {   # without these there is nothing to examine
    "missing-folder": ("index_png", lambda layout: (layout.root / "test").rename(layout.root / "tests")),
    "missing-table": ("rle_csv", lambda layout: (layout.root / "test.csv").unlink()),
    "table-row": ("rle_csv", lambda layout: layout.text("test.csv", "img_id,img_path\nT0,a.png,\n")),
    "name-encoding": ("index_png", lambda layout: (layout.root / "test/images" / os.fsdecode("서울.png".encode("cp949"))).touch()),
    "missing-column": ("rle_csv", lambda layout: layout.text("test.csv", "id,img_path\nT0,a.png\n")),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", LAYOUTS)
def test_good_files_have_no_findings(name, tmp_path):
    layout = LAYOUTS[name](tmp_path)
    report = examine(layout.recipe(), workers=2)
    assert report.ok and not report.findings
    assert report.summary["images"]["train"] == report.summary["masks"] > 1


@pytest.mark.quick
@pytest.mark.parametrize("case", PROVOKE)
def test_each_finding_is_provoked(case, tmp_path):
    code, (name, spoil) = case.split()[0], PROVOKE[case]
    layout = LAYOUTS[name](tmp_path)
    overrides = spoil(layout) or {}
    overrides = overrides if isinstance(overrides, dict) else {}
    report = examine(layout.recipe(**overrides), workers=0)
    found = [finding for finding in report.findings if finding["code"] == code]
    assert found, report.table()
    assert all(finding.keys() == dict(code=0, severity=0, file=0, row=0, message=0, remedy=0).keys() for finding in report.findings)
    assert len({(f["code"], f["file"], f["row"], f["message"]) for f in report.findings}) == len(report.findings)
    assert not any(str(tmp_path) in finding["file"] for finding in found if code != "no-images"), "files are named relative to the root"
    assert report.ok == all(finding["severity"] != "error" for finding in report.findings)
    assert max(map(columns, report.table().splitlines())) <= 100
    assert json.loads(report.to_json())["findings"] == report.findings


@pytest.mark.quick
@pytest.mark.parametrize("code", RAISED)
def test_what_leaves_nothing_to_examine_is_raised(code, tmp_path):
    name, spoil = RAISED[code]
    layout = LAYOUTS[name](tmp_path)
    spoil(layout)
    with pytest.raises(DataError) as error: examine(layout.recipe(), workers=0)
    assert error.value.finding["code"] == code and error.value.exit_code == 3
    with pytest.raises(DataError): read_samples(layout.recipe())


@pytest.mark.quick
def test_every_code_is_provoked():
    assert {case.split()[0] for case in PROVOKE} | set(RAISED) == set(FINDINGS)


@pytest.mark.quick
def test_read_samples_refuses_what_the_doctor_calls_an_error_in_the_listing(tmp_path):
    layout = index_png(tmp_path)
    (layout.root / "train/masks/1.png").unlink()
    with pytest.raises(DataError, match="train/images/1.png: no file in train/masks has its name"): read_samples(layout.recipe())
    assert list(read_samples(layout.recipe(**{"data.exclude": ["1"]})).image_id) == ["0", "2", "0"]


def test_workers_do_not_change_the_report(tmp_path):
    layout = index_png(tmp_path)
    for k in range(20): layout.picture(f"train/images/{k}.png", layout.scene())
    assert examine(layout.recipe(), workers=0) == examine(layout.recipe(), workers=4)


@pytest.mark.real
@pytest.mark.parametrize("name", ["satellite", "trash", "indoor", "handbone", "wildfire"])
def test_real_pictures_have_no_errors_and_the_oddities_are_found(name):
    report = examine(load_recipe(REAL / name / "recipe.yaml"))
    codes = {found["code"] for found in report.findings}
    assert codes == dict(handbone={"blank-image"}, wildfire={"nodata", "zero-values"}).get(name, set())
    assert report.ok and all(report.summary["classes"].values())
