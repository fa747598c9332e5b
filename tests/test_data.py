"""What `02_data` proves on single arrays, here on files of every mode, and on the real pictures against peer libraries."""
import io, json, unicodedata

import cv2
import numpy as np
import pandas as pd
import pytest
import tifffile
from conftest import REAL
from PIL import Image, ImageOps

from segnb.data import decode_mask, find_file, list_files, read_header, read_image, read_image_file, read_mask, read_samples, read_table, turn
from segnb.files import DataError
from segnb.masks import coco_encode, rle_encode
from segnb.recipe import load_recipe

H, W = 11, 14
RNG = np.random.default_rng(0)
RGB, RGBA = RNG.integers(0, 256, (H, W, 3), np.uint8), RNG.integers(0, 256, (H, W, 4), np.uint8)
DEEP = RNG.integers(0, 65536, (H, W, 4), np.uint16)
INVERTED = Image.fromarray(RGB[..., 0], "P")
INVERTED.putpalette(np.repeat(np.arange(255, -1, -1), 3).astype(np.uint8).tobytes())

PICTURES = {   # name, what is saved, what is to be read
    "1.png": (Image.fromarray(RGB[..., 0] > 99), None),
    "L.png": (Image.fromarray(RGB[..., 0]), None),
    "LA.png": (Image.fromarray(RGBA).convert("LA"), None),
    "P.png": (Image.fromarray(RGB).quantize(16), None),
    "P inverted.png": (INVERTED, 255 - RGB[..., :1].repeat(3, 2)),
    "RGB.png": (Image.fromarray(RGB), RGB),
    "RGBA.png": (Image.fromarray(RGBA), RGBA[..., :3]),
    "I;16.png": (Image.fromarray(DEEP[..., 0]), DEEP[..., :1].repeat(3, 2)),
    "L.jpg": (Image.fromarray(RGB[..., 0]), None),
    "RGB.jpg": (Image.fromarray(RGB), None),
    "CMYK.jpg": (Image.fromarray(RGB).convert("CMYK"), None),
    "P.gif": (Image.fromarray(RGB).quantize(16), None),
    "RGB.bmp": (Image.fromarray(RGB), RGB),
    "RGBA.webp": (Image.fromarray(RGBA), None),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", PICTURES)
def test_pictures_of_every_mode_are_what_one_sees_in_three_channels(name, tmp_path):
    picture, expected = PICTURES[name]
    picture.save(tmp_path / name)
    image = read_image_file(tmp_path / name)
    assert image.shape == (H, W, 3) and image.flags.c_contiguous
    if expected is None: expected = np.asarray(Image.open(tmp_path / name).convert("RGB"))
    assert image.dtype == expected.dtype and (image == expected).all()
    assert read_header(tmp_path / name).shape == (H, W)


@pytest.mark.quick
@pytest.mark.parametrize("channels", [3, 4])
def test_sixteen_bits_stay_sixteen_bits(channels, tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), DEEP[..., [2, 1, 0, 3][:channels]])
    image = read_image_file(tmp_path / "a.png")
    assert image.dtype == np.uint16 and (image == DEEP[..., :3]).all()


