"""Rows that start as mean embeddings of documents, beside a frozen row of the base itself (FlexOlmo, arXiv 2507.07024).

    z_0 = r_0 . x,   z_e = r_e . x + min(beta_e, 0),   p = softmax(z_0, ..., z_E),   S = the top K of all E + 1
    y = sum over S of p_e FFN_e(x),   FFN_0 the frozen base: p_0 is its coefficient (`Routing.base_gate`)

Expert e belongs to one owner of data, who trains it, r_e and beta_e next to the base and r_0, which are the same for
all owners: so rows that were trained apart can be compared, and are joined by putting them under each other (a rule's
`load`). An owner's run has one expert. At the start r_e is the mean over the owner's documents of their embeddings,
r_0 that of public documents, in every layer the same and of the length that this mean has (`training/documents.py`
makes the embeddings). r_0 never trains. Where a site's input has another width than the embedding, both go through
one fixed random matrix that keeps lengths in expectation.

x is the site's input `[B, S, D]`, E owners. `logits`, `probs` of the decision are the owners'; the base's logit is
`Routing.base_logit`.
"""

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp
import numpy as np

from molora_jax.core import routing
from molora_jax.errors import InputError
from molora_jax.routers.base import Router


@dataclasses.dataclass(frozen=True)
class DocumentRows(Router):
    """`top_k`: experts a token, the base among them; 0 is all. `renormalise`: gates over their sum on S (off as
    published, where a norm after the block takes the common factor away; a base that norms before it is shrunk).

    `documents`: most of each task whose embeddings are averaged at the start of a run, 0 for random rows (`init`);
    `public`: the tasks of `data.tasks` whose documents give r_0, "" for all; expert e gets those of the other tasks
    whose place is e modulo E. `scale` multiplies rows at their start. `bias=False` leaves beta out; `merge_bias`: what
    `load` does with the owners' ("drop": 0, as the public code has it).
    """

    top_k: int = 0
    renormalise: bool = False
    documents: int = 1000
    public: str = ""
    scale: float = 1.0
    bias: bool = True
    merge_bias: Literal["drop", "keep"] = "drop"

    LIMITS: ClassVar = {"top_k": (0, None), "documents": (0, None), "scale": (0, None, "()")}
    FROZEN: ClassVar[tuple[str, ...]] = ("r0",)
    JOINS: ClassVar[bool] = True

    def k_max(self, experts):
        return min(self.top_k or experts, experts)

    def init_leaves(self, key, site, layer):
        both = super().init_leaves(key, dataclasses.replace(site, experts=site.experts + 1), layer)["W"]
        return {"W": both[1:], "r0": both[:1]} | ({"beta": jnp.zeros(site.experts)} if self.bias else {})

    def route(self, p, shared, x, ctx):
        # at 0 the bias has its gradient: from there it may fall, above 0 it has none
        beta = jnp.where(p["beta"] > 0, 0.0, p["beta"]) if self.bias else None
        z, z_0 = routing.logits(p["W"], x, beta), routing.logits(p["r0"], x)
        allowed = jnp.broadcast_to(routing.permitted(ctx.allowed), z.shape)
        every = jnp.concatenate([jnp.ones(z_0.shape, bool), allowed], axis=-1)  # the base is open to all
        probs = routing.softmax(jnp.concatenate([z_0, z], axis=-1), every[0, 0] if ctx.allowed is None else every)
        selected = routing.top_k(probs, self.top_k or probs.shape[-1])
        gates = jnp.where(selected, probs, 0.0)
        gates = routing.normalised(gates) if self.renormalise else gates
        decision = routing.finish(
            gates[..., 1:], selected[..., 1:], z, probs[..., 1:], ctx, k_max=self.k_max(z.shape[-1]), base=gates[..., 0]
        )
        return decision.replace(base_logit=z_0[..., 0]), ctx.carry, {}

    def rows(self, means: dict[str, np.ndarray], experts: int, width: int, where: str):
        """`(W [E, width], r0 [1, width])` of mean embeddings `[D]` by task, in the order of `data.tasks`.

        Raises:
          InputError: in the name of `where`: `public` names no task, or an expert has no task's documents.
        """
        public = [name.strip() for name in self.public.split(",") if name.strip()]
        unknown = [name for name in public if name not in means]
        if unknown:
            raise InputError(
                f"{where}.public", got=repr(unknown[0]), expected=f"tasks among data.tasks = {', '.join(means)}"
            )
        owners = [name for name in means if name not in public]
        if len(owners) < experts:
            raise InputError(
                f"{where}.public", got=f"{len(owners)} tasks that are not public, for {experts} experts",
                expected="documents for every expert", fix="Add tasks to data.tasks, or lower experts.",
            )  # fmt: skip
        mean = lambda names: np.mean([means[name] for name in names], axis=0)  # noqa: E731
        W = np.stack([mean(owners[e::experts]) for e in range(experts)])
        r0 = mean(public or list(means))[None]
        if W.shape[1] != width:  # one matrix for all owners, whatever their seeds
            turn = np.random.default_rng(0).standard_normal((W.shape[1], width)) / np.sqrt(width)
            W, r0 = W @ turn, r0 @ turn
        return tuple((self.scale * rows).astype(np.float32) for rows in (W, r0))

    def joined(self, own: dict, theirs: list[dict], paths, where: str) -> dict:
        """One layer's leaves of owners' runs as those of a joined router: rows and biases under each other.

        Raises:
          InputError: in the name of `where`: runs with other rows r_0, which were trained beside another base row.
        """
        for path, leaves in zip(paths, theirs, strict=True):
            if leaves["r0"].tobytes() != theirs[0]["r0"].tobytes():
                raise InputError(
                    where, got=f"{paths[0]} and {path}, whose rows r_0 of the base differ", expected="one r_0 for all",
                    fix="Train owners with the same public tasks, seq_len and documents: rows compare through r_0.",
                )  # fmt: skip
        out = {"W": np.concatenate([leaves["W"] for leaves in theirs]), "r0": np.asarray(theirs[0]["r0"])}
        if "beta" in own:
            kept = [leaves.get("beta", np.zeros(1, np.float32)) for leaves in theirs]
            out["beta"] = np.concatenate(kept) * np.float32(self.merge_bias == "keep")
        return out
