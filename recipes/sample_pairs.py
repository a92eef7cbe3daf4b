r"""Pairs from a model's own answers to prompts: the best and the worst, by a judge.

  python recipes/sample_pairs.py --model=runs/tiny/hf/step-60 --directory=runs/round1 \
    --prompts=recipes/tiny/train.jsonl --judge=recipes.tiny.judge:manner

A model is a folder, a folder of adapters, or a hub id of either. Prompts are those of any data that
recipes/dpo.py reads, or rows of prompts alone. The judge is one of

  --judge=module:function   given a prompt (messages) and its answers (texts), gives their scores
  --judge='COMMAND'         of the shell: lines of JSON on stdin, a list of scores a line on stdout
  --reward_model=FOLDER     a …ForSequenceClassification with one label
  --reference=FOLDER        the implicit reward: log p of the model less that of this one

`answers.jsonl`, `scores.jsonl` and `pairs.jsonl` in the directory are kept line by line: the same
command resumes after a kill. The last is a --config.train_data of recipes/dpo.py.
"""

from absl import flags

if __name__ == "__main__":  # a wrong flag is answered before the imports below
    from recipes.training import command

    flags.DEFINE_string("model", None, "The model that answers: a folder or hub id.", required=True)
    flags.DEFINE_string("prompts", None, "The prompts: a file or dataset.", required=True)
    flags.DEFINE_string("directory", None, "Where everything is written.", required=True)
    flags.DEFINE_string("judge", None, "The judge: a module:function of yours, or a command.")
    flags.DEFINE_string("reward_model", None, "The judge: a reward model.")
    flags.DEFINE_string(
        "reference",
        None,
        "The judge: implicit rewards against this reference, the model that --model was "
        "trained from.",
    )
    flags.DEFINE_string(
        "base", None, "The base model of adapters, if it is not where their config says."
    )
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Of the weights.")
    flags.DEFINE_integer("tensor", 1, "Number of devices to split the weights over.", lower_bound=1)
    flags.DEFINE_integer("answers", 4, "To each prompt.", lower_bound=2)
    flags.DEFINE_integer(
        "max_new_tokens", 512, "Maximum length of an answer, in tokens.", lower_bound=1
    )
    flags.DEFINE_float("temperature", 1.0, "Of the drawing.", lower_bound=0.01)
    flags.DEFINE_float(
        "top_p", 1.0, "Sample from the most likely tokens whose probabilities add up to this."
    )
    flags.DEFINE_integer(
        "top_k", 0, "Sample from this many of the most likely tokens; 0: from all.", lower_bound=0
    )
    flags.DEFINE_float(
        "min_p", 0.0, "Sample from tokens with at least this fraction of the highest probability."
    )
    flags.DEFINE_integer("seed", 0, "Of what is drawn.")

from typing import NamedTuple

from flax import nnx
import jax

from checkpoints_io import bits, compiled, places
from checkpoints_io.errors import BadInput, StorageError
from recipes.data.rows import sources
from recipes.own_pairs import answers, judges, kept, pairs, prompts
from recipes.own_pairs.answers import Drawing
from recipes.training import command
from recipes.training.run import say
import zoo
from zoo import chat, sampling
from zoo.parts import sharding


class Options(NamedTuple):
    """The options of the program."""

    model: str
    prompts: str
    directory: str
    how: Drawing
    judge: str | None = None
    reward_model: str | None = None
    reference: str | None = None
    base: str | None = None
    dtype: str | None = None
    tensor: int = 1  # devices that share the weights


def sample(options: Options) -> str:
    """Writes the pairs; says how many there are, and why rows have none.

    Raises:
      FileNotFoundError, ValueError: a sentence about the model, the prompts or the judge.
      FileExistsError: the directory holds something else.
      RuntimeError: the judge gives no scores.
    """
    name = _judge_of(options)
    judged_by_user = judges.of_user(options.judge) if options.judge else None
    sampling.check(options.how.sampling)
    directory = places.at(options.directory, "--directory")
    directory.make()
    mesh = sharding.mesh_of(-1, 1, options.tensor)
    with directory.alone(otherwise=lambda: _refuse(directory)), jax.set_mesh(mesh):
        say(f"reading {options.model}")
        model, tokenizer = chat.loaded(options.model, options.base, options.dtype, mesh)
        room = zoo.longest_text(model)
        read = prompts.read(options.prompts, tokenizer, room and room - options.how.most)
        kept.check(directory, _made_with(options, model))
        batches = answers.batches(read.prompts, options.how)
        say(f"drawing {options.how.answers} answers to each of {len(read.prompts)} prompts")
        answers.draw(model, tokenizer, directory, batches, options.how)

        def opened() -> judges.Judge:
            if judged_by_user:
                return judged_by_user
            if options.reward_model:
                return judges.of_reward_model(options.reward_model, options.dtype, mesh)
            assert options.reference
            reference, _ = chat.loaded(options.reference, None, options.dtype, mesh)
            return judges.of_implicit(model, reference, tokenizer)

        judges.judge(directory, name, opened)
        return pairs.write(directory, read.left_out)


def _judge_of(options: Options) -> str:
    given = {
        "judge": options.judge,
        "reward_model": options.reward_model,
        "reference": options.reference,
    }
    named = [f"--{flag}={value}" for flag, value in given.items() if value]
    if len(named) != 1:
        raise BadInput(
            f"give exactly one judge, by one of --{', --'.join(given)}; {len(named) or 'none'} "
            "given"
        )
    return named[0]


def _made_with(options: Options, model: zoo.Model) -> dict[str, object]:
    """What the answers depend on, to refuse mixing answers of different settings."""
    how = options.how
    return {
        "prompts": sources.identity(options.prompts),
        "model": {"weights": bits.fingerprint(nnx.to_pure_dict(nnx.state(model)))},
        "answers": how.answers,
        "max_new_tokens": how.most,
        **how.sampling._asdict(),
        "seed": how.seed,
    }


def _refuse(directory: places.Place) -> None:
    raise StorageError(
        f"another program is writing to {directory}: wait for it, or give another --directory"
    )


def main() -> None:
    """Makes the pairs that the flags ask for."""
    given = flags.FLAGS
    compiled.keep_here()
    drawn = sampling.Sampling(given.temperature, given.top_k, given.top_p, given.min_p)
    how = Drawing(given.answers, given.max_new_tokens, drawn, given.seed)
    options = Options(
        given.model, given.prompts, given.directory, how, given.judge, given.reward_model,
        given.reference, given.base, given.dtype, given.tensor,
    )  # fmt: skip
    say(sample(options))


if __name__ == "__main__":
    command.main_without_config(main)
