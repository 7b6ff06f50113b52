"""Dictionaries in the layouts of other libraries: against what those libraries compute (golden files) or their published definitions."""

import base64
import json
import pickle
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import models
import sae
from models.taps import BLOCK_TAPS
from sae.formats.arrays import torch_object
from sae.formats.common import TAP_PAIRS, from_module_path, from_transformer_lens, to_transformer_lens

D, F, K = 6, 10, 3
rng = np.random.default_rng(5)
W_ENC, W_DEC = (rng.standard_normal(s).astype(np.float32) for s in ((D, F), (F, D)))
B_ENC, B_DEC, R_MAG = (0.3 * rng.standard_normal(n).astype(np.float32) for n in (F, D, F))
B_MAG, THRESHOLD = 0.2 * rng.standard_normal(F).astype(np.float32), np.abs(rng.standard_normal(F)).astype(np.float32)
X = rng.standard_normal((7, D)).astype(np.float32) * 2 + 0.5


def relu(x):
    return np.maximum(x, 0)


def top_k(pre, k=K):
    return np.where(pre >= -np.sort(-pre, axis=1)[:, k - 1 : k], relu(pre), 0)


def layer_norm(x):
    mean, std = x.mean(1, keepdims=True), x.std(1, ddof=1, keepdims=True)
    return (x - mean) / (std + 1e-5), mean, std


def safe(folder, name, **tensors):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    save_file({n: np.ascontiguousarray(t) for n, t in tensors.items()}, folder / name)


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def check(d, z, x_hat, x=X):
    np.testing.assert_allclose(sae.encode(d, x), z, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sae.decode(d, np.asarray(z, np.float32), x), x_hat, rtol=1e-5, atol=2e-5)


def golden(repo_golden, library):
    return json.loads(repo_golden.read_text())[library]["entries"]


@pytest.fixture
def golden_file(repo):
    return repo / "tests" / "golden" / "sae_formats.json"


@pytest.mark.parametrize("library,name", [
    *[("saelens", n) for n in ("standard", "topk", "topk rescaled", "gated", "jumprelu", "layer_norm", "transcoder", "skip_transcoder",
                              "jumprelu_transcoder", "jumprelu_skip_transcoder")],
    *[("sparsify", n) for n in ("topk", "transcoder", "skip")],
])  # fmt: skip
def test_as_the_library_that_wrote_it_computes(tmp_path, golden_file, library, name):
    entry = golden(golden_file, library)[name]
    folder = tmp_path / entry["name"]
    folder.mkdir()
    for file, content in entry["files"].items():
        (folder / file).write_bytes(base64.b64decode(content))
    d = sae.load(folder)
    x, z, x_hat = (np.asarray(entry[n], np.float32) for n in ("x", "z", "x_hat"))
    if name != "topk rescaled":  # there the norms are folded: latents are its times the decoder's norms
        np.testing.assert_allclose(sae.encode(d, x), z, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sae.reconstruct(d, x), x_hat, rtol=1e-5, atol=1e-5)
    if library == "saelens":
        assert d.cfg.hook_name == "blocks.1.resid_post" and d.cfg.context_size == 32
    else:
        assert (d.cfg.hook_name_out if name != "topk" else d.cfg.hook_name) == "blocks.2.resid_post"


def test_what_is_saved_is_what_the_libraries_save(tmp_path, golden_file):
    """The same tensors under the same names, and for every field of theirs that says what the SAE is, the same value."""
    autoencoders, transcoders = ("standard", "topk", "gated", "jumprelu"), ("skip_transcoder", "jumprelu_skip_transcoder")
    for library, names in (("saelens", (*autoencoders, *transcoders)), ("sparsify", ("topk", "skip"))):
        for name in names:
            entry = golden(golden_file, library)[name]
            theirs, ours = tmp_path / library / name / "layers.2", tmp_path / library / name / "ours"
            theirs.mkdir(parents=True)
            for file, content in entry["files"].items():
                (theirs / file).write_bytes(base64.b64decode(content))
            sae.save(ours, sae.load(theirs), layout=library)
            from safetensors.numpy import load_file

            weights = "sae_weights.safetensors" if library == "saelens" else "sae.safetensors"
            first, second = load_file(theirs / weights), load_file(ours / weights)
            assert first.keys() == second.keys()
            for tensor in first:
                np.testing.assert_array_equal(first[tensor], second[tensor])
            first, second = (json.loads((folder / "cfg.json").read_text()) for folder in (theirs, ours))
            for field in ("architecture", "d_in", "d_sae", "k", "d_out", "dtype", "apply_b_dec_to_input", "num_latents", "transcode",
                          "skip_connection", "activation"):  # fmt: skip
                assert first.get(field) == second.get(field), (library, name, field)


