"""Checkpoints: exact, re-shardable, atomic, written in the background; damage and a full disk."""

import dataclasses
import errno
import os
import shutil
import signal
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_grpo as tiny
import tiny_preferences as prefs
from orbax.checkpoint._src.path import atomicity

from jaxrl_llm.checkpoint import Checkpoints, checksums, until_done
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
    checkpoints.finish()
    half = checkpoints.path / "2.orbax-checkpoint-tmp-123"
    shutil.copytree(checkpoints.path / "1", half)
    again = Checkpoints(checkpoints.path)
    assert again.steps() == [1] and not half.exists()
    again.close()


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(checkpoints):
    for step in (1, 2):
        checkpoints.save(step, state(step), {})
    checkpoints.finish()
    for file in (checkpoints.path / "2").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(b"")
    assert checkpoints.restore(abstract())[0] == 1


def test_values_that_changed_on_the_disk_are_noticed(tmp_path, caplog):
    """Bits that flip inside an array's numbers: whatever is read is what was saved, or the one before is."""
    weights = {"w": jax.random.normal(jax.random.key(0), (64, 512)), "n": jnp.arange(7)}
    wanted = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), weights)
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, weights, {})
    largest = max((file for file in (tmp_path / "2").rglob("*") if file.parent.name == "d"), key=lambda file: file.stat().st_size)
    data = bytearray(largest.read_bytes())
    for place in range(len(data) // 2, len(data) // 2 + 8):
        data[place] ^= 1
    largest.write_bytes(data)
    with Checkpoints(tmp_path) as checkpoints:
        step, found, _ = checkpoints.restore(wanted)
    assert step == 1 and "2 cannot be read (['w'] does not hold the values that were saved" in caplog.text
    np.testing.assert_array_equal(found["w"], weights["w"])


def test_checksums_see_one_bit_and_the_order():
    arrays = [np.arange(12).reshape(3, 4).astype(dtype) for dtype in (np.float32, jnp.bfloat16, np.int32, np.uint32, np.int8, bool)]
    for array in arrays:
        ((dtype, total),) = checksums([array]).values()
        assert dtype == str(array.dtype) and checksums([jnp.asarray(array)]) == {"[0]": [dtype, total]}
        swapped, changed = array.copy(), array.copy()
        swapped[0, 0], swapped[2, 3] = array[2, 3], array[0, 0]
        changed[1, 1] = not array[1, 1] if dtype == "bool" else array[1, 1] + 1
        assert len({total, *(found[1] for a in (swapped, changed) for found in checksums([a]).values())}) == 3
    words = np.float32([[1.5, -2.0], [0.0, 3.25]]).view(np.uint32).astype(np.uint64)
    assert checksums([words.astype(np.uint32).view(np.float32)])["[0]"][1] == int((words * np.uint64([[1, 3], [5, 7]])).sum() % 2**32)


def test_what_is_damaged_stands_in_nothings_way(tmp_path):
    """It is put aside by the restart that passes over it, so the next saves are written, kept and found, at its step and below it."""
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (10, 20):
            checkpoints.save(step, state(step), {})
    for file in (tmp_path / "20").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(b"")
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.restore(abstract())[0] == 10
        assert checkpoints.steps() == [10] and (tmp_path / "unreadable-20").is_dir()
        checkpoints.name_best(15)
        checkpoints.save(15, state(15.0), {})
        checkpoints.save(20, state(20.5), {})
        assert checkpoints.steps() == [15, 20]
        step, found, _ = checkpoints.restore(abstract())
        assert step == 20 and float(found["params"]["w"].ravel()[0]) == float(state(20.5)["params"]["w"].ravel()[0])
        checkpoints.save(25, state(25.0), {})
        checkpoints.save(30, state(30.0), {})
        assert checkpoints.steps() == [15, 25, 30] and checkpoints.restore(abstract(), at=15)[0] == 15
        with pytest.raises(UserError, match="no checkpoint of step 27 was written, since there is one of a later step"):
            checkpoints.save(27, state(27.0), {})
        (tmp_path / "15" / "host" / "metadata").unlink()
        with pytest.raises(UserError, match=r"the best checkpoint in .* cannot be read \(15: .*allow_changes=train.keep_best"):
            checkpoints.restore(abstract(), at=15)
        assert checkpoints.steps() == [15, 25, 30]


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
            checkpoints.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    again = Checkpoints(checkpoints.path)
    assert again.steps() == [1] and again.restore(abstract())[0] == 1
    again.close()


def test_a_folder_that_cannot_be_made_is_a_users_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        Checkpoints(tmp_path / "file" / "checkpoints")


# ------------------------------------------------------------------------------------------------- in the background


class Write:
    """Orbax's writes, which begin only when `go` is set and end with `error` in place of the rename that makes a checkpoint of a folder."""

    def __init__(self, monkeypatch):
        self.go, self.error, self.begun, self.ended = threading.Event(), None, 0, 0
        kind, write = atomicity.AtomicRenameTemporaryPath, self
        create, finalize = kind.create, kind.finalize

        async def begin(path):
            write.begun += path.get_final().name.isdigit()
            assert write.go.wait(60)
            return await create(path)

        async def end(path, *given, **how):
            if write.error is not None:
                raise write.error
            write.ended += path.get_final().name.isdigit()  # not the folders of its parts
            return await finalize(path, *given, **how)

        monkeypatch.setattr(kind, "create", begin)
        monkeypatch.setattr(kind, "finalize", end)


@pytest.fixture
def write(monkeypatch):
    held = Write(monkeypatch)
    yield held
    held.go.set()


FULL = OSError(errno.ENOSPC, "No space left on device")


def test_what_is_written_is_the_state_of_the_save_though_training_goes_on(checkpoints, write):
    """Not a byte is written before five further steps have had the state's memory, and the host's arrays were changed in place."""
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2 + 1, tree), donate_argnums=0)
    training = step({"w": jax.random.normal(jax.random.key(0), (300, 300)), "small": jnp.arange(3.0)})
    window, host = np.arange(6.0), {"used": np.zeros(4)}
    wanted = jax.tree.map(np.array, training)
    checkpoints.save(1, {"train": training, "window": window}, host)
    assert write.ended == 0 and not any(path.name == "1" for path in checkpoints.path.iterdir())
    for i in range(5):
        before, training = training, step(training)
        assert i == 0 or before["w"].is_deleted(), "the steps take each other's memory"
    window[:], host["used"][:] = 99, 99
    jax.block_until_ready(training)
    write.go.set()
    _, found, saved = checkpoints.restore(abstract({"train": training, "window": window}))
    jax.tree.map(np.testing.assert_array_equal, found["train"], wanted)
    assert found["window"].tolist() == list(range(6)) and saved["used"].tolist() == [0] * 4
    assert np.abs(training["w"] - wanted["w"]).max() > 1


