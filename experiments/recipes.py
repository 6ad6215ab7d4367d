"""The recipes of the programs, by the names under which a sweep finds them."""

import functools

from experiments import base_configs
from lora_jax.tasks import classification, e2e, glue_config, instruction_tuning, own_texts
from lora_jax.training.task import Recipe

GLUE = Recipe(glue_config.resolve, glue_config.check, classification.make_task, base_configs.GLUE)
CLASSIFY = Recipe(
    own_texts.resolve,
    own_texts.check,
    functools.partial(classification.make_task, load_texts=own_texts.load),
    base_configs.CLASSIFY,
)
E2E = Recipe(e2e.resolve, e2e.check, e2e.make_task, base_configs.E2E, higher_is_better=False)
INSTRUCT = Recipe(
    instruction_tuning.resolve,
    instruction_tuning.check,
    instruction_tuning.make_task,
    base_configs.INSTRUCT,
    higher_is_better=False,
)

RECIPES = {"glue": GLUE, "classify": CLASSIFY, "e2e_nlg": E2E, "instruct": INSTRUCT}