def opensae(folder, shift_back, **changes):
    config = {"architectures": ["OpenSae"], "activation": "topk", "hidden_size": D, "feature_size": F, "k": K, "input_normalize": True,
              "input_normalize_eps": 1e-5, "normalize_shift_back": shift_back, "input_hookpoint": "layers.25", "output_hookpoint": "layers.25",
              "model_name": "meta-llama/meta-llama-3.1-8b", "torch_dtype": "float32"} | changes  # fmt: skip
    write_json(folder / "config.json", config)
    first, second = {"W_dec": W_DEC, "b_dec": B_DEC}, {"encoder.weight": W_ENC.T, "encoder.bias": B_ENC}
    names = {n: f"model-0000{i}-of-00002.safetensors" for i, part in ((1, first), (2, second)) for n in part}
    safe(folder, names["W_dec"], **first)
    safe(folder, names["encoder.bias"], **second)
    total = 4 * (2 * D * F + D + F)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": names})
    return folder


@pytest.mark.parametrize("shift_back", [False, True])
def test_opensae(tmp_path, shift_back):
    d = sae.load(opensae(tmp_path, shift_back))
    normal, mean, std = layer_norm(X)
    z = top_k((normal - B_DEC) @ W_ENC + B_ENC)
    x_hat = z @ W_DEC + B_DEC
    check(d, z, x_hat * (std + 1e-5) + mean if shift_back else x_hat)
    flat = X * 1e-3  # rows whose deviation is near the constant: OpenSAE undoes what it divided by
    normal, mean, std = layer_norm(flat)
    x_hat = top_k((normal - B_DEC) @ W_ENC + B_ENC) @ W_DEC + B_DEC
    expected = x_hat * (std + 1e-5) + mean if shift_back else x_hat
    np.testing.assert_allclose(np.asarray(sae.reconstruct(d, flat)) - mean * shift_back, expected - mean * shift_back, rtol=5e-4, atol=1e-6)
    assert d.cfg.hook_name == "blocks.25.resid_post" and d.cfg.model_name == "meta-llama/meta-llama-3.1-8b"
    with pytest.raises(sae.SAEError, match="SAELens normalises rows otherwise"):
        sae.save(tmp_path / "saelens", d, layout="saelens")


def test_opensae_jumprelu_and_its_mistakes(tmp_path):
    d = sae.load(opensae(tmp_path / "a", True, activation="jumprelu", jumprelu_theta=0.5))
    pre = (layer_norm(X)[0] - B_DEC) @ W_ENC + B_ENC
    np.testing.assert_allclose(sae.encode(d, X), np.where(pre > 0.5, pre, 0), rtol=1e-5, atol=1e-5)
    for changes, message in (({"input_normalize_eps": 1e-6}, "input_normalize_eps is 1e-06"), ({"activation": "gelu"}, "activation is 'gelu'"),
                             ({"hidden_size": None}, "hidden_size is missing"),
                             ({"hidden_size": 5}, r"encoder.weight has shape \(10, 6\)")):  # fmt: skip
        with pytest.raises(sae.SAEError, match=message):
            sae.load(opensae(tmp_path / "b", True, **changes))
    index = tmp_path / "a" / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(str(4 * (2 * D * F + D + F)), "17"))
    with pytest.raises(sae.SAEError, match="total_size is 17, but the files hold 544 bytes"):
        sae.load(tmp_path / "a")


