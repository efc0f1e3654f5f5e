"""Whether another run stands on the base that is here: a warm start, loaded experts and surgery all ask this.

    digest, config     the weights, the numbers of config.json                     another one is refused
    ids                what turns a text into ids                                  another one is refused
    tokenizer          that, special tokens and chat template                      another one is said
    quant              the form of its kernels                                     another one is said, or refused

Both sides are the section `base` of an identity. What one of them does not tell (an older version) is not compared.
"""

from molora_jax.io.base_facts import base_facts
from molora_jax.runs import identity


def facts_of(base, config) -> dict:
    """Of a loaded base, as an identity tells them; `config`: that asked for it."""
    return {"digest": base.digest, "quant": config.base.get("quant", "none"), **base_facts(base)}


def same_base(theirs: dict, ours: dict, *, refuse, note, one_form: bool = False) -> None:
    """Refuses a run on another base than ours, and says where it is the same in another dress.

    Args:
      theirs, ours: such as `facts_of`. refuse: `(got, expected, fix) -> InputError`; note: called with a line of text.
      one_form: refuse another `quant` too.

    Raises:
      InputError: another base, other numbers in its config, another tokenizer.
    """
    theirs, ours = ({k: v for k, v in side.items() if v is not None} for side in (theirs, ours))

    def differs(name):
        return name in theirs and name in ours and theirs[name] != ours[name]

    if differs("digest"):
        raise refuse(
            f"trained on base {str(theirs['digest'])[:16]}", f"one on base {ours['digest'][:16]}",
            "Choose another run, or its base.source.",
        )  # fmt: skip
    if "config" in theirs and "config" in ours:
        changed, _ = identity.compare(*({"base": {"config": side["config"]}} for side in (theirs, ours)))
        if changed:
            raise refuse(
                "trained on these weights with another config.json:\n  " + "\n  ".join(changed) + "\n",
                "the same values", "Restore config.json, or choose another run.",
            )  # fmt: skip
    if differs("ids"):
        raise refuse(
            "trained on these weights with another tokenizer", "the same one: with another, an id is another text",
            "Restore the base's tokenizer files, or choose another run.",
        )  # fmt: skip
    if differs("tokenizer"):
        both = "ids" in theirs and "ids" in ours
        note(f"trained with another {'chat template or end token' if both else 'tokenizer or chat template'}")
    if differs("quant"):
        got, expected = f"trained on base.quant={str(theirs['quant'])[:16]}", f"base.quant={ours['quant']}"
        if one_form:
            raise refuse(got, expected, "Choose runs on the same form of the base.")
        note(f"{got}; here {expected}: its leaves meet kernels of another rounding")
