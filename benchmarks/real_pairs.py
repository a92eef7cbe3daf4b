"""Real pairs, a real trained model: what the recipe learns, over three seeds.

  python benchmarks/real_pairs.py --pairs=instruction-data-with-preference.json --model=stories260K

The pairs are the 1,100 polite and impolite answers of rasbt/LLMs-from-scratch (ch07/04), the model
karpathy's stories260K as a Hugging Face folder. 15% of the prompts are held out.
"""

import json
import pathlib
import tempfile

from absl import flags, logging
import numpy as np

from recipes import dpo
from recipes.configs import tiny
from recipes.training import command

PAIRS = flags.DEFINE_string("pairs", None, "The JSON file of pairs.", required=True)
MODEL = flags.DEFINE_string("model", None, "The model folder.", required=True)
SEEDS = flags.DEFINE_integer("seeds", 3, "How many seeds.", lower_bound=1)


def main() -> None:
    """Trains once per seed and prints the last held-out figures and their means."""
    logging.set_verbosity(logging.WARNING)
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        path = pathlib.Path(scratch, "pairs.jsonl")
        rows = json.loads(pathlib.Path(PAIRS.value).read_text())
        path.write_text("".join(json.dumps(as_row(row)) + "\n" for row in rows))
        for seed in range(SEEDS.value):
            config = tiny.get_config()
            config.directory = str(pathlib.Path(scratch, f"seed{seed}"))
            config.seed = seed
            config.initialize_from_hf = MODEL.value
            config.train_data = str(path)
            config.data.layout = "plain_text"
            config.validation_split_fraction = 0.15
            config.validation = {}
            config.train_seq_len = config.row_length = 512
            config.num_train_steps = 60
            config.learning_rate = 3e-4
            config.tensorboard = False
            config.sample_tokens = 0
            dpo.train(config)
            lines = pathlib.Path(config.directory, "metrics.jsonl").read_text().splitlines()
            found.append([json.loads(line) for line in lines][-1])
    for name in ("dpo_loss", "dpo_accuracy", "drift_chosen", "drift_rejected"):
        values = [record[f"eval/validation/{name}"] for record in found]
        print(f"{name:<15} mean {np.mean(values):.4f}   {np.round(values, 4)}")


def as_row(row: dict[str, str]) -> dict[str, str]:
    """Instruction and input make the prompt."""
    asked = "\n".join(part for part in (row["instruction"], row["input"]) if part)
    return {"prompt": asked + "\n", "chosen": row["chosen"], "rejected": row["rejected"]}


if __name__ == "__main__":
    command.main_without_config(main)
