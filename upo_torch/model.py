"""A frozen transformers model with PEFT's LoRA layers: loading, targets, hidden states, head, recomputation."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from upo.adapters import Adapter, lora_name
from upo.data.forest import Layout
from upo.data.packed import Packed
from upo.errors import ConfigError, ModelError, UpoError
from upo.models import NOT_FINITE, is_quantized_mlx, model_config, quantised_by
from upo.repair import for_torch
from upo.targets import some
from upo_torch.attention import Attention
from upo_torch.device import check_quantize
from upo_torch.lora import LowRank, forward_of

POLICY, REFERENCE = "default", "reference"  # PEFT's name of the adapter to train, and how those of references begin


@dataclass(frozen=True)
class Head:
    """The model's output layer, with the scale or soft cap that some families apply to its logits."""

    linear: nn.Module
    width: int  # V
    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 logits [m, V] of hidden states [m, H]."""
        logits = self.linear(hidden).float()
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class Model:
    """The network: `net` as transformers built it, its `decoder` (ids -> hidden states after the final norm) and its `head`.

    `policy` holds the float32 masters that are trained, by PEFT parameter name; without `add_policy` it is empty.
    """

    def __init__(self, net: Any, device: torch.device) -> None:
        self.net, self.device = net, device
        self.decoder, self.head = _split(net)
        self.attention = Attention(self.decoder)
        self.policy: dict[str, nn.Parameter] = {}
        self.scale = 0.0
        self._peft: Any = None
        self._references: list[str | None] = []  # PEFT's name of each reference's adapter; None for the base

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return int(self.net.config.get_text_config().num_hidden_layers)

    def linears(self) -> dict[str, nn.Linear]:
        """Every linear layer of the decoder but head and routers, by path; of an adapted one, the layer beneath.

        Phi-MoE's router is a kind of linear layer that returns more than its product, which no adapter can be added to.
        """
        prefix = next(name for name, module in self.net.named_modules() if module is self.decoder)
        found: dict[str, nn.Linear] = {}
        for name, module in self.net.named_modules():
            parts = name.split(".")
            if name.startswith(f"{prefix}.") and isinstance(module, nn.Linear) and not type(module).__name__.endswith("Router"):
                found[".".join(parts[:-1]) if parts[-1] == "base_layer" else name] = module
        return dict(sorted(found.items()))

    def dims(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of every linear layer of the decoder, by path."""
        return {path: (layer.in_features, layer.out_features) for path, layer in self.linears().items()}

    def add_policy(self, adapter: Adapter) -> None:
        """The adapter to train."""
        self.policy, self.scale = self._add(POLICY, adapter), adapter.scale

    def add_reference(self, adapter: Adapter | None) -> None:
        """Another reference: the base, or a frozen adapter, in use inside `reference()` only."""
        name = None if adapter is None else f"{REFERENCE}_{len(self._references)}"
        self._references.append(name)
        if name is not None and adapter is not None:
            self._add(name, adapter)
            self._peft.set_adapter(POLICY)

    def _add(self, name: str, adapter: Adapter) -> dict[str, nn.Parameter]:
        from peft import LoraConfig, get_peft_model

        config: Any = LoraConfig(r=adapter.rank, lora_alpha=adapter.scale * adapter.rank, target_modules=list(adapter.targets), task_type="CAUSAL_LM")  # type: ignore[arg-type]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft calls what transformers has renamed
            # PEFT's matrices stay on the meta device, drawing no random numbers, and are replaced below.
            try:
                if self._peft is None:
                    self._peft = get_peft_model(self.net, config, adapter_name=name, autocast_adapter_dtype=False, low_cpu_mem_usage=True)
                else:
                    self._peft.add_adapter(name, config, low_cpu_mem_usage=True, autocast_adapter_dtype=False)
            except ValueError:  # PEFT's own word for some of what follows
                pass
        # In some mixtures of experts PEFT takes names like gate_proj for the experts', wherever they stand.
        if lost := [path for path in adapter.targets if not hasattr(self.net.get_submodule(path), "lora_A")]:
            names = {path.rpartition(".")[2] for path in adapter.targets} - {path.rpartition(".")[2] for path in lost}
            raise ModelError(
                f"adapter.targets: PEFT puts no adapter on {some(lost)} of {type(self.net).__name__}. "
                f"Name other layers: adapter.targets: [{', '.join(sorted(names))}]"
            )
        params = {}
        for path in adapter.targets:
            layer: Any = self.net.get_submodule(path)
            layer.cast_input_dtype_enabled = False
            if type(layer.base_layer) is nn.Linear:  # packed weights have a product of their own
                layer.forward = forward_of(layer)
            for side, matrices in (("A", layer.lora_A), ("B", layer.lora_B)):
                matrices[name] = LowRank(adapter.arrays[lora_name(path, side)], self.device)
                params[lora_name(path, side)] = matrices[name].weight
        return params

    @contextmanager
    def reference(self, index: int) -> Iterator[None]:
        """Compute as the reference of this index inside the block: with its adapter, or with none."""
        if self._peft is None:
            yield
            return
        try:
            if (name := self._references[index]) is not None:
                self._peft.set_adapter(name)
            else:
                self._peft.base_model.disable_adapter_layers()
            yield
        finally:
            self._peft.base_model.enable_adapter_layers()
            self._peft.set_adapter(POLICY)

    def recomputable(self) -> list[Any]:
        """The modules that run their layers through gradient checkpointing when told to; none in families that do not support it."""
        return [m for m in self.decoder.modules() if hasattr(m, "gradient_checkpointing")]

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """Gradient checkpointing inside the block: each decoder layer keeps its input and is run again in the backward pass.

        transformers checkpoints a layer whose `training` flag is set. The flag is set on that module alone, so that nothing inside it
        starts to drop out.
        """
        modules = self.recomputable()
        if not modules:
            raise ConfigError(f"train.gradient_checkpointing: {type(self.net).__name__} does not support it. Set it to false and lower train.micro_batch_tokens.")
        try:
            for module in modules:
                module._gradient_checkpointing_func = partial(
                    checkpoint, use_reentrant=False, preserve_rng_state=False, context_fn=self.attention.recomputing
                )
                module.gradient_checkpointing = module.training = True
            yield
        finally:
            for module in modules:
                module.gradient_checkpointing = module.training = False

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """[B * T, H] after the final norm, for token ids [B, T] under a causal mask."""
        return self.decoder(input_ids=ids, use_cache=False)[0].flatten(0, 1)

    def hidden_of(self, layout: Layout) -> torch.Tensor:
        """[B * T, H] after the final norm, for the tokens of a layout, each seeing what its text holds before it."""
        ids = torch.from_numpy(layout.ids.astype(np.int64)).to(self.device)
        if not isinstance(layout, Packed):
            return self.hidden(ids)
        with self.attention.over(layout):
            # With a mask of ones, transformers does not take the jumps in the positions for borders between texts.
            positions = torch.from_numpy(layout.positions).to(self.device)
            return self.decoder(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions, use_cache=False)[0].flatten(0, 1)

    @torch.no_grad()
    def check(self) -> None:
        """Raise ModelError unless decoder and head put together give the network's own logits on a short sequence."""
        ids = torch.arange(2, 9, device=self.device)[None]
        own = self.net(input_ids=ids, use_cache=False).logits[0].float()
        ours = self.head(self.hidden(ids))
        difference, size = float((own - ours).abs().max()), float(own.abs().max())
        close = 1e-3 if self.net.dtype == torch.float32 else 2e-2  # the soft cap is computed in float32 here, in 16 bits there
        if not np.isfinite(size):
            raise ModelError(f"model: {NOT_FINITE}")
        if not difference <= close * max(size, 1.0):
            raise ModelError(
                f"model: self-check failed: the logits of {type(self.net).__name__} differ by {difference:.2g} from those of its decoder and "
                f"output layer put together (largest logit {size:.2g}). This family is not supported yet; please report it."
            )