STACK = RNG.integers(0, 65536, (10, H, W), np.uint16)
TIFFS = {   # what is saved, how, what is to be read
    "bands first": (STACK, {}, STACK.transpose(1, 2, 0)),
    "bands last": (STACK.transpose(1, 2, 0), {}, STACK.transpose(1, 2, 0)),
    "bands last in one page": (STACK.transpose(1, 2, 0), dict(planarconfig="contig", photometric="minisblack"), STACK.transpose(1, 2, 0)),
    "compressed": (STACK, dict(compression="zlib"), STACK.transpose(1, 2, 0)),
    "an axis too many": (STACK[None], {}, STACK.transpose(1, 2, 0)),
    "one band": (STACK[:1], {}, STACK[0][..., None]),
    "no axis of bands": (STACK[0], {}, STACK[0][..., None]),
    "RGB": (RGB, dict(photometric="rgb"), RGB),
    "float": (STACK[:4].astype(np.float32), {}, STACK[:4].transpose(1, 2, 0).astype(np.float32)),
    "white is zero": (RGB[..., 0], dict(photometric="miniswhite"), 255 - RGB[..., :1]),
    "white is zero, 16 bits": (STACK[0], dict(photometric="miniswhite"), 65535 - STACK[0][..., None]),
    "white is zero, the large byte first": (STACK[0], dict(photometric="miniswhite", byteorder=">"), 65535 - STACK[0][..., None]),
    "the large byte first": (STACK, dict(byteorder=">"), STACK.transpose(1, 2, 0)),
    "big": (STACK, dict(bigtiff=True), STACK.transpose(1, 2, 0)),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", TIFFS)
def test_tiff_keeps_its_bands_in_either_order(name, tmp_path):
    array, options, expected = TIFFS[name]
    tifffile.imwrite(tmp_path / "a.tif", array, **options)
    image = read_image_file(tmp_path / "a.tif")
    assert image.shape == expected.shape and image.dtype == expected.dtype and (image == expected).all()
    assert read_header(tmp_path / "a.tif").shape == expected.shape[:2]


@pytest.mark.quick
def test_tiff_that_tifffile_cannot_decode_alone(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "lzw.tif", compression="tiff_lzw")
    Image.fromarray(RGB).quantize(8).save(tmp_path / "palette.tif")
    assert (read_image_file(tmp_path / "lzw.tif") == RGB).all()
    assert (read_image_file(tmp_path / "palette.tif") == np.asarray(Image.open(tmp_path / "palette.tif").convert("RGB"))).all()


@pytest.mark.quick
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_exif_turns_a_picture_and_a_mask_that_was_drawn_on_its_stored_pixels(orientation, suffix, tmp_path):
    picture, mask = Image.fromarray(RGB), np.arange(H * W, dtype=np.uint8).reshape(H, W) % 3
    picture.getexif()[274] = orientation
    for folder in ("train/images", "train/masks", "test/images"): (tmp_path / folder).mkdir(parents=True)
    for folder in ("train", "test"): picture.save(tmp_path / folder / f"images/a.{suffix}", exif=picture.getexif())
    seen = turn(mask, orientation)
    recipe = load_recipe("indoor", {"data.root": tmp_path})
    image = tmp_path / f"train/images/a.{suffix}"
    for drawn in [seen] + [mask] * (orientation > 4):
        Image.fromarray(np.ascontiguousarray(drawn)).save(tmp_path / "train/masks/a.png")
        row = read_samples(recipe).iloc[0]
        assert (row.height, row.width) == seen.shape
        assert (read_image(recipe, row) == np.asarray(ImageOps.exif_transpose(Image.open(image)))).all()
        assert (read_mask(recipe, row) == seen).all()


@pytest.mark.quick
def test_coco_outlines_drawn_on_stored_pixels_are_turned_with_the_picture(tmp_path):
    picture = Image.fromarray(RGB)
    picture.getexif()[274] = 6
    picture.save(tmp_path / "a.png", exif=picture.getexif())
    coco = dict(images=[dict(id=1, file_name="a.png", height=H, width=W)], categories=[dict(id=1, name="Paper")],
                annotations=[dict(id=1, image_id=1, category_id=1, segmentation=[[0, 0, 9, 0, 9, 3, 0, 3]])])
    for name in ("train_all.json", "test.json"): (tmp_path / name).write_text(json.dumps(coco))
    recipe = load_recipe("trash", {"data.root": tmp_path})
    mask = read_mask(recipe, read_samples(recipe).iloc[0])
    assert mask.shape == (W, H) and set(zip(*np.nonzero(turn(mask, 8)))) == {(y, x) for y in range(3) for x in range(9)}


@pytest.mark.quick
@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp949", "utf-16"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_korean_names_in_tables_of_every_kind(form, encoding, newline, tmp_path):
    on_disk = unicodedata.normalize({"NFC": "NFD", "NFD": "NFC"}[form], "학습_이미지/건물 1_가")
    if encoding == "cp949" and form == "NFD": pytest.skip("CP949 has no decomposed letters")
    in_table = unicodedata.normalize(form, "학습_이미지/건물 1_가")
    folder = tmp_path / on_disk.split("/")[0]
    folder.mkdir()
    for n in (1, 2): Image.fromarray(RGB).save(tmp_path / f"{on_disk}{n}.png")
    mask = (RGB[..., 0] > 128).astype(np.uint8)
    table = lambda rows: newline.join(rows + [""]).encode(encoding)
    (tmp_path / "train.csv").write_bytes(table(["img_id,img_path,mask_rle", f"{in_table}1,./{in_table}1.png,{rle_encode(mask)}"]))
    (tmp_path / "test.csv").write_bytes(table(["img_id,img_path", f"{in_table}2,./{in_table}2.png"]))
    (tmp_path / "sample_submission.csv").write_bytes(table(["img_id,mask_rle", f"{in_table}2,-1"]))
    recipe = load_recipe("satellite", {"data.root": tmp_path})
    samples = read_samples(recipe)
    assert samples.image_id.tolist() == [f"{in_table}1", f"{in_table}2"]
    assert (read_mask(recipe, samples.iloc[0]) == mask).all() and (read_image(recipe, samples.iloc[1]) == RGB).all()


@pytest.mark.quick
def test_names_pair_across_unicode_forms_suffixes_and_folders(tmp_path):
    for name in ("b", "a_1", "가 1", "sub/가"):
        for folder, form, suffix in (("train/images", "NFD", "JPG"), ("train/masks", "NFC", "png"), ("test/images", "NFC", "jpeg")):
            path = tmp_path / folder / f"{unicodedata.normalize(form, name)}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((H, W), len(name), np.uint8)).save(path)
    for rubbish in ("train/images/._b.JPG", "train/images/Thumbs.db", "test/images/.hidden.png", "__MACOSX/x.png"):
        (tmp_path / rubbish).parent.mkdir(exist_ok=True)
        (tmp_path / rubbish).write_bytes(b"rubbish")
    recipe = load_recipe("indoor", {"data.root": tmp_path})
    samples = read_samples(recipe)
    assert samples.image_id.tolist() == ["a_1", "b", "sub/가", "가 1"] * 2 and samples.group.tolist() == ["", "", "sub", ""] * 2
    assert [int(read_mask(recipe, row).max()) for row in samples[:4].itertuples()] == [3, 1, 5, 3]


@pytest.mark.quick
def test_nothing_is_read_outside_of_the_root(tmp_path):
    (tmp_path / "secret.png").write_bytes(b"x")
    root = tmp_path / "root"
    root.mkdir()
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "folder").symlink_to(tmp_path)
    for name in ("../secret.png", str(tmp_path / "secret.png"), "a/../../secret.png", "link.png", "folder/secret.png", "..\\secret.png"):
        with pytest.raises(DataError, match="leads out of"): find_file(root, name)


