import errno
import json
import logging
import math
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gvpo_jax.errors import UserError
from gvpo_jax.parallel.mesh import MeshConfig
from gvpo_jax.training import checkpoint
from gvpo_jax.training.checkpoint import Checkpoints, fingerprint
from gvpo_jax.training.step import TrainState

# Where a read fails, Orbax leaves coroutines and futures behind, whose loop is closed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def tree(seed, sharding=None):
    rng = np.random.default_rng(seed)
    arrays = {
        "params": {"layers": {0: rng.normal(size=(256, 512)).astype(np.float32), 10: np.arange(3)}},
        "half": jnp.asarray(rng.normal(size=5), jnp.bfloat16),
        "count": np.int32(seed),
    }
    place = (lambda x: jax.device_put(x, sharding)) if sharding else jnp.asarray
    return jax.tree.map(place, arrays)


def like(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def save(checkpoints, step, state, extra=None, samples=None, score=math.nan):
    """A tree as two items, as a policy saves its own."""
    checkpoints.save(step, items(state), extra or {}, samples, score=score)


def items(state):
    rest = {name: value for name, value in state.items() if name != "params"}
    return {"params": state["params"], "state": rest}


def restore(checkpoints, state, **options):
    return checkpoints.restore(like(items(state)), **options)


def whole(restored):
    return {"params": restored.trees["params"], **restored.trees["state"]}


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_newest_comes_back_bitwise_with_its_extras(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3):
            save(checkpoints, step, tree(step), {"tokens": step * 10, "name": "x"})
    with Checkpoints(tmp_path) as checkpoints:
        restored = restore(checkpoints, tree(0))
    assert (restored.step, restored.extra) == (3, {"tokens": 30, "name": "x"})
    assert_equal(whole(restored), tree(3))
    assert not (tmp_path / "1").exists()


SCORES = {1: 0.5, 2: 0.9, 3: math.nan, 4: 0.9, 5: 0.1, 6: 0.2}


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [(1, 0, {6}), (1, 1, {4, 6}), (2, 2, {2, 4, 5, 6}), (1, 9, {1, 2, 4, 5, 6})],
)
@pytest.mark.parametrize("session", [1, 6])
def test_the_best_stay_beside_the_latest(tmp_path, keep, best, left, session):
    """Of equal scores the later; NaN is none. Also where each is saved by a start of its own."""
    steps = list(SCORES)
    for i in range(0, 6, 6 // session):
        with Checkpoints(tmp_path, keep=keep, keep_best=best) as checkpoints:
            for step in steps[i : i + 6 // session]:
                save(checkpoints, step, tree(step), {"x": step}, score=SCORES[step])
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert set(checkpoints.steps()) == left
        scored = {step: SCORES[step] for step in left if not math.isnan(SCORES[step])}
        found = checkpoints.find("best", scored | {99: 1.0})
        assert scored[found] == max(scored.values())
        restored = restore(checkpoints, tree(0), step=found)
    assert_equal(whole(restored), tree(found))


def test_a_step_that_is_asked_for_is_read_or_it_is_said_why_not(tmp_path):
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        for step in (1, 2):
            save(checkpoints, step, tree(step), {})
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert restore(checkpoints, tree(0), step=checkpoints.find(1, {})).step == 1
        with pytest.raises(UserError, match="has no checkpoint 7; there are 1, 2"):
            checkpoints.find(7, {})
        with pytest.raises(UserError, match=r"has a score: .* there are 1, 2"):
            checkpoints.find("best", {7: 1.0})
        shutil.rmtree(tmp_path / "1" / "params")
        with pytest.raises(UserError, match=r"checkpoint 1 in .* is broken"):
            restore(checkpoints, tree(0), step=1)


def test_nothing_saved_is_nothing_there(tmp_path):
    with Checkpoints(tmp_path / "new") as checkpoints:
        assert checkpoints.steps() == []


def test_parameters_are_read_without_the_rest(tmp_path):
    """Also where the rest is broken, which nobody asked for."""
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, tree(1), {"x": 1})
    for file in (tmp_path / "1" / "state").rglob("*"):
        if file.is_file():
            file.unlink()
    with Checkpoints(tmp_path) as checkpoints:
        restored = restore(checkpoints, tree(0), without=["state"])
    assert (restored.step, restored.extra) == (1, {"x": 1})
    assert_equal(restored.trees, {"params": tree(1)["params"]})


def test_a_checkpoint_of_version_0_1_is_read(tmp_path):
    """There everything was one item, under the names of the train state."""
    params, opt_state = tree(1)["params"], {"mu": jnp.arange(3.0)}
    state = TrainState(params, opt_state, jnp.int32(7))
    old = {"train": state, "reference": {"w": jnp.ones(2)}}
    manager = ocp.CheckpointManager(tmp_path.absolute())
    extra = {"refreshed_at": 3, "checksums": checkpoint._checksums(old)}
    args = ocp.args.Composite(state=ocp.args.StandardSave(old), extra=ocp.args.JsonSave(extra))
    manager.save(7, args=args)
    manager.close()
    trees = {"params": params, "state": {"opt_state": opt_state, "step": state.step}}
    trees["reference"] = old["reference"]
    for without in ([], ["state"]):
        with Checkpoints(tmp_path) as checkpoints:
            restored = checkpoints.restore(like(trees), without=without)
        assert (restored.step, restored.extra) == (7, {"refreshed_at": 3, "updates": 7})
        assert_equal(restored.trees, trees)


def test_a_checkpoint_of_a_later_format_is_left_alone(tmp_path, monkeypatch):
    """It may be whole: to go on from an earlier one would throw it away."""
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, tree(1))
        monkeypatch.setattr(checkpoint, "FORMAT", 3)
        save(checkpoints, 2, tree(2))
    monkeypatch.undo()
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(UserError, match="has format 3, and this version reads up to 2; pip"):
            restore(checkpoints, tree(0))
        assert "format 3" in checkpoints.problem(2)
        assert checkpoints.steps() == [2, 1]
        assert restore(checkpoints, tree(0), step=1).step == 1


