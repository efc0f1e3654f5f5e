"""A Hugging Face `config.json` as a backbone. Every field is accounted for (`hf_fields.py`)."""

from molora_jax.backbones import hf_fields, mamba, rope
from molora_jax.backbones.base import Backbone
from molora_jax.backbones.families import FAMILIES
from molora_jax.errors import InputError

ACTIVATIONS = {  # hidden_act -> ours (kernels_pallas/routed_ffn/activations.py)
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_accurate": "gelu_tanh", "relu": "relu",
}  # fmt: skip


def from_hf(config: dict, *, where: str, note=lambda text: None) -> Backbone:
    """Reads a Hugging Face `config.json`; what it means is what transformers means by it.

    `note` is told of fields that nobody knows.

    Raises:
      InputError: a field that is missing or of the wrong kind, or one that says what the decoder does not have.
    """
    name = config.get("model_type", "")
    if not isinstance(name, str) or name not in FAMILIES:
        raise InputError(
            f"{where}: model_type", got=hf_fields.quoted(name), expected=f"one of {', '.join(FAMILIES)}",
            fix="Choose a model of these families, or add its row to molora_jax/backbones/families.py.",
        )  # fmt: skip
    family, file = FAMILIES[name], where
    meant = family.before(config, where)
    if meant.get("model_type") != name:
        return from_hf(meant, where=where, note=note)
    config = family.defaults | meant

    def number(key, default=None, *, kind=int, source=config, where=""):
        value = source.get(key)
        if value is None and default is not None:
            return kind(default)
        # type(), not isinstance: True is no size
        if type(value) not in (int, kind) or not 0 < value < 1 << 31:
            expected = f"a positive {kind.__name__}"
            raise InputError(where or f"{file}: {key}", got=hf_fields.quoted(value), expected=expected)
        return kind(value)

    heads, width = number("num_attention_heads") if family.heads else 1, number("hidden_size")
    if family.whole is not None:
        _known(config, family, note, where, width // heads or 1)
        activation = _activation(config, where, "gelu" if family.heads else "silu")
        return family.whole(config, family=name, where=where, number=number, activation=activation)
    kv_heads, head_dim = number("num_key_value_heads", heads), number("head_dim", width // heads or 1)
    if heads % kv_heads or head_dim % 2 or (width % heads and config.get("head_dim") is None):
        raise InputError(
            f"{where}: heads", got=f"{heads} heads, {kv_heads} key-value heads of size {head_dim}",
            expected="key-value heads that divide the heads, and an even size",
        )  # fmt: skip
    _known(config, family, note, where, head_dim)
    activation = _activation(config, where, "silu", family.activation)
    if number("num_hidden_layers") > 10_000:
        raise InputError(f"{where}: num_hidden_layers", got=str(number("num_hidden_layers")), expected="at most 10,000")
    partial = "partial_rotary_factor" in family.reads
    r = rope.rotated(config, where=where, head_dim=head_dim) if partial else head_dim
    rope_base, scaling = rope.read(config, where=where, number=number, head_dim=r, partial=partial)
    context = number("max_position_embeddings")
    if scaling is not None and scaling.kind == "dynamic":
        context = int(scaling.factor * context)
    window, sliding = _window(config, family, number, where)
    fields = _biases(config, family, where) | family.derived(config, number, where)
    reached = bool(sliding) and window < context  # else full attention is the same
    local = fields.get("local_base") is not None
    common = dict(
        family=name,
        layers=number("num_hidden_layers"),
        width=width,
        ffn_width=number("intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=number("vocab_size"),
        context=context,
        rope_base=rope_base,
        norm_eps=number("rms_norm_eps", 1e-6, kind=float),
        tied=_flag(config, "tie_word_embeddings", where),
        activation=activation,
        rope_scaling=scaling,
        window=window if reached else None,
        sliding=sliding if reached or local else (),
        rotated=None if r == head_dim else r,
    )
    return family.backbone(**common | fields)


def _known(config, family, note, where, head_dim):
    """Refuses fields that change the numbers in a way that is not implemented; those nobody knows are told."""
    unknown = hf_fields.check(config, where=where, head_dim=head_dim, reads=family.reads)
    if unknown:
        names = ", ".join(map(hf_fields.shown, unknown[:8])) + (", ..." if len(unknown) > 8 else "")
        note(f"{where}: not read: {names}")


def _activation(config, where, default, field="hidden_act") -> str:
    """Our name of the activation that `field` names."""
    activation = config.get(field, default)
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise InputError(
            f"{where}: {field}", got=hf_fields.quoted(activation), expected=f"one of {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[activation]


def _flag(config, key, where) -> bool:
    value = config.get(key)
    if value not in (None, True, False) or isinstance(value, (int, float)) and not isinstance(value, bool):
        raise InputError(f"{where}: {key}", got=hf_fields.shown(value), expected="true or false")
    return bool(value)


def _biases(config, family, where) -> dict:
    """The family's switches, with q, k, v and o biased where `attention_bias` says so and the family reads it."""
    if _flag(config, "mlp_bias", where):
        raise InputError(f"{where}: mlp_bias", got="true", expected="false: gate, up and down have no bias here")
    switches = dict(family.switches)
    if _flag(config, "attention_bias", where) and not switches.get("qkv_bias"):
        if not family.biased:
            raise InputError(f"{where}: attention_bias", got="true", expected="false for this family")
        switches |= dict(qkv_bias=True, o_bias=True)
    return switches


def _window(config, family, number, where) -> tuple[int, tuple[int, ...]]:
    """The sliding window and the layers that slide, none where no layer does."""
    layers, kinds = number("num_hidden_layers"), config.get("layer_types")
    kinds_read = ("full_attention", "sliding_attention")
    if kinds is not None and (not isinstance(kinds, list) or any(kind not in kinds_read for kind in kinds)):
        raise InputError(
            f"{where}: layer_types", got=hf_fields.shown(kinds), expected=f"a list of {', '.join(kinds_read)}"
        )
    if not family.windowed:  # transformers does not read it
        return 0, ()
    gated, typed = family.gated, bool(family.every or family.slides)
    if (gated and not _flag(config, "use_sliding_window", where)) or config.get("sliding_window") is None:
        if gated and typed and kinds and "sliding_attention" in kinds:
            raise InputError(
                f"{where}: layer_types", got="sliding_attention",
                expected="full_attention, for use_sliding_window is off or there is no sliding_window",
                fix="Set the one that is right.",
            )  # fmt: skip
        return 0, ()
    window = number("sliding_window")
    if family.every and kinds is None:
        every = number("sliding_window_pattern", family.every)
        kinds = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)]
    if not typed:
        return window, tuple(range(layers))
    if kinds is not None:
        if len(kinds) != layers:
            raise InputError(f"{where}: layer_types", got=f"{len(kinds)} layers", expected=f"{layers}")
        return window, tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
    return window, family.slides(config, number, where)


def to_hf(backbone: Backbone) -> dict:
    """A `config.json` that `from_hf` and transformers read as this backbone: one of `families.RANDOM`, or like them.

    Raises:
      ValueError: a backbone with what this does not write (a scaled rotation, windows).
    """
    out = mamba.written(backbone) if isinstance(backbone, mamba.Mamba) else _attending(backbone)
    if from_hf(out, where="config.json") != backbone:
        raise ValueError(f"no config.json is written for {backbone}")
    return out


def _attending(backbone: Backbone) -> dict:
    out = {
        "model_type": backbone.family, "num_hidden_layers": backbone.layers, "hidden_size": backbone.width,
        "hidden_act": "silu", "intermediate_size": backbone.ffn_width, "num_attention_heads": backbone.heads,
        "vocab_size": backbone.vocab, "max_position_embeddings": backbone.context,
    }  # fmt: skip
    if backbone.family == "bert":
        out |= {
            "type_vocab_size": backbone.token_types, "layer_norm_eps": backbone.norm_eps,
            "hidden_act": backbone.activation, "architectures": ["BertModel"],
        }  # fmt: skip
    else:
        out |= {
            "num_key_value_heads": backbone.kv_heads, "head_dim": backbone.head_dim, "rms_norm_eps": backbone.norm_eps,
            "rope_theta": backbone.rope_base, "tie_word_embeddings": backbone.tied,
        }  # fmt: skip
    if backbone.family == "mixtral":
        out |= {"num_local_experts": backbone.experts, "num_experts_per_tok": backbone.active, "sliding_window": None}
        out["intermediate_size"] = backbone.expert_width
    named = {"llama": "Llama", "qwen3": "Qwen3", "mixtral": "Mixtral"}.get(backbone.family)
    return out | ({"architectures": [f"{named}ForCausalLM"]} if named else {})
