"""Restaurants in E2E's format, made here, and configs that fit them."""

NAMES, FOODS = ("Alma", "Bento", "Cora", "Dado"), ("soup", "rice", "cake")


def lines(part):
    for k, (name, food) in enumerate((n, f) for n in NAMES for f in FOODS):
        if (k % 4 == 3) == (part == "test"):
            for text in (f"{name} serves {food} .", f"You can eat {food} at {name} ."):
                yield f"name : {name} | food : {food}||{text} "


COMMON = {"data.train": "train.txt", "batch_size": 6, "eval_batch_size": 6, "log_every": 5}

BASE = COMMON | {
    "model.vocab_size": 330, "model.n_embd": 24, "model.n_layer": 1, "model.n_head": 2,
    "model.n_positions": 48, "data.length": 24, "data.buckets": "(24,)", "data.holdout": 1,
    "epochs": 6, "optimizer.learning_rate": 0.01,
}  # fmt: skip

ADAPTED = COMMON | {
    "lora.rank": 8, "data.holdout": 1, "data.buckets": "(48,)", "epochs": 60,
    "optimizer.learning_rate": 0.02, "decode.beams": 2, "decode.max_new_tokens": 12,
    "decode.batch_size": 3,
}  # fmt: skip
