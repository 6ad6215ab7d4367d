"""What ``jax.export`` and ``flax.serialization`` need to know of the nodes in adapters.

With it an exported function can take an adapter as an argument, and ``flax.serialization`` writes
and reads adapters, alone or in a state that holds them. Flax, with all that it imports, is not
imported for that: it is told as soon as it is there and a node is made.
"""

import dataclasses
import json
import sys
from typing import Any

import jax.export

from lora_jax import lowrank
from lora_jax.lowrank import LowRank, Trained


def _aux_to_bytes(aux: tuple) -> bytes:
    return json.dumps(aux).encode()  # floats have a text that gives back the same float


def _aux_from_bytes(data: bytes) -> tuple:
    return tuple(json.loads(data))


def register_with_flax() -> bool:
    """Tells ``flax.serialization`` of the nodes, if it has been imported; says whether it was."""
    serialization = sys.modules.get("flax.serialization")
    if not hasattr(serialization, "from_bytes"):  # or is being imported
        return False
    one = {LowRank: (_to_state_dict, _from_state_dict), Trained: (_of_trained, _to_trained)}
    for node, (write, read) in one.items():
        serialization.register_serialization_state(node, write, read, override=True)
    return True


def _to_state_dict(node: LowRank) -> dict[str, Any]:
    from flax import serialization

    names = ("a", "b", "scale") if node.w is None else ("a", "b", "scale", "w")
    return {name: serialization.to_state_dict(getattr(node, name)) for name in names}


def _from_state_dict(node: LowRank, state: dict[str, Any]) -> LowRank:
    """The node with the arrays and the scale of the state; shapes must be those of the node.

    Raises:
      ValueError: the state is not one of such a node.
    """
    from flax import serialization

    wanted = set(_to_state_dict(node))
    if set(state) != wanted:
        raise ValueError(
            f"The state of a low-rank term has the entries {sorted(wanted)}, and this one has "
            f"{sorted(state)}."
        )
    new = {
        name: serialization.from_state_dict(getattr(node, name), state[name], name=name)
        for name in sorted(wanted)
    }
    if lowrank.has_static_scale(node):
        new["scale"] = float(new["scale"])
    return dataclasses.replace(node, **new)


def _of_trained(node: Trained) -> dict[str, Any]:
    from flax import serialization

    return {"value": serialization.to_state_dict(node.value)}


def _to_trained(node: Trained, state: dict[str, Any]) -> Trained:
    from flax import serialization

    return Trained(serialization.from_state_dict(node.value, state["value"]))


for _type, _name in ((LowRank, "lora_jax.LowRank"), (Trained, "lora_jax.Trained")):
    jax.export.register_pytree_node_serialization(
        _type,
        serialized_name=_name,
        serialize_auxdata=_aux_to_bytes,
        deserialize_auxdata=_aux_from_bytes,
    )
lowrank.observe(register_with_flax)
