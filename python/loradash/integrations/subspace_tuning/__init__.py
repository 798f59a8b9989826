"""The authors' own code (github.com/Chongjie-Si/Subspace-Tuning) as a front end.

Models that were written for it run on our operator in one of two ways: `Linear` takes the place of `loralib`'s in the source,
or `patch(model)` takes the layers of a model that is built already (loralib's, or those of the forks of PEFT in CR_MR and
SdG). `convert` and `convert_state_dict` rewrite checkpoints of all of these and ours into one another.

`semantics` says whose rules hold. The results are the same until launch, and but for rounding after it, where a training
step is one forward call without dropout.

| | "loradash" (default) | "authors" |
|---|---|---|
| the warm-up counts | optimizer steps: `DashSchedule(model)`, `schedule.step()` | forward calls of each layer, in eval and in accumulation too |
| launch | at one step in all layers | each layer in its first call after 100 |
| change rate | abs(delta) / (sigma + eps) | abs(delta) / sigma |
| decomposition | `config.svd`, a cache, shared over processes | exact, inside of forward |
| dropout | one mask for both terms | a mask for each term |
| Adam on delta sigma | begins at launch | begins at launch: until then there is no gradient |
| min(N, K) < 8 | fewer directions | fewer directions |
| torch.compile | one graph, and no other at launch | graph breaks where calls are counted |
| DistributedDataParallel | as any model | find_unused_parameters=True, as theirs: delta sigma takes no part until launch |
| merge_weights | `Linear` merges in eval, and is the old one bit for bit in train | as in their file: without effect |

What their code does and neither of these: a launch in bfloat16 raises; a layer with min(N, K) < 8 raises; fan_in_fan_out
raises or, where the weight is square, chooses directions of its transpose; FLAG is in no state dict, so that a resumed run
warms up anew and throws the directions away; their `lora_state_dict` leaves out U and V; activation checkpointing counts a
call twice, or fails at launch; CR_MR's train() after eval() raises. Here the key `lora_flag` keeps the count (calls, or the
schedule's steps) and the phase in every state dict, and where it is missing the phase is that of U.

FSDP2 shards `Linear` and loralib's layers with "loradash"; the forks', whose delta sigma is a matrix, are refused by DashSchedule.
With "authors" a sharded model is refused until launch: what forward writes into sharded parameters does not stay.
`merge_and_unload` has no plain layer to give back: save the adapter and load it into the plain model.

Files: `layers` is what their layers have in common on our operator, `kinds` what each of the three has of its own, `run` what the
layers of a model share; `patch` and `drop_in` are the two ways in. `dialects` has the names of their tensors, `state_dicts` and
`settings` change them and their settings into ours and back, `convert` does so with files.

MergedLinear, which is plain LoRA on some of the projections in one weight (`enable_lora`), runs on the group operator
(`merged`): no directions, no launch. Other layers of theirs (Embedding, Conv) are left alone, and `PatchReport` says so.
"""

from .convert import convert
from .drop_in import Linear, lora_state_dict, mark_only_lora_as_trainable
from .patch import PatchReport, patch, unpatch
from .state_dicts import convert_state_dict

__all__ = [
    "Linear",
    "PatchReport",
    "convert",
    "convert_state_dict",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "patch",
    "unpatch",
]