MASK = (RNG.integers(0, 3, (H, W))).astype(np.uint8)
COLORS = np.array([[0, 0, 0], [200, 0, 0], [0, 200, 0]], np.uint8)


def palette_png(indices, palette):
    picture, out = Image.fromarray(indices), io.BytesIO()
    picture.putpalette(np.array(palette, np.uint8).tobytes())
    picture.save(out, "PNG")
    return out.getvalue()


def grey(*values): return [[v] * 3 for v in values]


@pytest.mark.quick
@pytest.mark.parametrize("palette, expected", [
    (COLORS, MASK),                                    # as VOC does: indices, in colours to look at
    (grey(0, 1, 2), MASK),
    (grey(2, 1, 0), 2 - MASK),                         # an inverted palette: the greys are the classes
    (grey(0, 127, 255), MASK),                         # a ramp to look at
    (grey(255, 127, 0), None),                         # an inverted ramp: which one is meant?
    (grey(0, 0, 0), MASK),                             # an empty palette says nothing
])
def test_masks_with_a_palette_are_read_if_they_have_one_meaning(palette, expected):
    data = palette_png(MASK, palette)
    if expected is not None: assert (decode_mask(data, "a.png", n_values=3) == expected).all()
    else:
        with pytest.raises(DataError, match="Set data.palette"): decode_mask(data, "a.png", n_values=3)
        colors = decode_mask(data, "a.png", n_values=3, palette=grey(255, 127, 0))
        assert (colors == MASK).all()


@pytest.mark.quick
def test_black_and_white_means_zero_and_one_however_the_palette_is_sorted():
    on = (MASK > 0).astype(np.uint8)
    assert (decode_mask(palette_png(on, grey(0, 255)), "a.png", n_values=2) == on).all()
    assert (decode_mask(palette_png(1 - on, grey(255, 0)), "a.png", n_values=2) == on).all()


