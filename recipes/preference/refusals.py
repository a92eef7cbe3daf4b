"""Refuses settings of losses that cannot be combined, before anything is read."""

from collections.abc import Collection

from checkpoints_io.errors import BadInput
from recipes.data.rows import source
from recipes.preference import losses
from recipes.training import written
from recipes.training.by_name import Values

# A summed log-ratio is as large as an answer is long; a mean per token is about 1 nat.
USUAL_PER_TOKEN, USUAL_SUMMED = "2 to 10", "0.01 to 0.5"
LEAST_PER_TOKEN, MOST_SUMMED = 0.5, 2.0


def check(given: Values, names: Collection[str]) -> None:
    """Checks the settings of losses with these names, each by itself known.

    Raises:
      ValueError: one has no effect with another, or no meaning.
    """
    _check_lists(given, names)
    _check_unpaired(given, names)
    _check_columns(given, names)
    _check_weighting(given, names)
    _check_alpha(given)
    for name in names:
        _check_beta(name, given["beta"])


def _check_lists(given: Values, names: Collection[str]) -> None:
    which, most = given["list_pairs"], given.get("data.answers", 2)
    if which is not None and most == 2:
        raise BadInput(
            f"--config.list_pairs={which} has no effect with --config.data.answers=2, which makes "
            "one pair per row: leave it out, or raise --config.data.answers"
        )
    if which is not None and {*names} <= {*losses.OF_LISTS}:
        raise BadInput(
            f"--config.list_pairs={which} has no effect with --config.loss={given['loss']}, which "
            "does not compare pairs: leave it out"
        )
    if most > 2 and given["ld_alpha"] is not None:
        raise BadInput(
            f"--config.ld_alpha={given['ld_alpha']} only supports pairs, whose shorter answer "
            f"decides, but --config.data.answers={most} produces ranked lists: leave out one of "
            "the two"
        )
    if most > 2 and (alone := [name for name in names if name in (*losses.COUPLED, "cpo")]):
        instead = "reference_free,sft" if alone[0] == "cpo" else "sigmoid"
        raise BadInput(
            f"--config.loss={given['loss']}: `{alone[0]}` only supports pairs, but "
            f"--config.data.answers={most} produces ranked lists: choose another loss (e.g. "
            f"{instead}), or --config.data.answers=2"
        )


def _check_unpaired(given: Values, names: Collection[str]) -> None:
    alone = [name for name in names if name in source.UNPAIRED]
    if alone and len(names) > 1:
        raise BadInput(
            f"--config.loss={given['loss']}: {alone[0]} takes single answers with a label, but "
            "the others take pairs: leave out one of the two"
        )
    if alone and given["ld_alpha"] is not None:
        raise BadInput(
            f"--config.ld_alpha={given['ld_alpha']} only supports pairs, whose shorter answer "
            f"decides, but --config.loss={alone[0]} takes single answers: leave it out"
        )


def _check_columns(given: Values, names: Collection[str]) -> None:
    """What the data says of each pair must have a meaning for the losses."""
    if "train_data" not in given:  # where nothing but a loss is asked for, as in a notebook
        return
    whole = [name for name in names if name in losses.OF_AN_UPDATE]
    if whole and source.names_column(given, written.rows_of(given), "weight"):
        raise BadInput(
            f"columns name a `weight` for each pair, but --config.loss={whole[0]} is computed "
            "over all pairs of an update together: leave out one of the two"
        )
    if not source.names_column(given, written.rows_of(given), "margin"):
        return
    if given["data.answers"] > 2:
        raise BadInput(
            "columns name a `margin` for each pair, but "
            f"--config.data.answers={given['data.answers']} produces ranked lists: leave out one "
            "of the two"
        )
    if not any(name in losses.OF_MARGINS for name in names):
        raise BadInput(
            f"columns name a `margin`, which has no effect with --config.loss={given['loss']}: it "
            f"only applies to {', '.join(losses.OF_MARGINS)}"
        )


def _check_weighting(given: Values, names: Collection[str]) -> None:
    if not given["use_weighting"]:
        return
    whole = [f"loss={name}" for name in names if name in losses.OF_AN_UPDATE]
    if given.get("data.answers", 2) > 2:
        whole.append(f"data.answers={given['data.answers']}")
    if given["ld_alpha"] is not None:
        whole.append(f"ld_alpha={given['ld_alpha']}")
    if whole:
        raise BadInput(
            "--config.use_weighting=true weights each pair by all tokens of its two answers, so "
            f"it cannot be combined with --config.{whole[0]}: leave out one of the two"
        )


def _check_alpha(given: Values) -> None:
    kind, alpha = given["f_divergence_type"], given["f_alpha_divergence_coef"]
    if (kind == "alpha_divergence") != (alpha is not None):
        raise BadInput(
            "set --config.f_alpha_divergence_coef if and only if "
            "--config.f_divergence_type=alpha_divergence"
        )


def _check_beta(name: str, beta: float) -> None:
    if name in losses.PER_TOKEN and beta < LEAST_PER_TOKEN:
        raise BadInput(
            f"--config.beta={beta:g} suits losses on summed log-probabilities: {name} takes means "
            f"per token, with a usual beta of {USUAL_PER_TOKEN}"
        )
    if name not in losses.PER_TOKEN + losses.FREE_OF_BETA and beta > MOST_SUMMED:
        raise BadInput(
            f"--config.beta={beta:g} suits losses on means per token "
            f"({', '.join(losses.PER_TOKEN)}): {name} takes sums, with a usual beta of "
            f"{USUAL_SUMMED}"
        )
