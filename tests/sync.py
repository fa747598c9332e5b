"""Clean the notebooks and write segnb/*.py and README.md from them; with --check in a copy, and say what differs."""
import argparse, json, os, re, shutil, subprocess, sys, tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEPT = {"__init__.py"}   # nbdev does not write these


def nbdev(command, folder):
    subprocess.run([Path(sys.executable).parent / f"nbdev_{command}"], cwd=folder, check=True)


def readme(folder):
    "README.md from nbs/index.ipynb: its cells one after another, links as seen from the top"
    cells = json.loads((folder / "nbs/index.ipynb").read_text("utf8"))["cells"]
    texts = ["".join(c["source"]) for c in cells]
    shown = [t if c["cell_type"] == "markdown" else f"```python\n{t}\n```" for c, t in zip(cells, texts) if t.strip()]
    text = "\n\n".join(shown) + "\n"
    return re.sub(r"\]\((?=images/|\d\d_\w+\.ipynb)", "](nbs/", text).replace("](../", "](")


def write(folder):
    "Make everything that is made from notebooks anew"
    nbdev("clean", folder)
    for module in (folder / "segnb").glob("*.py"):
        if module.name not in KEPT: module.unlink()
    nbdev("export", folder)
    (folder / "README.md").write_text(readme(folder), "utf8")


def project_files(folder):
    "Files of the project as git sees them, new ones too; a copy without git has only those"
    if not (folder / ".git").exists(): return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    names = subprocess.run(["git", "ls-files", "-coz", "--exclude-standard"], cwd=folder, check=True, capture_output=True).stdout.decode()
    return sorted(n for n in names.split("\0") if n and (folder / n).is_file())


def check():
    "Names of files that are not what their notebooks say"
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp) / ROOT.name
        names = project_files(ROOT)
        for name in names:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
        write(copy)
        after = {n for n in project_files(copy) if "__pycache__" not in n}
        same = lambda n: (ROOT / n).read_bytes() == (copy / n).read_bytes()
        return sorted(set(names) ^ after) + [n for n in names if n in after and not same(n)]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check: return write(ROOT)
    wrong = check()
    if wrong: sys.exit("Not in sync with the notebooks: " + ", ".join(wrong) + ". Run `make sync` and commit what it writes.")
    print("in sync: notebooks are clean, segnb/*.py and README.md are what the notebooks say")


if __name__ == "__main__": main()
