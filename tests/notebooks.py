"""Run every notebook as nbdev_test does, one after the other, each with a time limit."""
import subprocess, sys, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 1200   # seconds for one notebook


def run(notebook):
    "Exit code of nbdev_test on `notebook`"
    command = [Path(sys.executable).parent / "nbdev_test", "--path", str(notebook.relative_to(ROOT)), "--n_workers", "0"]
    try: return subprocess.run(command, cwd=ROOT, timeout=LIMIT).returncode
    except subprocess.TimeoutExpired:
        print(f"{notebook.name}: not done after {LIMIT} seconds")
        return 1


def main():
    failed = []
    for notebook in sorted((ROOT / "nbs").glob("*.ipynb")):
        began = time.time()
        if run(notebook): failed.append(notebook.name)
        print(f"{notebook.name}: {'FAILED' if notebook.name in failed else 'ok'} in {time.time() - began:.0f} s", flush=True)
    if failed: sys.exit("Notebooks that do not run through: " + ", ".join(failed))


if __name__ == "__main__": main()
