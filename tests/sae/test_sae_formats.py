"""Saving and loading: our layout, SAELens's, and files that cannot be used."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import sae
from sae.dictionary import param_shapes
from sae.formats import WRITABLE, from_transformer_lens, hub_files, to_transformer_lens

D, F, K = 6, 10, 3


def dictionary(**changes):
    cfg = sae.SAEConfig(**({"d_in": D, "d_sae": F, "k": K, "hook_name": "blocks.2.resid_post", "model_name": "m", "context_size": 64} | changes))
    shapes = param_shapes(cfg)
    keys = jax.random.split(jax.random.key(0), len(shapes))
    params = {n: jax.random.normal(k, s).astype(cfg.dtype) for k, (n, s) in zip(keys, shapes.items(), strict=True)}
    return sae.Dictionary(params, cfg)


def x(n=7):
    return np.random.default_rng(0).standard_normal((n, D)).astype(np.float32)


TRANSCODER = {"d_out": 4, "hook_name_out": "blocks.2.mlp_out"}
FORMS = {
    "topk": {},
    "relu": {"architecture": "relu", "k": None},
    "gated": {"architecture": "gated", "k": None},
    "jumprelu": {"architecture": "jumprelu", "k": None, "apply_b_dec_to_input": False},
    "bfloat16": {"dtype": "bfloat16"},
    "layer_norm": {"normalize_activations": "layer_norm"},
    "transcoder": {"architecture": "relu", "k": None, **TRANSCODER},
    "skip": {"architecture": "relu", "k": None, "skip": True, **TRANSCODER},
    "jumprelu transcoder": {"architecture": "jumprelu", "k": None, **TRANSCODER},
    "jumprelu skip": {"architecture": "jumprelu", "k": None, "skip": True, **TRANSCODER},
}
FILES = {"native": {"sae.json", "sae.safetensors"}, "saelens": {"cfg.json", "sae_weights.safetensors"}, "sparsify": {"cfg.json", "sae.safetensors"}}


@pytest.mark.parametrize("layout", ["native", "saelens"])
@pytest.mark.parametrize("form", FORMS)
def test_round_trip_is_bit_equal(tmp_path, layout, form):
    d = dictionary(**FORMS[form])
    sae.save(tmp_path / "a", d, layout=layout)
    back = sae.load(tmp_path / "a")
    assert back.cfg == d.cfg
    jax.tree.map(np.testing.assert_array_equal, back.params, d.params)
    assert {p.name for p in (tmp_path / "a").iterdir()} == FILES[layout]


@pytest.mark.parametrize("changes", [{}, {"apply_b_dec_to_input": False, "d_out": D, "skip": True, "hook_name": None}])
def test_sparsify_round_trip(tmp_path, changes):
    d = dictionary(model_name=None, context_size=None, **changes)
    sae.save(tmp_path / "layers.2", d, layout="sparsify")
    back = sae.load(tmp_path / "layers.2")
    expected = d.cfg.replace(hook_name="blocks.2.resid_pre", hook_name_out="blocks.2.resid_post") if changes else d.cfg
    assert back.cfg == expected
    jax.tree.map(np.testing.assert_array_equal, back.params, d.params)
    assert {p.name for p in (tmp_path / "layers.2").iterdir()} == FILES["sparsify"]


@pytest.mark.parametrize("form,layout", [("relu", "sparsify"), ("transcoder", "sparsify"), ("layer_norm", "sparsify")])
def test_what_a_layout_has_no_form_for_is_refused(tmp_path, form, layout):
    with pytest.raises(sae.SAEError, match="choose layout='native'"):
        sae.save(tmp_path / "a", dictionary(**FORMS[form]), layout=layout)
    with pytest.raises(sae.SAEError, match="SAELens has no topk transcoder"):
        sae.save(tmp_path / "a", dictionary(**TRANSCODER), layout="saelens")
    with pytest.raises(sae.SAEError, match="a batchtopk SAE is one in training"):
        sae.save(tmp_path / "a", dictionary(architecture="batchtopk"), layout="saelens")
    assert not (tmp_path / "a").exists()


def test_saving_again_replaces(tmp_path):
    sae.save(tmp_path, dictionary())
    other = dictionary().replace(params=jax.tree.map(lambda a: a + 1, dictionary().params))
    sae.save(tmp_path, other)
    np.testing.assert_array_equal(sae.load(tmp_path).params["b_dec"], other.params["b_dec"])


def test_saving_in_another_layout_leaves_one_dictionary(tmp_path):
    """Two in one folder would leave `load` to guess."""
    for first in WRITABLE:
        for then in WRITABLE:
            sae.save(tmp_path / first, dictionary(k=2), layout=first)
            sae.save(tmp_path / first, dictionary(k=3), layout=then)
            assert sae.load(tmp_path / first).cfg.k == 3
            assert {p.name for p in (tmp_path / first).iterdir()} == FILES[then]


def test_input_scale_survives_both_layouts(tmp_path):
    d = dictionary(normalize_activations="expected_average_only_in", input_scale=0.25)
    for layout in WRITABLE:
        sae.save(tmp_path / layout, d, layout=layout)
        np.testing.assert_allclose(sae.encode(sae.load(tmp_path / layout), x()), sae.encode(d, x()), rtol=1e-5, atol=1e-5)
    assert sae.load(tmp_path / "native").cfg == d.cfg
    assert json.loads((tmp_path / "saelens" / "cfg.json").read_text())["normalize_activations"] == "none"


def test_saelens_config_is_what_that_library_writes(tmp_path):
    sae.save(tmp_path, dictionary(), layout="saelens")
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert config["architecture"] == "topk" and config["k"] == K and config["d_in"] == D and config["d_sae"] == F
    assert config["metadata"]["hook_name"] == "blocks.2.hook_resid_post" and config["metadata"]["model_name"] == "m"
    assert config["metadata"]["sae_lens_version"].startswith("6.") and config["metadata"]["context_size"] == 64
    sae.save(tmp_path, dictionary(architecture="relu", k=None), layout="saelens")
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert config["architecture"] == "standard" and "k" not in config and config["reshape_activations"] == "none"
    sae.save(tmp_path, dictionary(hook_name="blocks.2.attn_z"), layout="saelens")
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert config["reshape_activations"] == "hook_z" and config["metadata"]["hook_name"] == "blocks.2.attn.hook_z"
    assert sae.load(tmp_path).cfg.hook_name == "blocks.2.attn_z"


def write_saelens(folder, config, d):
    folder.mkdir(exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file({n: np.ascontiguousarray(v) for n, v in d.params.items()}, folder / "sae_weights.safetensors")
    return folder


def test_saelens_before_version_6(tmp_path):
    d = dictionary()
    flat = {"d_in": D, "d_sae": F, "hook_name": "blocks.1.hook_mlp_out", "hook_layer": 1, "model_name": "gpt2", "context_size": 128,
            "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 2}, "dtype": "torch.float32", "normalize_activations": False}
    back = sae.load(write_saelens(tmp_path / "a", flat, d))
    assert back.cfg.k == 2 and back.cfg.hook_name == "blocks.1.mlp_out" and back.cfg.context_size == 128 and back.cfg.model_name == "gpt2"
    for config in (flat | {"hook_head_index": 3}, {"architecture": "standard", "d_in": D, "d_sae": F, "metadata": {"hook_head_index": 0}}):
        with pytest.raises(sae.SAEError, match="cfg.json: hook_head_index is [30]: an SAE of one attention head"):
            sae.load(write_saelens(tmp_path / "c", config, d))
    with pytest.raises(sae.SAEError, match="cfg.json: activation_fn_str is 'tanh-relu'; 'relu' and 'topk' are supported"):
        sae.load(write_saelens(tmp_path / "d", flat | {"activation_fn_str": "tanh-relu"}, d))
    back = sae.load(write_saelens(tmp_path / "b", {"d_in": D, "d_sae": F, "hook_point": "hook_embed"}, d))
    assert back.cfg.architecture == "relu" and back.cfg.hook_name == "embed"


def test_rescaled_topk_is_folded_on_load(tmp_path):
    """SAELens multiplies pre-activations by the decoder's row norms before the top-k and divides before decoding."""
    d = dictionary()
    config = {"architecture": "topk", "d_in": D, "d_sae": F, "k": K, "rescale_acts_by_decoder_norm": True, "metadata": {}}
    back = sae.load(write_saelens(tmp_path / "a", config, d))
    p = {n: np.asarray(v) for n, v in d.params.items()}
    norms = np.linalg.norm(p["W_dec"], axis=1)
    pre = ((x() - p["b_dec"]) @ p["W_enc"] + p["b_enc"]) * norms
    z = np.where(pre >= -np.sort(-pre, axis=1)[:, K - 1 : K], np.maximum(pre, 0), 0)
    np.testing.assert_allclose(sae.encode(back, x()), z, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sae.reconstruct(back, x()), z / norms @ p["W_dec"] + p["b_dec"], rtol=1e-4, atol=1e-4)
    plain = sae.load(write_saelens(tmp_path / "b", config | {"rescale_acts_by_decoder_norm": False}, d))
    jax.tree.map(np.testing.assert_array_equal, plain.params, d.params)


