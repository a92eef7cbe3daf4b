r"""Scores of pairs, without training: log-probabilities, implicit rewards, margins, ranks.

  python recipes/score.py --config=recipes/configs/tiny.py --config.directory=runs/scored \
    --config.initialize_from_hf=runs/tiny/hf/step-60 \
    --config.reference_model_path=recipes/tiny/model

The policy is `initialize_from_hf`, with the adapters in `adapter.path` if that is set; the
reference is `reference_model_path`, or else the policy without its adapters. Every pair of
`train_data` and `validation` becomes a line of `scores.jsonl` in `--config.directory`. Configs are
those of recipes/dpo.py: what they say of training is not read.
"""

if __name__ == "__main__":  # a wrong flag is answered before the imports below, which take seconds
    from recipes.training import command, settings

    command.answer(settings.SCORE)

import functools

from flax import nnx
import jax
import ml_collections

from recipes.preference import scoring
from recipes.preference.scoring import Found
from recipes.training import checks, command, logps, prepare, settings
from recipes.training.run import say
from recipes.training.update import Params


def score(config: ml_collections.ConfigDict) -> None:
    """Scores all pairs that the config names; writes a line for each, prints a table by source.

    Raises:
      ValueError, OSError: a sentence about the settings, the data, the models or the disk.
      RuntimeError: a log-probability is not finite.
    """
    given = checks.checked(config, settings.table_of(settings.SCORE))
    directory, wanted = prepare.made(given["directory"]), scoring.beside(given)
    scoring.refuse_foreign(directory)
    run = prepare.scoring(given, wanted)
    sources = scoring.sources(run.data)
    say(scoring.told(run, sources))
    with jax.set_mesh(run.computing.mesh):
        forward = logps.compiled(run.computing.mesh)

        def ask(graph: nnx.GraphDef, weights: Params) -> Found:
            """Log p of each answer given its prompt, summed over its scored tokens."""
            model = functools.partial(forward, graph, weights)
            return [scoring.logps_of(source.pairs, model, run.place) for source in sources]

        # The same pass for both, so that equal weights give equal bits: the one model, and then
        # the other, so that memory holds one, no gradient and no optimizer.
        ours, theirs = scoring.of_both(run, wanted, ask)
    # A reward is beta times the log-ratio of policy and reference; a margin is the chosen answer's
    # reward less the rejected one's.
    found = [
        scoring.of_source(source, policy, reference, given["beta"])
        for source, policy, reference in zip(sources, ours, theirs, strict=True)
    ]
    say(f"\n{scoring.table(found)}\n{scoring.note(found)}")
    scoring.write(found, run.data, directory)


if __name__ == "__main__":
    command.main(score, settings.SCORE, joins=True)
