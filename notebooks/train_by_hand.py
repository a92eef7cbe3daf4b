# %% [markdown]
# # Train a model by hand
#
# A model of the zoo is a Flax NNX module: `nnx.value_and_grad` and `nnx.Optimizer` train it as any
# other. Here a fresh one learns four sentences by heart. Open this file as a notebook (VS Code and
# Jupyter with jupytext do), or run it as it stands:
#
#     pip install -e '.[notebooks]'
#     python notebooks/train_by_hand.py

# %%
import itertools
import pathlib

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import transformers

import zoo

ROOT = pathlib.Path(zoo.__file__).parent.parent  # in Jupyter there is no __file__ of a notebook
FOLDER = ROOT / "recipes/tiny/model"  # or another folder, or a hub id

model = zoo.fresh(FOLDER, seed=0)  # its sizes, other weights; `zoo.load` reads the weights as well
tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)

# %% [markdown]
# ## Rows of different lengths
#
# A list of lists is padded by the model itself. In a compiled step the shapes stay the same: an
# array, and the length of each row.

# %%
texts = [
    "The moon is a good friend of the sea.",
    "Owls sleep by day.",
    "The stone bridge is older than the town.",
    "Good morning.",
]
texts = [tokenizer(text)["input_ids"] for text in texts]
print("logits of rows of", [len(text) for text in texts], "tokens:", model(texts).shape)

lengths = np.array([len(text) for text in texts])
tokens = np.zeros((len(texts), max(lengths)), np.int32)
for row, text in zip(tokens, texts, strict=True):
    row[: len(text)] = text

# %% [markdown]
# ## A step
#
# Each token is scored by the logits before it; positions after the end of a text are not.


# %%
@nnx.jit
def step(model, optimizer, tokens, lengths):
    def loss(model):
        logps = jax.nn.log_softmax(model(tokens, lengths)[:, :-1])
        scored = jnp.arange(1, tokens.shape[1]) < lengths[:, None]
        logps = jnp.take_along_axis(logps, tokens[:, 1:, None], axis=-1)[..., 0]
        return -(logps * scored).sum() / scored.sum()

    value, gradient = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradient)
    return value


optimizer = nnx.Optimizer(model, optax.adamw(3e-3), wrt=nnx.Param)
for i in range(61):
    value = step(model, optimizer, tokens, lengths)
    if i % 15 == 0:
        print(f"step {i:3d}  nats per token {value:.3f}")

# %% [markdown]
# ## What it has learned

# %%
starts = [text[: len(text) // 2] for text in texts]
for start, text, more in zip(
    starts, texts, zoo.generate.generate(model, starts, max_new_tokens=12), strict=True
):
    end = text[len(start) :]
    print(repr(tokenizer.decode(start)), "->", repr(tokenizer.decode(more[: len(end)])))
    assert more[: len(end)] == end

# %% [markdown]
# ## Its states
#
# `hidden_states` gives the residual stream before the first block and after each, as transformers
# does; the last comes after the last norm. How much does each block change it?

# %%
states = model.hidden_states(texts[0])
print("states of one text [L + 1, T, D]:", states.shape)
for layer, (before, after) in enumerate(itertools.pairwise(states[:-1])):
    change = jnp.linalg.norm(after - before, axis=-1) / jnp.linalg.norm(before, axis=-1)
    print(f"block {layer} changes it by {change.mean():.0%}")
