"""Writes tests/golden/: logits and greedy completions by `transformers` (torch, fp32, CPU) for every parity case, and some logits
of the real checkpoints.

Run `python tests/make_golden.py [cases] [real]` (default: both) where torch and transformers are installed; "real" finds the
checkpoints through JAXRL_LLM_ASSETS, as the tests do. No checkpoint is stored: tests/models/parity_cases.py makes the cases' from
seeds, the real ones are known by their hash. The versions used are stored beside the numbers.
"""

import hashlib
import json
import os
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


# Where the first prompts that come to hand all end early, these give completions past the cache's first stage.
PROMPT_SEEDS = {"llama_yarn": 10, "mistral": 5, "phi3": 1, "qwen3_moe_unnormalised": 1}


def prompts(name: str) -> list[list[int]]:
    """Three prompts of different lengths; the longest is longer than the sliding window of 7."""
    rng = np.random.default_rng(cases.case_seed(name) + 2 + PROMPT_SEEDS.get(name, 0))
    lengths = (2, 4, 6) if "dynamic" in name else (3, 20, 11)
    return [rng.integers(3, cases.SMALL["vocab_size"], n).tolist() for n in lengths]


def new_tokens(name: str) -> int:
    """Past the first stage of the sampler's cache (32), but the case of dynamic scaling has only 16 positions."""
    return 10 if "dynamic" in name else 40


def reference_completions(folder: Path, prompts, max_new_tokens: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Greedy completions by transformers, each prompt alone: tokens [P, T], -1 past the end-of-text token; their
    log-probabilities [P, T]; and the smallest lead of a chosen token's logit over the next."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    settings = {"do_sample": False, "pad_token_id": 0, "output_logits": True, "return_dict_in_generate": True}
    tokens = np.full((len(prompts), max_new_tokens), -1, np.int16)
    logps, lead = np.zeros(tokens.shape, np.float32), np.inf
    for row, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, **settings)
        logits, chosen = torch.stack(out.logits)[:, 0], out.sequences[0, len(prompt) :]
        tokens[row, : len(chosen)] = chosen.numpy()
        logps[row, : len(chosen)] = logits.log_softmax(-1).gather(-1, chosen[:, None])[:, 0].numpy()
        best = logits.topk(2).values
        lead = min(lead, float((best[:, 0] - best[:, 1]).min()))
    return tokens, logps, lead


def case_completions(name: str) -> dict[str, np.ndarray]:
    """The greedy completions of one case's prompts, at least one of them longer than the cache's first stage."""
    with tempfile.TemporaryDirectory() as folder:
        cases.write_checkpoint(Path(folder), cases.CASES[name], cases.case_seed(name))
        tokens, logps, lead = reference_completions(Path(folder), prompts(name), new_tokens(name))
    assert lead > 1e-4, f"{name}: a lead of {lead} leaves the choice to rounding; take another seed"
    assert (tokens[:, min(32, new_tokens(name) - 1)] >= 0).any(), f"{name}: every completion ends early; take another seed"
    return {f"{name}/tokens": tokens, f"{name}/logps": logps}


def check_options_matter(name: str, logits: np.ndarray) -> None:
    """Without its window or its scaling the case must give other logits, or it would test neither."""
    config = cases.CASES[name]
    theta = (config.get("rope_parameters") or config).get("rope_theta", 10000.0)
    no_scaling = {k: v for k, v in config.items() if not k.startswith("rope_")} | {"rope_theta": theta}
    no_window = config | {"sliding_window": None}
    if "layer_types" in config or "gemma" in name:  # a Gemma has windows in any case
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


REAL = ("stories260k", "babyllama-0.9m")
REAL_POSITIONS = ((0, 0), (0, 17), (0, 63), (1, 39))  # (row, position) whose logits are stored; row 1 is padded after position 39
REAL_STRIDE = 4  # of the vocabulary: every fourth logit, so that the file stays small


def real_inputs(vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [2, 64], lengths [2]) that the real checkpoints read."""
    return np.random.default_rng(0).integers(3, vocab_size, (2, 64)), np.array([64, 40])


def stored_part(logits_BTV: np.ndarray) -> np.ndarray:
    """What is stored of a real checkpoint's logits: [len(REAL_POSITIONS), every REAL_STRIDE-th of V]."""
    rows, positions = zip(*REAL_POSITIONS, strict=True)
    return np.asarray(logits_BTV)[list(rows), list(positions), ::REAL_STRIDE]


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_real(assets: Path) -> dict[str, str]:
    """Writes real_logits.npz; name -> hash of the weights."""
    logits, digests = {}, {}
    for name in REAL:
        folder = assets / "checkpoints" / name
        vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
        logits[name] = stored_part(reference_logits(folder, *real_inputs(vocab_size)))
        digests[name] = file_digest(folder / "model.safetensors")
    np.savez_compressed(GOLDEN / "real_logits.npz", **logits)
    return digests


def write_cases() -> str:
    """Writes logits.npz and completions.npz; the hash of all weights."""
    logits, completions = {}, {}
    for name in cases.CASES:
        logits |= case_logits(name)
        check_options_matter(name, logits[f"{name}/padded"])
        completions |= case_completions(name)
    for file, found in (("logits.npz", logits), ("completions.npz", completions)):
        np.savez_compressed(GOLDEN / file, **{name: as_before(GOLDEN / file, name, value) for name, value in found.items()})
    return weights_digest()


def as_before(path: Path, name: str, value: np.ndarray) -> np.ndarray:
    """The stored value where today's differs from it by no more than another machine's rounding: then the file keeps it."""
    if not path.exists() or name not in (stored := np.load(path)).files or stored[name].shape != value.shape:
        return value
    near = value.dtype == np.float32 and cases.relative_error(value, stored[name]) < 2e-5
    return stored[name] if near else value


def main(parts: list[str]) -> None:
    import torch
    import transformers

    GOLDEN.mkdir(exist_ok=True)
    path = GOLDEN / "versions.json"
    told = json.loads(path.read_text()) if path.exists() else {}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__}
    if "cases" in parts:
        told |= {**versions, "weights_sha256": write_cases()}
    if "real" in parts:
        told["real"] = {**versions, "weights_sha256": write_real(Path(os.environ["JAXRL_LLM_ASSETS"]))}
    path.write_text(json.dumps(told, indent=2) + "\n")
    print(f"{sum(path.stat().st_size for path in GOLDEN.iterdir()):,} bytes, {told}")


if __name__ == "__main__":
    main(sys.argv[1:] or ["cases", "real"])
