"""Which experts does a token use, with what weight?"""

from molora_jax.routers.biased_topk import BiasedTopK
from molora_jax.routers.by_task import ByTask
from molora_jax.routers.controlled_threshold import ControlledThreshold
from molora_jax.routers.core_space import CoreSpace
from molora_jax.routers.document_rows import DocumentRows
from molora_jax.routers.dselect_k import DSelectK
from molora_jax.routers.entropy_hybrid import EntropyHybrid
from molora_jax.routers.expert_choice import ExpertChoice
from molora_jax.routers.fixed import Fixed
from molora_jax.routers.labelled_topk import LabelledTopK
from molora_jax.routers.learned_threshold import LearnedThreshold
from molora_jax.routers.noisy_topk import NoisyTopK
from molora_jax.routers.nonlinear_topk import NonlinearTopK
from molora_jax.routers.null_experts import NullExperts
from molora_jax.routers.prototypes import Prototypes
from molora_jax.routers.recurrent import Recurrent
from molora_jax.routers.relu import Relu
from molora_jax.routers.self_activated import SelfActivated
from molora_jax.routers.sequence_gate import SequenceGate
from molora_jax.routers.sigmoid_threshold import SigmoidThreshold
from molora_jax.routers.sigmoid_topk import SigmoidTopK
from molora_jax.routers.sinkhorn import Sinkhorn
from molora_jax.routers.soft_topk import SoftTopK
from molora_jax.routers.softmax_topk import SoftmaxTopK
from molora_jax.routers.sparse_projection import SparseProjection
from molora_jax.routers.sparsegen import Sparsegen
from molora_jax.routers.task_gate import TaskGate
from molora_jax.routers.top1 import Top1
from molora_jax.routers.top_p import TopP
from molora_jax.routers.x_lora import XLora

ROUTERS = {
    "softmax_topk": SoftmaxTopK,
    "top_p": TopP,
    "entropy_hybrid": EntropyHybrid,
    "sigmoid_topk": SigmoidTopK,
    "recurrent": Recurrent,
    "top1": Top1,
    "x_lora": XLora,
    "biased_topk": BiasedTopK,
    "sequence_gate": SequenceGate,
    "sparsegen": Sparsegen,
    "core_space": CoreSpace,
    "learned_threshold": LearnedThreshold,
    "sparse_projection": SparseProjection,
    "soft_topk": SoftTopK,
    "labelled_topk": LabelledTopK,
    "self_activated": SelfActivated,
    "document_rows": DocumentRows,
    "sigmoid_threshold": SigmoidThreshold,
    "by_task": ByTask,
    "noisy_topk": NoisyTopK,
    "nonlinear_topk": NonlinearTopK,
    "dselect_k": DSelectK,
    "null_experts": NullExperts,
    "prototypes": Prototypes,
    "sinkhorn": Sinkhorn,
    "relu": Relu,
    "controlled_threshold": ControlledThreshold,
    "fixed": Fixed,
    "task_gate": TaskGate,
    "expert_choice": ExpertChoice,
}