def test_the_next_save_waits_for_the_one_before(checkpoints, write):
    checkpoints.save(1, state(1.0), {})
    second = threading.Thread(target=lambda: checkpoints.save(2, state(2.0), {}))
    second.start()
    second.join(0.2)
    assert second.is_alive() and write.begun <= 1
    write.go.set()
    second.join()
    assert checkpoints.steps() == [1, 2] and write.ended == 2


@pytest.mark.parametrize("how", ["save", "finish", "restore", "close", "leaving"])
def test_an_error_of_the_write_is_raised_by_what_comes_next_and_older_ones_stay(tmp_path, write, how):
    write.go.set()
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    checkpoints.save(1, state(1.0), {})
    checkpoints.finish()
    write.error = FULL
    checkpoints.save(2, state(2.0), {})
    acts = {
        "save": lambda: checkpoints.save(3, state(3.0), {}), "finish": checkpoints.finish, "close": checkpoints.close,
        "restore": lambda: checkpoints.restore(abstract()), "leaving": lambda: checkpoints.__exit__(None, None, None),
    }  # fmt: skip
    with pytest.raises(UserError, match="disk is full.*last good checkpoint is step 1"):
        acts[how]()
    write.error = None
    if how not in ("close", "leaving"):  # there is room again: one stays, as set
        assert checkpoints.steps() == [1] and checkpoints.restore(abstract())[0] == 1
        checkpoints.save(3, state(3.0), {})
        assert checkpoints.steps() == [3]
        checkpoints.close()
    again = Checkpoints(tmp_path / "checkpoints")
    assert again.restore(abstract())[0] == (1 if how in ("close", "leaving") else 3)
    again.close()


