"""Makes tests/golden/sae_formats.json: dictionaries that other libraries wrote, with what those libraries compute with them.

    .venvs/saelens/bin/python tests/make_golden_sae.py saelens    (make peer-saelens)
    PYTHON tests/make_golden_sae.py sparsify                      (an environment with torch==2.13.0 and eai-sparsify)
    PYTHON tests/make_golden_sae.py check saelens|sparsify FOLDER IN.npy OUT.npz

The first two replace their library's entries: the files (base64), rows x, latents z and reconstructions, and the library's version. The third
loads a folder that sae.save wrote and stores what the library computes with it, for tests that find its environment.
"""

import base64
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).resolve().parent / "golden" / "sae_formats.json"
D, F, K, OUT = 6, 10, 3, 5
PACKAGES = {"saelens": "sae-lens", "sparsify": "eai-sparsify"}


def fill(module):
    """Parameters that are none of them zero; thresholds and biases small."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, value in sorted(module.named_parameters()):
            value.copy_(torch.randn(value.shape, generator=generator) * (0.3 if value.ndim == 1 else 1.0))
            if "threshold" in name:
                value.abs_()
    return module


def rows():
    """The rows that are encoded."""
    return torch.randn(9, D, generator=torch.Generator().manual_seed(1))


def saelens():
    """name -> (folder, x, z, x_hat) of every inference architecture of SAELens that has a form here."""
    import sae_lens
    from sae_lens import saes

    common = {"d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu"}
    meta = {"hook_name": "blocks.1.hook_resid_post", "model_name": "m", "context_size": 32}
    made = {
        "standard": saes.StandardSAE(saes.StandardSAEConfig(**common)),
        "topk": saes.TopKSAE(saes.TopKSAEConfig(**common, k=K)),
        "topk rescaled": saes.TopKSAE(saes.TopKSAEConfig(**common, k=K, rescale_acts_by_decoder_norm=True)),
        "gated": saes.GatedSAE(saes.GatedSAEConfig(**common)),
        "jumprelu": saes.JumpReLUSAE(saes.JumpReLUSAEConfig(**common)),
        "layer_norm": saes.StandardSAE(saes.StandardSAEConfig(**common, normalize_activations="layer_norm")),
        "transcoder": saes.Transcoder(saes.TranscoderConfig(**common, d_out=OUT, apply_b_dec_to_input=False)),
        "skip_transcoder": saes.SkipTranscoder(saes.SkipTranscoderConfig(**common, d_out=OUT, apply_b_dec_to_input=False)),
        "jumprelu_transcoder": saes.JumpReLUTranscoder(saes.JumpReLUTranscoderConfig(**common, d_out=OUT, apply_b_dec_to_input=False)),
        "jumprelu_skip_transcoder": saes.JumpReLUSkipTranscoder(
            saes.JumpReLUSkipTranscoderConfig(**common, d_out=OUT, apply_b_dec_to_input=False)
        ),
    }
    x = rows()
    for name, module in made.items():
        for key, value in meta.items():
            setattr(module.cfg.metadata, key, value)
        fill(module)
        folder = Path(tempfile.mkdtemp())
        with torch.no_grad():
            z, x_hat = module.encode(x), module(x)
        module.save_model(folder)
        yield name, folder, x, z, x_hat
    assert sae_lens.__version__


def sparsify():
    """The same of sparsify: an autoencoder, a transcoder, a skip transcoder."""
    from sparsify import SparseCoder, SparseCoderConfig

    x = rows()
    for name, changes in {"topk": {}, "transcoder": {"transcode": True}, "skip": {"transcode": True, "skip_connection": True}}.items():
        module = fill(SparseCoder(D, SparseCoderConfig(num_latents=F, k=K, **changes)))
        folder = Path(tempfile.mkdtemp()) / "layers.2"
        yield name, folder, x, *computed(module, x)
        module.save_to_disk(folder)


def computed(module, x):
    """(dense latents, reconstruction) of a sparsify module."""
    with torch.no_grad():
        values, indices = module.encode(x)[:2]
        z = torch.zeros(len(x), module.num_latents).scatter_(1, indices, values)
        return z, module(x).sae_out


def make(library):
    """Replaces the library's entries of the golden file."""
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    entries = {}
    for name, folder, x, z, x_hat in {"saelens": saelens, "sparsify": sparsify}[library]():
        entries[name] = {"x": x.tolist(), "z": z.tolist(), "x_hat": x_hat.tolist(), "folder": folder}
    for entry in entries.values():  # a generator saves after it yields
        folder = entry.pop("folder")
        entry |= {"name": folder.name if library == "sparsify" else "sae"}
        entry["files"] = {p.name: base64.b64encode(p.read_bytes()).decode() for p in sorted(folder.iterdir())}
    golden[library] = {"version": f"{PACKAGES[library]} {version(PACKAGES[library])}, torch {torch.__version__}", "entries": entries}
    GOLDEN.write_text(json.dumps(golden) + "\n")


def check(library, folder, given, result):
    """Loads our folder by the library and stores what it computes."""
    x = torch.from_numpy(np.load(given))
    if library == "saelens":
        from sae_lens import SAE

        module = SAE.load_from_disk(folder, device="cpu")
        with torch.no_grad():
            z, x_hat = module.encode(x), module(x)
    else:
        from sparsify import SparseCoder

        z, x_hat = computed(SparseCoder.load_from_disk(folder, device="cpu"), x)
    np.savez(result, z=z.numpy(), x_hat=x_hat.numpy())


if __name__ == "__main__":
    make(sys.argv[1]) if sys.argv[1] != "check" else check(*sys.argv[2:])
