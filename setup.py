"""Packaging, read from settings.ini; the wheel also carries the notebooks: `segnb run` executes those of the stages, `segnb bundle` reads explanations in all."""
from configparser import ConfigParser
from pathlib import Path
import json, re

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
config = ConfigParser(delimiters=["="], interpolation=None)
config.read(here / "settings.ini", encoding="utf8")
cfg = config["DEFAULT"]


class BuildWithNotebooks(build_py):
    "Put the notebooks into the package as it is built; what those of the library show stays behind"
    def run(self):
        super().run()
        if self.editable_mode: return
        target = Path(self.build_lib) / "segnb" / "notebooks"
        target.mkdir(parents=True, exist_ok=True)
        for notebook in sorted((here / "nbs").glob("[0-9]*.ipynb")):
            content = json.loads(notebook.read_text("utf8"))
            if not re.match("[1-6]0_", notebook.name):
                for cell in content["cells"]: cell.update({"outputs": []} if cell["cell_type"] == "code" else {})
            (target / notebook.name).write_text(json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True) + "\n", "utf8")


setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], keywords=cfg["keywords"],
    author=cfg["author"], author_email=cfg["author_email"], license="Apache-2.0", url=cfg["git_url"],
    long_description=(here / "README.md").read_text("utf8"), long_description_content_type="text/markdown",
    packages=find_packages(include=["segnb", "segnb.*"]), package_data={"segnb": ["recipes/*.yaml"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={extra: [r for name in parts.split() for r in cfg[f"{name}_requirements"].split()]
                    for extra, parts in {"track": "track", "tune": "tune", "dev": "dev track tune"}.items()},
    entry_points={"console_scripts": cfg["console_scripts"].split(), "nbdev": ["segnb=segnb._modidx:d"]},
    cmdclass={"build_py": BuildWithNotebooks}, zip_safe=False,
)
