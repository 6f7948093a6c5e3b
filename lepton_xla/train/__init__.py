"""Training: the loop, compression while training, distillation, checkpoints."""

from lepton_xla.environment.extras import Needs

with Needs("train", "lx.train"):
    from lepton_xla.recipe import PruneRule
    from lepton_xla.train.checkpoints import Checkpoints
    from lepton_xla.train.choosing import per_row
    from lepton_xla.train.compression import Compression, Stage
    from lepton_xla.train.distillation import (
        Answers,
        Distillation,
        Features,
        Labels,
        Logits,
        distill,
        every_nth_layer,
        teach,
    )
    from lepton_xla.train.evaluations import Evaluation
    from lepton_xla.train.loop import fit
    from lepton_xla.train.models import Model, from_linen, from_nnx, supervised
    from lepton_xla.train.preemption import Preempted
    from lepton_xla.train.runs import Result
    from lepton_xla.train.schedules import Schedule, one_shot, periodic, polynomial
    from lepton_xla.train.sizing import Size, largest_batch, size
    from lepton_xla.train.sparsity import Regrow, SparsityState, finalize, masks_of, sparsify
    from lepton_xla.train.specs import TrainSpec, schedule
    from lepton_xla.train.state import State
    from lepton_xla.train.transfer import freeze, low_rank, merge

__all__ = [
    "Answers",
    "Checkpoints",
    "Compression",
    "Distillation",
    "Evaluation",
    "Features",
    "Labels",
    "Logits",
    "Model",
    "Preempted",
    "PruneRule",
    "Regrow",
    "Result",
    "Schedule",
    "Size",
    "SparsityState",
    "Stage",
    "State",
    "TrainSpec",
    "distill",
    "every_nth_layer",
    "finalize",
    "fit",
    "freeze",
    "from_linen",
    "from_nnx",
    "largest_batch",
    "low_rank",
    "masks_of",
    "merge",
    "one_shot",
    "per_row",
    "periodic",
    "polynomial",
    "schedule",
    "size",
    "sparsify",
    "supervised",
    "teach",
]
