"""m-sharpness over processes: who shares a perturbation with whom, and who averages which gradients.

data_parallel.py   the call at set-up
replicas.py        ranks that have the whole model: averaging, overflow, comparison of the weights
ddp.py             first passes of a DistributedDataParallel that stay on their rank
backward_hooks.py  second gradients averaged during backward, without a DistributedDataParallel
buckets.py         gradients in flat buckets, one all-reduce each
zero.py            replicas that each update a part of the weights, and have that part of the state alone (ZeRO-1)
slices.py          gradients in flat buckets, one reduce-scatter each
state_slices.py    state cut into these parts, and put together for a checkpoint
ranks.py           which ranks share one perturbation; reduce-scatter and all-gather
agreement.py       that all ranks have the same parameters

What a step asks of other ranks is `fused_sam.peers`; DTensor parameters (FSDP2, tensor parallelism) are
`fused_sam.dtensor`.
"""

from fused_sam.distributed.data_parallel import DataParallel, data_parallel

__all__ = ["DataParallel", "data_parallel"]
