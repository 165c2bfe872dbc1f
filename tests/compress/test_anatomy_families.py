"""The anatomy of many families against facts that were written down by hand from their sources.

A fact names, for every block: its path, (heads, heads of keys and values, head width), query/key/value/out, up/gate/down
(a dash: there is none; one name: fused), and for the model: joins, head, and every layer that is left without a role.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from pathlib import Path

import pytest
from families import build
from sweeps import swept

from compress.anatomy import Anatomy, Block, find

TABLE = Path(__file__).with_name("families.md")
ATTENTION = ("attention.query", "attention.key", "attention.value", "attention.out")
MLP = ("mlp.up", "mlp.gate", "mlp.down")


@dataclass(frozen=True)
class Expected:
    path: str
    heads: tuple[int, int, int] | None
    attention: str
    mlp: str


@dataclass(frozen=True)
class Facts:
    blocks: list[Expected]
    joins: int
    head: str = ""
    unplaced: str = ""
    note: str = ""
    """What is not found, where something is not."""


def stack(path: str, count: int, heads: tuple[int, int, int] | None, attention: str, mlp: str) -> list[Expected]:
    return [Expected(path.format(index), heads, attention, mlp) for index in range(count)]


def fused(qkv: str, out: str) -> str:
    return f"{qkv} {qkv} {qkv} {out}"


H = (4, 4, 8)
BERT = (
    "attention.self.query attention.self.key attention.self.value attention.output.dense",
    "intermediate.dense - output.dense",
)
LLAMA = ("self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj", "mlp.up_proj mlp.gate_proj mlp.down_proj")
VIT = ("attention.q_proj attention.k_proj attention.v_proj attention.o_proj", "mlp.fc1 - mlp.fc2")
CLIP = ("self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj", "mlp.fc1 - mlp.fc2")
TIMM = (fused("attn.qkv", "attn.proj"), "mlp.fc1 - mlp.fc2")
SEPARATE_KV = ("attn.q attn.kv attn.kv attn.proj", "mlp.fc1 - mlp.fc2")
NONE = "- - - -"
NO_MLP = "- - -"


def _t5(mlp: str) -> Facts:
    names = "layer.0.SelfAttention."
    attention = " ".join(names + letter for letter in "qkvo")
    return Facts(stack("encoder.block.{}", 2, H, attention, mlp), 4)


def _staged(path: str, heads: list[tuple[int, int, int]], attention: str, mlp: str) -> list[Expected]:
    """One block a stage."""
    return [Expected(path.format(stage), heads[stage], attention, mlp) for stage in range(len(heads))]


PYRAMID = [(1, 1, 16), (2, 2, 16), (2, 2, 16), (4, 4, 16)]

_LEVIT = fused("module.queries_keys_values.linear", "module.projection.linear")
_LEVIT_MLP = "module.linear_up.linear - module.linear_down.linear"
_TIMM_LEVIT = (fused("attn.qkv.linear", "attn.proj.ln.linear"), "mlp.ln1.linear - mlp.ln2.linear")
_FORMER2 = "mlp.fc1.conv - mlp.fc2.conv"
_FORMER2_ATTENTION = "token_mixer.q.conv token_mixer.k.conv token_mixer.v.conv token_mixer.proj.conv"
_TIMM_LEVIT_REDUCED = (
    "attn_downsample.q.ln.linear attn_downsample.kv.linear attn_downsample.kv.linear attn_downsample.proj.ln.linear",
    _TIMM_LEVIT[1],
)

FACTS: dict[str, Facts] = {
    "bert": Facts(stack("bert.encoder.layer.{}", 2, H, *BERT), 4, "bert.pooler.dense classifier"),
    "bert_eager": Facts(stack("bert.encoder.layer.{}", 2, H, *BERT), 4, "bert.pooler.dense classifier"),
    "bert_mlm": Facts(
        stack("bert.encoder.layer.{}", 2, H, *BERT), 4, "cls.predictions.transform.dense cls.predictions.decoder"
    ),
    "sentence_bert": Facts(
        stack("encoder.layer.{}", 2, H, *BERT), 4, unplaced="pooler.dense", note="pooler: the output does not read it"
    ),
    "roberta": Facts(stack("roberta.encoder.layer.{}", 2, H, *BERT), 4, "classifier.dense classifier.out_proj"),
    "xlm_roberta": Facts(stack("roberta.encoder.layer.{}", 2, H, *BERT), 4, "classifier.dense classifier.out_proj"),
    "camembert": Facts(stack("roberta.encoder.layer.{}", 2, H, *BERT), 4, "classifier.dense classifier.out_proj"),
    "electra": Facts(stack("electra.encoder.layer.{}", 2, H, *BERT), 4, "classifier.dense classifier.out_proj"),
    "layoutlm": Facts(stack("layoutlm.encoder.layer.{}", 2, H, *BERT), 4, "layoutlm.pooler.dense classifier"),
    "esm": Facts(
        stack("esm.encoder.layer.{}", 2, H, *BERT), 4, "classifier.dense classifier.out_proj",
        unplaced="esm.contact_head.regression", note="contact head: the output does not read it",
    ),
    "distilbert": Facts(
        stack(
            "distilbert.transformer.layer.{}", 2, H,
            "attention.q_lin attention.k_lin attention.v_lin attention.out_lin", "ffn.lin1 - ffn.lin2",
        ),
        4, "pre_classifier classifier",
    ),
    "albert": Facts(
        stack(
            "albert.encoder.albert_layer_groups.0.albert_layers.{}", 1, H,
            "attention.query attention.key attention.value attention.dense", "ffn - ffn_output",
        ),
        4, "albert.pooler classifier",
    ),
    "deberta_v2": Facts(
        stack(
            "deberta.encoder.layer.{}", 2, H,
            "attention.self.query_proj attention.self.key_proj attention.self.value_proj attention.output.dense", BERT[1],
        ),
        4, "pooler.dense classifier",
    ),
    "deberta": Facts(
        stack("deberta.encoder.layer.{}", 2, H, fused("attention.self.in_proj", "attention.output.dense"), BERT[1]),
        4, "pooler.dense classifier", unplaced="deberta.encoder.layer.*.attention.self.pos_*proj",
        note="projections of relative positions",
    ),
    "mpnet": Facts(
        stack(
            "mpnet.encoder.layer.{}", 2, H,
            "attention.attn.q attention.attn.k attention.attn.v attention.attn.o", BERT[1],
        ),
        4, "classifier.dense classifier.out_proj",
    ),
    "modernbert": Facts(
        stack("model.layers.{}", 2, H, fused("attn.Wqkv", "attn.Wo"), "mlp.Wi mlp.Wi mlp.Wo"), 4, "head.dense classifier"
    ),
    "mobilebert": Facts(
        stack(
            "mobilebert.encoder.layer.{}", 2, (4, 4, 4), BERT[0],
            "ffn.0.intermediate.dense+intermediate.dense - ffn.0.output.dense+output.dense",
        ),
        6, "mobilebert.pooler.dense classifier", unplaced="mobilebert.encoder.layer.*.*bottleneck*.dense",
        note="bottlenecks in and out of a block",
    ),
    "squeezebert": Facts(
        stack(
            "transformer.encoder.layers.{}", 2, H,
            "attention.query attention.key attention.value post_attention.conv1d", "intermediate.conv1d - output.conv1d",
        ),
        4, "transformer.pooler.dense classifier",
    ),
    "funnel": Facts(
        stack(
            "funnel.encoder.blocks.{}.0", 2, H,
            "attention.q_head attention.k_head attention.v_head attention.post_proj", "ffn.linear_1 - ffn.linear_2",
        ),
        4, "classifier.linear_hidden classifier.linear_out", unplaced="funnel.encoder.blocks.*.attention.*",
        note="parameters of relative positions and segments",
    ),
    "convbert": Facts(
        stack(
            "convbert.encoder.layer.{}", 2, (2, 2, 8),
            "attention.self.query attention.self.key attention.self.value+attention.self.conv_out_layer "
            "attention.output.dense", BERT[1],
        ),
        4, "classifier.dense classifier.out_proj", unplaced="convbert.encoder.layer.*.attention.self.conv_kernel_layer",
        note="the layer that makes the convolution kernels",
    ),
    "fnet": Facts(
        stack("fnet.encoder.layer.{}", 2, None, NONE, BERT[1]), 2, "fnet.pooler.dense classifier",
        note="the Fourier mixing has no weights; its joins",
    ),
    "t5_encoder": _t5("layer.1.DenseReluDense.wi - layer.1.DenseReluDense.wo"),
    "mt5_encoder": _t5("layer.1.DenseReluDense.wi_1 layer.1.DenseReluDense.wi_0 layer.1.DenseReluDense.wo"),
    "clip_text": Facts(stack("text_model.encoder.layers.{}", 2, H, *CLIP), 4, "text_projection"),
    "torch_encoder": Facts(
        stack("encoder.layers.{}", 2, H, fused("self_attn.in_proj_weight", "self_attn.out_proj"), "linear1 - linear2"),
        4, "classifier",
    ),
    "detr_like": Facts(
        stack(
            "layers.{}", 2, H,
            "self_attention.to_q+cross_attention.to_q self_attention.to_kv+cross_attention.to_kv "
            "self_attention.to_kv+cross_attention.to_kv self_attention.proj+cross_attention.proj", "fc1 - fc2",
        ),
        6, "head",
    ),
    "gpt2": Facts(
        stack("transformer.h.{}", 2, H, fused("attn.c_attn", "attn.c_proj"), "mlp.c_fc - mlp.c_proj"), 4, "lm_head"
    ),
    "gpt2_eager": Facts(
        stack("transformer.h.{}", 2, H, fused("attn.c_attn", "attn.c_proj"), "mlp.c_fc - mlp.c_proj"), 4, "lm_head"
    ),
    "opt": Facts(stack("model.decoder.layers.{}", 2, H, CLIP[0], "fc1 - fc2"), 4, "lm_head"),
    "llama": Facts(stack("model.layers.{}", 2, (4, 2, 8), *LLAMA), 4, "lm_head"),
    "llama_eager": Facts(stack("model.layers.{}", 2, (4, 2, 8), *LLAMA), 4, "lm_head"),
    "qwen2": Facts(stack("model.layers.{}", 2, (4, 2, 8), *LLAMA), 4, "lm_head"),
    "qwen3": Facts(stack("model.layers.{}", 2, (4, 2, 16), *LLAMA), 4, "lm_head"),
    "mistral": Facts(stack("model.layers.{}", 2, (4, 2, 8), *LLAMA), 4, "lm_head"),
    "gemma": Facts(stack("model.layers.{}", 2, (4, 1, 8), *LLAMA), 4, "lm_head"),
    "gemma2": Facts(stack("model.layers.{}", 2, (4, 2, 8), *LLAMA), 4, "lm_head"),
    "olmo2": Facts(stack("model.layers.{}", 2, (4, 2, 8), *LLAMA), 4, "lm_head"),
    "phi": Facts(
        stack(
            "model.layers.{}", 2, H, "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.dense", "mlp.fc1 - mlp.fc2"
        ),
        2, "lm_head",
    ),
    "phi3": Facts(
        stack(
            "model.layers.{}", 2, (4, 2, 8), fused("self_attn.qkv_proj", "self_attn.o_proj"),
            "mlp.gate_up_proj mlp.gate_up_proj mlp.down_proj",
        ),
        4, "lm_head",
    ),
    "cohere": Facts(stack("model.layers.{}", 2, (4, 2, 8), *LLAMA), 4, "lm_head"),
    "mixtral": Facts(
        stack(
            "model.layers.{}", 2, (4, 2, 8), LLAMA[0],
            "mlp.experts.gate_up_proj mlp.experts.gate_up_proj mlp.experts.down_proj",
        ),
        4, "lm_head", unplaced="model.layers.*.mlp.gate", note="the router",
    ),
    "bart": Facts(
        [
            *stack("encoder.layers.{}", 2, H, CLIP[0], "fc1 - fc2"),
            *stack(
                "decoder.layers.{}", 2, H,
                " ".join(f"self_attn.{name}+encoder_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")),
                "fc1 - fc2",
            ),
        ],
        10,
    ),
    "xlnet": Facts(
        stack(
            "transformer.layer.{}", 2, H, "rel_attn.q rel_attn.k rel_attn.v rel_attn.o", "ff.layer_1 - ff.layer_2"
        ),
        4, "sequence_summary.summary logits_proj", unplaced="transformer.layer.*.rel_attn.r",
        note="the parameter of relative positions",
    ),
    "gpt_neox": Facts(
        stack(
            "gpt_neox.layers.{}", 2, H, fused("attention.query_key_value", "attention.dense"),
            "mlp.dense_h_to_4h - mlp.dense_4h_to_h",
        ),
        2, "lm_head",
    ),
    "gpt_neo": Facts(
        stack(
            "transformer.h.{}", 2, H,
            "attn.attention.q_proj attn.attention.k_proj attn.attention.v_proj attn.attention.out_proj",
            "mlp.c_fc - mlp.c_proj",
        ),
        4, "lm_head",
    ),
    "gptj": Facts(
        stack(
            "transformer.h.{}", 2, H, "attn.q_proj attn.k_proj attn.v_proj attn.out_proj", "mlp.fc_in - mlp.fc_out"
        ),
        2, "lm_head",
    ),
    "bloom": Facts(
        stack(
            "transformer.h.{}", 2, H, fused("self_attention.query_key_value", "self_attention.dense"),
            "mlp.dense_h_to_4h - mlp.dense_4h_to_h",
        ),
        4, "lm_head",
    ),
    "falcon": Facts(
        stack(
            "transformer.h.{}", 2, (4, 1, 8), fused("self_attention.query_key_value", "self_attention.dense"),
            "mlp.dense_h_to_4h - mlp.dense_4h_to_h",
        ),
        2, "lm_head",
    ),
    "vit": Facts(stack("vit.layers.{}", 2, H, *VIT), 4, "classifier"),
    "vit_eager": Facts(stack("vit.layers.{}", 2, H, *VIT), 4, "classifier"),
    "vit_mae": Facts(stack("layers.{}", 2, H, *VIT), 4),
    "vit_msn": Facts(stack("vit.layers.{}", 2, H, *VIT), 4, "classifier"),
    "deit": Facts(stack("deit.layers.{}", 2, H, *VIT), 4, "cls_classifier distillation_classifier"),
    "beit": Facts(stack("beit.layers.{}", 2, H, *VIT), 4, "classifier"),
    "dinov2": Facts(stack("dinov2.encoder.layer.{}", 2, H, *VIT), 4, "classifier"),
    "dinov2_swiglu": Facts(
        stack("dinov2.encoder.layer.{}", 2, H, VIT[0], "mlp.up_proj mlp.gate_proj mlp.down_proj"), 4, "classifier"
    ),
    "clip_vision": Facts(stack("vision_model.encoder.layers.{}", 2, H, *CLIP), 4, "visual_projection"),
    "siglip_vision": Facts(
        [
            *stack("encoder.layers.{}", 2, H, *CLIP),
            Expected("head", H, fused("attention.in_proj_weight", "attention.out_proj"), "mlp.fc1 - mlp.fc2"),
        ],
        5,
    ),
    "swin": Facts(
        [
            *stack("swin.encoder.layers.0.blocks.{}", 2, (2, 2, 8), *VIT),
            *stack("swin.encoder.layers.1.blocks.{}", 2, (4, 4, 8), *VIT),
        ],
        8, "classifier", unplaced="swin.encoder.layers.*.downsample.reduction", note="patch merging",
    ),
    "swinv2": Facts(
        [
            *stack("swinv2.encoder.layers.0.blocks.{}", 2, (2, 2, 8), *BERT),
            *stack("swinv2.encoder.layers.1.blocks.{}", 2, (4, 4, 8), *BERT),
        ],
        8, "classifier",
        unplaced="swinv2.encoder.layers.*.downsample.reduction swinv2.encoder.*.continuous_position_bias_mlp.*",
        note="patch merging; the MLP that makes position biases",
    ),
    "pvt": Facts(
        _staged(
            "pvt.encoder.block.{}.0", PYRAMID, BERT[0].replace("output.dense", "output.dense"), "mlp.dense1 - mlp.dense2"
        ),
        8, "classifier",
    ),
    "pvt_v2": Facts(
        _staged(
            "pvt_v2.encoder.layers.{}.blocks.0", PYRAMID,
            "attention.query attention.key attention.value attention.proj", "mlp.dense1 - mlp.dense2",
        ),
        8, "classifier",
    ),
    "segformer": Facts(_staged("segformer.stages.{}.blocks.0", PYRAMID, *VIT), 8, "classifier"),
    "segformer_semantic": Facts(
        _staged("segformer.stages.{}.blocks.0", PYRAMID, *VIT), 8,
        "decode_head.linear_projections.0.proj decode_head.linear_projections.1.proj "
        "decode_head.linear_projections.2.proj decode_head.linear_projections.3.proj decode_head.classifier",
    ),
    "hiera": Facts(
        _staged("hiera.encoder.stages.{}.layers.0", [(1, 1, 16), (2, 2, 16), (4, 4, 16), (8, 8, 16)], *TIMM), 5,
        "classifier", unplaced="hiera.encoder.stages.*.layers.0.proj",
        note="projections beside a block that widens; the joins that they feed",
    ),
    "cvt": Facts(
        [
            *stack("cvt.encoder.stages.0.layers.{}", 1, (1, 1, 16), *(_CVT := (
                "attention.attention.projection_query attention.attention.projection_key "
                "attention.attention.projection_value attention.output.dense", "intermediate.dense - output.dense"))),
            *stack("cvt.encoder.stages.1.layers.{}", 2, (2, 2, 16), *_CVT),
            *stack("cvt.encoder.stages.2.layers.{}", 3, (4, 4, 16), *_CVT),
        ],
        12, "classifier",
    ),
    "levit": Facts(
        [
            Expected(f"levit.encoder.stages.{stage}.layers.{i}", *layer)
            for stage, (kept, reduced) in enumerate((((2, 2, 8), (4, 4, 8)), ((3, 3, 8), (6, 6, 8)), ((4, 4, 8), None)))
            for i, layer in enumerate((
                (kept, _LEVIT, NO_MLP), (None, NONE, _LEVIT_MLP), (kept, _LEVIT, NO_MLP), (None, NONE, _LEVIT_MLP),
                (reduced, "queries.linear keys_values.linear keys_values.linear projection.linear", NO_MLP),
                (None, NONE, _LEVIT_MLP),
            ))
            if i < 4 or reduced
        ],
        14, "classifier.linear classifier_distill.linear",
    ),
    "mobilevit": Facts(
        [
            *stack("mobilevit.encoder.layer.2.transformer.layer.{}", 2, (4, 4, 6), *(_MOBILE := (
                "attention.attention.query attention.attention.key attention.attention.value attention.output.dense",
                "intermediate.dense - output.dense"))),
            *stack("mobilevit.encoder.layer.3.transformer.layer.{}", 4, (4, 4, 8), *_MOBILE),
            *stack("mobilevit.encoder.layer.4.transformer.layer.{}", 3, (4, 4, 10), *_MOBILE),
        ],
        21, "classifier",
    ),
    "mobilevitv2": Facts(
        [
            *stack("mobilevitv2.encoder.layer.2.transformer.layer.{}", 1, (1, 1, 8), *(_SEPARABLE := (
                fused("attention.qkv_proj.convolution", "attention.out_proj.convolution"),
                "ffn.conv1.convolution - ffn.conv2.convolution"))),
            *stack("mobilevitv2.encoder.layer.3.transformer.layer.{}", 2, (1, 1, 8), *_SEPARABLE),
            *stack("mobilevitv2.encoder.layer.4.transformer.layer.{}", 1, (1, 1, 8), *_SEPARABLE),
        ],
        10, "classifier",
    ),
    "poolformer": Facts(
        [Expected(f"poolformer.encoder.block.{i}.0", None, NONE, "output.conv1 - output.conv2") for i in range(4)],
        8, "classifier",
    ),
    "convnextv2": Facts(
        [Expected(f"convnextv2.encoder.stages.{i}.layers.0", None, NONE, "pwconv1 - pwconv2") for i in range(4)],
        4, "classifier",
    ),
    "timm_vit": Facts(stack("blocks.{}", 2, (3, 3, 64), *TIMM), 4, "head"),
    "timm_vit_qknorm": Facts(stack("blocks.{}", 2, (3, 3, 64), *TIMM), 4, "head"),
    "timm_deit_distilled": Facts(stack("blocks.{}", 2, (3, 3, 64), *TIMM), 4, "head head_dist"),
    "timm_eva": Facts(stack("blocks.{}", 2, (3, 3, 64), TIMM[0], "mlp.fc1 mlp.fc1 mlp.fc2"), 4, "head"),
    "timm_beit": Facts(stack("blocks.{}", 2, H, *TIMM), 4, "head"),
    "timm_swin": Facts(
        [*stack("layers.0.blocks.{}", 2, (2, 2, 8), *TIMM), *stack("layers.1.blocks.{}", 2, (4, 4, 8), *TIMM)],
        8, "head.fc", unplaced="layers.1.downsample.reduction", note="patch merging",
    ),
    "timm_swinv2": Facts(
        [*stack("layers.0.blocks.{}", 2, (2, 2, 8), *TIMM), *stack("layers.1.blocks.{}", 2, (4, 4, 8), *TIMM)],
        8, "head.fc", unplaced="layers.1.downsample.reduction layers.*.attn.cpb_mlp.*",
        note="patch merging; the MLP that makes position biases",
    ),
    "timm_xcit": Facts(
        [
            *stack("blocks.{}", 2, H, *TIMM),
            *stack("cls_attn_blocks.{}", 2, H, "attn.q attn.k attn.v attn.proj", "mlp.fc1 - mlp.fc2"),
        ],
        10, "head",
    ),
    "timm_cait": Facts(
        [
            *stack("blocks.{}", 2, H, *TIMM),
            *stack("blocks_token_only.{}", 2, H, "attn.q attn.k attn.v attn.proj", "mlp.fc1 - mlp.fc2"),
        ],
        8, "head", unplaced="blocks.*.attn.proj_[lw]", note="talking heads",
    ),
    "timm_pit": Facts(
        [
            *stack("transformers.0.blocks.{}", 2, (2, 2, 32), *TIMM),
            *stack("transformers.1.blocks.{}", 6, (4, 4, 32), *TIMM),
            *stack("transformers.2.blocks.{}", 4, (8, 8, 32), *TIMM),
        ],
        24, "head", unplaced="transformers.*.pool.fc", note="the class token's layer between stages",
    ),
    "timm_twins": Facts([
        Expected(f"blocks.{stage}.{i}", (heads, heads, dim // heads), *(TIMM if i == 0 else SEPARATE_KV))
        for stage, (dim, heads) in enumerate(((16, 2), (32, 4), (32, 8), (64, 16))) for i in range(2)
    ], 20, "head"),
    "timm_tnt": Facts(
        stack(
            "blocks.{}", 2, (6, 6, 8),
            "attn_in.qk+attn_out.qk attn_in.qk+attn_out.qk attn_in.v+attn_out.v attn_in.proj+attn_out.proj",
            "mlp_in.fc1+mlp.fc1 - mlp_in.fc2+mlp.fc2",
        ),
        8, "head", unplaced="blocks.*.proj", note="from pixels to patches, within a block; its join",
    ),
    "timm_convit": Facts(
        stack("blocks.{}", 3, (4, 4, 48), "attn.qk attn.qk attn.v attn.proj", "mlp.fc1 - mlp.fc2"), 6, "head",
        unplaced="blocks.*.attn.pos_proj", note="projection of positions",
    ),
    "timm_levit": Facts(
        [
            *stack("stages.0.blocks.{}", 2, (4, 4, 16), *_TIMM_LEVIT),
            Expected("stages.1.downsample", (8, 8, 16), *_TIMM_LEVIT_REDUCED),
            *stack("stages.1.blocks.{}", 3, (6, 6, 16), *_TIMM_LEVIT),
            Expected("stages.2.downsample", (16, 16, 16), *_TIMM_LEVIT_REDUCED),
            *stack("stages.2.blocks.{}", 4, (8, 8, 16), *_TIMM_LEVIT),
        ],
        20, "head.linear head_dist.linear",
    ),
    "timm_mobilevit": Facts(
        [
            *stack("stages.2.1.transformer.{}", 2, (4, 4, 16), *TIMM),
            *stack("stages.3.1.transformer.{}", 4, (4, 4, 20), *TIMM),
            *stack("stages.4.1.transformer.{}", 3, (4, 4, 24), *TIMM),
        ],
        21, "head.fc",
    ),
    "timm_mobilevitv2": Facts(
        [
            *stack("stages.2.1.transformer.{}", 2, (1, 1, 64), fused("attn.qkv_proj", "attn.out_proj"), TIMM[1]),
            *stack("stages.3.1.transformer.{}", 4, (1, 1, 96), fused("attn.qkv_proj", "attn.out_proj"), TIMM[1]),
            *stack("stages.4.1.transformer.{}", 3, (1, 1, 128), fused("attn.qkv_proj", "attn.out_proj"), TIMM[1]),
        ],
        19, "head.fc",
    ),
    "timm_efficientformer": Facts(
        [
            *(block for stage, depth in enumerate((3, 2, 6)) for block in stack(
                f"stages.{stage}.blocks.{{}}", depth, None, NONE, TIMM[1])),
            *stack("stages.3.blocks.{}", 3, None, NONE, TIMM[1]),
            Expected("stages.3.blocks.4", (8, 8, 32), fused("token_mixer.qkv", "token_mixer.proj"), TIMM[1]),
        ],
        16, "head head_dist", note="joins around the poolings, which have no weights",
    ),
    "timm_efficientformerv2": Facts(
        [
            *stack("stages.0.blocks.{}", 2, None, NONE, _FORMER2),
            *stack("stages.1.blocks.{}", 2, None, NONE, _FORMER2),
            *stack("stages.2.blocks.{}", 4, None, NONE, _FORMER2),
            *(Expected(f"stages.2.blocks.{i}", (8, 8, 32), _FORMER2_ATTENTION, _FORMER2) for i in (4, 5)),
            Expected("stages.3.downsample.attn", (8, 8, 16), "q.proj.conv k.conv v.conv proj.conv", NO_MLP),
            *stack("stages.3.blocks.{}", 2, None, NONE, _FORMER2),
            *(Expected(f"stages.3.blocks.{i}", (8, 8, 32), _FORMER2_ATTENTION, _FORMER2) for i in (2, 3)),
        ],
        19, "head head_dist", note="a pooled and a filtered query are added: counted as a join",
    ),
    "timm_crossvit": Facts(
        [
            block
            for stage in range(3)
            for block in (
                Expected(f"blocks.{stage}.blocks.0.0", (3, 3, 32), *TIMM),
                *stack(f"blocks.{stage}.blocks.1.{{}}", 4, (3, 3, 64), *TIMM),
                Expected(f"blocks.{stage}.fusion.0", (3, 3, 64), "attn.wq attn.wk attn.wv attn.proj", NO_MLP),
                Expected(f"blocks.{stage}.fusion.1", (3, 3, 32), "attn.wq attn.wk attn.wv attn.proj", NO_MLP),
            )
        ],
        36, "head.0 head.1", unplaced="blocks.*.projs.*.2 blocks.*.revert_projs.*.2",
        note="projections between the two branches",
    ),
    "timm_efficientvit_mit": Facts(
        [
            Expected(f"stages.{stage}.blocks.{i}", (heads, heads, 16), fused(
                "context_module.main.qkv.conv", "context_module.main.proj.conv"),
                "local_module.main.inverted_conv.conv - local_module.main.point_conv.conv")
            for stage, heads in ((2, 8), (3, 16)) for i in (1, 2)
        ],
        11, "head.classifier.0 head.classifier.4",
        note="multi-scale filters are convolutions of the block",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def found() -> dict[str, Anatomy]:
    return {}


def anatomy_of(name: str) -> tuple[Anatomy, object]:
    if name.startswith("timm_"):
        pytest.importorskip("timm", reason="timm is not installed")
    else:
        pytest.importorskip("transformers", reason="transformers is not installed")
    model, signature, example = build(name)
    return find(model, signature, example), model


_MOBILEVIT2 = "mobilevitv2.encoder.layer"
BRIDGES: dict[str, list[str]] = {
    **{name: [] for name in ("bert", "squeezebert", "gpt2", "vit", "swin", "convnextv2", "timm_vit", "timm_deit_distilled")},
    # The layers that Q-HyViT lists by their numbers: conv_1x1 and the first qkv of each MobileViT block; and the ways back.
    "timm_mobilevit": [
        pair
        for stage, last in ((2, 1), (3, 3), (4, 2))
        for pair in (
            f"into tokens: stages.{stage}.1.conv_1x1 > stages.{stage}.1.transformer.0.attn.qkv",
            f"into features: stages.{stage}.1.transformer.{last}.mlp.fc2 > stages.{stage}.1.conv_proj.conv",
        )
    ],
    # Here tokens are [batch, channels, pixels of a patch, patches], and all layers are convolutions.
    "mobilevitv2": [
        pair
        for layer, last in ((f"{_MOBILEVIT2}.2", 0), (f"{_MOBILEVIT2}.3", 1), (f"{_MOBILEVIT2}.4", 0))
        for pair in (
            f"into tokens: {layer}.conv_1x1.convolution > {layer}.transformer.layer.0.attention.qkv_proj.convolution",
            f"into features: {layer}.transformer.layer.{last}.ffn.conv2.convolution > {layer}.conv_projection.convolution",
        )
    ],
    "timm_efficientformer": ["into tokens: stages.3.blocks.2.mlp.fc2 > stages.3.blocks.4.token_mixer.qkv"],
    "timm_efficientformerv2": [
        "through attention: " + " ".join(f"{mixer}.{name}.conv" for name in "qkv") + f" > {mixer}.proj.conv"
        for mixer in (f"stages.{stage}.blocks.{block}.token_mixer" for stage, block in ((2, 4), (2, 5), (3, 2), (3, 3)))
    ],
    "levit": [
        "into tokens: levit.patch_embeddings.embedding_layer_4.convolution > "
        "levit.encoder.stages.0.layers.0.module.queries_keys_values.linear"
    ],
}
"""Where features of convolutions become tokens of an attention, and back, written down from the sources."""


def relative(block: Block, roles: tuple[str, ...]) -> str:
    cut = len(block.path) + 1
    return " ".join("+".join(path[cut:] for path in block.roles.get(role, [])) or "-" for role in roles)


@pytest.mark.parametrize(
    "name",
    swept(
        FACTS,
        {
            "bert", "albert", "deberta_v2", "modernbert", "squeezebert", "t5_encoder", "torch_encoder", "gpt2", "llama", "gemma2",
            "mixtral", "bart", "gpt_neox", "vit", "dinov2_swiglu", "swin", "segformer", "convnextv2",
            "timm_vit", "timm_deit_distilled", "timm_mobilevit",
        },
    ),
)  # fmt: skip
def test_facts(name: str) -> None:
    anatomy, model = anatomy_of(name)
    facts = FACTS[name]
    assert [block.path for block in anatomy.blocks] == [expected.path for expected in facts.blocks]
    for block, expected in zip(anatomy.blocks, facts.blocks, strict=True):
        heads = (block.heads, block.kv_heads, block.head_dim)
        assert heads == (expected.heads or (None, None, None)), block.path
        assert relative(block, ATTENTION) == expected.attention, block.path
        assert relative(block, MLP) == expected.mlp, block.path
    assert anatomy.joins == facts.joins
    assert anatomy.roles.get("head", []) == facts.head.split()
    bridges = [f"{one.crossing}: {' '.join(one.before)} > {' '.join(one.after)}" for one in anatomy.bridges]
    assert bridges == BRIDGES.get(name, bridges)
    unplaced = set(anatomy.unplaced)
    for pattern in facts.unplaced.split():
        matched = set(fnmatch.filter(anatomy.unplaced, pattern))
        assert matched, f"{pattern} was placed"
        unplaced -= matched
    assert not unplaced
    laws(anatomy, model)


def laws(anatomy: Anatomy, model: object) -> None:
    """What holds for every anatomy."""
    paths = [site.path for site in anatomy.sites]
    assert len(paths) == len(set(paths))
    modules, parameters = dict(model.named_modules(remove_duplicate=False)), model.state_dict()
    for site in anatomy.sites:
        assert site.path in (modules if site.kind != "other" or site.path in modules else parameters), site.path
        assert site.block is None or site in anatomy.blocks[site.block].sites
    assert anatomy.totals["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    state = {id(t): t.numel() * t.element_size() for t in model.state_dict(keep_vars=True).values()}
    assert anatomy.totals["bytes"] == sum(state.values())
    for block in anatomy.blocks:
        assert block.path in modules
        if block.container is not None:
            assert list(modules[block.container].children())[block.position] is modules[block.path]


def table() -> str:
    lines = [
        "# Architectures whose anatomy is tested", "",
        "Written by `python tests/compress/test_anatomy_families.py` from the facts there; a test keeps it true.", "",
        "| family | blocks | attention | MLP | left without a role or not seen |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for name, facts in FACTS.items():
        attention = sum(block.attention != NONE for block in facts.blocks)
        mlp = sum(block.mlp != NO_MLP for block in facts.blocks)
        lines.append(f"| {name} | {len(facts.blocks)} | {attention} | {mlp} | {facts.note or 'nothing'} |")
    return "\n".join(lines) + "\n"


def test_table_is_current() -> None:
    assert TABLE.read_text() == table(), "run: python tests/compress/test_anatomy_families.py"


if __name__ == "__main__":
    TABLE.write_text(table())
