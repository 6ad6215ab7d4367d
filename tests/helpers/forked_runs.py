"""A process that has imported the training program, and runs it in a fork of itself, on and on.

Reads lines of JSON, a list of command-line arguments each. Writes "pid N" when the run starts, the
name of each part of it that begins, and "status N" when it has ended; what the run prints goes to
the file that is the first of the arguments.
"""

import json
import os
import sys

import lora_jax
from experiments import cli, finetuning
from lora_jax.training import checkpointing, loop, metric_writer, train


def say(text):
    os.write(SAYS, f"{text}\n".encode())


def told(module, name, part):
    """Has each call of a function say that its part begins, and that it is left."""
    function = getattr(module, name)

    def call(*args, **kwargs):
        say(f"begin {part}")
        try:
            return function(*args, **kwargs)
        finally:
            say(f"end {part}")

    setattr(module, name, call)


def run(log, *arguments):
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    told(train, "_resume", "resuming")
    told(loop, "evaluate", "evaluation")
    told(lora_jax, "save", "adapter")
    told(checkpointing, "save", "save")
    told(metric_writer.MetricWriter, "write", "line")
    make = train.make_train_step

    def making(*args, **named):
        step = {"call": make(*args, **named)}
        step = type("Step", (), step)
        told(step, "call", "step")
        return step.call

    train.make_train_step = making
    sys.argv = ["sst2", *arguments]
    cli.run(finetuning.main)


SAYS = os.dup(1)
if __name__ == "__main__":
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            run(*json.loads(line))
        say(f"pid {pid}")
        say(f"status {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}")
