"""Writes tests/golden/logits.npz: what `transformers` (torch, fp32, CPU) computes for every parity case.

Run `python tests/make_golden.py` where torch and transformers are installed. The checkpoints themselves are not
stored: tests/models/parity_cases.py makes them from seeds. The versions used are stored beside the logits.
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

TESTS = Path(__file__).resolve().parent
GOLDEN = TESTS / "golden"
sys.path[:0] = [str(TESTS / "models"), str(TESTS.parent)]

import parity_cases as cases  # noqa: E402

from models import ModelConfig  # noqa: E402


def reference_logits(folder: Path, tokens, lengths=None, offset=0) -> np.ndarray:
    """Logits [B, T, V] of the checkpoint in `folder` by transformers, positions starting at `offset`."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    ids = torch.tensor(np.asarray(tokens), dtype=torch.long)
    mask = None if lengths is None else torch.arange(ids.shape[1]) < torch.tensor(np.asarray(lengths))[:, None]
    positions = torch.arange(ids.shape[1]).expand(ids.shape) + int(offset)
    with torch.no_grad():
        out = model(ids, attention_mask=None if mask is None else mask.long(), position_ids=positions)
    return out.logits.numpy()


def padded_logits(name: str, folder: Path) -> np.ndarray:
    """Logits of a case's right-padded batch.

    Under dynamic scaling `transformers` lets the padding of a batch count towards the length; ours is each row's own
    length, so there the reference runs the rows one by one.
    """
    tokens, lengths = (cases.inputs(name)[key] for key in ("tokens", "lengths"))
    if "dynamic" not in name:
        return reference_logits(folder, tokens, lengths)
    rows = [reference_logits(folder, row[None, :length])[0] for row, length in zip(tokens, lengths, strict=True)]
    return np.stack([np.pad(row, ((0, tokens.shape[1] - len(row)), (0, 0))) for row in rows])


def case_logits(name: str) -> dict[str, np.ndarray]:
    """The two reference runs of one case: padded from position 0, and unpadded from a far position."""
    given = cases.inputs(name)
    with tempfile.TemporaryDirectory() as folder:
        cases.write_checkpoint(Path(folder), cases.CASES[name], cases.case_seed(name))
        far = reference_logits(Path(folder), given["tokens"], offset=given["offset"])
        return {f"{name}/padded": padded_logits(name, Path(folder)), f"{name}/far": far}


def check_options_matter(name: str, logits: np.ndarray) -> None:
    """Without its window or its scaling the case must give other logits, or it would test neither."""
    config = cases.CASES[name]
    theta = (config.get("rope_parameters") or config).get("rope_theta", 10000.0)
    no_scaling = {k: v for k, v in config.items() if not k.startswith("rope_")} | {"rope_theta": theta}
    no_window = config | {"sliding_window": None}
    if "layer_types" in config:
        no_window = config | {"layer_types": ["full_attention"] * config["num_hidden_layers"]}
    for other in (no_scaling, no_window):
        with tempfile.TemporaryDirectory() as folder:
            cases.write_checkpoint(Path(folder), other, cases.case_seed(name))
            found = reference_logits(Path(folder), cases.inputs(name)["tokens"])
        optioned = ModelConfig.from_hf(other) != ModelConfig.from_hf(config)
        assert optioned == (cases.relative_error(found[0], logits[0]) > 1e-3), name


def weights_digest() -> str:
    """Of all cases' weights: tells a changed random generator from a changed model."""
    digest = hashlib.sha256()
    for name, config in cases.CASES.items():
        for value in cases.tensors(config, cases.case_seed(name)).values():
            digest.update(value.tobytes())
    return digest.hexdigest()


def main() -> None:
    import torch
    import transformers

    logits = {}
    for name in cases.CASES:
        logits |= case_logits(name)
        check_options_matter(name, logits[f"{name}/padded"])
    GOLDEN.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN / "logits.npz", **logits)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__}
    versions["weights_sha256"] = weights_digest()
    (GOLDEN / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")
    print(f"{len(logits)} arrays, {(GOLDEN / 'logits.npz').stat().st_size:,} bytes, {versions}")


if __name__ == "__main__":
    main()