def _split(net: Any) -> tuple[nn.Module, Head]:
    """Decoder and head of a causal language model."""
    decoder, linear, config = net.get_decoder(), net.get_output_embeddings(), net.config.get_text_config()
    if decoder is net or not isinstance(linear, nn.Linear):
        raise ModelError(f"model: {type(net).__name__} has no decoder and linear output layer that upo can tell apart. Use another model.")
    scale = float(getattr(config, "logit_scale", None) or 1.0) * float(getattr(config, "lm_head_multiplier", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    return decoder, Head(linear, linear.out_features, scale, getattr(config, "final_logit_softcapping", None))


def load_base(folder: Path, dtype: torch.dtype, device: torch.device, quantize: str = "none", tokens: int = 0) -> tuple[Any, list[str]]:
    """The frozen network of a folder that `upo.models.resolve` has checked, with its rope configuration repaired for sequences of up to
    `tokens`; and notes.

    Raises ModelError, or BackendError for a quantisation that this device does not have.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    raw, notes = model_config(folder)
    if is_quantized_mlx(raw):
        raise ModelError(f"{folder}: an MLX {raw['quantization'].get('bits')}-bit model. Use --backend mlx, or the original model with quantize: nf4 on CUDA.")
    kind = known_kind(folder, raw)
    if method := quantised_by(raw):  # most of their kernels have no backward pass, or a wrong one, and none says so
        raise ModelError(f"{folder}: is quantised ({method}), and upo does not train on that. Use the original model, on CUDA with quantize: nf4 if you like.")
    try:
        raw, told = for_torch(raw, tokens)
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from None
    notes += told
    options: dict[str, Any] = {}
    check_quantize(quantize, device)
    if quantize == "nf4":
        options = _nf4(dtype, device)
    with loading(folder, "this model"):
        config = CONFIG_MAPPING[kind].from_dict(_without_dropout(raw))
        if config.is_encoder_decoder:
            raise ModelError(f"{folder}: {kind} is an encoder-decoder; upo trains decoder-only language models. Use another model.")
        load: Any = AutoModelForCausalLM.from_pretrained
        net, loaded = load(folder, config=config, dtype=dtype, **SAFELY, **attention_of(config), **options)
    absent = absent_of(loaded)
    if absent:
        raise ModelError(f"{folder}: the weights lack {some(absent)}, or have them in another shape. The download is incomplete, or config.json is another model's.")
    if loaded["unexpected_keys"]:
        notes.append(f"model: weights that {type(net).__name__} does not use: {some(sorted(loaded['unexpected_keys']))}.")
    if not options:
        net = net.to(device)
    return net.requires_grad_(False).eval(), notes


# Nothing of a folder is executed. Weights in another shape are reported, and then refused by the caller.
SAFELY = {"use_safetensors": True, "trust_remote_code": False, "local_files_only": True, "output_loading_info": True, "ignore_mismatched_sizes": True}


def attention_of(config: Any) -> dict[str, str]:
    """How to load a family with a soft cap on its scores: the fused kernel of transformers 5.17 leaves the cap out without a word, 5.23's refuses it."""
    return {"attn_implementation": "eager"} if getattr(config.get_text_config(), "attn_logit_softcapping", None) else {}


def known_kind(folder: Path, config: dict[str, Any]) -> str:
    """The model_type of a configuration. Raises ModelError if this transformers does not have it."""
    from transformers import CONFIG_MAPPING

    kind = str(config.get("model_type"))
    if kind not in CONFIG_MAPPING:
        raise ModelError(f"{folder / 'config.json'}: model_type {kind!r} is unknown to this transformers. Update it: pip install -U transformers")
    return kind


@contextmanager
def loading(folder: Path, what: str) -> Iterator[None]:
    """Around calls of transformers that read a folder: quiet, and whatever they raise is a ModelError of one line."""
    try:
        with quiet():
            yield
    except UpoError:
        raise
    except Exception as error:  # transformers and what it calls raise of every kind
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(f"{folder}: transformers cannot load {what} ({reason}). Use another model, or update transformers.") from None


def absent_of(loaded: dict[str, Any]) -> list[str]:
    """Weights that a folder lacks or has in another shape, by transformers' report."""
    return sorted({*loaded["missing_keys"], *(key[0] for key in loaded["mismatched_keys"])})


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without its progress bar and its report on the weights, which is told in our words."""
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    try:
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _nf4(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    from transformers import BitsAndBytesConfig

    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True)
    return {"quantization_config": quantised, "device_map": {"": device.index}}


def _without_dropout(config: dict[str, Any]) -> dict[str, Any]:
    """Dropout off wherever a configuration names it: policy and reference must score alike, and the backends too."""
    off = {key: 0.0 for key, value in config.items() if "drop" in key and isinstance(value, float)}  # ..._dropout, resid_pdrop, layerdrop
    return {key: _without_dropout(value) if isinstance(value, dict) else value for key, value in {**config, **off}.items()}


def parameter_count(net: Any) -> int:
    """Weights of the network, packed quantised ones counted singly. Call it before adapters are added."""
    return sum(p.quant_state.shape.numel() if hasattr(p, "quant_state") else p.numel() for p in net.parameters())


def has_experts(model: Model) -> bool:
    """Whether tokens are sent to experts, each a slice of one three-dimensional weight."""
    return any(p.dim() == 3 and "expert" in name for name, p in model.net.named_parameters())


def family_notes(model: Model) -> list[str]:
    """What a user should know about where the adapter sits."""
    notes = []
    if has_experts(model):
        notes.append("adapter: the experts of this mixture-of-experts model and what chooses among them carry no adapter; its other linear layers do.")
    if model.net.config._attn_implementation == "eager":
        notes.append(f"attention: transformers has no fused kernel for {type(model.net).__name__}; memory grows with the square of the length.")
    return notes
