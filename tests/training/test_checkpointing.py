"""Checkpoints: what is in them, what a failed save says, and how damage is survived."""

import contextlib
import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from benchmarks.checkpoints import bert_base_state
from lora_jax.training import checkpointing
from tests.helpers import slow, tiny_task

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture
def stopped(tmp_path):
    """A run that fails in step 13, with checkpoints of steps 8 and 10."""
    workdir = tmp_path / "run"
    with pytest.raises(RuntimeError, match="step 12"):
        tiny_task.run(workdir, failing(12))
    assert steps(workdir) == [8, 10]
    return workdir


def failing(step, error=RuntimeError):
    task = tiny_task.task()

    def batch(number):
        if number == step:
            raise error(f"step {step}")
        return task.train_batch(number)

    return dataclasses.replace(task, train_batch=batch)


def steps(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def same_as(left_alone, workdir):
    found = tiny_task.outcome(workdir)
    assert found == left_alone and len(found.lines) > 8


@pytest.mark.parametrize("step", [2, 7, 11, 16])
@pytest.mark.slow
def test_a_run_that_goes_on_is_the_run_left_alone(left_alone, tmp_path, step):
    """Whatever the steps of lines, evaluations and checkpoints have to do with the interruption."""
    with pytest.raises(RuntimeError):
        tiny_task.run(tmp_path, failing(step))
    tiny_task.run(tmp_path)
    same_as(left_alone, tmp_path)
    assert [x["step"] for x in tiny_task.lines(tmp_path)] == [
        3, 6, 8, 8, 9, 12, 15, 16, 16, 18, 21, 24, 24,
    ]  # fmt: skip


def test_state_and_progress_come_back_exactly(tmp_path):
    state = tiny_task.state()
    rng = np.random.default_rng(0)
    state = jax.tree.map(
        lambda x: rng.integers(0, 255, x.nbytes, np.uint8).view(x.dtype).reshape(x.shape), state
    )
    progress = {"best_score": -np.inf, "pending": [[0.1, 1 / 3, 6.0]], "seconds": 1e-300}
    with checkpointing.manager(tmp_path) as checkpoints:
        assert checkpointing.restore(checkpoints, state) is None
        checkpointing.save(checkpoints, 7, state, progress)
    with checkpointing.manager(tmp_path) as checkpoints:
        found, noted = checkpointing.restore(checkpoints, tiny_task.state())
    bits = lambda tree: [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]
    assert bits(found) == bits(state) and noted == progress
    assert jax.tree.structure(found) == jax.tree.structure(state)


def test_a_checkpoint_of_bert_base_takes_a_few_megabytes(tmp_path):
    """Rank 8 on query and value, and the classifier; by shapes alone."""
    state = bert_base_state()
    trained = sum(x.size for x in jax.tree.leaves(state.adapter) if x.ndim)
    assert trained == 24 * 8 * (768 + 768) + 2 * 768 + 2
    with checkpointing.manager(tmp_path) as checkpoints:
        checkpointing.save(checkpoints, 1, state, {})
    size = sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file())
    assert 12 * trained < size < 12 * trained + 20_000  # three float32 numbers each: 3.6 MB


@pytest.mark.parametrize("keep", [1, 3])
def test_so_many_checkpoints_are_kept(tmp_path, keep):
    tiny_task.run(tmp_path, checkpoint_keep=keep)
    assert steps(tmp_path) == [16, 20, 24][-keep:]
    tiny_task.run(tmp_path, checkpoint_keep=2)  # which may be another when a run goes on


# What fails in the background.


def test_a_failed_save_is_told_by_the_next(tmp_path):
    state = tiny_task.state()
    with pytest.raises(OSError) as error, checkpointing.manager(tmp_path) as checkpoints:
        checkpointing.save(checkpoints, 5, state, {})
        checkpointing.wait(checkpoints)
        with tiny_task.files():
            checkpointing.save(checkpoints, 10, state, {})
            with contextlib.suppress(Exception):
                checkpoints._checkpointer.wait_until_finished()
        checkpointing.save(checkpoints, 15, state, {})
    text = str(error.value)
    assert "checkpoint of step 10" in text and "that of step 5 is intact" in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["5"]  # nothing fills the disk
    with checkpointing.manager(tmp_path) as checkpoints:
        tiny_task.same(checkpointing.restore(checkpoints, state)[0], state)


def test_a_failed_save_is_told_at_the_end(tmp_path):
    told = pytest.raises(OSError, match="step 3 .*there was none before")
    with tiny_task.files(), told, checkpointing.manager(tmp_path) as checkpoints:
        checkpointing.save(checkpoints, 3, tiny_task.state(), {})


