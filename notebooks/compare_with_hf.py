# %% [markdown]
# # Compare with Hugging Face
#
# The same folder, read here and by transformers: logits, log-probabilities of an answer, and
# greedy text. It needs torch:
#
#     pip install -e '.[notebooks]' && pip install torch
#     python notebooks/compare_with_hf.py

# %%
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

import zoo
from zoo import generate

ROOT = pathlib.Path(zoo.__file__).parent.parent  # in Jupyter there is no __file__ of a notebook
FOLDER = ROOT / "recipes/tiny/model"  # or another folder, or a hub id

ours = zoo.load(FOLDER)
theirs = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
ids = np.array([tokenizer("The moon is a good friend of the sea.")["input_ids"]])

# %% [markdown]
# ## Logits
#
# Both round in float32; what is left between them is about what float32 leaves between the original
# and its own float64.

# %%
with torch.no_grad():
    expected = theirs(torch.tensor(ids)).logits.numpy()
    exact = theirs.double()(torch.tensor(ids)).logits.numpy()
    theirs.float()
found = np.asarray(ours(jnp.asarray(ids)))
print(f"zoo - transformers        {np.abs(found - expected).max():.1e}")
print(f"transformers - float64    {np.abs(expected - exact).max():.1e}")
print(f"zoo - that float64        {np.abs(found - exact).max():.1e}")
assert np.abs(found - expected).max() < 1e-3

# %% [markdown]
# ## Log-probabilities, token by token

# %%
logps = jax.nn.log_softmax(jnp.asarray(found))[0, :-1]
of_theirs = torch.tensor(expected).log_softmax(-1)[0, :-1]
print(f"{'token':16}{'ours':>10}{'theirs':>10}")
for at, token in enumerate(ids[0, 1:]):
    word = repr(tokenizer.decode([token]))
    print(f"{word:16}{logps[at, token]:10.4f}{of_theirs[at, token]:10.4f}")

# %% [markdown]
# ## Greedy text

# %%
(text,) = generate.generate(ours, ids.tolist(), max_new_tokens=32)
by_theirs = theirs.generate(
    torch.tensor(ids), max_new_tokens=32, min_new_tokens=32, do_sample=False, eos_token_id=None
)[0, ids.shape[1] :]
print(repr(tokenizer.decode(text)))
assert text == by_theirs.tolist()
