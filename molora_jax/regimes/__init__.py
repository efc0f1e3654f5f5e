"""How is training organised?"""

from molora_jax.config import outside
from molora_jax.config.regimes import PLAIN
from molora_jax.regimes.base import Regime, Stage
from molora_jax.regimes.continual import Continual
from molora_jax.regimes.federated import Federated
from molora_jax.regimes.stages import Stages, stage_at, stage_of

__all__ = ["REGIMES", "Regime", "Stage", "Stages", "compile_regime", "stage_at", "stage_of"]

REGIMES = {"stages": Stages, "federated": Federated, "continual": Continual}


def compile_regime(config) -> Regime:
    """The member that `config.regime` names; runs of older versions have none and were trained in stages."""
    options = dict(config.get("regime") or PLAIN)
    return outside.member("regimes", REGIMES, options.pop("name"))(**options)
