"""What the paper compares with, and its rivals: one file a method, each with the same two functions.

    prepare(model, options)   makes of a float model, in place, what the method trains
    trainables(model)         name -> parameter of what that is, the task head among it, and everything else frozen

Each changes the matrices that PreQuant would quantize, so all work on the same weights; embeddings stay float but for
PreQuant's own methods and qlora.
"""

from prequant_ext.baselines.options import Method, Options

__all__ = ["METHODS", "Method", "Options"]

# By the name of its module, which is imported when the method is used.
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("ft", "full fine-tuning"),
        Method("ptq", "PTQ", begins_with="ft", is_trained=False, needs_calibration=True),
        Method("qat", "QAT", needs_calibration=True),
        Method("qat_vanilla", "QAT, plain"),
        Method("alphatuning", "AlphaTuning"),
        Method("quadapter", "Quadapter, 8 bit", needs_calibration=True),
        Method("prequant", "PreQuant"),
        Method("prequant_alpha", "PreQuant-alpha"),
        Method("prequant_random", "PreQuant, random dimensions"),
        Method("prequant_ticket", "PreQuant, ticket dimensions", begins_with="ticket"),
        Method("qlora", "LoRA on the quantized base"),
        Method("bitfit", "BitFit"),
        Method("lora", "LoRA"),
    )
}
