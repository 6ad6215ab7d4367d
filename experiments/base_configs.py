"""The base config of each program: all of its fields, with their defaults and what they mean."""

from collections.abc import Callable, Mapping

from ml_collections import ConfigDict

from configs import common, e2e_tiny_base, instruct_llama

MakeConfig = Callable[[], ConfigDict]

GLUE, CLASSIFY, E2E = common.base_config, common.classify_config, common.e2e_config
INSTRUCT, PRETRAIN = instruct_llama.get_config, e2e_tiny_base.get_config

# Of the programs that a sweep can run.
BY_PROGRAM: Mapping[str, MakeConfig] = {
    "classify": CLASSIFY,
    "e2e_nlg": E2E,
    "glue": GLUE,
    "instruct": INSTRUCT,
}
