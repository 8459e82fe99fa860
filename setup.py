"""Package metadata.

Requirements are ranges that are known to work; `constraints.txt` is the exact set that is tested. NVIDIA's apex is on
no list: the package of that name on PyPI is a web toolkit, NVIDIA's own is built from source and is optional.
Transformer Engine is an extra, because it only installs where there is a CUDA toolchain to match; so is DALI, which is
600 MB, needs no GPU and is tested on CPUs.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "megalong/__init__.py").read_text(), re.MULTILINE)[1]
README = HERE / "README.md"
DALI = "nvidia-dali-cuda130>=2.0,<3"

setup(
    name="megalong",
    version=VERSION,
    description="Continued pretraining of Llama models to contexts of 1M, 2M and 4M tokens, in 3D parallel",
    long_description=README.read_text() if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megalong", "megalong.*"]),
    # Without a checkout beside it, `megalong slurm` finds its scripts here.
    data_files=[("share/megalong/slurm", sorted(str(file.relative_to(HERE)) for file in HERE.glob("slurm/*.*")))],
    install_requires=[
        "torch>=2.6",
        "megatron-core>=0.16.1,<0.20",
        "transformers>=5.0",
        "tokenizers>=0.22",
        "gigatoken>=0.10,<0.11",
        "orjson>=3.10",
        "pyarrow>=17",
        "zstandard>=0.23",
        "safetensors>=0.5",
        "isal>=1.7",
        "pydantic>=2.7",
        "pyyaml>=6.0",
        "numpy>=1.26",
        "psutil>=5.9",
        "tensorboard>=2.16",
        "matplotlib>=3.8",
    ],
    extras_require={
        "gpu": ["transformer-engine[core_cu13,pytorch]>=2.20,<3"],
        "dali": [DALI],
        "eval": ["lm-eval[hf,ruler]>=0.4.13,<0.5"],
        "test": [
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "mypy",
            "types-PyYAML",
            "peft",
            DALI,
        ],
    },
    entry_points={"console_scripts": ["megalong = megalong.__main__:run"]},
)