def cut_less():
    return jnp.zeros(())


def test_restoring_onto_another_mesh(tmp_path):
    mesh = MeshConfig(fsdp=-1).mesh()
    cut = NamedSharding(mesh, P("fsdp"))
    state = {"params": {"w": jax.device_put(jnp.arange(32.0).reshape(16, 2), cut)}, "n": cut_less()}
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, state)
    with Checkpoints(tmp_path) as checkpoints:
        restored = restore(checkpoints, {"params": {"w": jnp.zeros((16, 2))}, "n": cut_less()})
    np.testing.assert_array_equal(restored.trees["params"]["w"], np.arange(32.0).reshape(16, 2))
    assert fingerprint(state) == fingerprint(whole(restored))


def biggest_file(folder):
    return max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def truncate(folder):
    file = biggest_file(folder)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(folder):
    for file in folder.rglob("*"):
        if file.is_file():
            file.unlink()


def forge_checksum(folder):
    """What a flipped bit on disk looks like to the reader: data and checksum disagree."""
    file = folder / "extra" / "metadata"
    content = json.loads(file.read_text())
    content["checksums"]["state/count"] ^= 4
    del content["checksum"]  # of these values: that of the array shall be found
    file.write_text(json.dumps(content))


def flip_a_counter(folder):
    file = folder / "extra" / "metadata"
    content = json.loads(file.read_text())
    content["of_step"] ^= 4
    file.write_text(json.dumps(content))


def call_it_another_step(folder):
    other = folder.with_name("1")
    shutil.rmtree(folder)
    shutil.copytree(other, folder)


@pytest.mark.parametrize("damage", [truncate, empty, forge_checksum, flip_a_counter])
def test_a_broken_step_is_passed_over_and_can_be_written_again(tmp_path, damage, caplog):
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        for step in (1, 2):
            save(checkpoints, step, tree(step))
    damage(tmp_path / "2")
    with caplog.at_level(logging.WARNING), Checkpoints(tmp_path, keep=3) as checkpoints:
        restored = restore(checkpoints, tree(0))
        assert restored.step == 1
        assert_equal(whole(restored), tree(1))
        assert (tmp_path / "2").exists()
        save(checkpoints, 2, tree(7))
        save(checkpoints, 4, tree(4))
    assert "checkpoint 2 is broken" in caplog.text
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        assert restore(checkpoints, tree(0)).step == 4
    damage(tmp_path / "4")
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        restore(checkpoints, tree(0))
        save(checkpoints, 3, tree(3))
    assert (tmp_path / "3").exists()
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        restored = restore(checkpoints, tree(0))
    assert_equal(whole(restored), tree(3))


def test_a_step_under_another_s_number_is_passed_over(tmp_path, caplog):
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        for step in (1, 2):
            save(checkpoints, step, tree(step))
    call_it_another_step(tmp_path / "2")
    with caplog.at_level(logging.WARNING), Checkpoints(tmp_path, keep=3) as checkpoints:
        assert restore(checkpoints, tree(0)).step == 1
    assert "checkpoint 2 is broken (its folder has the number of another step)" in caplog.text


def test_only_broken_steps_are_an_error(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, tree(1))
    forge_checksum(tmp_path / "1")
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match="no checkpoint in"):
        restore(checkpoints, tree(0))
    assert (tmp_path / "1").exists()


def test_fingerprints_tell_flipped_bits_shifts_and_swaps():
    state = {"a": jnp.arange(7, dtype=jnp.float32), "b": jnp.ones((2, 2), jnp.bfloat16)}
    original = fingerprint(state)
    for place in range(7):
        for bit in range(32):
            bits = np.arange(7, dtype=np.float32).view(np.uint32)
            bits[place] ^= np.uint32(1) << np.uint32(bit)
            flipped = state | {"a": jnp.asarray(bits).view(jnp.float32)}
            assert fingerprint(flipped) != original
    shifted = {"a": jnp.ones(64)}, {"a": jnp.ones(64) * 2}
    assert fingerprint(shifted[0]) != fingerprint(shifted[1])
    swapped = state | {"a": jnp.asarray([1.0, 0, 2, 3, 4, 5, 6])}
    assert fingerprint(swapped) != original


def test_samples_that_would_unpack_to_more_than_they_are_count_as_broken(
    tmp_path, monkeypatch, caplog
):
    state, bomb = tree(0), {"completions": np.zeros(10**7, np.int32)}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        save(checkpoints, 1, state, samples={"completions": np.arange(4)})
        checkpoints.wait()
        monkeypatch.setattr(np, "savez", np.savez_compressed)
        save(checkpoints, 2, state, samples=bomb)
    with Checkpoints(tmp_path, keep=2) as checkpoints, caplog.at_level(logging.WARNING):
        restored = restore(checkpoints, state)
    assert restored.step == 1
    assert "claim to be larger than what holds them" in caplog.text


def test_what_fails_when_the_files_are_closed_is_told_as_well(tmp_path, monkeypatch):
    """A write in the background may fail as late as that: seen on a file system that was full."""

    def close(self):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    checkpoints = Checkpoints(tmp_path)
    monkeypatch.setattr(ocp.CheckpointManager, "close", close)
    with pytest.raises(UserError, match=r"could not write a checkpoint to .*No space left"):
        checkpoints.close()
