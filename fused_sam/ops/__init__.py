"""The op surface: checks every argument once, then hands it to the backend of the tensors' device.

All lists are parallel: entry i of each belongs to parameter i, and None in ``grads``, ``backups`` or a list of state
means that there is none. Groups cover the lists in order, ``size`` tensors each.

    norm        ||T g||_q over all groups, T = |w| + eta elementwise in adaptive groups, 1 elsewhere; 1/p + 1/q = 1
    perturb     backup = w, w = w + rho_k T sign(g) (|T g| / ||T g||_q)^(q-1) for the tensors of group k, which is
                rho_k T^2 g / ||T g||_2 for p = 2                                            (Foret et al. 2021, eq. 2)
                Both take g + decay_k w for g in groups that say so.
    restore     w = backup
    restore_accumulate  w = backup, and a running mean of gradients beside it
    sgd_update  w = backup, then SGD with momentum at w with the gradient taken at w + e     (Algorithm 1)
    adam_update w = backup, then Adam or AdamW likewise

fp32, fp64, bf16 and fp16 tensors; 16-bit data is computed in fp32 and the norm always in fp64.
"""

from fused_sam.backends.interface import AccumulateGroup, AdamGroup, AscentGroup, InvalidTensor, Journal, SGDGroup
from fused_sam.ops.ascent import Ascent, holds_fp64, joint_norm, norm, perturb
from fused_sam.ops.descent import adam_update, restore, restore_accumulate, sgd_update
from fused_sam.ops.groups import dual_exponent, host_number, is_capturing
from fused_sam.ops.journal import NewState, StateEntry, joint_backup, restore_weights, roll_back

__all__ = [
    "AccumulateGroup",
    "AdamGroup",
    "Ascent",
    "AscentGroup",
    "InvalidTensor",
    "Journal",
    "NewState",
    "SGDGroup",
    "StateEntry",
    "adam_update",
    "dual_exponent",
    "holds_fp64",
    "host_number",
    "is_capturing",
    "joint_backup",
    "joint_norm",
    "norm",
    "perturb",
    "restore",
    "restore_accumulate",
    "restore_weights",
    "roll_back",
    "sgd_update",
]
