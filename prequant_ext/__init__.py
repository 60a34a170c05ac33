"""PreQuant: one 4-bit backbone for all tasks, r trained outlier dimensions for each (Gong et al., Findings of ACL
2023).
"""

import importlib.util

from prequant_ext.bit_allocation import propose_layer_bits, sensitivity
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

if importlib.util.find_spec("transformers") is not None:
    from prequant_ext import hf, t5_encoder  # noqa: F401  transformers finds no plug-ins by itself: importing this package registers ours

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
    "save_task",
    "sensitivity",
    "set_task",
    "task_parameters",
    "trainable_parameters",
]
