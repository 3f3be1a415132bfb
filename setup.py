"Packaging metadata comes from settings.ini, the one source; what setuptools wants as TOML is in pyproject.toml."
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

config = ConfigParser(delimiters=["="])
config.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
meta = config["DEFAULT"]
suffix = "_requirements"

setup(
    version=meta["version"],
    description=meta["description"],
    keywords=meta["keywords"].split(),
    python_requires=f">={meta['min_python']}",
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Programming Language :: Python :: 3 :: Only",
        *(f"Programming Language :: Python :: {v}" for v in meta["tested_python"].split()),
    ],
    install_requires=meta["requirements"].split(),
    extras_require={k.removesuffix(suffix).replace("_", "-"): v.split() for k, v in meta.items() if k.endswith(suffix)},
)
