"""Compares the programs of plain LoRA before and after a change of the library.

    git archive BEFORE lora_jax | tar x -C OLD
    python scripts/compare_programs.py OLD

For each model of tests/helpers/zoo.py, with a trained head and without: the lifted function, its
gradient with dropout and without, and the merged tree. Compared are the text of the jaxpr, and what
XLA says of the compiled program: FLOPs, bytes accessed, temporary, argument and output bytes.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def measure():
    sys.path.append(str(ROOT))
    import jax
    import jax.numpy as jnp

    import lora_jax as lora
    from tests.helpers import zoo

    def program(fn, *args):
        text = re.sub(r"0x[0-9a-f]+", "", str(jax.make_jaxpr(fn)(*args)))
        compiled = jax.jit(fn).lower(*args).compile()
        cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
        return {
            "jaxpr": hashlib.sha256(text.encode()).hexdigest()[:16],
            "flops": cost.get("flops", 0.0),
            "bytes": cost.get("bytes accessed", 0.0),
            "temporary": memory.temp_size_in_bytes,
            "arguments": memory.argument_size_in_bytes,
            "output": memory.output_size_in_bytes,
        }

    found = {}
    for name, make in zoo.ZOO.items():
        model = make()
        for train in ((), ("head",)):
            config = lora.LoRAConfig(rank=2, alpha=3.0, targets=model.targets, train=train)
            adapter = lora.init(jax.random.key(0), model.fn, model.params, config, model.x)

            def loss(adapter, params, x, key=None, fn=model.fn):
                rate = {} if key is None else {"dropout": 0.1, "dropout_key": key}
                return jnp.mean(lora.lift(fn, **rate)(lora.bind(params, adapter), x) ** 2)

            args = adapter, model.params, model.x
            programs = {
                "lift": (lambda a, p, x, fn=model.fn: lora.lift(fn)(lora.bind(p, a), x), *args),
                "gradient": (jax.grad(loss), *args),
                "gradient with dropout": (jax.grad(loss), *args, jax.random.key(1)),
                "merge": (lambda a, p: lora.merge(p, a), adapter, model.params),
            }
            case = f"{name}{' + head' if train else ''}"
            found |= {f"{case}: {n}": program(*p) for n, p in programs.items()}
    print(json.dumps({"from": lora.__file__, "programs": found}))


def run(tree):
    env = {**os.environ, "PYTHONPATH": str(tree)}
    command = [sys.executable, __file__, "--measure"]
    done = subprocess.run(command, env=env, cwd=tree, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(old):
    before, after = run(old), run(ROOT)
    print(f"before: {before['from']}\nafter:  {after['from']}")
    names = ("jaxpr", "flops", "bytes", "temporary", "arguments", "output")
    same = dict.fromkeys(names, 0)
    for case, new in after["programs"].items():
        was = before["programs"][case]
        for name in names:
            same[name] += was[name] == new[name]
            if was[name] != new[name]:
                print(f"{case}: {name} {was[name]} -> {new[name]}")
    count = len(after["programs"])
    for name in names:
        total = "" if name == "jaxpr" else f", in sum {_sum(before, name)} -> {_sum(after, name)}"
        print(f"{name}: equal in {same[name]} of {count} programs{total}")


def _sum(result, name):
    return f"{sum(p[name] for p in result['programs'].values()):,.0f}"


if __name__ == "__main__":
    measure() if "--measure" in sys.argv else main(Path(sys.argv[1]).resolve())