def test_what_overflows_float16_on_its_way_is_refused(tmp_path):
    """Where norms or scales are folded in on load, where a dictionary is cast, and where it is saved."""
    large = dictionary(dtype="float16")
    large = large.replace(params=large.params | {"W_enc": jnp.full((D, F), 6e4, jnp.float16), "W_dec": jnp.full((F, D), 2.0, jnp.float16)})
    config = {"architecture": "topk", "d_in": D, "d_sae": F, "k": K, "dtype": "float16", "rescale_acts_by_decoder_norm": True, "metadata": {}}
    folder = write_saelens(tmp_path / "a", config, large)
    with pytest.raises(sae.SAEError, match="cfg.json: W_enc holds a NaN or an infinity; it may be too large for float16"):
        sae.load(folder)
    loaded = sae.load(folder, dtype="float32")
    np.testing.assert_allclose(loaded.params["W_enc"], np.float32(np.float16(6e4)) * 2 * D**0.5, rtol=1e-6)  # nothing was rounded on the way
    with pytest.raises(sae.SAEError, match="sae.cast: W_enc holds .* too large for float16"):
        sae.cast(loaded, "float16")
    kept = tmp_path / "kept"
    sae.save(kept, dictionary())
    scaled = large.replace(cfg=large.cfg.replace(normalize_activations="expected_average_only_in", input_scale=4.0))
    broken = dictionary().replace(params=dictionary().params | {"b_enc": jnp.full(F, jnp.nan)})
    for d, layout, name in ((scaled, "saelens", "W_enc"), (scaled, "sparsify", "encoder.weight"), (broken, "native", "b_enc")):
        with pytest.raises(sae.SAEError, match=f"is not written: {name} holds a NaN or an infinity"):
            sae.save(kept, d, layout=layout)
    assert sae.load(kept).cfg == dictionary().cfg  # what was there stays