def jumped(pre, threshold=THRESHOLD):
    return np.where(pre > threshold, relu(pre), 0)


@pytest.mark.parametrize("lower", [True, False])
def test_gemma_scope(tmp_path, lower):
    folder = tmp_path / "gemma-scope-2b-pt-res" / "layer_20" / "width_16k" / "average_l0_71"
    folder.mkdir(parents=True)
    w = "w" if lower else "W"
    np.savez(folder / "params.npz", **{f"{w}_enc": W_ENC, f"{w}_dec": W_DEC, "b_enc": B_ENC, "b_dec": B_DEC, "threshold": THRESHOLD})
    d = sae.load(folder)
    z = jumped(X @ W_ENC + B_ENC)
    check(d, z, z @ W_DEC + B_DEC)
    assert d.cfg.hook_name == "blocks.20.resid_post" and d.cfg.model_name == "google/gemma-2-2b" and not d.cfg.apply_b_dec_to_input
    np.testing.assert_array_equal(sae.load(folder / "params.npz").params["W_enc"], d.params["W_enc"])
    turned = {"w_enc": W_ENC, "w_dec": np.asfortranarray(W_DEC), "b_enc": B_ENC, "b_dec": B_DEC, "threshold": THRESHOLD}
    for save in (np.savez_compressed, np.savez):
        save(folder / "params.npz", **turned)
        np.testing.assert_array_equal(sae.load(folder).params["W_dec"], W_DEC)


def test_gemma_scope_transcoders_and_embeddings(tmp_path):
    folder = tmp_path / "gemma-scope-2b-pt-transcoders" / "layer_3" / "width_16k"
    folder.mkdir(parents=True)
    out = W_DEC[:, :4]
    np.savez(folder / "params.npz", W_enc=W_ENC, W_dec=out, b_enc=B_ENC, b_dec=B_DEC[:4], threshold=THRESHOLD)
    d = sae.load(folder)
    z = jumped(X @ W_ENC + B_ENC)
    check(d, z, z @ out + B_DEC[:4])
    assert d.cfg.d_out == 4 and (d.cfg.hook_name, d.cfg.hook_name_out) == ("blocks.3.mlp_normalized", "blocks.3.mlp_out")
    folder = tmp_path / "gemma-scope-2b-pt-att" / "layer_3" / "width_16k"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", W_enc=W_ENC, W_dec=W_DEC, b_enc=B_ENC, b_dec=B_DEC, threshold=THRESHOLD)
    assert sae.load(folder).cfg.hook_name == "blocks.3.attn_z"
    folder = tmp_path / "gemma-scope-2b-pt-res" / "embedding" / "width_4k"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", W_enc=W_ENC, W_dec=W_DEC, b_enc=B_ENC, b_dec=B_DEC, threshold=THRESHOLD)
    d = sae.load(folder)
    z = jumped(X @ W_ENC / D**0.5 + B_ENC)
    check(d, z, z @ W_DEC * D**0.5 + B_DEC)
    assert d.cfg.hook_name == "embed"


def test_gemma_scope_names_the_tuned_model_where_it_is_that(tmp_path):
    models_of = {"gemma-scope-9b-it-res": "google/gemma-2-9b-it", "gemma-scope-27b-pt-res": "google/gemma-2-27b", "gemma-scope-res": None}
    for name, model in models_of.items():
        folder = tmp_path / name / "layer_20" / "width_16k"
        folder.mkdir(parents=True)
        np.savez(folder / "params.npz", W_enc=W_ENC, W_dec=W_DEC, b_enc=B_ENC, b_dec=B_DEC, threshold=THRESHOLD)
        assert sae.load(folder).cfg.model_name == model


