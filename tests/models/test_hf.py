"""Hugging Face folders: bit-equal round trips, sharded files, dtypes, memory, and what goes wrong."""

import dataclasses
import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import parity_cases as cases
import pytest
from safetensors.numpy import load_file, save_file

import models
from models import ModelError, hf_export

# Every tensor that there is.
NAMES = (
    *("llama_biases_linear", "qwen2", "qwen3_layer_types", "mistral_window", "olmo2_biases", "gemma2_uncapped", "gemma3", "phi3"),
    *("gpt2", "gpt2_untied", "gpt_neox", "gpt_neox_sequential", "gptj"),
)


@pytest.fixture
def checkpoint(tmp_path):
    """make(name) writes a random checkpoint and returns (folder, its tensors)."""

    def make(name="qwen2", dtype=np.float32, **changes):
        folder = tmp_path / f"{name}-original"
        config = {**cases.CASES[name], "dtype": np.dtype(dtype).name, **changes}
        return folder, cases.write_checkpoint(folder, config, dtype=dtype)

    return make


def stored(folder):
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def assert_same_tensors(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        assert found[name].tobytes() == value.tobytes(), name


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("name", NAMES)
def test_round_trip_is_bit_equal(name, dtype, checkpoint, tmp_path):
    folder, tensors = checkpoint(name, dtype)
    cfg, params = models.load(folder, dtype=np.dtype(dtype).name)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(dtype)}
    models.save(tmp_path / "export", cfg, params)
    assert_same_tensors(stored(tmp_path / "export"), tensors)
    again, _ = models.load(tmp_path / "export", dtype=np.dtype(dtype).name)
    assert again == cfg


@pytest.mark.parametrize("name", ["stories260k", "babyllama-0.9m"])
def test_real_round_trip_is_bit_equal(name, assets, tmp_path):
    original = assets / "checkpoints" / name
    cfg, params = models.load(original)
    models.save(tmp_path / name, cfg, params, tokenizer_from=original)
    assert_same_tensors(stored(tmp_path / name), stored(original))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name / file).read_bytes() == (original / file).read_bytes()
    text = "Once upon a time, there was a little girl named Lily."
    assert models.load_tokenizer(tmp_path / name).encode(text) == models.load_tokenizer(original).encode(text)


def test_leaves_are_the_transposed_stack(checkpoint):
    folder, tensors = checkpoint("qwen2")
    _, params = models.load(folder)
    q = tensors["model.layers.1.self_attn.q_proj.weight"]  # [heads * head_dim, d_model]
    np.testing.assert_array_equal(params["blocks"]["q"][1], q.T.reshape(32, 4, 8))
    o = tensors["model.layers.1.self_attn.o_proj.weight"]  # [d_model, heads * head_dim]
    np.testing.assert_array_equal(params["blocks"]["o"][1], o.T.reshape(4, 8, 32))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), params) == jax.tree.map(
        lambda a: (a.shape, a.dtype), models.abstract_params(models.load(folder)[0])
    )


def test_dtype_argument(checkpoint):
    folder, tensors = checkpoint("llama2", np.float16)
    cfg, params = models.load(folder)
    assert cfg.dtype == "float32"  # float16 widens unless asked for
    name = "model.embed_tokens.weight"
    np.testing.assert_array_equal(params["embed"]["embedding"], tensors[name].astype(np.float32))
    cfg, params = models.load(folder, dtype="bfloat16")
    assert cfg.dtype == "bfloat16"
    np.testing.assert_array_equal(params["embed"]["embedding"], tensors[name].astype(ml_dtypes.bfloat16))
    with pytest.raises(ModelError, match="dtype='int4'.*bfloat16"):
        models.load(folder, dtype="int4")