def test_a_bfloat16_dictionary_is_folded_in_fp32(tmp_path):
    """Each parameter is rounded once: not the norms, and not the parameter before them."""
    d = dictionary()
    config = {"architecture": "topk", "d_in": D, "d_sae": F, "k": K, "rescale_acts_by_decoder_norm": True, "metadata": {}}
    folder = write_saelens(tmp_path / "a", config, d)
    exact = sae.cast(sae.fold_decoder_norm(d), "bfloat16")
    jax.tree.map(np.testing.assert_array_equal, sae.load(folder, dtype="bfloat16").params, exact.params)
    rounded = sae.cast(d, "bfloat16")
    expected = sae.cast(sae.fold_decoder_norm(sae.cast(rounded, "float32")), "bfloat16")
    jax.tree.map(np.testing.assert_array_equal, sae.fold_decoder_norm(rounded).params, expected.params)


def test_the_input_scale_of_a_saelens_checkpoint_lies_beside_it(tmp_path):
    """Its trainer writes the scale there; the weights are folded, and the setting gone, only when training has ended."""
    config = {"architecture": "topk", "d_in": D, "d_sae": F, "k": K, "normalize_activations": "expected_average_only_in", "metadata": {}}
    folder = write_saelens(tmp_path / "a", config, dictionary())
    (folder / "activation_scaler.json").write_text('{"scaling_factor": 0.25}')
    back = sae.load(folder)
    assert back.cfg.input_scale == 0.25
    np.testing.assert_array_equal(sae.encode(back, x()), sae.encode(dictionary(), x() * 0.25))
    folded = write_saelens(tmp_path / "b", config | {"normalize_activations": "none"}, dictionary())
    (folded / "activation_scaler.json").write_text('{"scaling_factor": null}')
    assert sae.load(folded).cfg.input_scale == 1.0
    sae.save(folder, back)  # in our layout; nothing of the other one stays
    assert {p.name for p in folder.iterdir()} == {"sae.json", "sae.safetensors"}


