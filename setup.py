"""Packaging of hgkd. Ranges here are what is believed to work; constraints.txt pins the set that CI runs."""

import os
import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "hgkd/__init__.py").read_text()).group(1)

# HGKD_ONEDL=1: the maintained OneDL forks in place of OpenMMLab's originals. They install into the same folders, so a
# requirement on both would damage both, and an extra cannot take a requirement away.
ONEDL = os.environ.get("HGKD_ONEDL", "") not in ("", "0")

INSTALL = [
    "torch>=2.4",
    "torchvision>=0.19",
    "timm>=1.0.20,<2",
    "huggingface_hub>=0.25",  # timm needs it, too
    "onedl-mmengine>=0.10.12,<0.11" if ONEDL else "mmengine>=0.10.7,<0.11",
    "setuptools<80",  # mmengine imports pkg_resources
    "safetensors>=0.4",
    "scikit-learn>=1.3",
    "scipy>=1.11",
    "threadpoolctl>=3",
    "tensorboard>=2.14",
    "matplotlib>=3.7",
    "numpy>=1.26",
    "pillow>=10.1",
    "rich>=13",
    "pyyaml>=6",
]
ORIGINALS = [
    "mmcv-lite>=2.1.0,<2.2",  # mmdet and mmsegmentation refuse 2.2
    "mmdet>=3.3,<3.4",
    "mmsegmentation>=1.2.2,<1.3",
]
FORKS = ["onedl-mmcv>=2.3.6,<2.4", "onedl-mmdetection>=3.5.1,<3.6", "onedl-mmsegmentation>=1.4.2,<1.5"]
DOWNSTREAM = [
    *(FORKS if ONEDL else ORIGINALS),
    "ftfy",  # mmsegmentation imports both without declaring them
    "regex",
    "pycocotools>=2.0.7,!=2.0.9,!=2.0.10",  # these two: KeyError 'info' on annotations without that entry
]
EXPORT = ["onnx>=1.16", "onnxruntime>=1.18", "onnxscript>=0.1"]
EDGE = ["openvino>=2025.0", "nncf>=2.17", "ncnn>=1.0.20250503", "pnnx>=20250530"]
EXECUTORCH = ["executorch>=1.5,<1.6", "torchao>=0.18,<0.19"]
# litert-torch 0.10 declares torch below 2.15: pip installs 2.14 with it, or refuses a newer one
LITERT = ["litert-torch>=0.10,<0.11", "ai-edge-litert>=2.3,<2.4", "ai-edge-quantizer>=0.10,<0.11"]
COREML = ["coremltools>=9.0,<10"]
SHARDS = ["webdataset>=1.0"]
TIFF = ["tifffile>=2023.8.12"]
PARQUET = ["pyarrow>=15"]
REMOTE = ["fsspec>=2024.2", "aiohttp>=3.9", "braceexpand>=0.1.7"]
NOTEBOOK = ["nbclient>=0.10", "ipykernel>=6.29"]  # the tutorial's notebook is run by a test
TEST = [
    *(*EXPORT, *EDGE, *DOWNSTREAM, *SHARDS, *TIFF, *PARQUET, *REMOTE, *NOTEBOOK),
    *("pytest>=8", "pytest-xdist>=3", "hypothesis>=6.100"),
]
# each of these releases installs on Python 3.11 to 3.13; Sphinx 9.1 wants 3.12, and 3.10 resolves 8.1 with myst-parser 4
DOCS = ["sphinx>=8.1,<9.1", "myst-parser>=4,<6", "myst-nb>=1.2,<2", "furo>=2025.12.19", "sphinx-copybutton>=0.5.2"]
EXTRAS = {
    "downstream": DOWNSTREAM,
    # any spconv build serves; this one has wheels up to Python 3.11
    "spconv": ["spconv-cu120>=2.3.6; python_version < '3.12'", "spconv-cu126>=2.3.8; python_version >= '3.12'"],
    "export": EXPORT,
    "edge": EDGE,
    "executorch": EXECUTORCH,
    "litert": LITERT,
    "coreml": COREML,
    "shards": SHARDS,  # to write them; reading needs nothing
    "tiff": TIFF,  # TIFFs of several bands, where in_chans says how many
    "wandb": ["wandb>=0.18"],  # tracker=wandb
    "mlflow": ["mlflow-skinny>=2.16"],  # tracker=mlflow; `mlflow ui`, to look at the runs, is in the whole package
    "parquet": PARQUET,  # Parquet and Arrow files of images, Hugging Face's among them
    "remote": REMOTE,  # http(s)://; s3:// and gs:// need s3fs and gcsfs as well
    "test": TEST,
    "docs": [*DOWNSTREAM, *DOCS],  # the config keys of detectors and segmentors are read from their code
    "dev": [*TEST, "ruff>=0.8", "mypy>=1.11"],
}


class BuildWithRecipes(build_py):
    """Copies the recipes to where the installed package finds them: ``hgkd/.mim/configs`` (see hgkd/recipes.py)."""

    def run(self):
        super().run()
        if self.editable_mode:
            return  # the checkout has links there
        mim = Path(self.build_lib) / "hgkd" / ".mim"
        shutil.rmtree(mim, ignore_errors=True)  # an earlier build's
        skip = shutil.ignore_patterns("__pycache__", "*.md")
        shutil.copytree(ROOT / "configs", mim / "configs", ignore=skip)
        shutil.copytree(ROOT / "downstream", mim / "configs" / "downstream", ignore=skip)
        shutil.copy(ROOT / "hgkd/.mim/model-index.yml", mim)
        # downstream lies within configs here, and its recipes name ../../configs/_base_
        shutil.copytree(ROOT / "configs/_base_", mim / "configs" / "configs" / "_base_", ignore=skip)


setup(
    name="hgkd",
    version=VERSION,
    description="Distil a Vision Transformer into a sparse masked CNN, and carry it downstream",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["hgkd", "hgkd.*"]),
    cmdclass={"build_py": BuildWithRecipes},
    entry_points={"console_scripts": ["hgkd = hgkd.cli.main:main"]},
    package_data={"hgkd": ["py.typed"]},
    install_requires=INSTALL,
    extras_require=EXTRAS,
)
