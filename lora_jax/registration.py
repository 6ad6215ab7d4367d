"""What ``jax.export`` and ``flax.serialization`` need to know of the nodes in adapters.

With it an exported function can take an adapter as an argument, and ``flax.serialization`` writes
and reads adapters, alone or in a state that holds them.
"""

import dataclasses
import json
from typing import Any

import jax.export
from flax import serialization

from lora_jax import lowrank
from lora_jax.lowrank import LowRank, Trained


def _aux_to_bytes(aux: tuple) -> bytes:
    return json.dumps(aux).encode()  # floats have a text that gives back the same float


def _aux_from_bytes(data: bytes) -> tuple:
    return tuple(json.loads(data))


def _to_state_dict(node: LowRank) -> dict[str, Any]:
    names = ("a", "b", "scale") if node.w is None else ("a", "b", "scale", "w")
    return {name: serialization.to_state_dict(getattr(node, name)) for name in names}


def _from_state_dict(node: LowRank, state: dict[str, Any]) -> LowRank:
    """The node with the arrays and the scale of the state; shapes must be those of the node.

    Raises:
      ValueError: the state is not one of such a node.
    """
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


for _type, _name in ((LowRank, "lora_jax.LowRank"), (Trained, "lora_jax.Trained")):
    jax.export.register_pytree_node_serialization(
        _type,
        serialized_name=_name,
        serialize_auxdata=_aux_to_bytes,
        deserialize_auxdata=_aux_from_bytes,
    )
serialization.register_serialization_state(LowRank, _to_state_dict, _from_state_dict)
serialization.register_serialization_state(
    Trained,
    lambda node: {"value": serialization.to_state_dict(node.value)},
    lambda node, state: Trained(serialization.from_state_dict(node.value, state["value"])),
)