@pytest.mark.parametrize("held", [None, "{}", '{"scaling_factor": null}', '{"scaling_factor": 0}', '{"scaling_factor": "1"}', "[]", "{"])
def test_an_unknown_input_scale_is_refused(tmp_path, held):
    """SAELens warns and multiplies by 1, which gives other latents than those that were trained."""
    config = {"architecture": "topk", "d_in": D, "d_sae": F, "k": K, "normalize_activations": True}
    folder = write_saelens(tmp_path / "a", config, dictionary())
    if held is not None:
        (folder / "activation_scaler.json").write_text(held)
    with pytest.raises(sae.SAEError, match=r"activation_scaler.json") as error:
        sae.load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("ours", ["embed", "final_norm", "blocks.12.resid_post", "blocks.0.mlp_act", "blocks.3.attn_probs"])
def test_hook_names_go_there_and_back(ours):
    theirs = to_transformer_lens(ours)
    assert theirs != ours and from_transformer_lens(theirs) == ours
    assert to_transformer_lens(None) is None and to_transformer_lens("my.hook") == "my.hook"


def broken(folder, what):
    """A saved dictionary with one thing wrong."""
    d = dictionary()
    sae.save(folder, d, layout="saelens")
    cfg, weights = folder / "cfg.json", folder / "sae_weights.safetensors"
    config = json.loads(cfg.read_text())
    tensors = {n: np.ascontiguousarray(v) for n, v in d.params.items()}
    if what == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif what == "empty":
        weights.write_bytes(b"")
    elif what == "no weights":
        weights.unlink()
    elif what == "json":
        cfg.write_text("{")
    elif what == "binary json":
        cfg.write_bytes(b"\xff\xfe\x00")
    elif what == "list":
        cfg.write_text("[]")
    elif what == "architecture":
        cfg.write_text(json.dumps(config | {"architecture": "quantum"}))
    elif what == "reshape":
        cfg.write_text(json.dumps(config | {"reshape_activations": "flat"}))
    elif what == "no width":
        cfg.write_text(json.dumps({k: v for k, v in config.items() if k != "d_in"}))
    elif what == "k":
        cfg.write_text(json.dumps(config | {"k": F + 1}))
    elif what == "shape":
        save_file(tensors | {"W_dec": np.ascontiguousarray(tensors["W_dec"].T)}, weights)
    elif what == "missing":
        save_file({n: v for n, v in tensors.items() if n != "b_dec"}, weights)
    elif what == "extra":
        save_file(tensors | {"threshold": tensors["b_enc"]}, weights)
    elif what == "nan":
        save_file(tensors | {"b_enc": np.full(F, np.nan, np.float32)}, weights)
    elif what == "scaling":
        save_file(tensors | {"scaling_factor": np.full(F, 2.0, np.float32)}, weights)
    return folder


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("truncated", r"sae_weights.safetensors: not a whole safetensors file"),
        ("empty", r"sae_weights.safetensors: not a whole safetensors file"),
        ("no weights", r"sae_weights.safetensors: missing"),
        ("json", r"cfg.json: cannot be read as JSON"),
        ("binary json", r"cfg.json: cannot be read as JSON"),
        ("list", r"cfg.json: holds no JSON object"),
        ("architecture", r"cfg.json: unknown architecture 'quantum'; known: standard, topk, gated"),
        ("reshape", r"reshape_activations is 'flat'"),
        ("no width", r"cfg.json: d_in is None; give a whole number"),
        ("k", r"cfg.json: .*needs 1 <= k"),
        ("shape", r"W_dec has shape \(6, 10\); the config says \(10, 6\)"),
        ("missing", r"tensor b_dec is missing"),
        ("extra", r"unexpected tensor threshold"),
        ("nan", r"b_enc holds a NaN"),
        ("scaling", r"scaling_factor other than 1"),
    ],
)
def test_broken_files_are_named_in_one_line(tmp_path, what, message):
    with pytest.raises(sae.SAEError, match=message) as error:
        sae.load(broken(tmp_path, what))
    assert "\n" not in str(error.value)


