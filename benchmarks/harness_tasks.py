"""Tasks of lm-evaluation-harness over pairs, one of each kind, for benchmarks and tests."""

from collections.abc import Sequence
import json
import pathlib
from typing import Any

KINDS = {
    "mine_choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{[right, wrong, 'No.', right ~ ' Indeed.']}}"
doc_to_target: 0
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "mine_cloze": """
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: " {{right}}"
metric_list: [{metric: perplexity}, {metric: acc}]
""",
    "mine_text": """
output_type: generate_until
doc_to_text: "{{question}}\\n"
doc_to_target: "{{right}}"
generation_kwargs: {until: ["\\n", " a "], max_gen_toks: 24, do_sample: false}
metric_list: [{metric: exact_match}]
""",
    "mine_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{right}} {{wrong}} {{long}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}]
""",
}


def write(folder: pathlib.Path, pairs: Sequence[dict[str, Any]]) -> None:
    """The files of the tasks, and what they ask: of each pair of conversations its question."""
    docs = [
        {
            "question": pair["chosen"][0]["content"], "right": pair["chosen"][-1]["content"],
            "wrong": pair["rejected"][-1]["content"],
            "long": " ".join(one["chosen"][-1]["content"] for one in pairs[i : i + 1 + i % 3]),
        }
        for i, pair in enumerate(pairs)
    ]  # fmt: skip
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    for name, kind in KINDS.items():
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ntest_split: test\n"
            f"dataset_kwargs:\n  data_files:\n    test: {folder}/docs.jsonl\n{kind}"
        )
