"""What keeps routing healthy?"""

from molora_jax.losses.balance import Balance
from molora_jax.losses.device_balance import DeviceBalance
from molora_jax.losses.diversity import Diversity
from molora_jax.losses.entropy import Entropy
from molora_jax.losses.ewc import Ewc
from molora_jax.losses.importance import Importance
from molora_jax.losses.load import Load
from molora_jax.losses.localized_balance import LocalizedBalance
from molora_jax.losses.mean_entropy import MeanEntropy
from molora_jax.losses.mutual_information import MutualInformation
from molora_jax.losses.orthogonal import Orthogonal
from molora_jax.losses.preservation import Preservation
from molora_jax.losses.router_cost import RouterCost
from molora_jax.losses.sparsity import Sparsity
from molora_jax.losses.specialisation import Specialisation
from molora_jax.losses.task_label import TaskLabel
from molora_jax.losses.z_loss import ZLoss

LOSSES = {
    "balance": Balance, "z_loss": ZLoss, "entropy": Entropy, "localized_balance": LocalizedBalance, "ewc": Ewc,
    "orthogonal": Orthogonal, "device_balance": DeviceBalance, "sparsity": Sparsity, "importance": Importance,
    "load": Load, "mutual_information": MutualInformation, "mean_entropy": MeanEntropy, "router_cost": RouterCost,
    "diversity": Diversity, "specialisation": Specialisation, "preservation": Preservation, "task_label": TaskLabel,
}  # fmt: skip
