"""What the sample notebooks cannot show about themselves: processes, full disks, interrupted draws."""
import errno
import cv2
import pytest
from segnb import sample
from segnb.doctor import examine
from segnb.files import DataError
from segnb.recipe import load_recipe
from segnb.sample import LAYOUTS, draw_sample

def bytes_of(root): return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}

def test_workers_do_not_change_a_byte(tmp_path):
    alone, together = (draw_sample("trash", tmp_path / str(n), train=9, test=4, size=64, workers=n) for n in (0, 2))
    assert bytes_of(alone) == bytes_of(together)

def test_full_disk_is_one_paragraph_and_can_go_on(tmp_path, monkeypatch):
    put, calls = sample._put, []
    def full(path, data):
        calls.append(path)
        if len(calls) > 5: raise OSError(errno.ENOSPC, "No space left on device")
        put(path, data)
    monkeypatch.setattr(sample, "_put", full)
    with pytest.raises(DataError, match="cannot be written to .*No space left on device.*goes on from there") as error:
        draw_sample("handbone", tmp_path / "out", train=4, test=2, size=64)
    assert error.value.exit_code == 3 and "\n" not in str(error.value)
    assert len(bytes_of(tmp_path / "out")) == 5                      # what was drawn stays, and no table claims more
    monkeypatch.setattr(sample, "_put", put)
    assert bytes_of(draw_sample("handbone", tmp_path / "out", train=4, test=2, size=64)) == \
           bytes_of(draw_sample("handbone", tmp_path / "new", train=4, test=2, size=64))

def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot be written"): draw_sample("indoor", tmp_path / "file" / "out", train=1, test=1, size=64)
    assert (tmp_path / "file").read_text() == "in the way"

def test_competition_sizes(tmp_path):
    root = draw_sample("satellite", tmp_path, train=1, test=1, size=1024)
    assert cv2.imread(str(root / "train_img/TRAIN_0000.png")).shape == (1024, 1024, 3)
    assert cv2.imread(str(root / "test_img/TEST_00000.png")).shape == (224, 224, 3)

@pytest.mark.parametrize("name", LAYOUTS)
def test_the_doctor_finds_nothing_wrong(name, tmp_path):
    report = examine(load_recipe(name, {"data.root": draw_sample(name, tmp_path, train=10, test=8, size=96)}), workers=0)
    assert report.ok and [f for f in report.findings if f["severity"] != "note"] == []