def test_sharded_files(checkpoint, tmp_path):
    """A small max_shard_size gives several files and an index; reading them gives the same parameters."""
    folder, tensors = checkpoint("qwen3_layer_types")
    cfg, params = models.load(folder)
    models.save(tmp_path / "sharded", cfg, params, max_shard_size=12_000)
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "sharded").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert set(index["weight_map"].values()) == set(files) and index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    for file in files:
        held = load_file(tmp_path / "sharded" / file)
        assert sum(t.nbytes for t in held.values()) <= 12_000 or len(held) == 1
    assert_same_tensors(stored(tmp_path / "sharded"), tensors)
    _, again = models.load(tmp_path / "sharded")
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_transformers_reads_the_sharded_export(checkpoint, tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    import transformers

    folder, _ = checkpoint("qwen3_layer_types")
    cfg, params = models.load(folder)
    models.save(tmp_path / "sharded", cfg, params, max_shard_size=12_000)
    tokens = torch.arange(10)[None] + 3
    with torch.no_grad():
        a, b = (
            transformers.AutoModelForCausalLM.from_pretrained(f)(tokens).logits.numpy()
            for f in (folder, tmp_path / "sharded")
        )
    np.testing.assert_array_equal(a, b)


def test_generation_config_says_what_ends_a_generation(checkpoint, tmp_path):
    folder, _ = checkpoint("llama2")
    assert models.load(folder)[0].eos_token_ids == (2,)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    cfg, params = models.load(folder)
    assert cfg.eos_token_ids == (2, 5)
    (folder / "generation_config.json").write_text('{"eos_token_id": "2"}')
    fails(folder, f"{folder / 'generation_config.json'}: eos_token_id must be null, a token id", "not '2'")
    models.save(tmp_path / "export", cfg, params)
    assert json.loads((tmp_path / "export" / "generation_config.json").read_text())["eos_token_id"] == [2, 5]
    assert models.load(tmp_path / "export")[0] == cfg


def test_known_buffers_and_a_stored_tied_head_are_ignored(checkpoint):
    folder, tensors = checkpoint("qwen2")
    embedding = tensors["model.embed_tokens.weight"]
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32), "lm_head.weight": embedding}
    save_file({**tensors, **extra}, folder / "model.safetensors")
    cfg, params = models.load(folder)
    assert "lm_head" not in params and cfg.tie_embeddings
    save_file({**tensors, "lm_head.weight": embedding + 1}, folder / "model.safetensors")
    with pytest.raises(ModelError, match="lm_head.weight differs from model.embed_tokens.weight.*tie_word_embeddings"):
        models.load(folder)


# --- memory ----------------------------------------------------------------------------------------------------------

MEMORY = """
import sys
import jax, numpy as np
import models
from models.config import ModelConfig

def memory(field):  # not getrusage's ru_maxrss, which starts at the parent's
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

folder, what = sys.argv[1:]
cfg = ModelConfig(vocab_size=4096, d_model=1024, n_layers=8, n_heads=8, n_kv_heads=8, head_dim=128, d_ff=1024,
                  bos_token_id=1, eos_token_ids=(2,))
size = 4 * cfg.param_count()
if what == "save":
    params = jax.tree.map(lambda a: jax.device_put(np.ones(a.shape, a.dtype)), models.abstract_params(cfg))
    jax.block_until_ready(params)
    jax.numpy.ones(8)[0].block_until_ready()
    before = memory("VmHWM")
    models.save(folder, cfg, params, max_shard_size=10**8)
else:
    models.abstract_params(cfg)  # what tracing needs is not the model's
    jax.device_put(np.ones(8)).block_until_ready()
    before = memory("VmRSS")
    mesh = None
    if what == "mesh":
        from models.sharding import make_mesh
        mesh = make_mesh({"fsdp": 2, "tensor": 2})
    cfg, params = models.load(folder, mesh=mesh)
    jax.block_until_ready(params)
print(size, memory("VmHWM") - before)
"""


