"""The data of a Levanter file, for training and held out: `data`, in `configs` or `components`."""

from collections.abc import Sequence

from recipes.peers.rows import Given, is_off


def sources(given: Given) -> dict[str, object]:
    """Sources by name; a list of files becomes one path, with `*` if there are several."""
    theirs, train, test = given.values, {}, {}
    found: dict[str, object] = {}
    for name, value in theirs.items():
        words = name.split(".")
        source = words[2] if words[1:2] and words[1] in ("configs", "components") else "train"
        if words[0] != "data":
            continue
        if words[-1] in ("train_urls", "id") and not is_off(value):
            train[source] = _one(name, value, given)
        elif words[-1] == "validation_urls" and not is_off(value):
            test["validation" if source == "train" else source] = _one(name, value, given)
        elif words[-1] in ("chosen_field", "rejected_field"):
            ours = words[-1].removesuffix("_field")
            if value != ours:
                columns = found.setdefault("data.columns", {})
                assert isinstance(columns, dict)
                columns[ours] = value
        elif words[-1] == "slice_strategy" and value in ("left", "right"):
            found["data.over_length"] = "cut_answer" if value == "left" else "cut_prompt"
        elif words[-1] == "mask_user_turns" and value is False:
            found["data.scored_turns"] = "all"
    shares = (name for name in theirs if name.startswith("data.train_weights."))
    weights = {name.removeprefix("data.train_weights."): float(theirs[name]) for name in shares}
    if len(train) == 1:
        (found["train_data"],) = train.values()
    elif train:
        found["train_data"] = {
            name: {"path": path, "weight": weights.get(name, 1.0)} for name, path in train.items()
        }
    if test:
        found["validation"] = test
    return found


def _one(name: str, value: str | Sequence[object], given: Given) -> str:
    urls = [value] if isinstance(value, str) else list(value)
    if "tokenized" in str(urls[0]):
        told = "rows are read, and no tokens: name the files that they were made of"
        given.notes.differs.append((name, told))
    if len(urls) > 1:
        told = f"the first of {len(urls)}: several files are one path with *"
        given.notes.lacking.append((name, told))
    return str(urls[0])
