"""Checkpoints: exact, re-shardable, atomic; damage and a full disk."""

import errno
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.checkpoint import Checkpoints
from jaxrl_llm.errors import UserError

HOST = {"used": np.array([True, False]), "weights": np.array([1 / 3, np.nan]), "step": np.array(7)}


def state(value=1.0):
    return {"params": {"w": jnp.full((4, 3), value), "b": jnp.arange(3, dtype=jnp.bfloat16)}, "step": jnp.int32(5)}


def abstract(tree=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state() if tree is None else tree)


@pytest.fixture
def checkpoints(tmp_path):
    made = Checkpoints(tmp_path / "checkpoints", keep=2)
    yield made
    made.close()


def test_what_is_saved_comes_back_bit_for_bit(checkpoints):
    assert checkpoints.restore(abstract()) is None
    checkpoints.save(3, state(1 / 3), HOST)
    step, restored, host = checkpoints.restore(abstract())
    assert step == 3
    jax.tree.map(np.testing.assert_array_equal, restored, state(1 / 3))
    assert jax.tree.map(lambda x: x.dtype, restored) == jax.tree.map(lambda x: x.dtype, state())
    assert host.keys() == HOST.keys()
    for name, array in HOST.items():
        np.testing.assert_array_equal(host[name], array)
        assert host[name].dtype == array.dtype and host[name].shape == array.shape


def test_keeps_the_newest_and_saves_a_step_once(checkpoints):
    for step in (1, 2, 3):
        checkpoints.save(step, state(step), {})
    checkpoints.save(3, state(99.0), {})
    assert checkpoints.steps() == [2, 3]
    assert checkpoints.restore(abstract())[1]["params"]["w"][0, 0] == 3


def test_a_partly_written_checkpoint_is_ignored_and_cleared(checkpoints):
    checkpoints.save(1, state(1.0), {})
    half = checkpoints.path / "2.orbax-checkpoint-tmp-123"
    shutil.copytree(checkpoints.path / "1", half)
    again = Checkpoints(checkpoints.path)
    assert again.steps() == [1] and not half.exists()
    again.close()


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(checkpoints):
    for step in (1, 2):
        checkpoints.save(step, state(step), {})
    for file in (checkpoints.path / "2").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(b"")
    assert checkpoints.restore(abstract())[0] == 1


def test_checkpoints_of_another_model_are_refused_not_overwritten(checkpoints):
    checkpoints.save(1, state(), {})
    other = abstract() | {"params": {"w": jax.ShapeDtypeStruct((9, 9), jnp.float32), "v": jax.ShapeDtypeStruct((1,), jnp.float32)}}
    with pytest.raises(UserError, match="can be read.*start over"):
        checkpoints.restore(other)
    assert checkpoints.steps() == [1]


def test_full_disk_is_one_clear_line_and_keeps_the_last_good_one(checkpoints, monkeypatch):
    checkpoints.save(1, state(1.0), {})
    usage = shutil.disk_usage(checkpoints.path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(UserError, match="disk is full.*last good checkpoint is step 1"):
        checkpoints.save(2, state(2.0), {})
    monkeypatch.undo()
    monkeypatch.setattr(checkpoints._manager, "save", _no_space)
    with pytest.raises(UserError, match="disk is full.*last good checkpoint is step 1") as caught:
        checkpoints.save(2, state(2.0), {})
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert checkpoints.restore(abstract())[0] == 1


def _no_space(*_, **__):
    raise ValueError(f"RESOURCE_EXHAUSTED: Error writing file: [OS error {errno.ENOSPC}: No space left on device]")


def test_a_disk_that_really_refuses_leaves_the_last_good_checkpoint(checkpoints):
    """A limit on the size of files is the nearest to a full disk that needs no privileges."""
    resource = pytest.importorskip("resource")
    checkpoints.save(1, state(1.0), {})
    large = state() | {"params": {"w": jax.random.normal(jax.random.key(0), (300, 300))}}  # does not compress
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(UserError, match="disk is full.*last good checkpoint is step 1"):
            checkpoints.save(2, large, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    again = Checkpoints(checkpoints.path)
    assert again.steps() == [1] and again.restore(abstract())[0] == 1
    again.close()


def test_a_folder_that_cannot_be_made_is_a_users_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        Checkpoints(tmp_path / "file" / "checkpoints")


RESHARD = """
import sys, jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
import models.sharding
from jaxrl_llm.checkpoint import Checkpoints
folder, ways = sys.argv[1], int(sys.argv[2])
mesh = models.sharding.make_mesh({"fsdp": ways})
where = NamedSharding(mesh, P("fsdp"))
value = np.arange(24, dtype=np.float32).reshape(8, 3)
checkpoints = Checkpoints(folder)
if ways == 4:
    checkpoints.save(1, {"w": jax.device_put(value, where)}, {})
else:
    _, state, _ = checkpoints.restore({"w": jax.ShapeDtypeStruct((8, 3), jnp.float32, sharding=where)})
    assert state["w"].sharding == where and len(state["w"].addressable_shards) == ways
    np.testing.assert_array_equal(state["w"], value)
    print("same")
checkpoints.close()
"""


def test_saved_on_four_devices_loads_on_one_and_on_eight(run_python, tmp_path):
    run_python(RESHARD, (str(tmp_path), "4"), devices=4)
    for ways in (1, 8):
        assert "same" in run_python(RESHARD, (str(tmp_path), str(ways)), devices=ways)