def test_memory_holds_one_copy(run_python, tmp_path):
    """A 250 MB model: loading peaks near one copy above the start, sharded or not, by less than two of its tensors of 16 MB beside what JAX
    itself takes; saving adds next to nothing."""
    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from /proc")
    folder = str(tmp_path / "big")
    size, saving = map(int, run_python(MEMORY, args=(folder, "save")).split()[-2:])
    assert size > 200 * 2**20
    assert saving < 0.2 * size
    for what, devices in (("load", None), ("mesh", 4)):
        _, loading = map(int, run_python(MEMORY, args=(folder, what), devices=devices).split()[-2:])
        assert 0.9 * size < loading < 1.15 * size, what


# --- what goes wrong -------------------------------------------------------------------------------------------------


def fails(folder, *told, load=models.load):
    with pytest.raises(ModelError) as error:
        load(folder)
    message = str(error.value)
    assert "\n" not in message
    for part in told:
        assert part in message, message


def rewrite(folder, tensors, **changes):
    """The checkpoint with some tensors replaced (None: left out)."""
    changed = {name.replace("__", "."): value for name, value in changes.items()}
    kept = {name: changed.get(name, value) for name, value in (tensors | changed).items()}
    save_file({name: value for name, value in kept.items() if value is not None}, folder / "model.safetensors")


def test_truncated_file(checkpoint):
    folder, _ = checkpoint()
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for cut in (len(whole) - 5, 100, 4, 0):
        path.write_bytes(whole[:cut])
        fails(folder, str(path), "not a complete safetensors file")
    path.write_text("version https://git-lfs.github.com/spec/v1")
    fails(folder, str(path), "not a complete safetensors file")


def test_wrong_missing_and_unexpected_tensors(checkpoint):
    folder, tensors = checkpoint()
    file = str(folder / "model.safetensors")
    rewrite(folder, tensors, model__norm__weight=np.ones(31, np.float32))
    fails(folder, file, "model.norm.weight", "expected shape [32]", "found [31]")
    rewrite(folder, tensors, model__norm__weight=None)
    fails(folder, str(folder), "missing tensor model.norm.weight [32]")
    rewrite(folder, tensors, model__extra=np.ones(3, np.float32))
    fails(folder, file, "unexpected tensor model.extra")
    rewrite(folder, tensors, model__norm__weight=np.ones(32, np.int32))
    fails(folder, file, "model.norm.weight", "dtype I32")


def test_missing_and_broken_files(checkpoint, tmp_path):
    folder, tensors = checkpoint()
    weights, config = folder / "model.safetensors", folder / "config.json"
    index = folder / "model.safetensors.index.json"
    index.write_text("{}")
    fails(folder, str(index), "weight_map")
    index.write_text('{"weight_map": {"model.norm.weight": 3}}')
    fails(folder, str(index), "weight_map must be an object {tensor: file name}")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}))
    fails(folder, "model-00001-of-00001.safetensors", "no such file")
    index.unlink()
    config.write_text('{"model_type": ')
    fails(folder, str(config), "invalid JSON")
    config.write_bytes(b"\xff\xfe{}")
    fails(folder, str(config), "invalid JSON")
    config.write_text("[]")
    fails(folder, str(config), "JSON object")
    config.write_text(json.dumps({**cases.CASES["qwen2"], "architectures": ["Qwen7ForCausalLM"]}))
    fails(folder, str(config), "architectures", "Qwen7ForCausalLM", "'Qwen3ForCausalLM'")
    config.write_text(json.dumps({**cases.CASES["qwen2"], "tie_word_embeddings": "false"}))
    fails(folder, f"{config}: tie_word_embeddings must be true or false, not 'false'")
    config.unlink()
    fails(folder, str(config), "no such file")
    config.write_text(json.dumps(cases.CASES["qwen2"]))
    weights.rename(folder / "pytorch_model.bin")
    fails(folder, str(weights), "no such file", "pytorch_model.bin", "convert")
    fails(tmp_path / "nowhere" / "x", "no such folder")
    fails(config, "is a file")


