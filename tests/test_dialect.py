"""What `segnb check` learns from files whose dialect is known, and where it says that they do not tell."""
import cv2
import numpy as np
import pytest
from conftest import REAL
from test_doctor import LAYOUTS

from segnb.data import read_table
from segnb.doctor import examine
from segnb.files import DataError
from segnb.masks import rle_encode
from segnb.recipe import load_recipe


def blobs(n, height, width, order):
    "Masks of a disk each, two of three cut off where a line begins or ends"
    rng = np.random.default_rng(1)
    for k in range(n):
        x, y = rng.integers(8, (width - 8, height - 8)).tolist()
        if k % 3: x, y = (x, (1, height - 2)[k % 3 - 1]) if order == "F" else ((1, width - 2)[k % 3 - 1], y)
        yield cv2.circle(np.zeros((height, width), np.uint8), (x, y), 5, 1, -1)


def tiles(root, n=18, height=32, width=32, *, order="C", base=1, **overrides):
    "Drawn tiles whose masks are written in a known dialect"
    layout = LAYOUTS["rle_csv"](root)
    layout.overrides, lines = overrides, ["img_id,img_path,mask_rle"]
    for k, mask in enumerate(blobs(n, height, width, order)):
        layout.picture(f"train_img/{k}.png", layout.scene(height, width, 3) // 8 + 180 * mask[..., None])
        lines.append(f"A{k},./train_img/{k}.png,{rle_encode(mask, order=order, base=base)}")
    layout.text("train.csv", "\n".join(lines) + "\n")
    return layout


def learned(layout, **overrides):
    return {known["key"]: known for known in examine(layout.recipe(**overrides), workers=0).summary["dialect"]}


@pytest.mark.parametrize("shape", [(32, 32), (32, 48)])
@pytest.mark.parametrize("order", "CF")
@pytest.mark.parametrize("base", [0, 1])
def test_order_and_base_are_learned_whatever_the_recipe_says(shape, order, base, tmp_path):
    layout, other = tiles(tmp_path, 54, *shape, order=order, base=base), {"C": "F", "F": "C"}[order]
    found = learned(layout, **{"data.order": other, "data.base": 1 - base})
    assert (found["data.order"]["value"], found["data.order"]["asked"]) == (order, other)
    assert not found["data.order"]["proven"] and ("picture" if shape[0] == shape[1] else "outline") in found["data.order"]["evidence"]
    assert (found["data.base"]["value"], found["data.base"]["asked"]) == (base, 1 - base)
    assert all(known["agrees"] for known in learned(layout, **{"data.order": order, "data.base": base}).values())


def test_too_few_masks_cannot_tell(tmp_path):
    found = learned(tiles(tmp_path, 6))
    assert found["data.order"]["value"] is None and found["data.base"]["value"] is None and "of" in found["data.order"]["evidence"]


def test_pictures_without_edges_cannot_tell_a_square_mask_from_its_transpose(tmp_path):
    layout = tiles(tmp_path, 40)
    for k in range(40): layout.picture(f"train_img/{k}.png", layout.scene(32, 32, 3))
    assert learned(layout)["data.order"]["value"] is None


def test_every_mask_makes_the_round_trip(tmp_path):
    layout = tiles(tmp_path)
    text = layout.root.joinpath("train.csv").read_text()
    assert examine(layout.recipe(), workers=0).summary["round_trips"] == dict(masks=18, same_text=18, same_mask=18)
    rows = text.splitlines() + ["B0,./train_img/0.png,1 3 4 2", "B1,./train_img/0.png, 1  3", "B2,./train_img/0.png,-1", "B3,./train_img/0.png,9 3 2 1"]
    layout.text("train.csv", "\n".join(rows) + "\n")
    report = examine(layout.recipe(), workers=0)
    assert report.summary["round_trips"] == dict(masks=22, same_text=19, same_mask=21)
    said = {found["row"]: (found["code"], found["message"]) for found in report.findings if found["code"].startswith("rle-")}
    assert [said[row][0] for row in (20, 21, 23)] == ["rle-unusual", "rle-unusual", "rle-broken"]
    assert "runs that touch" in said[20][1] and "white space" in said[21][1] and "goes back" in said[23][1]


@pytest.mark.parametrize("cell, value", [("-1", -1), ("", ""), ("nan", ""), ("-1.0", -1), ("1 1", None)])
def test_the_empty_mask_is_spelled_as_sample_submission_spells_it(cell, value, tmp_path):
    layout = tiles(tmp_path, 2)
    layout.text("sample_submission.csv", f"img_id,mask_rle\nT0,{cell}\nT1,{cell}\n")
    found = learned(layout, **{"submit.empty": -1})["submit.empty"]
    assert found["value"] == value and found["agrees"] == (value in (-1, None))


def test_columns_go_by_their_contents(tmp_path):
    layout = tiles(tmp_path, 4)
    for file in ("train.csv", "test.csv", "sample_submission.csv"):
        path = layout.root / file
        path.write_text(path.read_text().replace("img_id", "ID").replace("img_path", "file").replace("mask_rle", "rle"))
    with pytest.raises(DataError, match=r"data.id_column: ID \(.*data.image_column: file \(.*data.mask_column: rle") as error: examine(layout.recipe(), workers=0)
    assert error.value.finding["code"] == "missing-column"
    right = {"data.id_column": "ID", "data.image_column": "file", "data.mask_column": "rle"}
    assert examine(layout.recipe(**right), workers=0).ok
    for file in ("train.csv", "test.csv"):                        # ids that are no ids: the recipe means another column
        table = read_table(layout.root / file).assign(area="north")
        table.to_csv(layout.root / file, index=False)
    (layout.root / "sample_submission.csv").unlink()
    found = learned(layout, **right | {"data.id_column": "area"})["data.id_column"]
    assert (found["value"], found["agrees"]) == ("ID", False)


def test_both_directions_of_a_difference_are_named(tmp_path):
    for name, rows, said in (("rle_csv", "img_id,mask_rle\nT0,-1\nT7,-1\n", ("'T7' is not in the test table", "'T1' of the test table")),
                             ("coco", "image_id,PredictionString\nb/7.jpg,0\n", ("'b/7.jpg' is not in the test files", "'b/2.jpg' of the test files"))):
        layout = LAYOUTS[name](tmp_path / name)
        layout.text("sample_submission.csv", rows)
        found = [f["message"] for f in examine(layout.recipe(), workers=0).findings if f["code"] == "sample-submission"]
        assert len(found) == 2 and all(any(words in message for message in found) for words in said)


@pytest.mark.real
def test_the_real_tiles_tell_their_dialect():
    wrong = {"data.order": "F", "data.base": 0, "submit.empty": ""}
    report = examine(load_recipe(REAL / "satellite" / "recipe.yaml", wrong))
    found = {known["key"]: known["value"] for known in report.summary["dialect"]}
    assert (found["data.order"], found["data.base"], found["submit.empty"]) == ("C", 1, -1)
    assert {f["code"] for f in report.findings} >= {"dialect-proven", "dialect-likely"}
