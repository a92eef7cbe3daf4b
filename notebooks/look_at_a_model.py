# %% [markdown]
# # Look at a model
#
# What a model of the zoo is made of, what one of its heads looks at, and what it would say next.
# Open this file as a notebook (VS Code and Jupyter with jupytext do), or run it as it stands:
#
#     pip install -e '.[notebooks]'
#     python notebooks/look_at_a_model.py

# %%
import pathlib

from flax import nnx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import transformers

import zoo
from zoo import generate
from zoo.parts import blocks, spans

ROOT = pathlib.Path(zoo.__file__).parent.parent  # in Jupyter there is no __file__ of a notebook
FOLDER = ROOT / "recipes/tiny/model"  # or another folder, or a hub id

model = zoo.load(FOLDER)  # a folder or a hub id, "meta-llama/Llama-3.2-1B"
tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)

# %% [markdown]
# ## What it is made of
#
# Every weight says what its axes are (the alphabet is in `zoo/parts/layers.py`); those of the
# blocks have a leading L, one slice a layer. `model.config` holds the keys of the model's
# `config.json`.

# %%
print(model.config)
for path, param in nnx.to_flat_state(nnx.state(model)):
    print(f"{'.'.join(map(str, path)):32} {param.axes:8} {param.shape}")

# %% [markdown]
# ## What it would say next

# %%
text = tokenizer.apply_chat_template(
    [{"role": "user", "content": "What can you tell me about the moon?"}],
    tokenize=False, add_generation_prompt=True,
)  # fmt: skip
ids = jnp.array([tokenizer(text, add_special_tokens=False)["input_ids"]])
logps = jax.nn.log_softmax(model(ids)[0, -1])  # or of a list of ids: model([1, 15, 7])
print(f"after {text!r}:")
for logp, token in zip(*jax.lax.top_k(logps, 8), strict=True):
    print(f"  {jnp.exp(logp):6.1%}  {tokenizer.decode([int(token)])!r}")

(answer,) = generate.generate(model, ids.tolist(), max_new_tokens=24)
print("and so on:", repr(tokenizer.decode(answer)))

# %% [markdown]
# ## What one head looks at
#
# `hidden` takes the function that applies the blocks as an argument. `stack.run` is the usual one,
# a scan; here it is a plain loop that keeps each layer's queries and keys.


# %%
def keeping(kept):
    """Applies the blocks, and keeps queries, keys and their scale, layer by layer."""

    def run(model, x, where, *shared, each=None, handed=None):
        graph, state = nnx.split(model.blocks)
        for layer in range(model.config.sizes["L"]):
            at = lambda tree, layer=layer: jax.tree.map(lambda leaf: leaf[layer], tree)

            def attend(q, k, v, *, scale, **how):
                kept.append((q, k, scale, how))
                return zoo.parts.attention.attend(
                    q, k, v, where, scale=scale, backend="dense", **how
                )

            weights = at(nnx.to_pure_dict(state))
            entering = x, handed  # and what earlier layers left to this one, in some models
            x, handed = blocks.block_of(graph, entering, weights, at(each), (attend, *shared))
        return x

    return run


kept = []
model.hidden(ids, spans.causal(*ids.shape), keeping(kept))
LAYER, HEAD = 1, 0
q, k, scale, how = kept[LAYER]
key_head = HEAD * k.shape[2] // q.shape[2]
scores = q[0, :, HEAD] @ k[0, :, key_head].T * scale
if cap := how.get("softcap"):
    scores = cap * jnp.tanh(scores / cap)
back = jnp.arange(len(scores))[:, None] - jnp.arange(len(scores))
width = how["window"] if how.get("window") is not None else len(scores)
scores = jnp.where((back >= 0) & (back < width), scores, -jnp.inf)
sink = jnp.exp(how["sinks"][HEAD]) if how.get("sinks") is not None else 0.0
shares = jnp.exp(scores) / (jnp.exp(scores).sum(-1, keepdims=True) + sink)

words = [repr(tokenizer.decode([int(token)]))[1:-1] for token in ids[0]]
figure, axes = plt.subplots(figsize=(7, 6))
axes.imshow(shares, cmap="Blues")
axes.set(title=f"layer {LAYER}, head {HEAD}", xlabel="looks at", ylabel="token")
axes.set_xticks(range(len(words)), words, rotation=90, fontsize=7)
axes.set_yticks(range(len(words)), words, fontsize=7)
figure.tight_layout()
plt.show()