def test_missing_and_broken_tokenizer(checkpoint):
    folder, _ = checkpoint()
    fails(folder, str(folder), "no tokenizer", "tokenizer.json", load=models.load_tokenizer)
    (folder / "tokenizer.json").write_text("{")
    fails(folder, str(folder), "tokenizer cannot be read", load=models.load_tokenizer)
    (folder / "tokenizer.json").write_text('{"a": 1}')
    fails(folder, str(folder), "tokenizer cannot be read: KeyError: 'added_tokens'", load=models.load_tokenizer)


def test_tokenizer_without_padding_token(tmp_path):
    import transformers
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="<s>")
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="</s>")
    made.save_pretrained(tmp_path / "tokenizer")
    tokenizer = models.load_tokenizer(tmp_path / "tokenizer")
    assert (tokenizer.pad_token, tokenizer.pad_token_id, tokenizer.is_fast) == ("</s>", 1, True)


# --- the hub ---------------------------------------------------------------------------------------------------------


def test_hub_ids(checkpoint, monkeypatch, tmp_path):
    import huggingface_hub

    folder, _ = checkpoint()
    asked = []

    def download(name, revision=None, allow_patterns=None):
        asked.append((name, revision, allow_patterns))
        if name == "org/absent":
            raise huggingface_hub.errors.LocalEntryNotFoundError("offline\nand not cached" + " or so" * 50)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    models.load("org/name")
    models.load("org/name@v1.0")
    assert [a[:2] for a in asked] == [("org/name", None), ("org/name", "v1.0")]
    assert "*.safetensors" in asked[0][2] and not any("bin" in pattern for pattern in asked[0][2])
    fails("org/absent", "org/absent", "no such folder", "hub", "offline and not cached or so", "or so ...)")
    fails("./org/name", "./org/name: no such folder")
    fails("a/b/c", "a/b/c: no such folder")
    assert len(asked) == 3


# --- writing ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    cfg = models.ModelConfig.from_hf(cases.CASES["qwen2"])
    return cfg, cases.random_params(cfg)


def test_interrupted_export_leaves_nothing(tiny, tmp_path, monkeypatch):
    cfg, params = tiny
    models.save(tmp_path / "kept", cfg, params)
    before = stored(tmp_path / "kept")

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(hf_export, "_write_json", stop)
    for name in ("fresh", "kept"):
        with pytest.raises(KeyboardInterrupt):
            models.save(tmp_path / name, cfg, jax.tree.map(lambda a: a + 1, params))
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert_same_tensors(stored(tmp_path / "kept"), before)


