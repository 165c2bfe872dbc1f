"""Small random transformers of many families, to try the toolkit on: ``build(name) -> (model, Signature, example batch)``.

Weights are drawn from N(0, 1 / fan_in), so that activations and outputs are of the order of one: with the tiny default
initialisation of many libraries a comparison of outputs would pass whatever the output is.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from calibrate.signature import Batch, Output, Signature, TensorSpec

Built = tuple[nn.Module, Signature, Batch]

ROWS, TOKENS, VOCABULARY = 4, 16, 97
_torchvision: Any = None


def build(name: str) -> Built:
    """The family's model in eval mode, what it takes and gives, and four rows (text with ragged padding).

    Raises:
        KeyError: no such family.
        ImportError: the library that defines it (transformers, timm) is not installed.
    """
    _let_libraries_import()
    torch.manual_seed(0)
    model, signature, example = FAMILIES[name]()
    randomize(model)
    return model.eval(), signature, example


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Weights ~ N(0, 1 / fan_in), biases ~ N(0, 0.01), norm weights and running variances in [0.8, 1.2]; in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point():
                continue
            if parameter.ndim == 1 and name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            elif parameter.ndim <= 1:
                parameter.copy_(0.8 + 0.4 * torch.rand(parameter.shape, generator=generator))
            else:
                fan_in = parameter[0].numel() if parameter.ndim != 2 or parameter.shape[0] != VOCABULARY else 1
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.copy_(0.8 + 0.4 * torch.rand(buffer.shape, generator=generator))


def _let_libraries_import() -> None:
    """A torchvision built for another torch cannot register its operators, and timm and transformers fail with it."""
    global _torchvision
    if _torchvision is not None or "torchvision" in sys.modules:
        return
    try:
        _torchvision = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            _torchvision.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    except RuntimeError:
        _torchvision = True


def _text(output: Output, tokens: int = TOKENS, mask: bool = True) -> tuple[Signature, Batch]:
    generator = torch.Generator().manual_seed(1)
    lengths = [tokens, tokens - 3, tokens // 2, tokens - 6]
    attention = torch.stack([(torch.arange(tokens) < length).long() for length in lengths])
    ids = torch.randint(5, VOCABULARY - 1, (ROWS, tokens), generator=generator) * attention
    specs = [TensorSpec("input_ids", torch.int64, ("batch", "tokens"))]
    batch: Batch = {"input_ids": ids}
    if mask:
        specs.append(TensorSpec("attention_mask", torch.int64, ("batch", "tokens")))
        batch["attention_mask"] = attention
    return Signature(tuple(specs), output), batch


def _image(size: int, output: Output, name: str = "pixel_values", channels: int = 3) -> tuple[Signature, Batch]:
    pixels: Tensor = torch.randn(ROWS, channels, size, size, generator=torch.Generator().manual_seed(1))
    return Signature((TensorSpec(name, torch.float32, ("batch", channels, size, size)),), output), {name: pixels}


def _hf(class_name: str, config_name: str, text: bool, output: Output, size: int = 32, **options: Any) -> Built:
    """A model of transformers; ``options`` are its configuration. Attention is ``sdpa`` unless told."""
    import transformers

    attention = options.pop("attention", None)
    constants = options.pop("constants", {})
    config = getattr(transformers, config_name)(**options)
    if attention:
        config._attn_implementation = attention
    model = getattr(transformers, class_name)(config)
    signature, batch = _text(output) if text else _image(size, output)
    return model, Signature(signature.inputs, output, constants=constants), batch


def _timm(name: str, size: int = 224, **options: Any) -> Built:
    import timm

    model = timm.create_model(name, pretrained=False, **options)
    return model, *_image(size, "tensor", "x")


_BERT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64, "max_position_embeddings": 64,
}  # fmt: skip
_CAUSAL = {**_BERT, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "constants": {"use_cache": False}}
_VIT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip

_bert = functools.partial(_hf, text=True, output="logits", **_BERT)
_causal = functools.partial(_hf, text=True, output="logits", **_CAUSAL)
_vit = functools.partial(_hf, text=False, output="logits", **_VIT)

FAMILIES: dict[str, Callable[[], Built]] = {
    # text encoders
    "bert": lambda: _bert("BertForSequenceClassification", "BertConfig"),
    "bert_eager": lambda: _bert("BertForSequenceClassification", "BertConfig", attention="eager"),
    "bert_mlm": lambda: _bert("BertForMaskedLM", "BertConfig"),
    "sentence_bert": lambda: _hf("BertModel", "BertConfig", True, "mean_pooling", **_BERT),
    "roberta": lambda: _bert("RobertaForSequenceClassification", "RobertaConfig", pad_token_id=0),
    "distilbert": lambda: _hf(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        True,
        "logits",
        vocab_size=VOCABULARY,
        dim=32,
        n_layers=2,
        n_heads=4,
        hidden_dim=64,
        max_position_embeddings=64,
    ),
    "albert": lambda: _bert("AlbertForSequenceClassification", "AlbertConfig", embedding_size=16),
    "electra": lambda: _bert("ElectraForSequenceClassification", "ElectraConfig", embedding_size=16),
    "deberta_v2": lambda: _bert(
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        relative_attention=True,
        position_buckets=8,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
    ),
    "deberta": lambda: _bert(
        "DebertaForSequenceClassification",
        "DebertaConfig",
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
    ),
    "mpnet": lambda: _bert("MPNetForSequenceClassification", "MPNetConfig", pad_token_id=0),
    "modernbert": lambda: _bert(
        "ModernBertForSequenceClassification",
        "ModernBertConfig",
        pad_token_id=0,
        local_attention=8,
        global_attn_every_n_layers=2,
        cls_token_id=1,
        sep_token_id=2,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "xlm_roberta": lambda: _bert("XLMRobertaForSequenceClassification", "XLMRobertaConfig", pad_token_id=0),
    "camembert": lambda: _bert("CamembertForSequenceClassification", "CamembertConfig", pad_token_id=0),
    "layoutlm": lambda: _bert("LayoutLMForSequenceClassification", "LayoutLMConfig"),
    "mobilebert": lambda: _bert(
        "MobileBertForSequenceClassification",
        "MobileBertConfig",
        embedding_size=16,
        intra_bottleneck_size=16,
        num_feedforward_networks=2,
    ),
    "squeezebert": lambda: _bert(
        "SqueezeBertForSequenceClassification",
        "SqueezeBertConfig",
        q_groups=2,
        k_groups=2,
        v_groups=2,
        post_attention_groups=1,
        intermediate_groups=2,
        output_groups=2,
        embedding_size=32,
    ),
    "funnel": lambda: _hf(
        "FunnelForSequenceClassification",
        "FunnelConfig",
        True,
        "logits",
        vocab_size=VOCABULARY,
        block_sizes=[1, 1],
        d_model=32,
        n_head=4,
        d_head=8,
        d_inner=64,
        num_decoder_layers=1,
    ),
    "fnet": lambda: _hf(
        "FNetForSequenceClassification",
        "FNetConfig",
        True,
        "logits",
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=64,
        max_position_embeddings=64,
    ),
    "convbert": lambda: _bert("ConvBertForSequenceClassification", "ConvBertConfig", embedding_size=16),
    "esm": lambda: _bert(
        "EsmForSequenceClassification",
        "EsmConfig",
        pad_token_id=0,
        position_embedding_type="rotary",
        mask_token_id=4,
    ),
    "t5_encoder": lambda: _hf(
        "T5EncoderModel",
        "T5Config",
        True,
        "last_hidden_state",
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
    ),
    "mt5_encoder": lambda: _hf(
        "MT5EncoderModel",
        "MT5Config",
        True,
        "last_hidden_state",
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
    ),
    "clip_text": lambda: _hf(
        "CLIPTextModelWithProjection",
        "CLIPTextConfig",
        True,
        "tensor",
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        projection_dim=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "torch_encoder": lambda: _torch_encoder(),
    # causal language models
    "gpt2": lambda: _hf(
        "GPT2LMHeadModel",
        "GPT2Config",
        True,
        "logits",
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
        constants={"use_cache": False},
    ),
    "gpt2_eager": lambda: _hf(
        "GPT2LMHeadModel",
        "GPT2Config",
        True,
        "logits",
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
        constants={"use_cache": False},
        attention="eager",
    ),
    "opt": lambda: _causal("OPTForCausalLM", "OPTConfig", ffn_dim=64, word_embed_proj_dim=32),
    "llama": lambda: _causal("LlamaForCausalLM", "LlamaConfig", num_key_value_heads=2),
    "llama_eager": lambda: _causal("LlamaForCausalLM", "LlamaConfig", num_key_value_heads=2, attention="eager"),
    "qwen2": lambda: _causal("Qwen2ForCausalLM", "Qwen2Config", num_key_value_heads=2),
    "qwen3": lambda: _causal("Qwen3ForCausalLM", "Qwen3Config", num_key_value_heads=2, head_dim=16),
    "mistral": lambda: _causal("MistralForCausalLM", "MistralConfig", num_key_value_heads=2, sliding_window=8),
    "gemma": lambda: _causal("GemmaForCausalLM", "GemmaConfig", num_key_value_heads=1, head_dim=8),
    "gemma2": lambda: _causal("Gemma2ForCausalLM", "Gemma2Config", num_key_value_heads=2, head_dim=8, sliding_window=8),
    "phi": lambda: _causal("PhiForCausalLM", "PhiConfig"),
    "phi3": lambda: _causal("Phi3ForCausalLM", "Phi3Config", num_key_value_heads=2),
    "cohere": lambda: _causal("CohereForCausalLM", "CohereConfig", num_key_value_heads=2),
    "mixtral": lambda: _causal("MixtralForCausalLM", "MixtralConfig", num_key_value_heads=2, num_local_experts=2),
    "bart": lambda: _hf(
        "BartModel",
        "BartConfig",
        True,
        "last_hidden_state",
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        constants={"use_cache": False},
    ),
    "xlnet": lambda: _hf(
        "XLNetForSequenceClassification",
        "XLNetConfig",
        True,
        "logits",
        vocab_size=VOCABULARY,
        d_model=32,
        n_layer=2,
        n_head=4,
        d_inner=64,
    ),
    "gpt_neox": lambda: _causal("GPTNeoXForCausalLM", "GPTNeoXConfig"),
    "gpt_neo": lambda: _hf(
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        True,
        "logits",
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=64,
        window_size=8,
        constants={"use_cache": False},
    ),
    "gptj": lambda: _hf(
        "GPTJForCausalLM",
        "GPTJConfig",
        True,
        "logits",
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        rotary_dim=4,
        constants={"use_cache": False},
    ),
    "bloom": lambda: _hf(
        "BloomForCausalLM",
        "BloomConfig",
        True,
        "logits",
        vocab_size=VOCABULARY,
        hidden_size=32,
        n_layer=2,
        n_head=4,
        constants={"use_cache": False},
    ),
    "falcon": lambda: _hf(
        "FalconForCausalLM",
        "FalconConfig",
        True,
        "logits",
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        multi_query=True,
        new_decoder_architecture=False,
        constants={"use_cache": False},
    ),
    "olmo2": lambda: _causal("Olmo2ForCausalLM", "Olmo2Config", num_key_value_heads=2),
    # vision
    "vit": lambda: _vit("ViTForImageClassification", "ViTConfig"),
    "vit_eager": lambda: _vit("ViTForImageClassification", "ViTConfig", attention="eager"),
    "deit": lambda: _vit("DeiTForImageClassificationWithTeacher", "DeiTConfig"),
    "beit": lambda: _vit(
        "BeitForImageClassification",
        "BeitConfig",
        use_relative_position_bias=True,
        layer_scale_init_value=0.1,
    ),
    "dinov2": lambda: _vit("Dinov2ForImageClassification", "Dinov2Config", mlp_ratio=2),
    "dinov2_swiglu": lambda: _vit("Dinov2ForImageClassification", "Dinov2Config", mlp_ratio=2, use_swiglu_ffn=True),
    "vit_mae": lambda: _hf("ViTMAEModel", "ViTMAEConfig", False, "last_hidden_state", mask_ratio=0.0, **_VIT),
    "vit_msn": lambda: _vit("ViTMSNForImageClassification", "ViTMSNConfig"),
    "clip_vision": lambda: _hf(
        "CLIPVisionModelWithProjection",
        "CLIPVisionConfig",
        False,
        "tensor",
        projection_dim=16,
        **_VIT,
    ),
    "siglip_vision": lambda: _hf("SiglipVisionModel", "SiglipVisionConfig", False, "pooler_output", **_VIT),
    "swin": lambda: _hf(
        "SwinForImageClassification",
        "SwinConfig",
        False,
        "logits",
        image_size=32,
        patch_size=2,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
        mlp_ratio=2.0,
    ),
    "swinv2": lambda: _hf(
        "Swinv2ForImageClassification",
        "Swinv2Config",
        False,
        "logits",
        image_size=32,
        patch_size=2,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
        mlp_ratio=2.0,
    ),
    "pvt_v2": lambda: _hf(
        "PvtV2ForImageClassification",
        "PvtV2Config",
        False,
        "logits",
        size=64,
        image_size=64,
        hidden_sizes=[16, 32, 32, 64],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 2, 4],
        mlp_ratios=[2, 2, 2, 2],
    ),
    "pvt": lambda: _hf(
        "PvtForImageClassification",
        "PvtConfig",
        False,
        "logits",
        size=64,
        image_size=64,
        hidden_sizes=[16, 32, 32, 64],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 2, 4],
        mlp_ratios=[2, 2, 2, 2],
    ),
    "segformer": lambda: _hf(
        "SegformerForImageClassification",
        "SegformerConfig",
        False,
        "logits",
        size=64,
        hidden_sizes=[16, 32, 32, 64],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 2, 4],
        mlp_ratios=[2, 2, 2, 2],
    ),
    "segformer_semantic": lambda: _hf(
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        False,
        "logits",
        size=64,
        decoder_hidden_size=16,
        hidden_sizes=[16, 32, 32, 64],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 2, 4],
        mlp_ratios=[2, 2, 2, 2],
    ),
    "levit": lambda: _hf(
        "LevitForImageClassificationWithTeacher",
        "LevitConfig",
        False,
        "logits",
        size=64,
        image_size=64,
        hidden_sizes=[32, 48, 64],
        num_attention_heads=[2, 3, 4],
        depths=[2, 2, 2],
        key_dim=[8, 8, 8],
    ),
    "mobilevit": lambda: _hf(
        "MobileViTForImageClassification",
        "MobileViTConfig",
        False,
        "logits",
        size=64,
        image_size=64,
        hidden_sizes=[24, 32, 40],
        neck_hidden_sizes=[8, 8, 16, 16, 24, 32, 64],
        num_attention_heads=4,
    ),
    "mobilevitv2": lambda: _hf(
        "MobileViTV2ForImageClassification",
        "MobileViTV2Config",
        False,
        "logits",
        size=64,
        image_size=64,
        n_attn_blocks=[1, 2, 1],
        base_attn_unit_dims=[16, 16, 16],
        width_multiplier=0.25,
    ),
    "poolformer": lambda: _hf(
        "PoolFormerForImageClassification",
        "PoolFormerConfig",
        False,
        "logits",
        size=64,
        hidden_sizes=[16, 16, 32, 32],
        depths=[1, 1, 1, 1],
        mlp_ratio=2.0,
    ),
    "convnextv2": lambda: _hf(
        "ConvNextV2ForImageClassification",
        "ConvNextV2Config",
        False,
        "logits",
        size=64,
        hidden_sizes=[8, 16, 16, 32],
        depths=[1, 1, 1, 1],
    ),
    "cvt": lambda: _hf(
        "CvtForImageClassification",
        "CvtConfig",
        False,
        "logits",
        size=64,
        embed_dim=[16, 32, 64],
        num_heads=[1, 2, 4],
        depth=[1, 2, 3],
    ),
    "hiera": lambda: _hf(
        "HieraForImageClassification",
        "HieraConfig",
        False,
        "logits",
        size=64,
        image_size=[64, 64],
        embed_dim=16,
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 4, 8],
    ),
    "detr_like": lambda: _cross_attention(),
    # timm
    "timm_vit": lambda: _timm("vit_tiny_patch16_224", 32, img_size=32, depth=2, num_classes=10),
    "timm_vit_qknorm": lambda: _timm(
        "vit_tiny_patch16_224", 32, img_size=32, depth=2, num_classes=10, qk_norm=True, init_values=0.1
    ),
    "timm_deit_distilled": lambda: _timm("deit_tiny_distilled_patch16_224", 32, img_size=32, depth=2, num_classes=10),
    "timm_eva": lambda: _timm("eva02_tiny_patch14_224", 28, img_size=28, depth=2, num_classes=10),
    "timm_beit": lambda: _timm("beit_base_patch16_224", 32, img_size=32, depth=2, embed_dim=32, num_heads=4, num_classes=10),
    "timm_swin": lambda: _timm(
        "swin_tiny_patch4_window7_224", 56, img_size=56, embed_dim=16, depths=(2, 2), num_heads=(2, 4), num_classes=10
    ),
    "timm_swinv2": lambda: _timm(
        "swinv2_tiny_window8_256", 64, img_size=64, embed_dim=16, depths=(2, 2), num_heads=(2, 4), num_classes=10
    ),
    "timm_levit": lambda: _timm("levit_128s", 224, num_classes=10),
    "timm_levit_conv": lambda: _timm("levit_conv_128s", 224, num_classes=10),
    "timm_xcit": lambda: _timm("xcit_nano_12_p16_224", 32, img_size=32, depth=2, embed_dim=32, num_heads=4, num_classes=10),
    "timm_cait": lambda: _timm("cait_xxs24_224", 32, img_size=32, depth=2, embed_dim=32, num_heads=4, num_classes=10),
    "timm_mobilevit": lambda: _timm("mobilevit_xxs", 64, num_classes=10),
    "timm_mobilevitv2": lambda: _timm("mobilevitv2_050", 64, num_classes=10),
    "timm_efficientformer": lambda: _timm("efficientformer_l1", 224, num_classes=10),
    "timm_efficientformerv2": lambda: _timm("efficientformerv2_s0", 224, num_classes=10),
    "timm_efficientvit_mit": lambda: _timm("efficientvit_b0", 64, num_classes=10),
    "timm_efficientvit_msra": lambda: _timm("efficientvit_m0", 224, num_classes=10),
    "timm_pit": lambda: _timm("pit_ti_224", 224, num_classes=10),
    "timm_twins": lambda: _timm(
        "twins_svt_small", 64, img_size=64, embed_dims=[16, 32, 32, 64], depths=[2, 2, 2, 2], num_classes=10
    ),
    "timm_twins_pcpvt": lambda: _timm(
        "twins_pcpvt_small", 64, img_size=64, embed_dims=[16, 32, 80, 64], depths=[1, 1, 1, 1], num_classes=10
    ),
    "timm_tnt": lambda: _timm("tnt_s_patch16_224", 32, img_size=32, depth=2, embed_dim=48, num_classes=10),
    "timm_crossvit": lambda: _timm("crossvit_tiny_240", 240, num_classes=10),
    "timm_fastvit": lambda: _timm("fastvit_sa12", 64, num_classes=10),
    "timm_coat": lambda: _timm("coat_lite_tiny", 64, img_size=64, num_classes=10),
    "timm_maxvit": lambda: _timm("test_maxvit", 128, img_size=128, num_classes=10),
    "timm_mvitv2": lambda: _timm("mvitv2_tiny", 64, img_size=64, num_classes=10),
    "timm_edgenext": lambda: _timm("edgenext_xx_small", 64, num_classes=10),
    "timm_pvt_v2": lambda: _timm("pvt_v2_b0", 64, num_classes=10),
    "timm_nextvit": lambda: _timm("nextvit_small", 64, num_classes=10),
    "timm_visformer": lambda: _timm("visformer_tiny", 64, img_size=64, num_classes=10),
    "timm_volo": lambda: _timm("volo_d1_224", 64, img_size=64, num_classes=10),
    "timm_convit": lambda: _timm("convit_tiny", 32, img_size=32, depth=3, num_classes=10),
    "timm_gcvit": lambda: _timm("gcvit_xxtiny", 224, num_classes=10),
}


def _torch_encoder() -> Built:
    """PyTorch's own encoder: the three input projections are one parameter that no module owns."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(VOCABULARY, 32)
            layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.classifier = nn.Linear(32, 3)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.classifier(self.encoder(self.table(input_ids)).mean(1))

    return Encoder(), *_text("tensor", mask=False)


