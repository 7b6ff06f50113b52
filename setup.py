"""Packaging of jaxrl_llm.

Upper bounds are the next release that could break us; each pair below was installed and tested on Python 3.11 (jax 0.10.2) and
3.12 (jax 0.11.0). flax 0.12 allows any jax >= 0.10 but fails to import from jax 0.11.1 on, hence the bound on jax.
"""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
JAX = ">=0.10,<0.11.1"
VERSION = re.search(r'__version__ = "([^"]+)"', (HERE / "jaxrl_llm" / "__init__.py").read_text())[1]
README = HERE / "README.md"

setup(
    name="jaxrl-llm",
    version=VERSION,
    description="Post-training of language models in JAX, with data chosen by sparse-autoencoder features",
    long_description=README.read_text() if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        "models",
        "sae",
        "sae.architectures",
        "sae.formats",
        "jaxrl_llm",
        "jaxrl_llm.commands",
        "jaxrl_llm.curation",
        "jaxrl_llm.data",
        "jaxrl_llm.evals",
        "jaxrl_llm.evals.agentif",
        "jaxrl_llm.losses",
        "jaxrl_llm.report",
        "jaxrl_llm.rewards",
        "jaxrl_llm.rewards.sandbox",
        "jaxrl_llm.rewards.constraints",
        "jaxrl_llm.serve",
        "jaxrl_llm.train",
        "configs",
        "experiments",
    ],
    package_data={"jaxrl_llm.report": ["assets/*"]},
    install_requires=[
        f"jax{JAX}",
        "flax>=0.12.8,<0.13",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.4,<0.13",
        "chex>=0.1.90",
        "jaxtyping>=0.3,<0.4",
        "ml-dtypes>=0.4",
        "numpy>=2.0,<3",
        "scipy>=1.15,<2",
        "scikit-learn>=1.7,<2",
        "safetensors>=0.8,<0.9",
        "huggingface_hub>=1.0,<3",
        "transformers>=5.20,<6",
        "tokenizers>=0.22,<0.24",
        "jinja2>=3.1,<4",
        "datasets>=5.0,<6",
        "pyarrow>=20",
        "tensorflow-datasets>=4.9.9,<5",
        "array-record>=0.8,<0.9",
        "math-verify[antlr4_13_2]>=0.9,<0.10",
        "latex2sympy2_extended>=1.11,<2",
        "sympy>=1.13,<2",
        "threadpoolctl>=3.5,<4",
        "ml-collections>=1.1,<2",
        "absl-py>=2.1,<3",
        "tqdm>=4.66,<5",
        "regex>=2025.7",
        "packaging>=24",
    ],
    extras_require={
        "cuda": [f"jax[cuda12]{JAX}"],
        "tpu": [f"jax[tpu]{JAX}"],
        "test": ["pytest>=8,<10", "pytest-xdist>=3.6,<4", "hypothesis>=6.100,<7", "ruff>=0.14", "pyright>=1.1.400"],
    },
    entry_points={"console_scripts": ["jaxrl-llm = jaxrl_llm.cli:main"]},
    classifiers=["Programming Language :: Python :: 3.11", "Programming Language :: Python :: 3.12"],
)
