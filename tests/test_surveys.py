"""The checklist of the surveys: every item is there, every place that it names exists, every absence has its reason."""

import pytest

from configs import common
from launch import flags
from molora_jax import config as schema
from molora_jax.catalogue import surveys
from molora_jax.losses import LOSSES
from molora_jax.losses.base import Penalty
from molora_jax.routers import ROUTERS

PLACED = [item for item in surveys.ITEMS if item.axis != surveys.ABSENT]


def test_acceptance_1_every_item_of_the_surveys_is_an_option_or_has_a_reason():
    assert tuple(dict.fromkeys(item.key for item in surveys.ITEMS)) == surveys.KEYS
    assert len(surveys.KEYS) == 19 + 12
    for item in surveys.ITEMS:
        if item.axis == surveys.ABSENT:
            assert len(surveys.reason(item)) > 100, "a reason, not a name"
    found = {item.key for item in PLACED}
    assert set(surveys.KEYS) - found == {"G18"}, "only Soft MoE has no form here"


@pytest.mark.parametrize("item", PLACED, ids=lambda item: f"{item.key} {item.title}")
def test_a_place_that_is_named_exists(item):
    """A config with it is valid; the shipped one that is said to have it does."""
    made = common.get_config()
    router = dict(name="noisy_topk")
    if item.axis == "routers":
        router = dict(name=item.where, **item.options)
    if item.axis == "losses":
        of = {"sparsity": "sparsegen", "router_cost": "relu"}.get(item.where, router["name"])
        router = dict(name=of)
        made.losses = {item.where: dict(item.options)}
    adapter = common.adapter("adalora" if item.where == "orthogonal" else "lora", rank=4)
    made.method.rules = dict(mix=common.rule("q", experts="8", adapter=adapter, router=router))
    if item.axis == "config":
        path, _, value = item.where.partition("=")
        made = flags.load(flags.ROOT / "configs" / f"{item.config}.py")
        assert value.strip("'") in [getattr(made.schedule[stage], path.rpartition(".")[2]) for stage in made.schedule]
    schema.validate(made)
    if item.config:
        shipped = flags.load(flags.ROOT / "configs" / f"{item.config}.py")
        names = {rule.router.name for rule in shipped.method.rules.values() if "router" in rule} | set(shipped.losses)
        assert item.axis == "config" or item.where in names


def test_no_gate_or_loss_of_this_library_is_left_off_the_list():
    """What a method of its own paper has beside the surveys is named here."""
    own = {"x_lora", "core_space", "sparse_projection", "sigmoid_topk", "soft_topk", "labelled_topk", "self_activated"}
    own |= {"document_rows", "sigmoid_threshold", "by_task"}
    listed = {axis: {item.where for item in PLACED if item.axis == axis} for axis in ("routers", "losses")}
    assert set(ROUTERS) - listed["routers"] == own
    on_routing = {name for name, member in LOSSES.items() if not issubclass(member, Penalty)}
    assert on_routing - listed["losses"] == {"task_label", "specialisation"}


def test_links_between_the_two_pages_meet():
    page = surveys.absent_document()
    headings = {surveys.anchor(item) for item in surveys.ITEMS if f"### {surveys.heading(item)}\n" in page}
    asked = {place.split("#")[1].rstrip(")") for place in map(surveys.place, surveys.ITEMS) if "absent.md#" in place}
    assert asked == headings and len(asked) > 4
