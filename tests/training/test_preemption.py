"""SIGTERM: the run stops at a checkpoint, soon, and goes on as if nothing had been."""

import contextlib
import dataclasses
import os
import signal
import threading

import pytest

from lora_jax.training import checkpointing, preemption
from tests.helpers import slow, tiny_task

pytestmark = pytest.mark.usefixtures("quiet")


def terminate(times=1):
    for _ in range(times):
        os.kill(os.getpid(), signal.SIGTERM)


def terminated(step, times=1):
    """The task, with a signal while the batch of a step is made."""
    task = tiny_task.task()

    def batch(number):
        if number == step:
            terminate(times)
        return task.train_batch(number)

    return dataclasses.replace(task, train_batch=batch)


def newest(workdir):
    return max(int(p.name) for p in (workdir / "checkpoints").iterdir())


@pytest.mark.parametrize("step, times", slow.after(2, [(1, 1), (9, 3), (15, 2), (23, 1)]))
def test_the_step_is_finished_and_saved(left_alone, tmp_path, step, times):
    """Also a step with a checkpoint of its own, one with an evaluation, and the last."""
    with pytest.raises(preemption.Stopped, match=f"Stopped after step {step + 1}, .*To go on:"):
        tiny_task.run(tmp_path, terminated(step, times))
    assert newest(tmp_path) == step + 1
    tiny_task.run(tmp_path)
    assert tiny_task.outcome(tmp_path) == left_alone


@pytest.mark.parametrize("epoch, which", slow.after(1, [(1, 0), (2, 2), (3, 1)]))
def test_an_evaluation_is_left_and_made_again(left_alone, tmp_path, epoch, which):
    task, seen, evaluation = tiny_task.task(), [], 0

    def batches():
        nonlocal evaluation
        evaluation += 1
        for k, batch in enumerate(task.eval_batches()):
            seen.append((evaluation, k))
            if (evaluation, k) == (epoch, which):
                terminate()
            yield batch

    with pytest.raises(preemption.Stopped, match=f"after step {8 * epoch}"):
        tiny_task.run(tmp_path, dataclasses.replace(task, eval_batches=batches))
    assert seen[-1] == (epoch, which)  # no further batch was made
    assert newest(tmp_path) == 8 * epoch
    assert "eval_loss" not in tiny_task.lines(tmp_path)[-1]
    # Killed after the evaluation that is made again, before the next checkpoint.
    if epoch < 3:
        with pytest.raises(RuntimeError):
            tiny_task.run(tmp_path, broken(8 * epoch + 1))
        assert sum("eval_loss" in line for line in tiny_task.lines(tmp_path)) == epoch
    tiny_task.run(tmp_path)
    assert tiny_task.outcome(tmp_path) == left_alone
    tiny_task.run(tmp_path)
    assert tiny_task.outcome(tmp_path) == left_alone


def broken(step):
    task = tiny_task.task()
    batch = lambda number: 1 // 0 if number == step else task.train_batch(number)

    def raising(number):
        try:
            return batch(number)
        except ZeroDivisionError as error:
            raise RuntimeError("killed") from error

    return dataclasses.replace(task, train_batch=raising)


def test_a_signal_before_the_first_step_that_is_left(left_alone, tmp_path):
    """While the run finds out where it stands: nothing is done, and nothing is lost."""
    with pytest.raises(preemption.Stopped):
        tiny_task.run(tmp_path, terminated(9))
    restore = checkpointing.restore

    def restored(*args, **kwargs):
        terminate()
        return restore(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpointing, "restore", restored)
        with pytest.raises(preemption.Stopped, match="after step 10"):
            tiny_task.run(tmp_path)
    tiny_task.run(tmp_path)
    assert tiny_task.outcome(tmp_path) == left_alone


def test_a_signal_while_a_checkpoint_is_written(left_alone, tmp_path):
    """From another thread, again and again, until the run has ended."""
    save, threads, done = checkpointing.save, [], threading.Event()

    def signals():
        while not done.wait(0.001):
            terminate()

    def saved(*args):
        save(*args)
        terminate()
        threads.append(threading.Thread(target=signals))
        threads[-1].start()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpointing, "save", saved)
        old = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # of those that come after the run
        try:
            with pytest.raises(preemption.Stopped, match="after step 6"):
                tiny_task.run(tmp_path)
        finally:
            done.set()
            for thread in threads:
                thread.join()
            signal.signal(signal.SIGTERM, old)
    assert newest(tmp_path) == 6
    tiny_task.run(tmp_path)
    assert tiny_task.outcome(tmp_path) == left_alone


def test_the_old_handler_is_back(tmp_path):
    seen = []
    handler = lambda *_: seen.append("old")
    old = signal.signal(signal.SIGTERM, handler)
    try:
        with pytest.raises(preemption.Stopped):
            tiny_task.run(tmp_path, terminated(2))
        assert signal.getsignal(signal.SIGTERM) is handler and not seen
        terminate()
        assert seen == ["old"]
    finally:
        signal.signal(signal.SIGTERM, old)
    assert not preemption.is_requested(1)


def test_outside_the_main_thread_there_is_no_handler(left_alone, tmp_path):
    before, found = signal.getsignal(signal.SIGTERM), []

    def run():
        with preemption.handle_sigterm():
            found.append(signal.getsignal(signal.SIGTERM))
        tiny_task.run(tmp_path)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [before] and tiny_task.outcome(tmp_path) == left_alone


def test_a_stop_whose_checkpoint_fails_is_an_error(tmp_path):
    """Never status 0 without a checkpoint."""
    task = tiny_task.task()
    with contextlib.ExitStack() as stack:

        def batch(number):
            if number == 2:
                stack.enter_context(tiny_task.files())
                terminate()
            return task.train_batch(number)

        with pytest.raises(OSError, match="Could not write the checkpoint of step 3"):
            tiny_task.run(tmp_path, dataclasses.replace(task, train_batch=batch), log_every=100)
