"""A pipeline for the tiny model: tokenise, fine-tune, train on pairs, then on its own pairs.

python recipes/pipeline.py --config=recipes/pipelines/tiny.py --directory=runs/pipeline
"""

PROMPTS = "--prompts=recipes/tiny/train.jsonl --judge=recipes.tiny.judge:manner"


def get_steps() -> dict[str, str]:
    """Each step's program with its flags, in order; {name} is an earlier step's result."""
    return {
        "data": "recipes.data --config=recipes/configs/tiny.py",
        "sft": "recipes.sft --config=recipes/configs/tiny_sft.py",
        "dpo": "recipes.dpo --config=recipes/configs/tiny.py --config.initialize_from_hf={sft}",
        "own": f"recipes.sample_pairs --model={{dpo}} {PROMPTS} --answers=4 --max_new_tokens=64",
        "again": "recipes.dpo --config=recipes/configs/tiny.py --config.initialize_from_hf={dpo} "
        "--config.train_data={own} --config.validation.heldout=recipes/tiny/heldout.jsonl",
        "page": "recipes.report {dpo.run} {again.run}",
    }
