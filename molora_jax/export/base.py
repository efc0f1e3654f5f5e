"""The contract of a format, and what several share: names of modules, static changes as products.

A format is a module with `write(source, folder) -> [note, ...]`, which raises before it writes where the run is none of
its kind. Arrays are numpy; they come from the checkpoint, so no mesh and no engine is in them.
R rank, D_in and D_out widths of a site, E experts of the base.
"""

import dataclasses
import functools
import pathlib

import numpy as np

from molora_jax import placements
from molora_jax.backbones.base import Part
from molora_jax.core.quant import dense
from molora_jax.errors import InputError
from molora_jax.io.files import read_json
from molora_jax.placements.base_experts import BaseExperts
from molora_jax.runs.opened import Opened
from molora_jax.runs.products import products
from molora_jax.runs.view import View


@dataclasses.dataclass(frozen=True)
class Source:
    """A run that goes out. `format`: its name, for messages; `out`: where the folder will lie in the end."""

    opened: Opened
    format: str
    out: pathlib.Path

    config = property(lambda self: self.opened.config)
    rules = property(lambda self: self.opened.model.rules)
    backbone = property(lambda self: self.opened.base.config)

    def refuse(self, got: str, expected: str, fix: str = "--format=molora takes any run.") -> InputError:
        return InputError(f"--format={self.format}", got=f"{self.opened.folder}, {got}", expected=expected, fix=fix)

    @functools.cached_property
    def by_site(self) -> dict:
        """`{(rule, layer, site): {leaf: array}}`."""
        return View(self.opened.items["adapters"], where=str(self.opened.folder)).by_site()

    def shared(self, rule) -> dict:
        return self.opened.items["adapters"].get(rule.name, {}).get("shared", {})

    @functools.cached_property
    def shapes(self) -> dict:
        return self.backbone.shapes()

    @functools.cached_property
    def tower(self) -> str:
        """What stands in the place of `model.` in the names of a model with a vision tower beside its text."""
        folder = self.opened.base.folder
        beside = folder is not None and read_json(folder / "config.json").get("text_config")
        return "model.language_model." if beside else "model."

    def named(self, name: str) -> str:
        """A tensor's name in the model that transformers makes of the base's folder."""
        return self.tower + name.removeprefix("model.") if name.startswith("model.") else name

    def place(self, layer: int, site: str) -> tuple[str, Part | None]:
        """The Hugging Face name of a projection, without `.weight`, and which rows of it are the site's (None: all)."""
        stack = self.backbone.stack_of(layer)
        leaf = self.shapes[f"{stack.name}/{site}/kernel"]
        return self.named(leaf.name.format(layer - stack.start).removesuffix(".weight")), leaf.part

    def module(self, layer: int, site: str) -> str:
        """The name of a projection that is a module of its own.

        Raises:
          InputError: the checkpoint has one tensor for several projections, so no adapter of its module is this one.
        """
        stack, (name, _) = self.backbone.stack_of(layer), self.place(layer, site)
        for other in stack.sites:
            if other != site and self.place(layer, other)[0] == name:
                raise self.refuse(f"on a base of which {site} and {other} are one tensor", "projections of their own")
        return name

    def expert_module(self, layer: int, site: str, expert: int) -> str:
        """That of an expert of the base, as its checkpoint names it.

        Raises:
          InputError: the checkpoint has one tensor for all experts.
        """
        stack = self.backbone.stack_of(layer)
        leaf = self.shapes[f"{stack.name}/experts/{site}"]
        if leaf.stacked < 2:
            raise self.refuse(
                f"with experts of the family {self.backbone.family}, which are one tensor",
                "experts that are tensors of their own", "--format=peft takes them.",
            )  # fmt: skip
        return leaf.name.format(layer - stack.start, expert).removesuffix(".weight")

    def row_norms(self, layer: int, module: str) -> np.ndarray:
        """`[D_out]` of the base's weight of a module, whatever sites it is."""
        stack = self.backbone.stack_of(layer)
        sites = [site for site in stack.sites if self.place(layer, site)[0] == module]
        kernels = [self.opened.base.params[stack.name][site]["kernel"][layer - stack.start] for site in sites]
        return np.concatenate([np.linalg.norm(np.asarray(dense(W), np.float32), axis=0) for W in kernels])

    def check_static(self, *, experts: bool) -> None:
        """Raises InputError for a run that is more than static adapters.

        Args:
          experts: whether the format holds factors on the base's own experts.
        """
        self.check_alone()
        if not self.rules:
            raise self.refuse("without rules", "a run with adapters", "Copy its base.")
        for rule in self.rules:
            if rule.router is not None:
                raise self.refuse(
                    f"whose rule {rule.name} routes: what it adds depends on the token, and this format has no router",
                    "static adapters: rules without a router",
                )  # fmt: skip
            if rule.base_router == "trained":
                raise self.refuse(f"whose rule {rule.name} trained the base's router", "base_router='frozen'")
            if not placements.of(rule).LOADS and not (experts and self.on_experts(rule)):
                name = placements.of(rule).NAME
                raise self.refuse(f"whose rule {rule.name} is a {name}", "rules on projections")

    def check_alone(self) -> None:
        """Raises InputError where more than adapters was trained."""
        trained = self.opened.items.get("modules") or {}
        if trained:
            what = ", ".join("leaves of the base" if name == "base" else f"the head {name}" for name in trained)
            writes = "merged writes the whole model" if "base" in trained else "molora takes any run"
            raise self.refuse(f"which trained {what}", "a run that is adapters alone", f"--format={writes}.")

    def on_experts(self, rule) -> bool:
        return isinstance(placements.of(rule), BaseExperts)

    @functools.cached_property
    def products(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """`{module: (A [R, D_in], s B [R, D_out])}` of the rules on projections; what meets in a module is stacked.

        Where a module is several sites (Phi-3's qkv_proj), B of each is 0 in the rows of the others.
        """
        model = dataclasses.replace(
            self.opened.model, rules=tuple(rule for rule in self.rules if not self.on_experts(rule))
        )
        found: dict = {}
        for (_, layer, site), (A, B) in products(model, self.opened.items["adapters"], refuse=self.refuse).items():
            name, part = self.place(layer, site)
            found.setdefault(name, []).append((A, in_rows(B, part)))
        return {name: stacked(pairs) for name, pairs in found.items()}

    @functools.cached_property
    def expert_factors(self) -> dict[int, dict[str, tuple[np.ndarray, np.ndarray]]]:
        """`{layer: {site: (A [1|E, R, D_in], s B [1|E, R, D_out])}}` on the base's experts (one rule a layer)."""
        found: dict = {}
        for rule in filter(self.on_experts, self.rules):
            for (name, layer, site), own in self.by_site.items():
                if name == rule.name and layer is not None and "A" in own:
                    B = np.float32(rule.adapter.scale()) * own["B"]
                    found.setdefault(layer, {})[site] = (np.asarray(own["A"]), B)
        return found


def in_rows(B, part: Part | None) -> np.ndarray:
    """`B [R, D_out]` of a site as that of the whole module, `[R, size]`: 0 beside the site's own rows."""
    if part is None:
        return B
    wide = np.zeros((len(B), part.size), B.dtype)
    part.of(wide.T)[...] = B.T
    return wide


def stacked(pairs: list) -> tuple[np.ndarray, np.ndarray]:
    """Pairs `(A, B)` on one module as one, whose product is their sum."""
    A, B = zip(*pairs, strict=True)
    return np.concatenate(A), np.concatenate(B)


def source_name(opened) -> str:
    """Of the base, as a config of transformers would name it."""
    scheme, _, rest = str(opened.config.base.source).partition(":")
    return rest if scheme in ("dir", "hf") else str(opened.config.base.source)
