"""What the paper compares with, and its rivals: one file a method, each with the same two functions.

    prepare(model, options)   makes of a float model, in place, what the method trains
    trainables(model)         name -> parameter of what that is, the task head among it, and everything else frozen

Each changes the matrices that PreQuant would quantize, so all work on the same weights; embeddings stay float but for
PreQuant's own methods and qlora.
"""

from prequant_ext.baselines import (
    alphatuning,
    bitfit,
    ft,
    lora,
    prequant,
    prequant_alpha,
    prequant_random,
    prequant_ticket,
    ptq,
    qat,
    qat_vanilla,
    qlora,
    quadapter,
)
from prequant_ext.baselines.options import Method, Options

__all__ = ["METHODS", "Method", "Options"]

METHODS: dict[str, Method] = {
    "ft": Method("full fine-tuning", ft.prepare, ft.trainables),
    "ptq": Method("PTQ", ptq.prepare, ptq.trainables, begins_with="ft", is_trained=False, needs_calibration=True),
    "qat": Method("QAT", qat.prepare, qat.trainables, needs_calibration=True),
    "qat_vanilla": Method("QAT, plain", qat_vanilla.prepare, qat_vanilla.trainables),
    "alphatuning": Method("AlphaTuning", alphatuning.prepare, alphatuning.trainables),
    "quadapter": Method("Quadapter, 8 bit", quadapter.prepare, quadapter.trainables, needs_calibration=True),
    "prequant": Method("PreQuant", prequant.prepare, prequant.trainables),
    "prequant_alpha": Method("PreQuant-alpha", prequant_alpha.prepare, prequant_alpha.trainables),
    "prequant_random": Method("PreQuant, random dimensions", prequant_random.prepare, prequant_random.trainables),
    "prequant_ticket": Method(
        "PreQuant, ticket dimensions", prequant_ticket.prepare, prequant_ticket.trainables, begins_with="ticket"
    ),
    "qlora": Method("LoRA on the quantized base", qlora.prepare, qlora.trainables),
    "bitfit": Method("BitFit", bitfit.prepare, bitfit.trainables),
    "lora": Method("LoRA", lora.prepare, lora.trainables),
}
