"""PreQuant: one 4-bit backbone for all tasks, r trained outlier dimensions for each (Gong et al., Findings of ACL
2023).
"""

from prequant_ext import neighbours
from prequant_ext.bit_allocation import propose_layer_bits, sensitivity
from prequant_ext.checkpoint import save_model_dir
from prequant_ext.config import PreQuantConfig
from prequant_ext.embedding import PreQuantEmbedding
from prequant_ext.families import FAMILIES, Family
from prequant_ext.linear import PreQuantLinear
from prequant_ext.model import PlanRow, Report, plan, quantize_model, trainable_parameters
from prequant_ext.prepare import prepare_model
from prequant_ext.task import (
    active_task,
    add_task,
    list_tasks,
    load_task,
    merge,
    remove_task,
    save_task,
    set_task,
    task_parameters,
)

# transformers finds no plug-ins by itself: importing this package registers ours.
neighbours.open_if_installed("transformers", "the transformers plug-in", "prequant_ext.hf", "prequant_ext.t5_encoder")

__version__ = "0.1.0"
__all__ = [
    "FAMILIES",
    "Family",
    "PlanRow",
    "PreQuantConfig",
    "PreQuantEmbedding",
    "PreQuantLinear",
    "Report",
    "active_task",
    "add_task",
    "list_tasks",
    "load_task",
    "merge",
    "plan",
    "prepare_model",
    "propose_layer_bits",
    "quantize_model",
    "remove_task",
    "save_model_dir",
    "save_task",
    "sensitivity",
    "set_task",
    "task_parameters",
    "trainable_parameters",
]
