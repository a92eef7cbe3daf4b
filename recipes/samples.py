"""Two held-out prompts, answered greedily by the reference and by the policy, side by side."""

from recipes.data import tokenizer
from recipes.prepare import Run, say
import zoo
from zoo import generate


def show(run: Run, policy: zoo.Model, reference: zoo.Model | None, max_new_tokens: int) -> None:
    """Prints them; the reference is what the policy was before, where the run began from it.

    A reference that has left memory says nothing.
    """
    pairs = [pair for held_out in run.held_out for pair in held_out.pairs]
    prompts = [list(p) for p in dict.fromkeys(tuple(pair.prompt.tolist()) for pair in pairs)]
    prompts = [prompts[0], prompts[len(prompts) // 2]] if len(prompts) > 1 else prompts
    most = generate.most_new_tokens(policy, max(map(len, prompts), default=0))
    max_new_tokens = min(max_new_tokens, max_new_tokens if most is None else most)
    if not prompts or not max_new_tokens:
        return
    answers = {
        name: generate.generate(
            model, prompts, max_new_tokens=max_new_tokens, stop_ids=run.stop_ids
        )
        for name, model in (("before", reference), ("after", policy))
        if model
    }
    special = set(run.tokenizer.special.values())
    for i, prompt in enumerate(prompts):
        say(f"\nprompt   {run.tokenizer.decode(prompt)!r}")
        for name, texts in answers.items():
            words = [token for token in texts[i] if token not in special]
            say(f"{name:<8} {tokenizer.text_after(run.tokenizer, prompt, words)!r}")