def test_llama_scope(tmp_path):
    norm_in, theta = 3.0, 0.4
    config = {"d_model": D, "d_sae": F, "hook_point_in": "blocks.7.hook_resid_post", "hook_point_out": "blocks.7.hook_resid_post",
              "act_fn": "jumprelu", "jump_relu_threshold": theta, "norm_activation": "dataset-wise", "top_k": 50, "use_decoder_bias": True,
              "sparsity_include_decoder_norm": False, "dataset_average_activation_norm": {"in": norm_in, "out": norm_in}}  # fmt: skip
    write_json(tmp_path / "hyperparams.json", config)
    half = ml_dtypes.bfloat16
    tensors = {"encoder.weight": W_ENC.T.astype(half), "encoder.bias": B_ENC.astype(half), "decoder.weight": W_DEC.T.astype(half),
               "decoder.bias": B_DEC.astype(half)}  # fmt: skip
    safe(tmp_path, "checkpoints/final.safetensors", **tensors)
    d = sae.load(tmp_path, dtype="float32")
    s = D**0.5 / norm_in
    w_enc, b_enc, w_dec, b_dec = (np.asarray(a.astype(half), np.float32) for a in (W_ENC, B_ENC, W_DEC, B_DEC))
    z = jumped(X * s @ w_enc + b_enc, theta * s)
    check(d, z, (z @ w_dec + b_dec) / s)
    assert d.cfg.hook_name == "blocks.7.resid_post" and sae.load(tmp_path).params["W_enc"].dtype == half


def llamascopium(folder, tensors, **changes):
    config = {"sae_type": "sae", "d_model": D, "expansion_factor": 2, "hook_point_in": "blocks.7.hook_resid_post", "act_fn": "jumprelu",
              "norm_activation": "inference", "sparsity_include_decoder_norm": True, "use_decoder_bias": True, "top_k": K} | changes  # fmt: skip
    write_json(folder / "config.json", config)
    safe(folder, "sae_weights.safetensors", **tensors)
    return folder


