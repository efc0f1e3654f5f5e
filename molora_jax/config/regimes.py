"""The regime of a config, and what it excludes: each member states it in its file (`regimes.base`)."""

from molora_jax.config import fields as tables
from molora_jax.config.fields import wrong
from molora_jax.config.members import attribute, is_member, loss_of, members
from molora_jax.config.values import member_problems

PLAIN = {"name": "stages"}  # of a config without `regime`, as older versions wrote it


def regime_problems(config):
    value = config.get("regime") or PLAIN
    found = member_problems("regime", value, "regimes")
    yield from found
    if found:
        return
    states = lambda wanted: attribute("regimes", value["name"], wanted)  # noqa: E731
    for name, loss in config["losses"].items():
        member = loss_of(name, loss)
        penalty = is_member("losses", member) and attribute("losses", member, "PENALTY") is True
        needs = [n for n in ("PENALTY", "SQUARES") if penalty and attribute("losses", member, n) is not False]
        if not all(states(name) for name in needs):
            able = [r for r in members("regimes") if all(attribute("regimes", r, name) for name in needs)]
            expected = f"regime.name among {', '.join(able)} with a penalty on what earlier tasks left"
            yield wrong(f"losses.{name}", f"a penalty under regime {value['name']!r}", expected, "Remove the loss.")
    schedule = config.get("schedule") if isinstance(config.get("schedule"), dict) else {}
    for stage, fields in schedule.items():
        if isinstance(fields, dict) and isinstance(fields.get("set"), dict) and "regime" in fields["set"]:
            expected = "no regime: the stages of a run have one"
            yield wrong(f"schedule.{stage}.set.regime", str(fields["set"]["regime"])[:80], expected, "Take it out.")
    if not states("SCHEDULE"):
        yield from _own_stages(config, value["name"])
    if not states("EXACT") and config["train"].get("exact") is True:
        expected = "False: its programs are of one run and whole batches"
        yield wrong("train.exact", f"True with regime {value['name']!r}", expected, "Leave exact out.")
    if config["train"].get("patience") and not states("PATIENCE"):
        expected = f"0 with regime {value['name']!r}, whose later stages would be left out"
        yield wrong("train.patience", str(config["train"]["patience"])[:80], expected, "Set it to 0.")
    if states("HELD_OUT"):
        data = config["data"]
        if data.get("test_share", 0.05) == 0 and not data.get("valid", ""):
            fix = "Hold rows out, or name a file in data.valid."
            yield wrong("data.test_share", "0.0", f"above 0: regime {value['name']!r} measures held-out rows", fix)


def _own_stages(config, name):
    """A regime that cuts the run into stages itself takes over what one stage says of all of them."""
    stages = config["schedule"] if isinstance(config["schedule"], dict) else {}
    if len(stages) > 1:
        fix = "Leave one, or start a run of its own from this one's (train.init_from)."
        yield wrong("schedule", f"{len(stages)} stages with regime {name!r}", "one: the regime makes its own", fix)
        return
    for stage, fields in stages.items():
        for field, default in tables.WHOLE.items():
            if field not in ("tasks", "freeze") and isinstance(fields, dict) and fields.get(field, default) != default:
                expected = f"{default!r} with regime {name!r}, which makes the stages"
                fix = "Write it into the config itself."
                yield wrong(f"schedule.{stage}.{field}", str(fields[field])[:80], expected, fix)
