"""Tokens drawn per CPU second: several answers to one prompt, to as many, and transformers.

python benchmarks/sampling.py --model=FOLDER

Every answer has the same number of tokens: nothing stops one. Prints JSON lines; needs torch.
"""

import json
import time

from absl import flags
import numpy as np

from recipes.training import command
import zoo
from zoo import generate
from zoo.sampling import Sampling

MODEL = flags.DEFINE_string("model", None, "A folder.", required=True)
PROMPT = flags.DEFINE_integer("prompt", 512, "Tokens of a prompt.", lower_bound=1)
ANSWERS = flags.DEFINE_integer("answers", 8, "Answers.", lower_bound=1)
TOKENS = flags.DEFINE_integer("tokens", 64, "Tokens of an answer.", lower_bound=1)


def measured(run) -> float:
    """Tokens per CPU second, of the second time."""
    run()
    begin = time.process_time()
    run()
    return ANSWERS.value * TOKENS.value / (time.process_time() - begin)


def main() -> None:
    """Measures the three, one after the other in one process."""
    import torch
    import transformers

    model = zoo.load(MODEL.value)
    draw = np.random.default_rng(0)
    shape = ANSWERS.value, PROMPT.value
    prompts = draw.integers(3, model.config.vocab_size, shape).tolist()
    how = dict(max_new_tokens=TOKENS.value, sampling=Sampling(1.0))
    several = [prompts[0]] * ANSWERS.value
    found = {}
    for name, rows in (("one prompt", several), ("as many prompts", prompts)):
        found[name] = measured(lambda rows=rows: generate.generate(model, rows, **how))
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(MODEL.value, dtype=torch.float32)
    how = dict(max_new_tokens=TOKENS.value, min_new_tokens=TOKENS.value, do_sample=True, top_k=0)
    for name, ids, each in (
        ("transformers, one prompt", prompts[:1], ANSWERS.value),
        ("transformers, as many prompts", prompts, 1),
    ):
        ids = torch.tensor(ids)
        asked = dict(attention_mask=torch.ones_like(ids), num_return_sequences=each, pad_token_id=0)
        found[name] = measured(lambda ids=ids, asked=asked: theirs.generate(ids, **asked, **how))
    for name, speed in found.items():
        print(json.dumps({"answers to": name, "tokens per CPU second": round(speed, 1)}))


if __name__ == "__main__":
    command.main_without_config(main)
