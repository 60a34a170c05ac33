"""The one walk over a model: which modules are quantized, how, and why the other weights are not."""

import sys
from collections import Counter
from dataclasses import dataclass

from torch import nn

from prequant_ext.blocks import bits_by_block, block_holding, block_lists, blocks_of, ends_with, is_part_of
from prequant_ext.config import PreQuantConfig
from prequant_ext.families import FAMILIES, UNKNOWN, Family
from prequant_ext.frozen import quantized_modules
from prequant_ext.linear import is_conv1d
from prequant_ext.outliers import check_r
from prequant_ext.quantize import scale_shape

EXCLUDED, NO_EMBEDDING_BITS = "excluded by modules_to_not_convert", "embedding_bits is None"
HEAD, LM_HEAD, TIED, FLOAT_TABLE = (
    "task head",
    "language-model head",
    "tied to another module",
    "relative-position table",
)
OUTSIDE, NO_ROLE = "outside the blocks", "neither in reads nor in writes of the family"
READ_DIRECTLY = "nn.TransformerEncoderLayer reads its weight without calling it"
RENORMALIZED = "max_norm changes its weight at every lookup"
# the method's or the user's choice, not a gap
BY_INTENT = frozenset({EXCLUDED, NO_EMBEDDING_BITS, HEAD, LM_HEAD, TIED, FLOAT_TABLE})


@dataclass(frozen=True)
class Site:
    """A module to be quantized. shape is (N, K), also of a Conv1D, which stores (K, N); an embedding's is (V, D) and it
    has no axis.
    """

    name: str
    kind: str  # linear or embedding
    shape: tuple[int, int]
    axis: str | None
    bits: int
    is_transposed: bool = False
    hidden_size: int | None = None


@dataclass(frozen=True)
class Uncovered:
    """A weight that stays float, by its module's name, or by its own where the module is of a kind that is not
    quantized.
    """

    name: str
    shape: tuple[int, ...]
    reason: str


def find_sites(
    model: nn.Module, config: PreQuantConfig, family: Family | None = None, *, allow_unmatched: bool = False
) -> list[Site]:
    """The modules of ``model`` that ``config`` quantizes, in the model's order. Reads names and shapes only: a model on
    the meta device will do.

    ``family`` overrides the row found by the model's ``config.model_type``. ``allow_unmatched``: a name in
    ``modules_to_not_convert`` may match nothing (a checkpoint made from one class of model and loaded into another
    lacks some of its heads).

    Raises ValueError for an already quantized model, an unknown family with ``axis="hidden"``, names or rules that
    match nothing, r beyond a sliced axis, a group that does not divide K, and where nothing is left to quantize.
    """
    return survey(model, config, family, allow_unmatched=allow_unmatched)[0]


def survey(
    model: nn.Module, config: PreQuantConfig, family: Family | None = None, *, allow_unmatched: bool = False
) -> tuple[list[Site], list[Uncovered]]:
    """:func:`find_sites`, and the weights that they leave float."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if not isinstance(config, PreQuantConfig):
        raise TypeError(f"config must be a PreQuantConfig, got {type(config).__name__}")
    if family is not None and not isinstance(family, Family):
        raise TypeError(f"family must be a Family, got {type(family).__name__}")
    if type(model) is nn.Linear or is_conv1d(model):
        raise ValueError("model is a single layer: use PreQuantLinear.from_linear(layer, config, axis=...)")
    quantized = [name for name, _ in quantized_modules(model)]
    if quantized:
        raise ValueError(
            f"{type(model).__name__} is already quantized ({quantized[0]} and {len(quantized) - 1} more); "
            "merge(model) makes it float again"
        )
    if not allow_unmatched:
        _check_exclusions(model, config)
    family = family or family_of(model)
    if config.axis == "hidden" and not family.stacks:
        raise ValueError(_unknown_family(model))

    walk = _Walk(model, config, family)
    for name, module in model.named_modules():
        walk.visit(name, module)
    if not any(site.kind == "linear" for site in walk.sites):
        reasons = Counter(entry.reason for entry in walk.uncovered)
        found = "; ".join(f"{count} x {reason}" for reason, count in reasons.items()) or "it has no weight matrix"
        raise ValueError(f"nothing to quantize in {type(model).__name__}: no nn.Linear or Conv1D is left ({found})")
    return walk.sites, walk.uncovered


def family_of(model: nn.Module) -> Family:
    """The family the model was quantized with, else the row of its ``config.model_type``, else :data:`UNKNOWN`, which
    has no stacks.
    """
    given = getattr(model, "_prequant_family", None)
    return given or FAMILIES.get(getattr(getattr(model, "config", None), "model_type", ""), UNKNOWN)


def role_of(path: str, family: Family) -> str | None:
    """The axis of a reader ("input") or writer ("output") of the residual stream, by its name within its block; the
    longest matching ending decides.
    """
    endings = [(len(ending), "input") for ending in family.reads if ends_with(path, ending)]
    endings += [(len(ending), "output") for ending in family.writes if ends_with(path, ending)]
    return max(endings)[1] if endings else None


def is_pretrained_model(model: nn.Module) -> bool:
    """Whether ``model`` is a transformers model. transformers is optional: unless it is imported, nothing is."""
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(model, modeling.PreTrainedModel)


def without_base_prefix(model: nn.Module, name: str) -> str:
    """``name`` as a bare base model calls it: a task model puts a prefix before the names of its base."""
    return name.removeprefix(f"{getattr(model, 'base_model_prefix', '')}.")


def names_outside_base(model: nn.Module) -> list[str]:
    """Parameters outside a transformers model's base; any other model is all base."""
    if not is_pretrained_model(model):
        return []
    in_base = {id(parameter) for parameter in model.base_model.parameters()}  # type: ignore[union-attr]
    return [name for name, parameter in model.named_parameters() if id(parameter) not in in_base]


