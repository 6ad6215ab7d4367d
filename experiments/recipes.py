"""The recipes of the programs, by the names under which a sweep finds them."""

from configs import common, instruct_llama
from lora_jax.tasks import classification, e2e, glue_config, instruction_tuning
from lora_jax.training.task import Recipe

GLUE = Recipe(glue_config.resolve, glue_config.check, classification.make_task, common.base_config)
E2E = Recipe(e2e.resolve, e2e.check, e2e.make_task, common.e2e_config)
INSTRUCT = Recipe(
    instruction_tuning.resolve,
    instruction_tuning.check,
    instruction_tuning.make_task,
    instruct_llama.get_config,
)

RECIPES = {"glue": GLUE, "e2e_nlg": E2E, "instruct": INSTRUCT}