def killed_between(folder, name, *contents):
    """What a process that was killed in `replacing` leaves: its hidden folder, with a lock that nobody holds."""
    hidden = folder / f".{name}.abcdefgh"
    for path in (hidden / "lock", *(hidden / content / "config.json" for content in contents)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")


def test_what_a_killed_export_left_is_removed_and_what_a_living_one_makes_is_not(tiny, tmp_path):
    cfg, params = tiny
    killed_between(tmp_path, "out", "out")
    (tmp_path / ".out.no_lock_").mkdir()  # somebody else's
    (tmp_path / ".other.abcdefgh").mkdir()
    with hf_export.replacing(tmp_path / "out") as contents:
        models.save(tmp_path / "out", cfg, params)
        assert contents.is_dir()
        (contents / "mine").write_text("")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.abcdefgh", ".out.no_lock_", "out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"], "it came last"


def test_a_kill_between_the_two_renames_loses_nothing(tiny, tmp_path, monkeypatch):
    cfg, params = tiny
    models.save(tmp_path / "out", cfg, params)
    before = stored(tmp_path / "out")
    killed_between(tmp_path, "out", "out")
    (tmp_path / "out").rename(tmp_path / ".out.abcdefgh" / "old")
    monkeypatch.setattr(hf_export, "_write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        models.save(tmp_path / "out", cfg, jax.tree.map(lambda a: a + 1, params))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert_same_tensors(stored(tmp_path / "out"), before)


def test_failed_swap_puts_the_old_checkpoint_back(tiny, tmp_path, monkeypatch):
    cfg, params = tiny
    models.save(tmp_path / "kept", cfg, params)
    before, real = stored(tmp_path / "kept"), hf_export.os.replace
    monkeypatch.setattr(
        hf_export.os, "replace", lambda a, b: real(a, b) if "old" in (a.name, b.name) else real(a / "absent", b)
    )
    with pytest.raises(ModelError, match="cannot be written"):
        models.save(tmp_path / "kept", cfg, jax.tree.map(lambda a: a + 1, params))
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert_same_tensors(stored(tmp_path / "kept"), before)


def test_replacing_a_checkpoint_keeps_its_tokenizer(tiny, tmp_path):
    cfg, params = tiny
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokenizer.json").write_text("{}")
    models.save(tmp_path / "out", cfg, params, tokenizer_from=tmp_path / "other", max_shard_size=10_000)
    models.save(tmp_path / "out", cfg, jax.tree.map(lambda a: a + 1, params))
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    np.testing.assert_array_equal(models.load(tmp_path / "out")[1]["blocks"]["q"], params["blocks"]["q"] + 1)
    with pytest.raises(ModelError, match="tokenizer_from: .*empty has no tokenizer"):
        (tmp_path / "empty").mkdir()
        models.save(tmp_path / "new", cfg, params, tokenizer_from=tmp_path / "empty")


def test_a_folder_that_is_no_checkpoint_is_not_replaced(tiny, tmp_path):
    cfg, params = tiny
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text('{"model_type": "llama"}')
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(ModelError, match="run: neither empty nor a checkpoint .*metrics.jsonl"):
        models.save(run, cfg, params)
    (run / "metrics.jsonl").unlink()
    (run / "config.json").write_text('{"learning_rate": 1}')
    with pytest.raises(ModelError, match="neither empty nor a checkpoint .*config.json"):
        models.save(run, cfg, params)
    (run / "config.json").unlink()
    models.save(run, cfg, params)  # an empty folder is fine
    with pytest.raises(ModelError, match="is a file"):
        models.save(run / "config.json", cfg, params)


def test_unwritable_place(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="cannot be written: File exists"):
        models.save(tmp_path / "file" / "out", *tiny)


def test_full_disk(run_python, tmp_path):
    """A file-size limit stands in for the full disk: one line, and nothing is left."""
    code = """
import resource, signal, sys
import jax, numpy as np, models
cfg = models.ModelConfig(vocab_size=64, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=48,
                         bos_token_id=1, eos_token_ids=(2,))
params = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), models.abstract_params(cfg))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try:
    models.save(sys.argv[1], cfg, params)
except models.ModelError as error:
    print(error)
"""
    out = run_python(code, args=(str(tmp_path / "out"),), env={"JAX_ENABLE_COMPILATION_CACHE": "false"})
    assert "cannot be written" in out and str(tmp_path / "out") in out
    assert list(tmp_path.iterdir()) == []


def test_params_that_do_not_fit(tiny, tmp_path):
    cfg, params = tiny
    blocks = params["blocks"]
    with pytest.raises(ModelError, match=r"blocks.q: expected shape \[2, 32, 4, 8\], found \[1, 32, 4, 8\]"):
        models.save(tmp_path / "a", cfg, {**params, "blocks": {**blocks, "q": blocks["q"][:1]}})
    with pytest.raises(ModelError, match="missing blocks.q"):
        models.save(tmp_path / "a", cfg, {**params, "blocks": {k: v for k, v in blocks.items() if k != "q"}})
    with pytest.raises(ModelError, match=r"unexpected lm_head.kernel"):
        models.save(tmp_path / "a", cfg, {**params, "lm_head": {"kernel": blocks["q"]}})
    with pytest.raises(ModelError, match="dtype int32"):
        models.save(tmp_path / "a", cfg, {**params, "blocks": {**blocks, "q": blocks["q"].astype(int)}})
    with pytest.raises(ModelError, match="layer_windows"):
        models.save(tmp_path / "a", dataclasses.replace(cfg, layer_windows=(3, 5)), params)
    assert list(tmp_path.iterdir()) == []