def test_llamascopium(tmp_path):
    """Sparsity is decided by pre-activation times decoder norm, and the reconstruction is of pre-activations."""
    wide = np.concatenate([W_ENC, W_ENC[:, ::-1][:, :2]], axis=1)
    dec, b, theta = np.concatenate([W_DEC, W_DEC[:2] * 2]), np.concatenate([B_ENC, B_ENC[:2]]), np.concatenate([THRESHOLD, THRESHOLD[:2]])
    tensors = {"W_E": wide, "b_E": b, "W_D": dec, "b_D": B_DEC, "log_jumprelu_threshold": np.log(theta)}
    d = sae.load(llamascopium(tmp_path / "a", tensors))
    pre, norms = X @ wide + b, np.linalg.norm(dec, axis=1)
    kept = (pre * norms > theta) & (pre > 0)
    np.testing.assert_allclose(sae.reconstruct(d, X), np.where(kept, pre, 0) @ dec + B_DEC, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(sae.encode(d, X), np.where(kept, pre * norms, 0), rtol=1e-4, atol=1e-4)
    d = sae.load(llamascopium(tmp_path / "b", tensors, act_fn="topk"))
    z = top_k(pre * norms)
    np.testing.assert_allclose(sae.encode(d, X), z, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(sae.reconstruct(d, X), z / norms @ dec + B_DEC, rtol=1e-4, atol=1e-4)
    both = {f"dataset_average_activation_norm.blocks.7.{hook}": np.float32(n) for hook, n in (("hook_resid_post", 3), ("hook_mlp_out", 5))}
    d = sae.load(llamascopium(tmp_path / "c", tensors | both, norm_activation="dataset-wise", hook_point_out="blocks.7.hook_mlp_out"))
    pre = X * D**0.5 / 3.0 @ wide + b
    x_hat = (np.where((pre * norms > theta) & (pre > 0), pre, 0) @ dec + B_DEC) * 5.0 / D**0.5
    np.testing.assert_allclose(sae.reconstruct(d, X), x_hat, rtol=1e-4, atol=1e-4)
    assert d.cfg.hook_name_out == "blocks.7.mlp_out" and d.cfg.d_out == D
    for changes, message in (({"act_fn": "batchtopk"}, "act_fn is 'batchtopk'"), ({"use_glu_encoder": True}, "use_glu_encoder is True"),
                             ({"sae_type": "lorsa"}, "sae_type is 'lorsa'"), ({"norm_activation": "batch-wise"}, "norm_activation is 'batch-wise'"),
                             ({"norm_activation": "dataset-wise"}, "says nothing of in")):  # fmt: skip
        with pytest.raises(sae.SAEError, match=message):
            sae.load(llamascopium(tmp_path / "d", tensors, **changes))


def torch_save(path, value):
    torch = pytest.importorskip("torch")
    path.parent.mkdir(parents=True, exist_ok=True)

    def turned(v):
        return torch.from_numpy(np.ascontiguousarray(v)) if isinstance(v, np.ndarray) else v

    torch.save({n: turned(v) for n, v in value.items()}, path)


LINEAR = {"encoder.weight": W_ENC.T, "encoder.bias": B_ENC, "decoder.weight": W_DEC.T}
MATRICES = {"W_enc": W_ENC, "b_enc": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC}
CENTRED = (X - B_DEC) @ W_ENC
DICTIONARY_LEARNING = {
    "AutoEncoder": ({**LINEAR, "bias": B_DEC}, relu(CENTRED + B_ENC)),
    "AutoEncoderNew": ({**LINEAR, "decoder.bias": B_DEC}, relu(X @ W_ENC + B_ENC)),
    "AutoEncoderTopK": ({**LINEAR, "b_dec": B_DEC, "k": np.int32(K), "threshold": np.float32(-1)}, top_k(CENTRED + B_ENC)),
    "BatchTopKSAE": ({**LINEAR, "b_dec": B_DEC, "k": np.int32(K), "threshold": np.float32(0.7)}, jumped(CENTRED + B_ENC, 0.7)),
    "MatryoshkaBatchTopKSAE": ({**MATRICES, "threshold": np.float32(0.7)}, jumped(CENTRED + B_ENC, 0.7)),
    "JumpReluAutoEncoder": ({**MATRICES, "threshold": THRESHOLD}, jumped(X @ W_ENC + B_ENC)),
    "GatedAutoEncoder": (
        {"encoder.weight": W_ENC.T, "decoder.weight": W_DEC.T, "decoder_bias": B_DEC, "gate_bias": B_ENC, "mag_bias": B_MAG, "r_mag": R_MAG},
        np.where(CENTRED + B_ENC > 0, relu(np.exp(R_MAG) * CENTRED + B_MAG), 0),
    ),
}


@pytest.mark.parametrize("kind", DICTIONARY_LEARNING)
def test_dictionary_learning(tmp_path, kind):
    tensors, z = DICTIONARY_LEARNING[kind]
    trainer = {"dict_class": kind, "activation_dim": D, "dict_size": F, "k": K, "layer": 8, "lm_name": "EleutherAI/pythia-70m",
               "submodule_name": "resid_post_layer_8"}  # fmt: skip
    write_json(tmp_path / "config.json", {"trainer": trainer, "buffer": {"ctx_len": 128}})
    torch_save(tmp_path / "ae.pt", {n: np.asarray(t) for n, t in tensors.items()})
    d = sae.load(tmp_path)
    check(d, z, z @ W_DEC + B_DEC)
    assert d.cfg.hook_name == "blocks.8.resid_post" and d.cfg.context_size == 128


def test_qwen_scope(tmp_path):
    file = tmp_path / "SAE-Res-Qwen3.5-2B-Base-W32K-L0_3" / "layer4.sae.pt"
    torch_save(file, {"W_enc": W_ENC.T, "W_dec": W_DEC.T, "b_enc": B_ENC, "b_dec": B_DEC})
    z = top_k(X @ W_ENC + B_ENC)
    for place in (file, file.parent):
        d = sae.load(place)
        check(d, z, z @ W_DEC + B_DEC)
    assert d.cfg.k == 3 and d.cfg.hook_name == "blocks.4.resid_post" and d.cfg.model_name == "Qwen/Qwen3.5-2B-Base"
    bare = tmp_path / "renamed" / "layer4.sae.pt"
    bare.parent.mkdir()
    file.rename(bare)
    with pytest.raises(sae.SAEError, match='put {"k": K} into a config.json'):
        sae.load(bare)
    write_json(bare.parent / "config.json", {"k": 2})
    assert sae.load(bare).cfg.k == 2


def test_openai(tmp_path):
    tensors = {"pre_bias": B_DEC, "latent_bias": B_ENC, "encoder.weight": W_ENC.T, "decoder.weight": W_DEC.T}
    tensors["stats_last_nonzero"] = np.zeros(F, np.int64)
    torch_save(tmp_path / "8.pt", tensors | {"activation": "TopK", "activation_state_dict": {"k": K}})
    normal, mean, std = layer_norm(X)
    z = top_k((normal - B_DEC) @ W_ENC + B_ENC)
    check(sae.load(tmp_path / "8.pt"), z, (z @ W_DEC + B_DEC) * (std + 1e-5) + mean)
    torch_save(tmp_path / "relu" / "8.pt", tensors)
    z = relu((X - B_DEC) @ W_ENC + B_ENC)
    check(sae.load(tmp_path / "relu"), z, z @ W_DEC + B_DEC)
    torch_save(tmp_path / "8.pt", tensors | {"activation": "Softplus"})
    with pytest.raises(sae.SAEError, match="activation is 'Softplus'"):
        sae.load(tmp_path / "8.pt")


class Runs:
    """A pickle of this runs a command when a careless reader opens it."""

    def __reduce__(self):
        import os

        return os.system, ("true",)


def test_a_torch_file_runs_nothing(tmp_path):
    path = tmp_path / "ae.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"W_enc": Runs()}))
    write_json(tmp_path / "config.json", {"trainer": {"dict_class": "AutoEncoder", "activation_dim": D, "dict_size": F}})
    with pytest.raises(sae.SAEError, match=r"ae.pt: holds a \w+.system, which is no tensor and is not run"):
        sae.load(tmp_path)


def test_torch_tensors_of_all_kinds(tmp_path):
    """Views, transposes, scalars, half precision and empty tensors come as torch has them; data that is cut off is named."""
    torch = pytest.importorskip("torch")
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    made = {"turned": base.T, "view": base[1:3, ::2], "scalar": torch.tensor(3), "half": base.to(torch.bfloat16), "empty": torch.zeros(0, 3),
            "parameter": torch.nn.Parameter(base.clone())}  # fmt: skip
    torch.save(made, tmp_path / "a.pt")
    found = torch_object(tmp_path / "a.pt")
    for name, tensor in made.items():
        np.testing.assert_array_equal(np.asarray(found[name], np.float32), tensor.detach().float().numpy(), err_msg=name)
    (tmp_path / "a.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:-200])
    with pytest.raises(sae.SAEError, match=r"a.pt: not a whole file"):
        torch_object(tmp_path / "a.pt")


def test_a_cast_that_overflows_is_named(tmp_path):
    d = sae.Dictionary({**MATRICES, "b_dec": np.full(D, 1e5, np.float32)}, sae.SAEConfig(d_in=D, d_sae=F, k=K))
    sae.save(tmp_path, d)
    with pytest.raises(sae.SAEError, match="b_dec holds a NaN or an infinity; it may be too large for float16: give dtype='float32'"):
        sae.load(tmp_path, dtype="float16")
    assert float(sae.load(tmp_path).params["b_dec"][0]) == 1e5
    with pytest.raises(sae.SAEError, match="unknown dtype 'int8'"):
        sae.load(tmp_path, dtype="int8")


def test_blocks_give_the_whole(tmp_path, monkeypatch):
    d = sae.Dictionary(MATRICES, sae.SAEConfig(d_in=D, d_sae=F, k=K))
    sae.save(tmp_path / "layers.1", d, layout="sparsify")
    monkeypatch.setattr("sae.formats.common.BLOCK_BYTES", 64)  # two rows of W_enc's transpose
    back = sae.load(tmp_path / "layers.1")
    for name, value in MATRICES.items():
        np.testing.assert_array_equal(back.params[name], value)


@pytest.mark.parametrize("path,ours", [
    ("layers.5", "blocks.5.resid_post"), ("model.layers.11.mlp", "blocks.11.mlp_out"), ("h.3.attn", "blocks.3.attn_out"),
    ("gpt_neox.layers.0", "blocks.0.resid_post"), ("embed_tokens", "embed"), ("lm_head", "lm_head"), (None, None),
])  # fmt: skip
def test_module_paths(path, ours):
    assert from_module_path(path) == ours


@pytest.mark.parametrize("path,ours", [
    ("layers.5.mlp", "blocks.5.mlp_in"), ("model.layers.11", "blocks.11.resid_pre"), ("h.3.attn", None), ("embed_tokens", None), (None, None),
])  # fmt: skip
def test_what_enters_a_module(path, ours):
    assert from_module_path(path, entering=True) == ours


def test_every_block_tap_has_a_name_in_transformer_lens_and_back():
    assert {ours for ours, _ in TAP_PAIRS} == set(BLOCK_TAPS) - {"router_logits"}
    for ours, theirs in TAP_PAIRS:
        assert to_transformer_lens(f"blocks.3.{ours}") == f"blocks.3.{theirs}"
        assert from_transformer_lens(f"blocks.3.{theirs}") == f"blocks.3.{ours}"


def test_attention_and_transcoder_layouts_are_spliced_into_a_model(tmp_path):
    """Gemma Scope's attention SAEs and transcoders from their files to the figures of a Gemma: what they read is what they were made for."""
    cfg = models.ModelConfig(
        family="gemma2", vocab_size=60, d_model=16, n_layers=2, n_heads=3, n_kv_heads=1, head_dim=8, d_ff=24, tie_embeddings=True, max_position=32,
        norm="rms_plus_one", block="pre_post", activation="gelu_pytorch_tanh", initializer_range=0.3,
    )  # fmt: skip
    params, rows = models.init(cfg, jax.random.key(0)), [[1, 5, 9, 7, 30, 12], [1, 8, 8, 40]]
    params["blocks"]["mlp_norm"] = 0.5 * jax.random.normal(jax.random.key(1), (2, 16))
    rng = np.random.default_rng(0)
    for kind, width, taps in (
        ("att", cfg.n_heads * cfg.head_dim, ("blocks.1.attn_z",)),
        ("transcoders", cfg.d_model, ("blocks.1.mlp_normalized", "blocks.1.mlp_out")),
    ):
        folder = tmp_path / f"gemma-scope-2b-pt-{kind}" / "layer_1"
        folder.mkdir(parents=True)
        out = width if len(taps) == 1 else cfg.d_model
        arrays = {"W_enc": rng.normal(size=(width, 24)), "W_dec": rng.normal(size=(24, out)), "b_enc": np.zeros(24), "b_dec": np.zeros(out)}
        np.savez(folder / "params.npz", threshold=np.full(24, 0.5), **arrays)
        d = sae.load(folder)
        found = np.concatenate(list(sae.harvest_activations(cfg, params, rows, taps, skip_first=0)))
        assert found.shape == (10, d.cfg.d_in + (d.cfg.d_out or 0)) and (d.cfg.hook_name, d.cfg.place) == (taps[0], taps[-1])
        figures = sae.ce_recovered(d, cfg, params, rows, skip_first=0)
        z = np.maximum(found[:, :width] @ arrays["W_enc"], 0)
        written = np.where(z > 0.5, z, 0) @ arrays["W_dec"]
        edit = {d.cfg.place: lambda x, written=written: jnp.stack([jnp.pad(jnp.asarray(written[a:b], x.dtype), ((0, 6 - b + a), (0, 0)))
                                                                   for a, b in ((0, 6), (6, 10))])}  # fmt: skip
        tokens = np.zeros((2, 6), np.int32)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = row
        logp = jax.nn.log_softmax(models.apply(cfg, params, tokens, lengths=np.array([6, 4]), interventions=edit)[0])
        ce = -np.mean([logp[i, t, rows[i][t + 1]] for i in range(2) for t in range(len(rows[i]) - 1)])
        assert figures["ce_sae"] == pytest.approx(float(ce), rel=1e-4) and figures["ce_sae"] != pytest.approx(figures["ce_clean"], rel=1e-3)