def test_broken_native_files(tmp_path):
    sae.save(tmp_path, dictionary())
    (tmp_path / "sae.json").write_text(json.dumps({"sae": {"d_in": D, "depth": 3}}))
    with pytest.raises(sae.SAEError, match="unknown field sae.depth"):
        sae.load(tmp_path)
    (tmp_path / "sae.json").write_text(json.dumps({"sae": {"d_in": D, "d_sae": F, "k": K, "normalize_activations": "expected_average_only_in"}}))
    with pytest.raises(sae.SAEError, match="sae.input_scale is missing"):
        sae.load(tmp_path)
    (tmp_path / "sae.json").write_text("{}")
    with pytest.raises(sae.SAEError, match="no object named 'sae'"):
        sae.load(tmp_path)


def test_places_that_hold_no_dictionary(tmp_path, monkeypatch):
    with pytest.raises(sae.SAEError, match=r"no dictionary in a known layout; it holds nothing. Known layouts are native: sae.json"):
        sae.load(tmp_path)
    with pytest.raises(sae.SAEError, match=r"no such folder, and not a hub id \(owner/repository\[/folder\]\[@revision\]\)$"):
        sae.load(tmp_path / "absent")
    (tmp_path / "runs" / "sae").mkdir(parents=True)
    with pytest.raises(sae.SAEError, match="not a hub id .*; did you mean .*/runs/sae?"):
        sae.load(tmp_path / "runs" / "saee" / "layer")
    monkeypatch.chdir(tmp_path)  # the hub is not asked for what begins with a folder that is here
    with pytest.raises(sae.SAEError, match="^runs/saee: no such folder; did you mean runs/sae.; for a repository of the hub .* add @main"):
        sae.load("runs/saee")
    with pytest.raises(sae.SAEError, match="^runs/other: no such folder; for a repository"):
        sae.load("runs/other")
    with pytest.raises(sae.SAEError, match="cannot write layout 'keras'; known: native, sparsify, saelens"):
        sae.save(tmp_path, dictionary(), layout="keras")
    (tmp_path / "file").write_text("")
    with pytest.raises(sae.SAEError, match="cannot be written"):
        sae.save(tmp_path / "file", dictionary())


def test_a_failed_save_leaves_the_old_files(tmp_path, monkeypatch):
    d = dictionary()
    sae.save(tmp_path, d)

    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("sae.formats.save_file", fail)
    with pytest.raises(sae.SAEError, match="No space left"):
        sae.save(tmp_path, d.replace(params=jax.tree.map(jnp.zeros_like, d.params)))
    np.testing.assert_array_equal(sae.load(tmp_path).params["W_dec"], d.params["W_dec"])


REPOSITORY = [
    "README.md", "config.json", "layers.2/cfg.json", "layers.2/sae.safetensors", "layers.2/old/sae.safetensors", "resid/trainer_0/ae.pt",
    "resid/trainer_0/config.json", "resid/trainer_0/checkpoints/ae_100.pt", "layer0.sae.pt", "layer1.sae.pt",
    "L5/hyperparams.json", "L5/checkpoints/final.safetensors", "L5/checkpoints/other.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("inside,wanted", [
    ("layers.2", ["layers.2/cfg.json", "layers.2/sae.safetensors"]),
    ("resid/trainer_0", ["resid/trainer_0/ae.pt", "resid/trainer_0/config.json"]),
    ("layer1.sae.pt", ["layer1.sae.pt", "config.json"]),
    ("L5", ["L5/checkpoints/final.safetensors", "L5/hyperparams.json"]),
])  # fmt: skip
def test_only_a_dictionarys_own_files_are_fetched(inside, wanted):
    assert hub_files(REPOSITORY, inside, f"owner/name/{inside}") == wanted