def test_a_failed_write_does_not_hide_the_error_that_ends_a_block(tmp_path, write, caplog):
    write.go.set()
    write.error = FULL
    with pytest.raises(ZeroDivisionError), Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, state(1.0), {})
        raise ZeroDivisionError
    assert len([message for message in caplog.messages if "disk is full" in message]) == len(caplog.messages) == 1


def test_a_folder_that_is_done_with_is_removed_and_one_whose_last_write_failed_is_not(tmp_path, write):
    write.go.set()
    with until_done(tmp_path / "well") as checkpoints:
        checkpoints.save(1, state(), {})
    assert not (tmp_path / "well").exists()
    with pytest.raises(UserError, match="disk is full"), until_done(tmp_path / "full") as checkpoints:
        checkpoints.save(1, state(), {})
        checkpoints.finish()
        write.error = FULL
        checkpoints.save(2, state(), {})
    assert (tmp_path / "full" / "1").exists()


class Chosen:
    """A reward, and after so many calls a signal to its own process."""

    def __init__(self, stop_at=None):
        self.calls, self.stop_at = 0, stop_at

    def __call__(self, inputs):
        self.calls += 1
        if self.calls == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return tiny.reward(inputs)


@pytest.mark.parametrize("verb", ["grpo", "grpo stopped", "dpo", "sft"])
def test_no_run_ends_before_its_last_save_is_on_disk(tmp_path, write, monkeypatch, verb):
    """Which a write shows that fails after the last step: the run fails too, and leaves no summary."""
    import test_train_sft as sft

    write.go.set()
    runs = {
        "grpo": lambda: tiny.run(tmp_path / "run", dataclasses.replace(tiny.TINY, checkpoint_every=0)),
        "grpo stopped": lambda: tiny.run(tmp_path / "run", dataclasses.replace(tiny.TINY, checkpoint_every=0), reward=Chosen(2)),
        "dpo": lambda: prefs.train(dataclasses.replace(prefs.QUICK, checkpoint_every=0), folder=tmp_path / "run"),
        "sft": lambda: sft.train(sft.QUICK, folder=tmp_path / "run"),
    }
    write.error = FULL
    with pytest.raises(UserError, match="disk is full.*no checkpoint was saved before"):
        runs[verb]()
    assert not (tmp_path / "run" / "summary.json").exists()
    write.error = None
    ended = write.ended
    monkeypatch.setattr(Chosen, "__call__", lambda self, inputs: tiny.reward(inputs))
    runs[verb]()
    assert write.ended == ended + (2 if verb == "dpo" else 1)  # dpo saves the references before its first step


KILLED = """
import sys, time; sys.path.insert(0, "tests/train")
import jax, jax.numpy as jnp
from orbax.checkpoint._src.path import atomicity
from jaxrl_llm.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[1], keep=1)
state = lambda value: {"w": jnp.full((200, 200), value)}
checkpoints.save(1, state(1.0), {})
checkpoints.finish()
kind, moment = atomicity.AtomicRenameTemporaryPath, sys.argv[2]
real = getattr(kind, moment)
async def halted(path, *given, **how):
    if moment == "create":
        await real(path, *given, **how)
    print("there", flush=True)
    time.sleep(600)
setattr(kind, moment, halted)
checkpoints.save(2, state(2.0), {})
time.sleep(600)
"""


@pytest.mark.parametrize("moment", ["create", "finalize"])
def test_a_kill_in_the_middle_of_a_write_leaves_the_checkpoint_before(repo, tmp_path, moment):
    """After the temporary folder was made, and when all is in it but the rename."""
    env = os.environ | {"PYTHONPATH": str(repo), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", KILLED, str(tmp_path / "checkpoints"), moment]
    process = subprocess.Popen(command, env=env, cwd=repo, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "there\n"
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    assert any("orbax-checkpoint-tmp" in path.name for path in (tmp_path / "checkpoints").iterdir())
    again = Checkpoints(tmp_path / "checkpoints")
    step, found, _ = again.restore({"w": jax.ShapeDtypeStruct((200, 200), jnp.float32)})
    assert step == 1 and float(found["w"][0, 0]) == 1.0 and again.steps() == [1]
    assert not any("orbax-checkpoint-tmp" in path.name for path in again.path.iterdir())
    again.close()


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