def test_a_failed_save_is_told_besides_another_error(tmp_path):
    opened = checkpointing.manager(tmp_path)
    with pytest.raises(OSError) as error, tiny_task.files(), opened as checkpoints:
        checkpointing.save(checkpoints, 3, tiny_task.state(), {})
        raise FloatingPointError("The training loss is nan")
    assert "step 3" in str(error.value) and "The training loss is nan" in str(error.value)


# Damage.


def files(directory):
    return sorted(p for p in directory.rglob("*") if p.is_file())


def largest(directory):
    return max(files(directory), key=lambda p: p.stat().st_size)


def truncated(directory):
    path = largest(directory)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(directory):
    for path in files(directory):
        path.write_bytes(b"")


def half_deleted(directory):
    for path in files(directory)[::2]:
        path.unlink()


def empty(directory):
    shutil.rmtree(directory)
    directory.mkdir()


def no_json(directory):
    (directory / "about" / "metadata").write_text('{"version": 2, "content"')


def other_json(directory):
    path = directory / "about" / "metadata"
    about = json.loads(path.read_text())
    about["content"]["progress"]["best_score"] += 0.25
    path.write_text(json.dumps(about))


def nested_json(directory):
    (directory / "about" / "metadata").write_text("[" * 200_000)


DAMAGES = [truncated, emptied, half_deleted, empty, no_json, other_json, nested_json]


@pytest.mark.parametrize("damage", slow.after(2, DAMAGES), ids=lambda f: f.__name__)
def test_a_damaged_checkpoint_is_put_aside(left_alone, stopped, damage, capsys):
    """The one before is used, the run ends as one left alone, and the same step is saved again."""
    damage(stopped / "checkpoints" / "10")
    tiny_task.run(stopped)
    out = capsys.readouterr().out
    assert "The checkpoint of step 10 is damaged: " in out
    assert "The checkpoint of step 8 is used." in out and "from the checkpoint of step 8." in out
    same_as(left_alone, stopped)
    assert (stopped / "checkpoints" / "damaged-10-1").is_dir()


@pytest.mark.slow
def test_bits_that_flip(left_alone, stopped, tmp_path):
    """The run ends the same, whether or not the file counts for anything."""
    newest = stopped / "checkpoints" / "10"
    rng, refused = np.random.default_rng(3), 0
    for path in files(newest)[::2]:
        copy = tmp_path / "copy"
        shutil.copytree(stopped, copy)
        data = bytearray(path.read_bytes())
        data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        (copy / path.relative_to(stopped)).write_bytes(data)
        tiny_task.run(copy)
        same_as(left_alone, copy)
        refused += (copy / "checkpoints" / "damaged-10-1").exists()
        shutil.rmtree(copy)
    assert refused >= 2


def test_all_are_damaged(stopped):
    for step in steps(stopped):
        truncated(stopped / "checkpoints" / str(step))
    with pytest.raises(ValueError, match="No checkpoint in .* can be read") as error:
        tiny_task.run(stopped)
    assert "step 10 is damaged" in str(error.value) and "step 8 is damaged" in str(error.value)
    assert "remove that folder" in str(error.value) and steps(stopped) == [8, 10]


def test_a_checkpoint_of_another_state_is_no_damage(stopped):
    with checkpointing.manager(stopped / "checkpoints") as checkpoints:
        other = {"x": np.zeros(3, np.float32)}
        with pytest.raises(checkpointing.StateMismatch, match="step 10 .*other shapes or dtypes"):
            checkpointing.restore(checkpoints, other)
    assert steps(stopped) == [8, 10]


def test_leftovers_of_a_killed_save_are_removed(left_alone, stopped):
    folder = stopped / "checkpoints" / "13.orbax-checkpoint-tmp"
    shutil.copytree(stopped / "checkpoints" / "10", folder)
    (folder / "state" / "manifest.ocdbt").unlink()
    (stopped / "checkpoints" / "readme").write_text("not ours")
    tiny_task.run(stopped)
    same_as(left_alone, stopped)
    assert not folder.exists() and (stopped / "checkpoints" / "readme").exists()


def test_a_newer_version_s_checkpoint_is_refused(stopped, tmp_path):
    with checkpointing.manager(stopped / "checkpoints") as checkpoints:
        state, progress = checkpointing.restore(checkpoints, tiny_task.state())
        checkpointing.save(checkpoints, 11, state, progress | {"future": 1})
    with pytest.raises(ValueError, match="holds future, which this version does not know"):
        tiny_task.run(stopped)


def test_an_old_checkpoint_that_was_half_deleted_does_no_harm(left_alone, stopped):
    """As a kill leaves it: it is older than those that are kept, and is removed with the next save."""
    shutil.copytree(stopped / "checkpoints" / "8", stopped / "checkpoints" / "5")
    half_deleted(stopped / "checkpoints" / "5")
    tiny_task.run(stopped)
    same_as(left_alone, stopped)
    assert steps(stopped) == [20, 24]
