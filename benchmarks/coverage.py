"""Which networks of timm, torchvision and transformers compile, and how far their outputs are from eager PyTorch's.

    python benchmarks/coverage.py [timm] [torchvision] [transformers] [--only TEXT] [--emit-only] [--json FILE]

One network of every model family, with random weights: the smallest of each module of timm and of each family of
torchvision's classifiers, at small images; the architectures of transformers with two layers of 64 channels. Each is
compiled in a process of its own, verification included. `error`: the largest difference of an output from eager
PyTorch's, on other inputs than those it was compiled with, over how far that output moves from those to these; so
that it says something of what lies in front of the output, weights that begin as next to nothing are larger here
and the statistics of batch normalisation are those of random images. --emit-only: up to the sources, without a
compiler and without outputs. Libraries that are not installed are left out, and said so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import results
import torch

import skive

SIZES = (64, 128, 224, 240, 256)  # of images, the first that a network takes
TOLERANCE = 1e-3
SMALL = ("atto", "femto", "pico", "nano", "xxs", "tiny", "_ti", "xs", "_s0", "mini", "small", "18", "lite0", "b0", "_s")

WIDTHS = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
TEXT = {**WIDTHS, "vocab_size": 99, "pad_token_id": 0}
CAUSAL = {**TEXT, "num_key_value_heads": 2, "max_position_embeddings": 64, "use_cache": False}
EXPERTS = {**CAUSAL, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
           "shared_expert_intermediate_size": 32, "experts_implementation": "batched_mm"}
NARROW = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 99, "n_positions": 64, "use_cache": False}
PATCHES = {**WIDTHS, "image_size": 32, "patch_size": 8}
SPEECH = {**WIDTHS, "conv_dim": [16] * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}


def _tokens() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(3, 90, (1, 12))}


def _masked() -> dict[str, torch.Tensor]:
    return {**_tokens(), "attention_mask": torch.ones(1, 12, dtype=torch.int64)}


def _image(size: int = 32) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(1, 3, size, size)}


def _sound() -> dict[str, torch.Tensor]:
    return {"input_values": torch.randn(1, 4000)}


# architecture of transformers: (class of the model behind its name, configuration, inputs)
TRANSFORMERS: dict[str, tuple[str, dict[str, Any], Callable[[], dict[str, torch.Tensor]]]] = {
    **{name: ("Model", TEXT, _masked) for name in (
        "Bert", "Roberta", "Electra", "Deberta", "DebertaV2", "ConvBert", "RemBert", "RoFormer", "Ernie", "MPNet",
        "Nystromformer", "XLMRoberta", "Camembert", "LayoutLM", "Splinter", "MegatronBert", "Data2VecText")},
    "Albert": ("Model", {**TEXT, "embedding_size": 32}, _masked),
    "MobileBert": ("Model", {**TEXT, "embedding_size": 32, "intra_bottleneck_size": 32}, _masked),
    "SqueezeBert": ("Model", {**TEXT, "embedding_size": 64}, _masked),
    "BigBird": ("Model", {**TEXT, "attention_type": "original_full"}, _masked),
    "ModernBert": ("Model", {**TEXT, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
                   _masked),
    "DistilBert": ("Model", {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, "vocab_size": 99}, _masked),
    **{name: ("ForCausalLM", CAUSAL, _tokens) for name in (
        "Llama", "Mistral", "Qwen2", "Phi", "Phi3", "StableLm", "Olmo", "Olmo2", "Cohere", "Granite", "Starcoder2",
        "Falcon", "Persimmon", "Nemotron", "Arcee", "Lfm2")},
    **{name: ("ForCausalLM", {**CAUSAL, "head_dim": 16}, _tokens) for name in (
        "Gemma", "Gemma2", "Qwen3", "Glm", "Glm4", "Helium", "Exaone4", "SmolLM3")},
    **{name: ("ForCausalLM", EXPERTS, _tokens) for name in ("Mixtral", "Qwen2Moe", "Olmoe")},
    "GPT2": ("LMHeadModel", NARROW, _tokens),
    "GPTJ": ("ForCausalLM", {**NARROW, "rotary_dim": 8}, _tokens),
    "CodeGen": ("ForCausalLM", {**NARROW, "rotary_dim": 8}, _tokens),
    "Bloom": ("ForCausalLM", {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 99, "use_cache": False},
              _tokens),
    "Mamba": ("ForCausalLM", {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 99, "state_size": 8,
                              "use_cache": False}, _tokens),
    "T5": ("EncoderModel", {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 99},
           _masked),
    **{name: ("Model", PATCHES, _image) for name in ("ViT", "DINOv3ViT", "Beit", "Dinov2")},
    **{name: ("VisionModel", PATCHES, _image) for name in ("Siglip", "CLIP", "Blip")},
    "Yolos": ("ForObjectDetection", {**PATCHES, "image_size": [32, 32], "num_detection_tokens": 5}, _image),
    "Segformer": ("ForSemanticSegmentation", {"hidden_sizes": [8, 16, 24, 32], "decoder_hidden_size": 16},
                  lambda: _image(64)),
    "ConvNextV2": ("Model", {**STAGES, "image_size": 64}, lambda: _image(64)),
    "Swin": ("Model", {"image_size": 64, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
             lambda: _image(64)),
    "Wav2Vec2": ("ForCTC", {**SPEECH, "vocab_size": 32}, _sound),
    "Hubert": ("Model", SPEECH, _sound),
    "PatchTST": ("ForPrediction", {"d_model": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64,
                                   "context_length": 64, "patch_length": 8, "patch_stride": 8, "num_input_channels": 3,
                                   "prediction_length": 8}, lambda: {"past_values": torch.randn(1, 64, 3)}),
}


def families(library: str) -> list[str]:
    """The networks of `library` to try, one of each family."""
    if library == "transformers":
        return list(TRANSFORMERS)
    by_family: dict[str, list[str]] = {}
    if library == "timm":
        import timm

        by_family = {module: timm.list_models(module=module) for module in timm.list_modules()}
    else:
        from torchvision import models

        for name in models.list_models(models):
            by_family.setdefault(re.match("[a-z]+", name)[0], []).append(name)  # type: ignore[index]

    def size(name: str) -> tuple[int, int, str]:
        return next((i for i, part in enumerate(SMALL) if part in name), len(SMALL)), len(name), name

    return [min(names, key=size) for names in by_family.values() if names]


def network(library: str, name: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor] | tuple[torch.Tensor, ...]]:
    """A network in evaluation mode, and example inputs for it."""
    torch.manual_seed(0)
    if library == "transformers":
        import transformers

        kind, values, inputs = TRANSFORMERS[name]
        values = dict(values)
        experts = values.pop("experts_implementation", None)
        model = getattr(transformers, name + kind)(
            getattr(transformers, name + ("VisionConfig" if kind == "VisionModel" else "Config"))(**values)).eval()
        if experts:
            model.set_experts_implementation(experts)
        example = inputs()
        return _awake(model, example), example
    problem: Exception | None = None
    for size in SIZES:
        images = (torch.randn(1, 3, size, size),)
        for options in ({"img_size": size}, {}) if library == "timm" else ({},):
            try:
                return _awake(_created(library, name, options).eval(), images), images
            except Exception as e:  # noqa: BLE001 - a size or an option that this network does not take
                problem = e
    assert problem is not None
    raise problem


def _awake(model: torch.nn.Module, example: Any) -> torch.nn.Module:
    """`model` with nothing that hides its other weights: see above."""
    for weight in model.parameters():
        if weight.abs().max() < 1e-3:
            torch.nn.init.normal_(weight, std=0.02)
    statistics = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    for part in statistics:
        part.momentum = None  # all that was seen counts alike
        part.train()
    for _ in range(4 if statistics else 1):  # once in any case: what does not take this size says so here
        _outputs(model, [torch.randn(8, *v.shape[1:]) for v in example] if statistics and isinstance(example, tuple)
                 else example)
    return model.eval()


def _created(library: str, name: str, options: dict[str, Any]) -> torch.nn.Module:
    if library == "timm":
        import timm

        return timm.create_model(name, pretrained=False, **options)
    from torchvision import models

    return models.get_model(name, weights=None)


def _outputs(model: torch.nn.Module, inputs: Any) -> list[np.ndarray]:
    with torch.no_grad():
        value = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    return [v.numpy() for v in torch.utils._pytree.tree_leaves(dict(value) if isinstance(value, dict) else value)
            if isinstance(v, torch.Tensor)]


def _others(example: Any) -> Any:
    """Inputs like `example`; integers in the other order."""
    if isinstance(example, dict):
        return {k: _others((v,))[0] for k, v in example.items()}
    return tuple(torch.randn_like(v) if v.is_floating_point() else v.flip(-1) for v in example)


def tried(library: str, name: str, emit_only: bool) -> dict[str, Any]:
    """One network compiled, and its outputs compared with those of eager PyTorch."""
    model, example = network(library, name)
    others = _others(example)
    before, wanted = _outputs(model, example), _outputs(model, others)
    row: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    start = time.perf_counter()
    try:
        module = skive.compile(model, example_inputs=example, emit_only=emit_only)
    except skive.SkiveError as e:
        return row | {"refused": str(e)}
    row["seconds"] = round(time.perf_counter() - start, 1)
    if emit_only:
        return row
    got = module(*(v.numpy() for v in (others.values() if isinstance(others, dict) else others)))
    got = list(got) if isinstance(got, (tuple, list)) else [got]
    if [g.shape for g in got] != [w.shape for w in wanted]:
        return row | {"error": float("inf")}
    errors = [abs(g - w).max() / max(abs(w - b).max(), 1e-30) for g, w, b in zip(got, wanted, before, strict=True)]
    return row | {"error": float(np.max(errors))}  # NaN stays


def in_own_process(library: str, name: str, emit_only: bool, limit: float) -> dict[str, Any]:
    command = [sys.executable, __file__, library, "--one", name, *["--emit-only"] * emit_only]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"crashed": f"not done after {limit:g} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"crashed": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    return json.loads(lines[-1])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("libraries", nargs="*", default=["timm", "torchvision", "transformers"])
    parser.add_argument("--only", default="", metavar="TEXT", help="networks with TEXT in their names")
    parser.add_argument("--emit-only", action="store_true")
    parser.add_argument("--limit", type=float, default=600, metavar="SECONDS", help="for one network")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.one:
        warnings.simplefilter("ignore")
        print(json.dumps(tried(asked.libraries[0], asked.one, asked.emit_only)))
        return 0
    rows = []
    for library in asked.libraries:
        if importlib.util.find_spec(library) is None:
            print(f"{library} is not installed: left out")
            continue
        for name in families(library):
            if asked.only in name:
                rows.append({"library": library, "name": name,
                             **in_own_process(library, name, asked.emit_only, asked.limit)})
                print(f"{library:13} {name:34} {_verdict(rows[-1])}", flush=True)
        own = [r for r in rows if r["library"] == library]
        print(f"{library}: {sum(_good(r) for r in own)} of {len(own)}")
    if asked.json:
        results.write(asked.json, rows)
    return 0 if rows and all(map(_good, rows)) else 1


def _good(row: dict[str, Any]) -> bool:
    return "seconds" in row and row.get("error", 0.0) <= TOLERANCE


def _verdict(row: dict[str, Any]) -> str:
    if problem := row.get("refused") or row.get("crashed"):
        return ("refused: " if "refused" in row else "crashed: ") + problem
    return f"{row['seconds']:6.1f} s" + (f"   error {row['error']:.1e}" if "error" in row else "")


if __name__ == "__main__":
    sys.exit(main())