def _cross_attention() -> Built:
    """An encoder's states read by learned queries: a block with self-attention, cross-attention and an MLP."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_q, self.to_kv, self.proj = nn.Linear(32, 32), nn.Linear(32, 64), nn.Linear(32, 32)

        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            q = self.to_q(x).unflatten(-1, (4, 8)).transpose(1, 2)
            k, v = self.to_kv(memory).unflatten(-1, (2, 4, 8)).permute(2, 0, 3, 1, 4)
            return self.proj((torch.einsum("bhid,bhjd->bhij", q, k) / 8**0.5).softmax(-1).matmul(v).transpose(1, 2).flatten(2))

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self_attention, self.cross_attention = Attention(), Attention()
            self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(3))
            self.fc1, self.fc2 = nn.Linear(32, 64), nn.Linear(64, 32)

        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            normed = self.norms[0](x)
            x = x + self.self_attention(normed, normed)
            x = x + self.cross_attention(self.norms[1](x), memory)
            return x + self.fc2(self.fc1(self.norms[2](x)).relu())

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.positions = nn.Embedding(VOCABULARY, 32), nn.Embedding(TOKENS, 32)
            self.layers = nn.ModuleList(Layer() for _ in range(2))
            self.head = nn.Linear(32, 3)

        def forward(self, input_ids: Tensor) -> Tensor:
            memory = self.table(input_ids)
            x = memory[:, :4] + self.positions(torch.arange(4))
            for layer in self.layers:
                x = layer(x, memory)
            return self.head(x.mean(1))

    return Reader(), *_text("tensor", mask=False)
