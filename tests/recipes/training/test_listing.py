"""All settings as a person reads them, in `--help` and in the docs: none is left out."""

import re

import pytest

from recipes.configs import tiny
from recipes.training import by_name, listing, settings
from recipes.training.settings import ABOVE_0, MUST, Setting
from tests.conftest import ROOT, given_by

GROUPS = {
    "Some": {
        "name": Setting(str, "what it is called", MUST),
        "tags": Setting(tuple, "its tags", ("a", "b"), free=True),
    },
    "Others": {
        "rows.each": Setting(
            int, "rows of a device", None, unset="as many as fit", bound=ABOVE_0, free=True
        ),
        "fast": Setting(bool, "fast | *safe*", True),
        "way": Setting(str, "how", "up", choices=("up", "down")),
        "over": Setting(str, "drop: left out; cut: made shorter", "drop", choices=("drop", "cut")),
    },
}


def test_help_by_eye():
    told = listing.text(GROUPS, {"rows.each": 4, "fast": False, "tags": ("c",)})
    assert told.splitlines() == [
        "",
        "Some",
        "  --config.name=",
        "      what it is called; required",
        "  --config.tags=c",
        "      its tags (a resume may change it)",
        "",
        "Others",
        "  --config.rows.each=4",
        "      rows of a device; above 0; unset: as many as fit (a resume may change it)",
        "  --config.fast=false",
        "      fast | *safe*",
        "  --config.way=up",
        "      how; one of up, down",
        "  --config.over=drop",
        "      drop: left out; cut: made shorter",
    ]


def test_the_table_by_eye():
    assert listing.markdown(GROUPS).splitlines()[3:] == [
        "",
        "**Some**",
        "",
        "| setting | meaning |",
        "|---|---|",
        "| `name` | what it is called; required |",
        "| `tags` (a,b) *resume* | its tags |",
        "",
        "**Others**",
        "",
        "| setting | meaning |",
        "|---|---|",
        "| `rows.each` (None) *resume* | rows of a device; above 0; unset: as many as fit |",
        "| `fast` (true) | fast \\| \\*safe\\* |",
        "| `way` (up) | how; one of up, down |",
        "| `over` (drop) | drop: left out; cut: made shorter |",
    ]


def test_what_a_config_leaves_out_by_eye():
    table = settings.table_of(GROUPS)
    told = listing.taken(["rows.each", "tags", "fast", "way"], table)
    assert told == (
        "settings not in the config, at their defaults: fast=true, way=up; 2 others are unset, or "
        "do not\n  affect results (see --help with the config)"
    )
    assert (
        listing.taken(["fast"], table) == "settings not in the config, at their defaults: fast=true"
    )
    assert listing.taken([], table) == listing.taken(["rows.each", "tags"], table) == ""


def test_help_has_every_setting_once_with_its_value_in_the_config():
    given = given_by(tiny.get_config(), beta=0.25, tags=("a", "b"), validation=None)
    told = listing.text(settings.DPO, given)
    values = dict(re.findall(r"^  --config\.(\S+?)=(.*)$", told, re.MULTILINE))
    assert list(values) == list(settings.ALL)
    assert len(re.findall(r"^  --config\.", told, re.MULTILINE)) == len(settings.ALL)
    assert values["beta"] == "0.25"
    assert values["tags"] == "a,b"
    assert values["validation"] == values["cooldown"] == "None"
    assert values["tensorboard"] == "true"
    assert values["initialize_from_hf"] == "recipes/tiny/model"
    assert [line for line in told.splitlines() if line and line[0] != " "] == list(settings.DPO)
    assert max(map(len, told.splitlines())) <= listing.WIDTH


@pytest.mark.parametrize("name", settings.ALL)
def test_a_value_that_is_shown_is_one_that_the_flag_takes(name):
    from recipes.training import overrides

    config = f"--config={ROOT}/recipes/configs/tiny.py"
    given = by_name.plain(overrides.read(["", config], settings.ALL)[0], settings.ALL)
    told = listing.text(settings.DPO, given)
    (flag,) = re.findall(rf"^  (--config\.{re.escape(name)}=.*)$", told, re.MULTILINE)
    again, _ = overrides.read(["", config, flag], settings.ALL)
    assert by_name.plain(again, settings.ALL) == given


def test_the_docs_end_with_all_settings():
    """`python -m recipes.training.listing` writes them."""
    told = (ROOT / "docs" / "dpo.md").read_text("utf-8")
    whole = told.endswith("\n\n" + listing.markdown(settings.DPO))
    assert whole, "write it again: python -m recipes.training.listing"
    assert listing.DOCS == ROOT / "docs" / "dpo.md"
    assert told.count(listing.HEADING) == 1