def test_a_hub_id_that_is_not_one_dictionary():
    with pytest.raises(sae.SAEError, match="holds 2 dictionaries, layer0.sae.pt, layer1.sae.pt...: name one, such as o/n/layer0.sae.pt"):
        hub_files(REPOSITORY, "", "o/n")
    with pytest.raises(sae.SAEError, match="no files of a dictionary there; folders with some: L5, layers.2"):
        hub_files(REPOSITORY, "layers.3", "o/n/layers.3")


def test_a_hub_id_is_listed_and_fetched(tmp_path, monkeypatch):
    sae.save(tmp_path / "layers.2", dictionary(), layout="sparsify")
    asked = {}
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda repository, revision: asked.update(listed=(repository, revision)) or REPOSITORY)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *given, **named: asked.update(got=(given, named)) or tmp_path)
    for name, revision in (("owner/name/layers.2", None), ("owner/name/layers.2@v1.0", "v1.0"), ("owner/name/layers.2@refs/pr/3", "refs/pr/3")):
        assert sae.load(name).cfg.k == K
        assert asked["listed"] == ("owner/name", revision)
        assert asked["got"] == (("owner/name",), {"revision": revision, "allow_patterns": ["layers.2/cfg.json", "layers.2/sae.safetensors"]})
    with pytest.raises(sae.SAEError, match="not a hub id"):
        sae.load("owner/name/layers.2@v1@v2")


def test_what_was_downloaded_before_is_read_without_the_hub(tmp_path, monkeypatch):
    def refuses(repository, revision):
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.list_repo_files", refuses)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(sae.SAEError, match="none downloaded before, and the hub answered: no route to host"):
        sae.load("owner/name/layers.2")
    cache, commit = tmp_path / "models--owner--name", "0123456789" * 4  # the client's own layout
    sae.save(cache / "snapshots" / commit / "layers.2", dictionary(), layout="sparsify")
    (cache / "refs").mkdir()
    for ref in ("main", "v1"):
        (cache / "refs" / ref).write_text(commit)
    for name in ("owner/name/layers.2", "owner/name/layers.2@v1", f"owner/name/layers.2@{commit}"):
        assert sae.load(name).cfg.k == K
    with pytest.raises(sae.SAEError, match="as downloaded before .the hub answered: no route to host.: .* folders with some: layers.2"):
        sae.load("owner/name/layers.3")
    with pytest.raises(sae.SAEError, match="@v2: no such folder here, none downloaded before"):
        sae.load("owner/name/layers.2@v2")


PEAK = """
import sys, threading
import sae

def held():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1024

def watch():
    while not done.wait(0.002):
        peaks.append(held())

for path in sys.argv[1:]:
    folder, _, dtype = path.partition("@")
    sae.load(folder + "/small", dtype)  # what is imported and compiled once
    peaks, done, before = [], threading.Event(), held()
    thread = threading.Thread(target=watch)
    thread.start()
    d = sae.load(folder, dtype)
    done.set()
    thread.join()
    print((max(peaks) - before) / (sum(a.nbytes for a in d.params.values()) / 2**20))
    del d
"""


def test_a_dictionary_is_never_twice_in_memory(tmp_path, run_python):
    """Not where norms and scales are folded in either: beside the parameters stand some blocks of 8 MiB, and no second copy."""
    for folder, width, latents in ((tmp_path, 512, 24576), (tmp_path / "small", 4, 8)):
        folder.mkdir(exist_ok=True)
        config = {"architecture": "topk", "d_in": width, "d_sae": latents, "k": 2, "rescale_acts_by_decoder_norm": True, "metadata": {}}
        (folder / "cfg.json").write_text(json.dumps(config))
        shapes = {"W_enc": (width, latents), "W_dec": (latents, width), "b_enc": (latents,), "b_dec": (width,)}
        save_file({name: np.full(shape, 0.5, np.float32) for name, shape in shapes.items()}, folder / "sae_weights.safetensors")
    found = run_python(PEAK, (f"{tmp_path}@float32", f"{tmp_path}@bfloat16")).split()
    assert len(found) == 2 and max(map(float, found)) < 1.8, found