def head_names(model: nn.Module, family: Family) -> list[str]:
    """Parameters of the task head: those outside a transformers model's base, and the family's heads; language-model
    heads are none.
    """
    outside_base = set(names_outside_base(model))
    lm_heads = _lm_head_names(model, family)
    names = []
    for name, _ in model.named_parameters():
        is_outside = name in outside_base and not any(is_part_of(name, part) for part in family.frozen)
        is_head = is_outside or any(is_part_of(name, part) for part in family.heads)
        if is_head and not any(is_part_of(name, part) for part in lm_heads):
            names.append(name)
    return names


def _lm_head_names(model: nn.Module, family: Family) -> set[str]:
    output = model.get_output_embeddings() if is_pretrained_model(model) else None  # type: ignore[operator]
    return {
        *family.lm_heads,
        *(name for name, module in model.named_modules() if output is not None and module is output),
    }


class _Walk:
    """What is known of the model before its modules are visited, and what the visits have found."""

    def __init__(self, model: nn.Module, config: PreQuantConfig, family: Family):
        self.config, self.family = config, family
        self.blocks = {block.name: block for block in blocks_of(model, family)}
        self.bits = bits_by_block(config.layer_bits, list(self.blocks.values()))
        self.heads = set(head_names(model, family))
        self.lm_heads = _lm_head_names(model, family)
        self.tied = _tied_parameters(model)
        layers = [module for module in model.modules() if isinstance(module, nn.TransformerEncoderLayer)]
        self.read_directly = {id(linear) for layer in layers for linear in (layer.linear1, layer.linear2)}
        self.hidden_size = getattr(getattr(model, "config", None), "hidden_size", None)
        self.streams: dict[str, Site] = {}  # the first site of each stack, which tells the width of its residual stream
        self.sites: list[Site] = []
        self.uncovered: list[Uncovered] = []

    def visit(self, name: str, module: nn.Module) -> None:
        for own_name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() < 2:
                continue
            reason = self._intent(name, own_name, parameter) or self._obstacle(name, module, parameter)
            if reason is None:
                self.sites.append(
                    self._linear(name, module) if type(module) is not nn.Embedding else self._embedding(name, module)
                )
            else:
                full_name = name if own_name == "weight" else f"{name}.{own_name}".lstrip(".")
                self.uncovered.append(Uncovered(full_name, tuple(parameter.shape), reason))

    def _intent(self, name: str, own_name: str, parameter: nn.Parameter) -> str | None:
        """The method's or the user's reason to leave a weight alone."""
        if any(is_part_of(name, entry) for entry in self.config.modules_to_not_convert or ()):
            return EXCLUDED
        if any(is_part_of(name, entry) for entry in self.lm_heads):
            return LM_HEAD
        if id(parameter) in self.tied:
            return TIED
        if any(is_part_of(name, entry) for entry in self.family.float_tables):
            return FLOAT_TABLE
        return HEAD if f"{name}.{own_name}" in self.heads else None

    def _obstacle(self, name: str, module: nn.Module, parameter: nn.Parameter) -> str | None:
        """Why a weight cannot be quantized. Exact types only: a subclass computes something else, or is read without
        being called.
        """
        if type(module) is nn.Embedding:
            if self.config.embedding_bits is None:
                return NO_EMBEDDING_BITS
            return RENORMALIZED if module.max_norm is not None else None
        if type(module) is not nn.Linear and not is_conv1d(module):
            kind = type(module).__name__
            return (
                f"{parameter.dim()}-D parameter of {kind}"
                if parameter.dim() > 2
                else f"{kind}, not exactly nn.Linear or nn.Embedding"
            )
        if id(module) in self.read_directly:
            return READ_DIRECTLY
        if not self.family.stacks:
            return None
        block = block_holding(name, self.blocks)
        if block is None:
            return OUTSIDE
        return NO_ROLE if role_of(name.removeprefix(f"{block.name}."), self.family) is None else None

    def _embedding(self, name: str, module: nn.Embedding) -> Site:
        return Site(name, "embedding", (module.num_embeddings, module.embedding_dim), None, 8)

    def _linear(self, name: str, module: nn.Module) -> Site:
        is_transposed = is_conv1d(module)
        N, K = module.weight.T.shape if is_transposed else module.weight.shape  # type: ignore[misc]
        block = block_holding(name, self.blocks)
        role = role_of(name.removeprefix(f"{block.name}."), self.family) if block else None
        axis = role if self.config.axis == "hidden" else self.config.axis
        hidden_size = {"input": K, "output": N, None: self.hidden_size}[role]
        bits = self.bits.get(block.name, self.config.bits) if block else self.config.bits
        site = Site(name, "linear", (N, K), axis, bits, is_transposed, hidden_size)
        if block is not None:
            self._check_stream(site, role, self.streams.setdefault(block.stack, site))
        check_r(self.config, N, K, str(axis), name)
        try:
            scale_shape(self.config, N, K, hidden_size)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        return site

    def _check_stream(self, site: Site, role: str | None, first: Site) -> None:
        if site.hidden_size != first.hidden_size:
            verb = "reads" if role == "input" else "writes"
            raise ValueError(
                f"{site.name} {site.shape} {verb} a residual stream of {site.hidden_size} by the family's row, but "
                f"{first.name} {first.shape} says "
                f"{first.hidden_size}: check reads and writes"
            )