@pytest.mark.quick
def test_tables_name_what_they_lack(tmp_path):
    (tmp_path / "a.csv").write_text("img_id,mask\nA,\n")
    with pytest.raises(DataError, match="a.csv: Column 'mask_rle' is not one of img_id, mask. Did you mean 'mask'?"): read_table(tmp_path / "a.csv", ["mask_rle"])
    with pytest.raises(DataError, match="no such folder"): list_files(tmp_path / "b")
    (tmp_path / "c.csv").write_text("")
    with pytest.raises(DataError, match="c.csv"): read_table(tmp_path / "c.csv")


@pytest.mark.quick
@pytest.mark.parametrize("compressed", [False, True])
def test_coco_run_lengths_beside_outlines(compressed, tmp_path):
    Image.fromarray(RGB).save(tmp_path / "a.png")
    coco = dict(images=[dict(id="x", file_name="a.png", height=H, width=W)], categories=[dict(id=90, name="Metal"), dict(id=4, name="Paper")],
                annotations=[dict(id=1, image_id="x", category_id=90, segmentation=coco_encode(MASK == 1, compressed=compressed)),
                             dict(id=2, image_id="x", category_id=4, segmentation=coco_encode(MASK == 2, compressed=compressed))])
    for name in ("train_all.json", "test.json"): (tmp_path / name).write_text(json.dumps(coco))
    recipe = load_recipe("trash", {"data.root": tmp_path, "classes": ["Background", "Metal", "Paper"]})
    assert (read_mask(recipe, read_samples(recipe).iloc[0]) == MASK).all()


REAL_NAMES = ["satellite", "trash", "indoor", "handbone", "wildfire"]


@pytest.mark.real
@pytest.mark.parametrize("name", REAL_NAMES)
def test_real_rows_have_the_pixels_and_masks_they_promise(name):
    recipe = load_recipe(REAL / name / "recipe.yaml")
    samples = read_samples(recipe)
    assert samples.columns.tolist() == ["image_id", "split", "image", "mask", "group", "height", "width"]
    assert samples.split.tolist() == sorted(samples.split, reverse=True) and not samples[["split", "image_id"]].duplicated().any()
    for row in samples.iloc[::7].itertuples():
        image = read_image(recipe, row)
        assert image.shape[:2] == (row.height, row.width)
        if name != "wildfire": assert (image == np.asarray(Image.open(REAL / name / row.image).convert("RGB"))).all()
        else: assert (image == tifffile.imread(REAL / name / row.image)[recipe.data.bands].transpose(1, 2, 0)).all()
        if row.split == "train": assert read_mask(recipe, row).shape[:2] == (row.height, row.width)


@pytest.mark.real
def test_real_coco_masks_equal_those_of_the_coco_tools():
    peer = pytest.importorskip("pycocotools.coco").COCO(REAL / "trash/train_all.json")
    recipe = load_recipe(REAL / "trash/recipe.yaml")
    samples = read_samples(recipe)
    for image in list(peer.imgs.values())[::9]:
        expected = np.zeros((image["height"], image["width"]), np.uint8)
        for entry in sorted(peer.imgToAnns[image["id"]], key=lambda entry: entry["category_id"]):
            expected[peer.annToMask(entry) == 1] = entry["category_id"] + 1
        row = samples[(samples.image_id == image["file_name"]) & (samples.split == "train")].iloc[0]
        assert (read_mask(recipe, row) == expected).all()


@pytest.mark.real
@pytest.mark.parametrize("name", REAL_NAMES)
def test_real_test_rows_stand_in_the_order_of_the_submission(name):
    root, recipe = REAL / name, load_recipe(REAL / name / "recipe.yaml")
    ids = read_samples(recipe).query("split == 'test'").image_id.tolist()
    expected = dict(
        satellite=lambda: pd.read_csv(root / "sample_submission.csv").img_id.tolist(),
        trash=lambda: [image["file_name"] for image in json.loads((root / "test.json").read_text())["images"]],
        indoor=lambda: [path.stem for path in sorted((root / "test/images").iterdir())],
        handbone=lambda: [path.name for path in sorted((root / "test/DCM").rglob("*.png"))],
        wildfire=lambda: pd.read_csv(root / "test_meta.csv").test_img.tolist())[name]()
    assert ids == expected