def _tied_parameters(model: nn.Module) -> set[int]:
    """Identities of parameters under more than one name, now or once transformers ties them (models on the meta device
    may not be tied yet).
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    uses = Counter(id(parameter) for parameter in parameters.values())
    tied_keys = getattr(model, "all_tied_weights_keys", None) or {}
    named = {id(parameters[name]) for pair in tied_keys.items() for name in pair if name in parameters}
    return named | {identity for identity, count in uses.items() if count > 1}


def _check_exclusions(model: nn.Module, config: PreQuantConfig) -> None:
    names = [name for name, _ in model.named_modules()]
    for entry in config.modules_to_not_convert or ():
        if not any(is_part_of(name, entry) for name in names):
            raise ValueError(f"modules_to_not_convert: {entry!r} matches no module of {type(model).__name__}")


def _unknown_family(model: nn.Module) -> str:
    """The error for a model without a row, with a row that fits its names."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    what = f"model_type {model_type!r}" if model_type else type(model).__name__
    stacks: dict[str, str] = {}
    linears: dict[str, tuple[int, int]] = {}
    for path, blocks in block_lists(model).items():
        within = {
            name.split(".", 1)[1]: module.weight.shape
            for name, module in blocks.named_modules()
            if type(module) is nn.Linear and "." in name
        }
        if within and not any(path.startswith(f"{outer}.") for outer in stacks.values()):
            stacks["decoder" if "decoder" in path else f"stack{len(stacks)}" if stacks else "encoder"] = path
            linears |= within
    sizes = Counter(size for parameter in model.parameters() for size in parameter.shape)
    hidden_size = getattr(getattr(model, "config", None), "hidden_size", None) or (
        sizes.most_common(1)[0][0] if sizes else None
    )
    writes = [name for name, (N, K) in linears.items() if N == hidden_size != K]
    reads = [name for name in linears if name not in writes]
    return (
        f'axis="hidden" needs to know which matrices read and which write the residual stream, and {what} is not '
        f"among {', '.join(FAMILIES)}.\n"
        'Pass axis="input" or axis="output", which need no family, or say it (sorted by shape below: move square '
        "matrices that write to writes):\n\n"
        "from prequant_ext.families import Family\n"
        f"family = Family(\n    stacks={stacks or {'encoder': 'encoder.layers'}!r},\n    "
        f"reads={tuple(reads or ['query', 'key', 'value', 'fc1'])!r},\n"
        f"    writes={tuple(writes or ['out', 'fc2'])!r},\n)\n"
        "quantize_model(model, config, family=family)\n"
    )
